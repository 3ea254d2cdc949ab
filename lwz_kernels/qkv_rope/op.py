"""torch.library operators of qkv_rope: schema, dispatch, fake, autograd.

The implementation is chosen inside, so that `torch.compile` has nothing to trace. Backward saves
the tables and the positions, no activations.
"""

from typing import Any

import torch
from torch import Tensor

from lwz_kernels.dispatch import log_choice_once
from lwz_kernels.once_differentiable import register_once_differentiable
from lwz_kernels.qkv_rope.torch_rotation import qkv_rope_bwd_torch, qkv_rope_fwd_torch

__all__ = ["qkv_rope_op"]

IMPLS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

torch.library.define(
    "lwz::qkv_rope",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor? position_ids, int num_heads, int num_kv_heads, "
    "str impl) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lwz::qkv_rope_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? position_ids, str impl) "
    "-> Tensor",
)
qkv_rope_op = torch.ops.lwz.qkv_rope.default
_backward_op = torch.ops.lwz.qkv_rope_backward.default


@torch.library.impl("lwz::qkv_rope", "default")
def _qkv_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (qkv, cos, sin, position_ids, num_heads, num_kv_heads)
    if _choose(impl, qkv) == "triton":
        from lwz_kernels.qkv_rope.kernels import qkv_rope_fwd_triton

        return qkv_rope_fwd_triton(*arguments)
    return qkv_rope_fwd_torch(*arguments)


@torch.library.impl("lwz::qkv_rope_backward", "default")
def _qkv_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    impl: str,
) -> Tensor:
    arguments = (dq, dk, dv, cos, sin, position_ids)
    if _choose(impl, dq) == "triton":
        from lwz_kernels.qkv_rope.kernels import qkv_rope_bwd_triton

        return qkv_rope_bwd_triton(*arguments)
    return qkv_rope_bwd_torch(*arguments)


def _choose(impl: str, x: Tensor) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        expected = f"{', '.join(IMPLS)} or reference"
        raise ValueError(f"qkv_rope: unknown impl {impl!r}, expected {expected}")
    if impl == "torch":
        return impl
    obstacle = _triton_obstacle(x)
    if obstacle and impl == "triton":
        raise NotImplementedError(f"qkv_rope: impl='triton' {obstacle}; use impl='torch' or 'auto'")
    if impl == "auto":
        reason = f"triton {obstacle}" if obstacle else "CUDA tensors"
        log_choice_once("qkv_rope", "torch" if obstacle else "triton", reason)
    return "torch" if obstacle else "triton"


def _triton_obstacle(x: Tensor) -> str:
    """Why the Triton kernels cannot run; empty if they can."""
    if not x.is_cuda:
        return f"needs CUDA tensors, got {x.device.type}"
    if x.dtype not in TRITON_DTYPES:
        return f"needs bfloat16, float16 or float32, got {x.dtype}"
    return ""


@torch.library.register_fake("lwz::qkv_rope")
def _qkv_rope_fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    del sin, position_ids, impl
    shape = (qkv.shape[0], num_kv_heads, 2 * cos.shape[1])
    q = qkv.new_empty((qkv.shape[0], num_heads, 2 * cos.shape[1]))
    return q, qkv.new_empty(shape), qkv.new_empty(shape)


@torch.library.register_fake("lwz::qkv_rope_backward")
def _qkv_rope_backward_fake(dq: Tensor, dk: Tensor, *_: Any) -> Tensor:
    return dq.new_empty((dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    del output
    _, cos, sin, position_ids, *_, impl = inputs
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.impl = impl


def _autograd(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dq, dk, dv, *ctx.saved_tensors, ctx.impl), *(None,) * 6


torch.library.register_autograd("lwz::qkv_rope", _autograd, setup_context=_setup_context)
register_once_differentiable("lwz::qkv_rope_backward")
