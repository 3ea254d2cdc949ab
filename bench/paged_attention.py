"""Times one decoding step's paged attention against gathering the pages for SDPA.

    python -m bench.paged_attention --csv bench/results/cpu/paged_attention.csv --threads 2
    python -m bench.paged_attention --device cuda --csv OUT.csv

The SDPA provider is favoured: all contexts have one length that fills whole pages, so it needs
no mask. Every provider must match fp64 before it is timed. Between two timed calls a buffer larger
than the caches is written, so that K and V come from memory: a decoding step streams the model's
weights in between. On a GPU each call is a replay of its captured CUDA graph, as in decoding, and
`copy_frac` is the bandwidth of reading K and V once over that of a copy timed in the same rounds.
flash-attn takes part where it is installed and pages have a multiple of 256 tokens, as it demands.
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import report
from bench.timing import Run, captured, time_interleaved
from lwz_kernels import native
from lwz_kernels.paged_attention import paged_attention

__all__ = ["main"]

RESULTS = ("op", "provider", "dtype", "shape", "median_ms", "p20_ms", "p80_ms", "gb_per_s")
COLUMNS = {
    "cpu": (*RESULTS, *report.MACHINE_COLUMNS["cpu"], "commit"),
    "cuda": (*RESULTS, "copy_frac", *report.MACHINE_COLUMNS["cuda"], "commit"),
}
COPY_BYTES = 2**30
# Sequences that are compared with fp64; a whole batch of them would not fit a GPU.
CHECKED_ROWS = 2


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


SHAPES = {
    # The training shape (SmolLM2-135M), one long sequence, short contexts, an 8-billion layer.
    "cpu": (
        Shape(16, 2048, 9, 3, 64, 16),
        Shape(1, 8192, 9, 3, 64, 16),
        Shape(16, 256, 9, 3, 64, 16),
        Shape(4, 1024, 32, 8, 128, 16),
    ),
    # Qwen2.5-1.5B, 3B and 7B at the context where the floors of the rollout are computed: batches,
    # the last running sequence, early in a rollout, and the page size of flash-attn.
    "cuda": (
        Shape(32, 14336, 12, 2, 128, 16),
        Shape(128, 14336, 12, 2, 128, 16),
        Shape(64, 14336, 16, 2, 128, 16),
        Shape(32, 14336, 28, 4, 128, 16),
        Shape(64, 14336, 28, 4, 128, 16),
        Shape(1, 14336, 28, 4, 128, 16),
        Shape(64, 512, 28, 4, 128, 16),
        Shape(32, 14336, 28, 4, 128, 256),
    ),
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="timed per shape and dtype")
    parser.add_argument("--commit", default=report.commit(), help="where there is no checkout")
    options = parser.parse_args()
    if options.device == "cpu" and not native.is_available():
        sys.exit(f"nothing to compare: {native.unavailable_reason()}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    torch.set_num_threads(options.threads)
    machine = report.machine(options.device, options.threads) | {"commit": options.commit}
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES[options.device]:
        for shape in SHAPES[options.device]:
            rows += [row | machine for row in _rows(shape, dtype, options.device, options.seconds)]
            # After each shape: a run that is cut off keeps what it has.
            report.write_csv(options.csv, COLUMNS[options.device], rows)


def _rows(shape: Shape, dtype: torch.dtype, device: str, seconds: float) -> list[dict[str, Any]]:
    problem = _problem(shape, dtype, device)
    providers = _providers(problem, shape, device)
    _check(providers, problem)
    if device == "cuda":
        providers = captured(providers) | {"copy": _copy(device)}
    times_ms = time_interleaved(providers, seconds, device)
    num_values = 2 * shape.batch * shape.context * shape.num_kv_heads * shape.head_size
    read_gb = num_values * dtype.itemsize / 1e9
    rows = []
    for provider, samples in times_ms.items():
        p20, median, p80 = report.quantiles(samples)
        moved_gb = 2 * COPY_BYTES / 1e9 if provider == "copy" else read_gb
        row = {
            "op": "paged_attention",
            "provider": provider,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": str(shape),
            "median_ms": f"{median:.4f}",
            "p20_ms": f"{p20:.4f}",
            "p80_ms": f"{p80:.4f}",
            "gb_per_s": f"{moved_gb / (median / 1e3):.2f}",
        }
        if device == "cuda":
            copy_ms = report.quantiles(times_ms["copy"])[1]
            copy_frac = moved_gb / median / (2 * COPY_BYTES / 1e9 / copy_ms)
            row["copy_frac"] = f"{copy_frac:.3f}"
        rows.append(row)
        print(f"{row['dtype']:9} {shape!s:36} {provider:22} {median:9.3f} ms", flush=True)
    return rows


def _problem(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Contexts that fill their pages, which lie in random order."""
    torch.manual_seed(0)
    max_pages = shape.context // shape.page_size
    assert max_pages * shape.page_size == shape.context, f"{shape} does not fill its pages"
    num_pages = shape.batch * max_pages
    cache_shape = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_size)
    pages = torch.randperm(num_pages, dtype=torch.int32).view(shape.batch, max_pages)
    return {
        "q": torch.randn(shape.batch, shape.num_heads, shape.head_size, device=device).to(dtype),
        "k_cache": torch.randn(cache_shape, device=device).to(dtype),
        "v_cache": torch.randn(cache_shape, device=device).to(dtype),
        "page_table": pages.to(device),
        "context_lens": torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device),
    }


