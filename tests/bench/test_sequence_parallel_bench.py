"""The sequence-parallel benchmark: right before it is timed, balanced, and its model by hand."""

import csv
from pathlib import Path

import pytest
import torch

from bench.sequence_parallel import __main__ as bench
from bench.sequence_parallel.cost import Heads, Links, exchange_ms, traffic_of
from bench.sequence_parallel.emulation import make_pack, rank_works
from bench.sequence_parallel.mixes import packed_mixes
from lwz_kernels.sequence_parallel import make_layout


def test_main_writes_measured_and_model_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    bench.main(["--preset", "cpu", "--mixes", "half", "--csv", str(path)])
    rows = list(csv.DictReader(path.open()))
    kinds = [row["kind"] for row in rows]
    assert set(kinds) == {"measured", "model"}
    measured = [row for row in rows if row["kind"] == "measured"]
    # Ulysses once, gather_kv and ring once a rank; P = 4 exceeds J = 2, which Ulysses allows.
    assert len(measured) == (1 + 2 + 2) + (1 + 4 + 4)
    assert all(float(row["forward_ms"]) > 0 < float(row["relayout_ms"]) for row in measured)
    model = [row for row in rows if row["kind"] == "model"]
    assert len(model) == 3 * 6
    assert all(row["speedup"] and not row["forward_ms"] for row in model)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["ulysses", "gather_kv", "ring", "two_d"])
def test_the_work_that_is_run_is_balanced_on_packed_mixes(scheme: str, ranks: int) -> None:
    """At most 5% more than the mean on the busiest rank, of what its segments make it compute."""
    for mix, lengths in packed_mixes(16384).items():
        ulysses_ranks = 2 if scheme == "two_d" else None
        layout = make_layout(lengths, ranks, scheme, ulysses_ranks=ulysses_ranks)
        pack = make_pack(layout, Heads(8, 2, 1), torch.float32, torch.device("cpu"))
        pairs = [work.pairs for work in rank_works(layout, pack)]
        assert max(pairs) * len(pairs) / sum(pairs) <= 1.05, mix


def test_a_wrong_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout([40, 24], 2, "gather_kv")
    pack = make_pack(layout, Heads(4, 2, 8), torch.float32, torch.device("cpu"))
    works = rank_works(layout, pack)
    bench._check(works, pack)
    pack.v[3] += 1.0  # of the whole pack; the ranks' copies stay as they were
    with pytest.raises(SystemExit, match="is wrong: relative error"):
        bench._check(works, pack)


def test_traffic_is_the_formula_of_the_documentation() -> None:
    heads, size = Heads(32, 8, 128), 2
    tokens = 64 * 1024
    n = tokens // 8
    ulysses = traffic_of(make_layout([tokens], 8), heads, size)
    assert ulysses.heads_forward == ulysses.heads_backward == 7 / 8 * n * 128 * 2 * (64 + 16)
    assert ulysses.kv_forward == ulysses.kv_backward == 0
    gather = traffic_of(make_layout([tokens], 8, "gather_kv"), heads, size)
    assert gather.heads_forward == 0
    assert gather.kv_forward == 7 * n * 2 * 8 * 128 * 2
    assert gather.kv_backward == 7 * n * 2 * 8 * 128 * (2 + 4)
    ring = traffic_of(make_layout([tokens], 8, "ring"), heads, size)
    assert ring.kv_backward == n * 2 * 8 * 128 * (7 * 2 + 8 * 4)
    two_d = traffic_of(make_layout([tokens], 8, "two_d", ulysses_ranks=4), heads, size)
    assert two_d.heads_forward == 3 / 4 * n * 128 * 2 * (64 + 16)
    assert two_d.kv_forward == 1 * (4 * n) * 2 * 2 * 128 * 2


def test_exchange_takes_the_network_where_ranks_span_nodes() -> None:
    links = Links(node_gb_per_s=100.0, network_gb_per_s=10.0, ranks_per_node=8)
    heads = Heads(32, 32, 128)
    near = make_layout([65536], 8)
    traffic = traffic_of(near, heads, 2)
    forward, backward = exchange_ms(near, traffic, links)
    assert forward == backward == pytest.approx(traffic.heads_forward / 100e6)
    assert exchange_ms(near, traffic, links, speed=2.0)[0] == pytest.approx(forward / 2)
    far = make_layout([65536], 16)
    traffic = traffic_of(far, heads, 2)
    assert exchange_ms(far, traffic, links)[0] == pytest.approx(
        traffic.heads_forward * (8 / 15) / 10e6
    )
