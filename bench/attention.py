"""Times attention forward and backward against torch's SDPA, FlexAttention, varlen and flash-attn.

    python -m bench.attention --preset cpu --csv bench/results/cpu/attention.csv
    python -m bench.attention --preset gpu --csv OUT.csv

One document and packs of several, causal, grouped heads. Before it is timed a provider must agree
with fp64 on a smaller pack of the same proportions: out and all gradients, with at most twice the
error of plain PyTorch in the same dtype. Providers take turns; before each call a buffer larger
than the caches is written. `bwd` is the backward pass alone. `tflops` counts 4·K FLOP per head and
visible (query, key) pair forward, 2.5 times that backward, whoever recomputes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import report
from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.attention.library import LIBRARY_IMPLS, is_installed, library_attention

__all__ = ["PRESETS", "Case", "main"]

COLUMNS = (
    *("op", "provider", "mode", "dtype", "shape", "lengths", "status", "reason"),
    *("error_vs_eager", "is_deterministic", "median_ms", "p20_ms", "p80_ms", "tflops"),
    *("device", "driver", "cuda", "torch", "triton", "threads", "commit"),
)
GATE_TOKENS = 1024
WARM_UP_S = 0.2
FLUSH_BYTES = 256 * 2**20
FP32_FLOOR = 5e-7
BACKWARD_FLOP_RATIO = 2.5

Run = Callable[[Tensor, Tensor, Tensor, SegmentTable], Tensor]


@dataclass(frozen=True)
class Case:
    """One pack: H query heads, J key/value heads of size K, and the documents' lengths."""

    heads: int
    kv_heads: int
    head_size: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"T{sum(self.lengths)} H{self.heads} J{self.kv_heads} K{self.head_size}"

    def tflop(self, mode: str) -> float:
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        ratio = BACKWARD_FLOP_RATIO if mode == "bwd" else 1.0
        return 4e-12 * self.head_size * self.heads * pairs * ratio

    def shrunk(self) -> "Case":
        """In proportion, for the gate."""
        divisor = max(1.0, sum(self.lengths) / GATE_TOKENS)
        lengths = tuple(max(1, int(n / divisor)) for n in self.lengths)
        return Case(self.heads, self.kv_heads, self.head_size, lengths)


SMALL = ((384,), (200, 100, 60, 24))
MEDIUM = ((2048,), (1024, 512, 256, 128, 128))
LARGE = ((16384,), (8192, 8192), (8192, 4096, 2048, 1024, 512, 256, 256))
# SmolLM2's heads on a CPU; on a GPU the published head size 128, alone and grouped, and 64.
PRESETS = {
    "cpu-small": [Case(9, 3, 64, lengths) for lengths in SMALL],
    "cpu": [Case(9, 3, 64, lengths) for lengths in MEDIUM],
    "gpu": [
        Case(*sizes, lengths)
        for sizes in ((16, 16, 128), (32, 8, 128), (32, 8, 64))
        for lengths in LARGE
    ],
}
SDPA_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
FAILURES = (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError, AssertionError)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="file that gets the rows; default: print them")
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    parser.add_argument("--providers", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed per case and mode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", default=None, help="for a tree that is no git checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.preset == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("preset gpu: there is no CUDA device; take preset cpu or cpu-small")
    providers = _providers(device)
    if options.providers:
        chosen = options.providers.split(",")
        if unknown := sorted(set(chosen) - set(providers)):
            sys.exit(f"unknown providers {', '.join(unknown)}; there are {', '.join(providers)}")
        providers = {name: providers[name] for name in chosen}
    machine = _machine(device, options.threads, options.commit)
    rows = []
    for case in PRESETS[options.preset]:
        for row in _measure_case(case, providers, device, options.seconds):
            rows.append({**row, **machine})
            print(*(row[name] for name in COLUMNS[:14]), file=sys.stderr, flush=True)
    report.write_csv(options.csv, COLUMNS, rows)


def _providers(device: str) -> dict[str, Run]:
    """Ours by name of the implementation, then the peers."""

    def ours(impl: str) -> Run:
        return lambda q, k, v, table: attention(q, k, v, segments=table, impl=impl)[0]

    def library(impl: str) -> Run:
        return lambda q, k, v, table: library_attention(
            q, k, v, table, q.shape[2] ** -0.5, None, impl
        )[0]

    if device == "cpu":
        sdpa = {name: _sdpa(SDPA_BACKENDS[name]) for name in ("sdpa_flash", "sdpa_math")}
        return {"lwz_sdpa": ours("sdpa"), "lwz_torch": ours("torch"), **sdpa}
    return {
        "lwz_triton": ours("triton"),
        **{name: _sdpa(backend) for name, backend in SDPA_BACKENDS.items()},
        "flex": _flex(),
        **{impl: library(impl) for impl in LIBRARY_IMPLS if is_installed(impl)},
    }


def _sdpa(backend: SDPBackend) -> Run:
    """A call per document, as SDPA knows no packs."""

    def run(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable) -> Tensor:
        assert table.pack is not None, "benchmarks take packs"
        lengths, outs = table.pack.lengths, []
        with sdpa_kernel(backend):
            for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
                q_HLK, k_JLK, v_JLK = (x.transpose(0, 1) for x in parts)
                out_HLK = F.scaled_dot_product_attention(
                    q_HLK[None], k_JLK[None], v_JLK[None], is_causal=True, enable_gqa=True
                )[0]
                outs.append(out_HLK.transpose(0, 1))
        return torch.cat(outs)

    return run


def _flex() -> Run:
    """Compiled once per size; its block mask is made once per pack, outside the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[SegmentTable, Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable) -> Tensor:
        if table not in masks:
            assert table.pack is not None, "benchmarks take packs"
            lengths = torch.tensor(table.pack.lengths, device=q.device)
            document = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)

            def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                del b, h
                return (j <= i) & (document[i] == document[j])

            size = q.shape[0]
            masks[table] = create_block_mask(is_visible, None, None, size, size, device=q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=masks[table], enable_gqa=True)
        assert isinstance(out, Tensor), "lse was not asked for"
        return out[0].transpose(0, 1)

    return run


def _measure_case(
    case: Case, providers: dict[str, Run], device: str, seconds: float
) -> list[dict[str, Any]]:
    """Two rows a provider, with times for those that pass the gate."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gates = {name: _gate(run, case.shrunk(), device, dtype) for name, run in providers.items()}
    rows = []
    for mode in ("fwd", "bwd"):
        calls: dict[str, Callable[[], object]] = {}
        for name, run in providers.items():
            if gates[name]["status"] == "ok":
                try:
                    calls[name] = _call(run, case, mode, device, dtype)
                    calls[name]()
                except FAILURES as error:
                    calls.pop(name, None)
                    gates[name] |= {"status": "error", "reason": _reason(error)}
        times_ms = _time_interleaved(calls, seconds, device)
        for name in providers:
            row = {
                "op": "attention",
                "provider": name,
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": str(case),
                "lengths": "+".join(map(str, case.lengths)),
                **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "tflops"), ""),
                **gates[name],
            }
            if name in times_ms:
                p20, median, p80 = report.quantiles(times_ms[name])
                row |= {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}"}
                row |= {"p80_ms": f"{p80:.4f}", "tflops": f"{case.tflop(mode) / median * 1e3:.3f}"}
            rows.append(row)
    return rows


