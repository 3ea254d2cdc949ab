"""The decoder's operations between its products, keeping only their inputs for the backward pass.

Autograd would keep their intermediate values: of a norm on a CPU several in fp32, of the gated
feed-forward layer the activated gate and its product. They are computed again instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.dtypes import wide_dtype
from lwz_trainer.model.main_grad import grad_dtype, main_grad

__all__ = ["rms_norm", "silu_gate"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, with statistics in fp32 or wider; differentiable once.

    Args:
        x: [..., D].
        weight: [D], dtype of x.
        eps: added to the mean square.

    Returns:
        [..., D] as x.
    """
    # On a GPU torch's own is one kernel, which keeps a number a row.
    if x.is_cuda or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2F], gate then up: [..., F]; differentiable once."""
    return _SiluGate.apply(gate_up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.main_grad, ctx.grad_dtype = eps, main_grad(weight), grad_dtype(weight)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = wide_dtype(x.dtype)
        normed = x.to(wide)
        scale = normed.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        normed = normed * scale
        dout = dout.to(wide)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dout * normed).flatten(0, -2).sum(0)
            if ctx.main_grad is not None:
                ctx.main_grad.add_(dweight)
                dweight = None
            else:
                dweight = dweight.to(ctx.grad_dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dnormed = dout * weight.to(wide)
            shared = (dnormed * normed).mean(-1, keepdim=True)
            dx = dnormed.sub_(normed.mul_(shared)).mul_(scale).to(x.dtype)
        return dx, dweight, None


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dout, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dout * up, gate, grad_input=dgate)
        return dgate_up
