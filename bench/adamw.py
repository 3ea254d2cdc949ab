"""Times the AdamW step on split masters against torch's optimizer on an fp32 copy.

    python -m bench.adamw --csv OUT.csv --threads 2
    python -m bench.adamw --device cuda --csv OUT.csv

All providers step the masters of a bf16 model and leave its bf16 weights behind: `halves` is
`adamw_` on weights and lower halves, `torch_fused` torch's fused AdamW on fp32 masters and a copy
of the result to bf16. `gb_per_s` counts what each has to read and write once. Every provider must
match fp64 before it is timed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.timing import Run, time_interleaved
from lwz_kernels.adamw import adamw_, join_halves, split_halves

__all__ = ["main"]

# SmolLM2-135M; as many as fit beside others on a GPU.
SIZES = {"cpu": 134_515_008, "cuda": 1_000_000_000}
NUM_CHECKED = 100_003
STEP, LR, BETAS, WEIGHT_DECAY = 3, 1e-3, (0.9, 0.95), 0.1
COLUMNS = (
    "op",
    "provider",
    "moments",
    "parameters",
    "bytes_a_parameter",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="timed in all")
    parser.add_argument("--commit", default=report.commit(), help="where there is no checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check(options.device)
    machine = report.machine(options.device, options.threads) | {"commit": options.commit}
    runs, moved, _ = make_runs(SIZES[options.device], options.device)
    rows = []
    for name, samples in time_interleaved(runs, options.seconds, options.device).items():
        p20, median, p80 = report.quantiles(samples)
        provider, _, moments = name.partition(" ")
        gb = moved[name] * SIZES[options.device] / 1e9
        row: dict[str, Any] = {
            "op": "adamw",
            "provider": provider,
            "moments": moments,
            "parameters": SIZES[options.device],
            "bytes_a_parameter": moved[name],
            "median_ms": f"{median:.2f}",
            "p20_ms": f"{p20:.2f}",
            "p80_ms": f"{p80:.2f}",
            "gb_per_s": f"{gb / (median / 1e3):.1f}",
        }
        rows.append(row | machine)
        print(f"{name:20} {median:9.2f} ms {row['gb_per_s']:>8} GB/s")
    report.write_csv(options.csv, (*COLUMNS, *machine), rows)


def make_runs(size: int, device: str) -> tuple[dict[str, Run], dict[str, int], dict[str, Any]]:
    """A step of each provider, the bytes a parameter that it moves, and the masters it steps."""
    torch.manual_seed(0)
    master = torch.randn(size, device=device)
    grad = torch.randn(size, device=device)
    runs: dict[str, Run] = {}
    masters: dict[str, Any] = {}
    for name, dtype in (("halves fp32", torch.float32), ("halves bf16", torch.bfloat16)):
        upper, lower = split_halves(master)
        moments = [torch.zeros(size, dtype=dtype, device=device) for _ in range(2)]
        runs[name] = _halves(upper, lower, grad, moments)
        masters[name] = (upper, lower)
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = grad
    optimizer = torch.optim.AdamW(
        [parameter], lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    weights = torch.empty(size, dtype=torch.bfloat16, device=device)

    def step() -> None:
        optimizer.step()
        weights.copy_(parameter.detach())

    runs["torch_fused fp32"] = step
    masters["torch_fused fp32"] = parameter.detach()
    # Weights, lower halves and both moments both ways, the gradient; the copy reads fp32 again.
    return runs, {"halves fp32": 28, "halves bf16": 20, "torch_fused fp32": 34}, masters


def _halves(upper: Tensor, lower: Tensor, grad: Tensor, moments: list[Tensor]) -> Run:
    steps = iter(range(1, 1 << 40))

    def step() -> None:
        adamw_(
            upper,
            grad,
            *moments,
            step=next(steps),
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            lower=lower,
        )

    return step


def check(device: str) -> None:
    """Three steps of each provider against torch's optimizer in fp64."""
    runs, _, masters = make_runs(NUM_CHECKED, device)
    torch.manual_seed(0)
    truth = torch.nn.Parameter(torch.randn(NUM_CHECKED, device=device).double())
    truth.grad = torch.randn(NUM_CHECKED, device=device).double()
    optimizer = torch.optim.AdamW([truth], lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    for _ in range(STEP):
        optimizer.step()
        for run in runs.values():
            run()
    for name, found in masters.items():
        master = join_halves(*found) if isinstance(found, tuple) else found
        error = (master.double() - truth.detach()).abs().max().item()
        # Moments in bf16 are off by 2^-9 each; the step is LR.
        allowed = 0.01 * LR * STEP if name.endswith("bf16") else 1e-6
        if not error <= allowed:
            raise SystemExit(f"{name} is wrong: error {error:.2e}, allowed {allowed:.2e}")


if __name__ == "__main__":
    main()
