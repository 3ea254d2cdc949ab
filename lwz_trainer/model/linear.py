"""Matrix products of the decoder, and the data type that suits a device.

A CPU without bf16 matrix instructions (AVX2, or AVX-512 without BF16) multiplies bf16 matrices
several times slower than fp32 ones. There `linear` multiplies fp32 copies that live for one call;
a handful of rows is limited by reading the weights, so those stay bf16.
Decoding has few rows and no gradients: there the kernel that reads each weight once runs instead,
in bf16 too unless torch has matrix instructions that the kernel lacks.
In the backward pass weight gradients go straight into the parameter's `main_grad`, if it has one.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.loss_head import has_native_bf16, matmul_wide
from lwz_kernels.skinny_linear import AUTO_MAX_ROWS, skinny_linear
from lwz_trainer.model.main_grad import grad_dtype, main_grad

__all__ = [
    "default_dtype",
    "embedding",
    "has_native_bf16",
    "is_fast_for_few_rows",
    "linear",
    "resolve_dtype",
    "wide_logits",
]

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
    upcasts = (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not has_native_bf16()
        and x.numel() >= _MIN_UPCAST_ROWS * x.shape[-1]
    )
    return _Linear.apply(x, weight, bias, upcasts)


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, D] by `input_ids` [T] int: [T, D], differentiable."""
    return _Embedding.apply(input_ids, weight)


def wide_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden · headᵀ in fp32 for sampling: [B, D] and [V, D] of one type to [B, V]."""
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return skinny_linear(hidden, head, out_dtype=torch.float32)
    return matmul_wide(hidden, head.t())


def is_fast_for_few_rows(dtype: torch.dtype) -> bool:
    """Whether the native kernels multiply `dtype` with instructions as wide as torch has here."""
    if dtype == torch.bfloat16:
        return not has_native_bf16() or native.has_fastest_bf16()
    return dtype == torch.float32


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether the inference kernel for few rows may run and is the faster one."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype != weight.dtype:
        return False
    return is_fast_for_few_rows(x.dtype) and 0 < x.numel() <= AUTO_MAX_ROWS * x.shape[-1]


class _Linear(torch.autograd.Function):
    """`F.linear`, of fp32 copies where those are faster; keeps only its inputs for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, upcasts: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.upcasts, ctx.main_grad = upcasts, main_grad(weight)
        ctx.grad_dtype = grad_dtype(weight)
        if not upcasts:
            return F.linear(x, weight, bias)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dout_RO = grad_outputs[0].reshape(-1, weight.shape[0])
        x_RI = x.reshape(-1, weight.shape[1])
        factor = weight
        if ctx.upcasts:
            dout_RO, x_RI, factor = dout_RO.float(), x_RI.float(), weight.float()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dout_RO @ factor).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            dweight = _dweight(dout_RO, x_RI, ctx.grad_dtype, ctx.main_grad)
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = dout_RO.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose gradient touches the rows of its tokens only."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.num_rows, ctx.main_grad = weight.shape[0], main_grad(weight)
        ctx.grad_dtype = grad_dtype(weight)
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        (dout_TD,) = grad_outputs
        total = ctx.main_grad
        if total is None:
            return None, torch.ops.aten.embedding_dense_backward(
                dout_TD.to(ctx.grad_dtype), input_ids, ctx.num_rows, -1, False
            )
        if total.is_cuda:  # sorts first; index_add_ would add in any order there
            total.index_put_((input_ids,), dout_TD.to(total.dtype), accumulate=True)
        else:
            total.index_add_(0, input_ids, dout_TD.to(total.dtype))
        return None, None


def _dweight(
    dout_RO: Tensor, x_RI: Tensor, dtype: torch.dtype, total: Tensor | None
) -> Tensor | None:
    """dout.T @ x, added to `total` where there is one, else returned in `dtype`."""
    if total is None:
        if dout_RO.is_cuda and dtype != dout_RO.dtype:
            return torch.mm(dout_RO.T, x_RI, out_dtype=dtype)
        return (dout_RO.T @ x_RI).to(dtype)
    if dout_RO.dtype == total.dtype:
        total.addmm_(dout_RO.T, x_RI)
    elif dout_RO.is_cuda:
        torch.addmm(total, dout_RO.T, x_RI, out_dtype=total.dtype, out=total)
    else:
        total.add_(dout_RO.T @ x_RI)
    return None
