"""AdamW in plain torch, in the type that it is given: what correct means."""

import torch
from torch import Tensor

from lwz_kernels.adamw.factors import Factors
from lwz_kernels.adamw.halves import join_halves, split_halves

__all__ = ["adamw_reference_", "adamw_torch_"]

# Elements whose intermediate values exist at a time: 4 MiB of each in fp32.
SPAN = 1 << 20


def adamw_reference_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Factors
) -> None:
    """In place on master and moments, all of one type: fp32, or fp64 as the oracle of tests."""
    grad = grad * by.grad_scale
    exp_avg += (grad - exp_avg) * (1 - by.beta1)
    exp_avg_sq *= by.beta2
    exp_avg_sq += grad.square() * (1 - by.beta2)
    denominator = exp_avg_sq.sqrt() * by.inverse_correction + by.eps
    master *= by.decay
    master -= exp_avg * by.step_size / denominator


def adamw_torch_(
    weights: Tensor,
    lower: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    by: Factors,
) -> None:
    """The same on the operator's tensors, a span at a time."""
    for start in range(0, weights.numel(), SPAN):
        span = slice(start, start + SPAN)
        master = weights[span] if lower is None else join_halves(weights[span], lower[span])
        mean, square = exp_avg[span].to(torch.float32), exp_avg_sq[span].to(torch.float32)
        adamw_reference_(master, grad[span], mean, square, by)
        if exp_avg.dtype != torch.float32:  # else they were stepped in place
            exp_avg[span], exp_avg_sq[span] = mean, square
        if lower is not None:
            weights[span], lower[span] = split_halves(master)
