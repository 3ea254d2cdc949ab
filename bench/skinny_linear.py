"""Times a decoding step's linear layers: native library against F.linear, weights from memory.

    python -m bench.skinny_linear --csv bench/results/cpu/skinny_linear.csv --threads 2

The calls go round copies of the weight that together are larger than the caches, as in decoding,
where a step reads every weight once. For bf16 weights "torch" is what torch does best on this CPU:
F.linear of the bf16 tensors, or from 8 rows on of fp32 copies where bf16 products are emulated.
Every provider must match fp64 before it is timed.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import report
from lwz_kernels import native
from lwz_kernels.loss_head import has_native_bf16
from lwz_kernels.skinny_linear import skinny_linear

__all__ = ["main"]

COLUMNS = (
    "op",
    "provider",
    "dtype",
    "shape",
    "median_ms",
    "min_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
    "gflops",
    "device",
    "cpu_capability",
    "threads",
    "torch",
    "commit",
)
WARM_UP_S = 0.1
MIN_SAMPLES = 5
COPIES_BYTES = 100 * 2**20
MIN_UPCAST_ROWS = 8

Provider = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """x [rows, depth] times weight [columns, depth]."""

    rows: int
    columns: int
    depth: int

    def __str__(self) -> str:
        return f"M{self.rows} N{self.columns} K{self.depth}"


# The matrices of SmolLM2-135M: query/key/value, gate and up, down, head.
WEIGHTS = ((960, 576), (3072, 576), (576, 1536), (49152, 576))
ROWS = (1, 4, 8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="timed per shape and dtype")
    options = parser.parse_args()
    if not native.is_available():
        sys.exit(f"nothing to compare: {native.unavailable_reason()}")
    torch.set_num_threads(options.threads)
    rows = []
    for dtype, (columns, depth) in itertools.product((torch.float32, torch.bfloat16), WEIGHTS):
        num_copies = COPIES_BYTES // (columns * depth * dtype.itemsize) + 1
        weights = [torch.randn(columns, depth).to(dtype) for _ in range(num_copies)]
        for num_rows in ROWS:
            shape = Shape(num_rows, columns, depth)
            rows += _rows(shape, weights, options.threads, options.seconds)
    report.write_csv(options.csv, COLUMNS, rows)


def _rows(shape: Shape, weights: list[torch.Tensor], threads: int, seconds: float) -> list[dict]:
    dtype = weights[0].dtype
    x = torch.randn(shape.rows, shape.depth).to(dtype)
    providers: dict[str, Provider] = {
        "native": lambda x, weight: skinny_linear(x, weight, impl="native"),
        "torch": _best_of_torch(shape.rows, dtype),
    }
    _check(providers, x, weights[0])
    times_ms = _time_interleaved(providers, x, weights, seconds)
    read_gb = shape.columns * shape.depth * dtype.itemsize / 1e9
    gflop = 2 * shape.rows * shape.columns * shape.depth / 1e9
    rows = []
    for provider, samples in times_ms.items():
        p20, median, p80 = report.quantiles(samples)
        median_s = median / 1e3
        rows.append(
            {
                "op": "skinny_linear",
                "provider": provider,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": str(shape),
                "median_ms": f"{median:.4f}",
                "min_ms": f"{min(samples):.4f}",
                "p20_ms": f"{p20:.4f}",
                "p80_ms": f"{p80:.4f}",
                "gb_per_s": f"{read_gb / median_s:.2f}",
                "gflops": f"{gflop / median_s:.1f}",
                "device": report.cpu_name(),
                "cpu_capability": report.cpu_capability(),
                "threads": threads,
                "torch": torch.__version__,
                "commit": report.commit(),
            }
        )
    native_ms, torch_ms = (statistics.median(samples) for samples in times_ms.values())
    print(
        f"{rows[0]['dtype']:9} {shape!s:20} native {native_ms:8.3f} ms  torch {torch_ms:8.3f} ms  "
        f"{torch_ms / native_ms:5.2f}x",
        flush=True,
    )
    return rows


def _best_of_torch(num_rows: int, dtype: torch.dtype) -> Provider:
    if dtype == torch.float32 or num_rows < MIN_UPCAST_ROWS or has_native_bf16():
        return F.linear
    return lambda x, weight: F.linear(x.float(), weight.float()).to(dtype)


def _check(providers: dict[str, Provider], x: torch.Tensor, weight: torch.Tensor) -> None:
    """Stops the benchmark if a provider is wrong: bf16 keeps 8 bits, fp32 sums about 18."""
    truth = F.linear(x.double(), weight.double())
    tolerance = 4e-3 if x.dtype == torch.bfloat16 else 4e-6
    for name, run in providers.items():
        error = ((run(x, weight).double() - truth).norm() / truth.norm()).item()
        if not error <= tolerance:
            sys.exit(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")


def _time_interleaved(
    providers: dict[str, Provider], x: torch.Tensor, weights: list[torch.Tensor], seconds: float
) -> dict[str, list[float]]:
    """Providers take turns, so that a slow phase of the machine hits all of them."""
    times_ms: dict[str, list[float]] = {name: [] for name in providers}
    copies = itertools.cycle(weights)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_UP_S + seconds or len(
        times_ms["native"]
    ) < MIN_SAMPLES:
        for name, run in providers.items():
            weight = next(copies)
            before = time.perf_counter()
            run(x, weight)
            if elapsed > WARM_UP_S:
                times_ms[name].append((time.perf_counter() - before) * 1e3)
        next(copies)  # an even number of copies would give each provider its own half
    return times_ms


if __name__ == "__main__":
    main()
