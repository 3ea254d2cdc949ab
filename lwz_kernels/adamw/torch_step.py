"""AdamW in plain torch, on any device, a span of elements at a time."""

import torch
from torch import Tensor

from lwz_kernels.adamw.factors import Factors
from lwz_kernels.adamw.halves import join_halves, split_halves

__all__ = ["adamw_torch_"]

# Elements whose intermediate values exist at a time: 4 MiB of each in fp32.
SPAN = 1 << 20


def adamw_torch_(
    weights: Tensor,
    lower: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    by: Factors,
) -> None:
    """In place; arguments as in the public function."""
    for start in range(0, weights.numel(), SPAN):
        span = slice(start, start + SPAN)
        master = weights[span] if lower is None else join_halves(weights[span], lower[span])
        scaled = grad[span] * by.grad_scale
        mean, square = exp_avg[span].to(torch.float32), exp_avg_sq[span].to(torch.float32)
        mean += (scaled - mean) * (1 - by.beta1)
        square *= by.beta2
        square += scaled.square() * (1 - by.beta2)
        if exp_avg.dtype != torch.float32:  # else they were stepped in place
            exp_avg[span], exp_avg_sq[span] = mean, square
        master *= by.decay
        master -= mean * by.step_size / (square.sqrt() * by.inverse_correction + by.eps)
        if lower is not None:
            weights[span], lower[span] = split_halves(master)