def _gate(run: Run, case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """out, dq, dk, dv against fp64, in units of what eager loses; and whether twice is the same."""
    table = _table(case)

    def reference(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable) -> Tensor:
        return attention(q, k, v, segments=table, impl="reference")[0]

    truths = _results(reference, table, *_inputs(case, device, dtype, torch.float64))
    inputs = _inputs(case, device, dtype, dtype)
    eager = _results(reference, table, *inputs)
    outcome: dict[str, Any] = {"error_vs_eager": "", "is_deterministic": ""}
    try:
        found = _results(run, table, *inputs)
        again = _results(run, table, *inputs)
    except FAILURES as error:
        return outcome | {"status": "error", "reason": _reason(error)}
    ratio = 0.0
    for mine, theirs, truth in zip(found, eager, truths, strict=True):
        lost, allowed = (float((x.double() - truth).norm() / truth.norm()) for x in (mine, theirs))
        ratio = max(ratio, lost / (allowed + FP32_FLOOR))
    is_same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    outcome |= {"error_vs_eager": f"{ratio:.3f}", "is_deterministic": is_same}
    if not ratio <= 2:
        return outcome | {"status": "wrong", "reason": "more than twice the error of eager"}
    return outcome | {"status": "ok", "reason": ""}


def _results(
    run: Run, table: SegmentTable, qkv: Sequence[Tensor], dout: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = qkv
    out = run(q, k, v, table)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def _inputs(
    case: Case, device: str, dtype: torch.dtype, wide: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and dout: values of `dtype`, stored as `wide`."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(case.lengths)
    q, k, v, dout = (
        torch.randn(tokens, heads, case.head_size, generator=generator).to(dtype).to(device, wide)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    return [x.requires_grad_() for x in (q, k, v)], dout


def _table(case: Case) -> SegmentTable:
    offsets = [sum(case.lengths[:i]) for i in range(len(case.lengths) + 1)]
    return SegmentTable.from_cu_seqlens(offsets)


def _call(run: Run, case: Case, mode: str, device: str, dtype: torch.dtype) -> Callable[[], object]:
    table = _table(case)
    (q, k, v), dout = _inputs(case, device, dtype, dtype)
    if mode == "bwd":
        out = run(q, k, v, table)
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(q, k, v, table)

    return forward


def _time_interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, list[float]]:
    """Providers take turns, so that a slow phase of the machine hits all; one call at least."""
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_UP_S + seconds or not all(
        times_ms.values()
    ):
        for name, call in calls.items():
            flush.add_(1)
            took_ms = _time_ms(call, device)
            if elapsed > WARM_UP_S:
                times_ms[name].append(took_ms)
    return times_ms


def _time_ms(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        before = time.perf_counter()
        call()
        return (time.perf_counter() - before) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _machine(device: str, threads: int, commit: str | None) -> dict[str, Any]:
    is_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else report.cpu_name(),
        "driver": report.cuda_driver() if is_gpu else "",
        "cuda": torch.version.cuda if is_gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "threads": threads,
        "commit": commit or report.commit(),
    }


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


if __name__ == "__main__":
    main()
