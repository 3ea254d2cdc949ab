"""The attention benchmark runs on a CPU, and who is wrong gets no time."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from bench import attention as bench
from lwz_kernels.attention import SegmentTable


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FLUSH_BYTES", 2**10)
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)


def test_bench_writes_a_row_for_each_provider_and_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "attention.csv"
    arguments = ["--preset", "cpu-small", "--seconds", "0", "--threads", "1", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench.attention", *arguments])
    bench.main()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    providers = {"lwz_sdpa", "lwz_torch", "sdpa_flash", "sdpa_math"}
    keys = [(row["lengths"], row["mode"], row["provider"]) for row in rows]
    assert sorted(keys) == sorted(
        (lengths, mode, provider)
        for lengths in ("384", "200+100+60+24")
        for mode in ("fwd", "bwd")
        for provider in providers
    )
    for row in rows:
        assert (row["status"], row["is_deterministic"]) == ("ok", "True"), row
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["tflops"]) > 0


def test_bench_times_only_who_is_right() -> None:
    case = bench.Case(2, 1, 8, (20, 5))

    def crossing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: SegmentTable):
        whole = SegmentTable.from_cu_seqlens([0, q.shape[0]])
        return bench.attention(q, k, v, segments=whole, impl="torch")[0]

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: SegmentTable):
        raise RuntimeError("no kernel\nfor this")

    providers = {**bench._providers("cpu"), "crossing": crossing, "broken": broken}
    rows = bench._measure_case(case, providers, "cpu", 0.0)
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["lwz_torch"]["status"] == "ok"
    assert by_provider["crossing"]["status"] == "wrong"
    assert float(by_provider["crossing"]["error_vs_eager"]) > 100
    assert by_provider["broken"]["reason"] == "RuntimeError: no kernel"
    assert by_provider["crossing"]["median_ms"] == by_provider["broken"]["median_ms"] == ""


def test_flop_count_is_of_the_visible_pairs() -> None:
    case = bench.Case(2, 1, 8, (3, 1))
    assert case.tflop("fwd") == pytest.approx(4e-12 * 8 * 2 * (6 + 1))
    assert case.tflop("bwd") == pytest.approx(2.5 * case.tflop("fwd"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpu"], "there is no CUDA device"),
        (["--providers", "lwz_sdpa,fast"], "unknown providers fast; there are lwz_sdpa"),
    ],
)
def test_bench_refuses(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.attention", *arguments])
    with pytest.raises(SystemExit, match=message):
        bench.main()