def _providers(problem: dict[str, Any], shape: Shape, device: str) -> dict[str, Run]:
    ours = "native" if device == "cpu" else "triton"
    providers: dict[str, Run] = {
        ours: lambda: paged_attention(**problem, impl=ours),
        "torch": lambda: paged_attention(**problem, impl="torch"),
        "sdpa_gathered_no_mask": lambda: _sdpa_without_mask(**problem),
    }
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if device == "cuda" and has_flash and shape.page_size % 256 == 0:
        providers["flash_attn"] = lambda: _flash_attn(**problem)
    return providers


def _sdpa_without_mask(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
) -> torch.Tensor:
    """Right only because every context fills its pages."""
    del context_lens
    k_BJLK = k_cache[page_table].flatten(1, 2).transpose(1, 2)
    v_BJLK = v_cache[page_table].flatten(1, 2).transpose(1, 2)
    out = F.scaled_dot_product_attention(q[:, :, None], k_BJLK, v_BJLK, enable_gqa=True)
    return out[:, :, 0]


def _flash_attn(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
) -> torch.Tensor:
    from flash_attn import flash_attn_with_kvcache

    out_B1HK = flash_attn_with_kvcache(
        q[:, None], k_cache, v_cache, cache_seqlens=context_lens, block_table=page_table
    )
    return out_B1HK[:, 0]


def _copy(device: str) -> Run:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _check(providers: dict[str, Run], problem: dict[str, Any]) -> None:
    """Stops the benchmark if a provider is wrong: bf16 keeps 8 bits, fp32 sums about 18."""
    first = {name: x if name.endswith("cache") else x[:CHECKED_ROWS] for name, x in problem.items()}
    pages = first["page_table"]
    first["k_cache"], first["v_cache"] = (
        first[name][pages.flatten()].double() for name in ("k_cache", "v_cache")
    )
    first["page_table"] = torch.arange(pages.numel(), device=pages.device).view(pages.shape)
    first["q"] = first["q"].double()
    truth = _sdpa_without_mask(**first)
    tolerance = 4e-3 if problem["q"].dtype == torch.bfloat16 else 4e-6
    for name, run in providers.items():
        error = ((run()[:CHECKED_ROWS].double() - truth).norm() / truth.norm()).item()
        if not error <= tolerance:
            sys.exit(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")


if __name__ == "__main__":
    main()
