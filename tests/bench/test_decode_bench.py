"""The decoding benchmarks: what the committed file shows, and that they run and check first."""

import csv
from pathlib import Path

import pytest
import torch

from bench import adamw, decode_layers, paged_attention, qkv_rope, timing
from lwz_kernels import native
from tests.trainer.train_case import ROOT

COMMITTED = ROOT / "bench" / "results" / "cpu" / "paged_attention.csv"
needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_native_decode_is_twice_as_fast_as_gathered_sdpa(dtype: str) -> None:
    """16 sequences of 2,048 keys with SmolLM2's heads, against the faster of the two."""
    shape = "B16 L2048 H9 J3 K64 page16"
    median_ms = {
        row["provider"]: float(row["median_ms"])
        for row in rows_of(COMMITTED)
        if (row["shape"], row["dtype"]) == (shape, dtype)
    }
    ours = median_ms.pop("native")
    assert median_ms.keys() == {"torch", "sdpa_gathered_no_mask"}
    assert 2 * ours <= min(median_ms.values())


@needs_native
def test_paged_attention_bench_writes_a_row_for_each_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(paged_attention.SHAPES, "cpu", [paged_attention.Shape(3, 32, 4, 2, 8, 16)])
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(
        "sys.argv", ["bench", "--csv", str(tmp_path / "out.csv"), "--seconds", "0.05"]
    )
    paged_attention.main()
    rows = rows_of(tmp_path / "out.csv")
    assert [(row["dtype"], row["provider"]) for row in rows] == [
        (dtype, provider)
        for dtype in ("bfloat16", "float32")
        for provider in ("native", "torch", "sdpa_gathered_no_mask")
    ]
    assert rows[0].keys() == rows_of(COMMITTED)[0].keys()
    # K and V of 3 sequences, 32 keys, 2 heads of 8 numbers of 2 bytes.
    read_bytes = 2 * 3 * 32 * 2 * 8 * 2
    seconds = float(rows[0]["median_ms"]) / 1e3
    assert float(rows[0]["gb_per_s"]) == pytest.approx(read_bytes / seconds / 1e9, abs=0.01)


def test_paged_attention_bench_stops_at_a_wrong_provider() -> None:
    shape = paged_attention.Shape(3, 32, 4, 2, 8, 16)
    problem = paged_attention._problem(shape, torch.float32, "cpu")
    right = paged_attention._sdpa_without_mask(**problem)
    paged_attention._check({"right": lambda: right}, problem)
    with pytest.raises(SystemExit, match=r"off is wrong: relative error 1.00e-03, allowed 4e-06"):
        paged_attention._check({"right": lambda: right, "off": lambda: right * 1.001}, problem)


def test_qkv_rope_bench_writes_a_row_for_each_provider_and_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(qkv_rope.SHAPES, "cpu", [qkv_rope.Shape(5, 2, 1, 8)])
    monkeypatch.setitem(qkv_rope.DTYPES, "cpu", [torch.float32])
    # The inductor is the compiler's business, and takes a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(
        "sys.argv", ["bench", "--csv", str(tmp_path / "out.csv"), "--seconds", "0.05"]
    )
    qkv_rope.main()
    assert [(row["mode"], row["provider"]) for row in rows_of(tmp_path / "out.csv")] == [
        (mode, provider)
        for mode in ("fwd", "fwd_bwd")
        for provider in ("torch", "decoder", "torch_compile")
    ]


def test_qkv_rope_bench_stops_at_a_wrong_provider() -> None:
    problem = qkv_rope._problem(qkv_rope.Shape(5, 2, 1, 8), torch.float32, "cpu")
    right = qkv_rope._call(qkv_rope._rotation(problem, "torch"), problem, "fwd_bwd")
    qkv_rope._check({"right": right}, problem, "fwd_bwd")
    with pytest.raises(SystemExit, match="off is wrong"):
        qkv_rope._check({"off": lambda: [1.001 * x for x in right()]}, problem, "fwd_bwd")


def test_adamw_bench_writes_a_row_for_each_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(adamw.SIZES, "cpu", 1000)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(
        "sys.argv", ["bench", "--csv", str(tmp_path / "out.csv"), "--seconds", "0.05"]
    )
    adamw.main()
    assert [(row["provider"], row["moments"]) for row in rows_of(tmp_path / "out.csv")] == [
        ("halves", "fp32"),
        ("halves", "bf16"),
        ("torch_fused", "fp32"),
    ]


def test_adamw_bench_stops_at_a_wrong_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    right = adamw.adamw_
    monkeypatch.setattr(adamw, "adamw_", lambda *a, **k: right(*a, **{**k, "lr": 1.1 * k["lr"]}))
    with pytest.raises(SystemExit, match="halves fp32 is wrong"):
        adamw.check("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_native_layers_are_faster_than_the_decoder_in_every_shape(dtype: str) -> None:
    rows = rows_of(COMMITTED.with_name("decode_layers.csv"))
    ratios = {
        (int(row["batch"]), int(row["context"])): float(row["decoder_ratio"])
        for row in rows
        if (row["provider"], row["dtype"]) == ("native", dtype)
    }
    assert len(ratios) == len(decode_layers.BATCHES) * len(decode_layers.CONTEXTS)
    assert min(ratios.values()) > 1.0


@needs_native
def test_decode_layers_bench_writes_a_row_for_each_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    arguments = ["--dtypes", "fp32", "--batches", "2", "--contexts", "17", "--seconds", "1"]
    num_threads = torch.get_num_threads()
    decode_layers.main([*arguments, "--csv", str(tmp_path / "out.csv"), "--threads", "1"])
    torch.set_num_threads(num_threads)
    rows = rows_of(tmp_path / "out.csv")
    assert [(row["provider"], row["batch"], row["context"]) for row in rows] == [
        ("native", "2", "17"),
        ("decoder", "2", "17"),
    ]
    assert rows[0].keys() == rows_of(COMMITTED.with_name("decode_layers.csv"))[0].keys()


def test_decode_layers_bench_refuses_to_time_what_differs() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(SystemExit, match="not timed"):
        decode_layers._check(x + 1e-3, x, x)
