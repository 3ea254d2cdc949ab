"""Times one decoding step's paged attention: native library against gathering the pages for SDPA.

    python -m bench.paged_attention --csv bench/results/cpu/paged_attention.csv --threads 2

The SDPA provider is favoured: all contexts have one length that fills whole pages, so it needs
no mask. Every provider must match fp64 before it is timed. Between two timed calls 64 MiB are
written, so that K and V come from memory: a decoding step streams the model's weights in between.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import report
from lwz_kernels import native
from lwz_kernels.paged_attention import paged_attention

__all__ = ["main"]

COLUMNS = (
    "op",
    "provider",
    "dtype",
    "shape",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
    "device",
    "cpu_capability",
    "threads",
    "torch",
    "commit",
)
WARM_UP_S = 0.5
FLUSH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shape:
    """Sizes of one decoding step; every sequence has `context` keys."""

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    page_size: int

    def __str__(self) -> str:
        return (
            f"B{self.batch} L{self.context} H{self.num_heads} J{self.num_kv_heads} "
            f"K{self.head_size} page{self.page_size}"
        )


# The training shape (SmolLM2-135M), one long sequence, short contexts, and an 8-billion layer.
SHAPES = (
    Shape(16, 2048, 9, 3, 64, 16),
    Shape(1, 8192, 9, 3, 64, 16),
    Shape(16, 256, 9, 3, 64, 16),
    Shape(4, 1024, 32, 8, 128, 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="timed per shape and dtype")
    options = parser.parse_args()
    if not native.is_available():
        sys.exit(f"nothing to compare: {native.unavailable_reason()}")
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            rows += _rows(shape, dtype, options.threads, options.seconds)
    report.write_csv(options.csv, COLUMNS, rows)


def _rows(shape: Shape, dtype: torch.dtype, threads: int, seconds: float) -> list[dict]:
    problem = _problem(shape, dtype)
    providers: dict[str, Callable[[], torch.Tensor]] = {
        "native": lambda: paged_attention(**problem, impl="native"),
        "torch": lambda: paged_attention(**problem, impl="torch"),
        "sdpa_gathered_no_mask": lambda: _sdpa_without_mask(**problem),
    }
    _check(providers, problem)
    times_ms = _time_interleaved(providers, seconds)
    num_values = 2 * shape.batch * shape.context * shape.num_kv_heads * shape.head_size
    read_gb = num_values * dtype.itemsize / 1e9
    rows = []
    for provider, samples in times_ms.items():
        p20, median, p80 = report.quantiles(samples)
        rows.append(
            {
                "op": "paged_attention",
                "provider": provider,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": str(shape),
                "median_ms": f"{median:.4f}",
                "p20_ms": f"{p20:.4f}",
                "p80_ms": f"{p80:.4f}",
                "gb_per_s": f"{read_gb / (median / 1e3):.2f}",
                "device": report.cpu_name(),
                "cpu_capability": report.cpu_capability(),
                "threads": threads,
                "torch": torch.__version__,
                "commit": report.commit(),
            }
        )
        print(f"{rows[-1]['dtype']:9} {shape!s:34} {provider:22} {median:9.3f} ms", flush=True)
    return rows


def _problem(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    max_pages = shape.context // shape.page_size
    num_pages = shape.batch * max_pages
    cache_shape = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_size)
    return {
        "q": torch.randn(shape.batch, shape.num_heads, shape.head_size).to(dtype),
        "k_cache": torch.randn(cache_shape).to(dtype),
        "v_cache": torch.randn(cache_shape).to(dtype),
        "page_table": torch.randperm(num_pages, dtype=torch.int32).view(shape.batch, max_pages),
        "context_lens": torch.full((shape.batch,), shape.context, dtype=torch.int32),
    }


def _sdpa_without_mask(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
) -> torch.Tensor:
    """Right only if every context fills its pages."""
    assert int(context_lens.min()) == page_table.shape[1] * k_cache.shape[1]
    k_BJLK = k_cache[page_table].flatten(1, 2).transpose(1, 2)
    v_BJLK = v_cache[page_table].flatten(1, 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k_BJLK, v_BJLK, enable_gqa=True)
    return out[:, :, 0]


def _check(providers: dict[str, Callable[[], torch.Tensor]], problem: dict[str, Any]) -> None:
    """Stops the benchmark if a provider is wrong: bf16 keeps 8 bits, fp32 sums about 18."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in problem.items()}
    truth = _sdpa_without_mask(**wide)
    tolerance = 4e-3 if problem["q"].dtype == torch.bfloat16 else 4e-6
    for name, run in providers.items():
        error = ((run().double() - truth).norm() / truth.norm()).item()
        if not error <= tolerance:
            sys.exit(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")


def _time_interleaved(
    providers: dict[str, Callable[[], torch.Tensor]], seconds: float
) -> dict[str, list[float]]:
    """Providers take turns, so that a slow phase of the machine hits all of them."""
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8)
    times_ms: dict[str, list[float]] = {name: [] for name in providers}
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_UP_S + seconds:
        for name, run in providers.items():
            flush.add_(1)
            before = time.perf_counter()
            run()
            if elapsed > WARM_UP_S:
                times_ms[name].append((time.perf_counter() - before) * 1e3)
    return times_ms


if __name__ == "__main__":
    main()
