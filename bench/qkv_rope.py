"""Times qkv_rope against the decoder's operations, the compiled formula, and Liger's kernel.

    python -m bench.qkv_rope --csv OUT.csv --threads 2
    python -m bench.qkv_rope --device cuda --csv OUT.csv

`decoder` is a view and three elementwise operations (`lwz_trainer/model/rotary.py`) whose q, k and
v are strided views; `torch_compile` is the formula compiled for the shape, with contiguous results
as ours. Liger (where installed, on a GPU) rotates copies of q and k; v stays a view. `fwd` records
no gradient; `fwd_bwd` takes the gradients of q, k and v back to the projection. Every provider must
match fp64 before it is timed; on a GPU each call is a replay of its captured CUDA graph.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.timing import Run, captured, time_interleaved
from lwz_kernels.qkv_rope import qkv_rope
from lwz_trainer.model.rotary import rotate

__all__ = ["main"]

RESULTS = ("op", "provider", "mode", "dtype", "shape", "median_ms", "p20_ms", "p80_ms", "gb_per_s")
MODES = ("fwd", "fwd_bwd")
Rotation = Callable[[Tensor], tuple[Tensor, ...]]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


@dataclass(frozen=True)
class Shape:
    """One layer's projection of `tokens` tokens."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"T{self.tokens} H{self.num_heads} J{self.num_kv_heads} K{self.head_size}"


# A decoding step and an update's pack: SmolLM2-135M; Qwen2.5-1.5B and 7B.
SHAPES = {
    "cpu": (Shape(16, 9, 3, 64), Shape(256, 9, 3, 64), Shape(2048, 9, 3, 64)),
    "cuda": (
        Shape(64, 12, 2, 128),
        Shape(16384, 12, 2, 128),
        Shape(64, 28, 4, 128),
        Shape(16384, 28, 4, 128),
    ),
}


@dataclass(frozen=True)
class Problem:
    """A projection, its angles as halves and as the decoder's and Liger's tables, and gradients."""

    shape: Shape
    qkv: Tensor
    cos: Tensor
    sin: Tensor
    upstream: tuple[Tensor, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="timed per shape and mode")
    parser.add_argument("--commit", default=report.commit(), help="where there is no checkout")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    torch.set_num_threads(options.threads)
    columns = (*RESULTS, *report.MACHINE_COLUMNS[options.device], "commit")
    machine = report.machine(options.device, options.threads) | {"commit": options.commit}
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES[options.device]:
        for shape in SHAPES[options.device]:
            problem = _problem(shape, dtype, options.device)
            for mode in MODES:
                rows += [row | machine for row in _rows(problem, mode, options.seconds)]
                report.write_csv(options.csv, columns, rows)


def _rows(problem: Problem, mode: str, seconds: float) -> list[dict[str, Any]]:
    device = problem.qkv.device.type
    runs = {name: _call(rotation, problem, mode) for name, rotation in _providers(problem).items()}
    _check(runs, problem, mode)
    if device == "cuda":
        runs = captured(runs)
    # Read and written once, in each direction.
    moved_gb = 2 * problem.qkv.nbytes * (2 if mode == "fwd_bwd" else 1) / 1e9
    rows = []
    for provider, samples in time_interleaved(runs, seconds, device).items():
        p20, median, p80 = report.quantiles(samples)
        rows.append(
            {
                "op": "qkv_rope",
                "provider": provider,
                "mode": mode,
                "dtype": str(problem.qkv.dtype).removeprefix("torch."),
                "shape": str(problem.shape),
                "median_ms": f"{median:.4f}",
                "p20_ms": f"{p20:.4f}",
                "p80_ms": f"{p80:.4f}",
                "gb_per_s": f"{moved_gb / (median / 1e3):.2f}",
            }
        )
        print(f"{rows[-1]['dtype']:9} {problem.shape!s:22} {mode:8} {provider:14} {median:9.4f} ms")
    return rows


def _problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    torch.manual_seed(0)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    angles = torch.rand(shape.tokens, shape.head_size // 2, device=device) * 6
    return Problem(
        shape,
        torch.randn(shape.tokens, sum(heads) * shape.head_size, device=device).to(dtype),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        tuple(
            torch.randn(shape.tokens, count, shape.head_size, device=device).to(dtype)
            for count in heads
        ),
    )


def _providers(problem: Problem) -> dict[str, Rotation]:
    """Tables are made once, as for all layers of a pass."""
    shape, cos, sin = problem.shape, problem.cos, problem.sin
    num_rotated = shape.num_heads + shape.num_kv_heads
    cos_T1K = torch.cat((cos, cos), dim=-1)[:, None]
    signed_sin_T1K = torch.cat((-sin, sin), dim=-1)[:, None]

    def decoder(qkv: Tensor) -> tuple[Tensor, ...]:
        qkv_THK = qkv.unflatten(1, (-1, shape.head_size))
        qk = rotate(qkv_THK[:, :num_rotated], cos_T1K, signed_sin_T1K)
        return qk[:, : shape.num_heads], qk[:, shape.num_heads :], qkv_THK[:, num_rotated:]

    # Compiled anew for each shape: a function is compiled eight times, then refused.
    torch.compiler.reset()
    formula = _rotation(problem, "reference")
    providers: dict[str, Rotation] = {
        "triton" if problem.qkv.is_cuda else "torch": _rotation(problem, "auto"),
        "decoder": decoder,
        "torch_compile": torch.compile(formula, fullgraph=True, dynamic=False),
    }
    if problem.qkv.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        providers["liger"] = _liger(problem)
    return providers


def _rotation(problem: Problem, impl: str) -> Rotation:
    shape = problem.shape
    return lambda qkv: qkv_rope(
        qkv,
        problem.cos,
        problem.sin,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        impl=impl,
    )


def _liger(problem: Problem) -> Rotation:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    shape = problem.shape
    tables = [torch.cat((table, table), dim=-1)[None] for table in (problem.cos, problem.sin)]

    def rotation(qkv: Tensor) -> tuple[Tensor, ...]:
        qkv_THK = qkv.unflatten(1, (-1, shape.head_size))
        q, k, v = qkv_THK.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        q, k = liger_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *tables)
        return q[0].transpose(0, 1), k[0].transpose(0, 1), v

    return rotation


def _call(rotation: Rotation, problem: Problem, mode: str) -> Run:
    """q, k and v, or the projection's gradient."""
    if mode == "fwd":
        return torch.no_grad()(lambda: rotation(problem.qkv))
    qkv = problem.qkv.clone().requires_grad_()
    return lambda: torch.autograd.grad(rotation(qkv), qkv, problem.upstream)


def _check(runs: dict[str, Run], problem: Problem, mode: str) -> None:
    """Stops the benchmark if a provider is wrong: bf16 keeps 8 bits, and rounds three times."""
    wide = Problem(
        problem.shape,
        problem.qkv.double(),
        problem.cos.double(),
        problem.sin.double(),
        tuple(x.double() for x in problem.upstream),
    )
    truths = _call(_rotation(wide, "reference"), wide, mode)()
    tolerance = 8e-3 if problem.qkv.dtype == torch.bfloat16 else 1e-6
    for name, run in runs.items():
        for output, truth in zip(run(), truths, strict=True):
            error = ((output.double() - truth).norm() / truth.norm()).item()
            if not error <= tolerance:
                sys.exit(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")


if __name__ == "__main__":
    main()
