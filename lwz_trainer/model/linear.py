"""Matrix products of the decoder, and the data type that suits a device.

A CPU without bf16 matrix instructions (AVX2, or AVX-512 without BF16) multiplies bf16 matrices
several times slower than fp32 ones. There `linear` multiplies fp32 copies that live for one call;
a handful of rows is limited by reading the weights, so those stay bf16.
Decoding has few rows and no gradients: there the kernel that reads each weight once runs instead.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lwz_kernels.loss_head import has_native_bf16, matmul_wide
from lwz_kernels.skinny_linear import AUTO_MAX_ROWS, skinny_linear

__all__ = ["default_dtype", "has_native_bf16", "linear", "resolve_dtype", "wide_logits"]

# From this many rows on, fp32 copies are the faster choice (AVX2, 576 x 1536, one thread: 8 rows
# 0.62 ms against 1.72 ms, 32 rows 0.95 ms against 5.80 ms; one row 0.21 ms against 0.19 ms).
_MIN_UPCAST_ROWS = 8


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where matrix products of that type are fast on `device`, fp32 elsewhere."""
    if torch.device(device).type == "cuda" or has_native_bf16():
        return torch.bfloat16
    return torch.float32


def resolve_dtype(name: Literal["auto", "bf16", "fp32"], device: torch.device | str) -> torch.dtype:
    """The torch type of a configuration's `dtype`; "auto" is `default_dtype(device)`."""
    if name == "auto":
        return default_dtype(device)
    return torch.bfloat16 if name == "bf16" else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias, differentiable.

    Args:
        x: [..., in], any float type.
        weight: [out, in], the type of `x`.
        bias: [out] or None.

    Returns:
        [..., out] of the type of `x`.

    Numerics: accumulates in fp32 for bf16 and fp32 inputs, rounds once at the end.
    """
    if _is_skinny(x, weight):
        out_RO = skinny_linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return out_RO.view(*x.shape[:-1], weight.shape[0])
    if (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not has_native_bf16()
        and x.numel() >= _MIN_UPCAST_ROWS * x.shape[-1]
    ):
        return _Fp32Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden · headᵀ in fp32 for sampling: [B, D] and [V, D] (an fp32 head on a CPU) to [B, V]."""
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return skinny_linear(hidden.to(head.dtype), head)
    return matmul_wide(hidden, head.t())


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether the inference kernel for few rows may run, and no bf16 instructions beat it."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype != weight.dtype:
        return False
    is_suitable = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not has_native_bf16())
    return is_suitable and 0 < x.numel() <= AUTO_MAX_ROWS * x.shape[-1]


class _Fp32Linear(torch.autograd.Function):
    """`F.linear` of fp32 copies; only the narrow inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dout_RO = grad_outputs[0].reshape(-1, weight.shape[0]).float()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dout_RO @ weight.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            dweight = (dout_RO.T @ x.reshape(-1, weight.shape[1]).float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dout_RO.sum(0).to(weight.dtype)
        return dx, dweight, dbias
