"""torch.library operators of attention: schema, dispatch, fake, autograd.

Segments enter as [S, 6] int64 on the CPU, so that compiled graphs do not depend on their values.
Backward saves q, k, v, out and lse, and computes the scores again. For implementations whose own
backward ignores the gradient of lse, `with_lse_gradient` adds what it contributes.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.attention.backends import choose_split_impl
from lwz_kernels.attention.segments import SegmentTable
from lwz_kernels.attention.torch_blocks import (
    attention_bwd_blocks,
    attention_fwd_blocks,
)
from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.once_differentiable import register_once_differentiable

__all__ = ["attention_op", "run_attention_bwd", "run_attention_fwd", "with_lse_gradient"]

torch.library.define(
    "lwz::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor segments, float softmax_scale, int? window_size, "
    "str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "lwz::attention_backward",
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor segments, float softmax_scale, int? window_size, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
attention_op = torch.ops.lwz.attention.default
_backward_op = torch.ops.lwz.attention_backward.default


def run_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out and lse by the implementation that `impl` names, "torch" or "triton"."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if impl == "triton":
            from lwz_kernels.attention.launch import attention_fwd_triton

            return attention_fwd_triton(q, k, v, table, softmax_scale, window_size)
        return attention_fwd_blocks(q, k, v, table.segments, softmax_scale, window_size)


def run_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in `grad_dtype` by the implementation that `impl` names."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        delta_HT = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
        if dlse is not None:
            delta_HT = delta_HT - dlse
        # A query whose larger softmax saw nothing has p = 0; its dlse may be no number.
        saw_nothing_HT = lse == float("-inf")
        lse = lse.masked_fill(saw_nothing_HT, float("inf"))
        delta_HT = delta_HT.masked_fill(saw_nothing_HT, 0.0)
        if impl == "triton":
            from lwz_kernels.attention.launch import attention_bwd_triton

            return attention_bwd_triton(
                dout, q, k, v, lse, delta_HT, table, softmax_scale, window_size, grad_dtype
            )
        dq, dk, dv = attention_bwd_blocks(
            dout, q, k, v, lse, delta_HT, table.segments, softmax_scale, window_size
        )
    return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)


@torch.library.impl("lwz::attention", "default")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    table = _table_of(segments, q, k)
    return run_attention_fwd(q, k, v, table, softmax_scale, window_size, impl)


@torch.library.impl("lwz::attention_backward", "default")
def _attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    table = _table_of(segments, q, k)
    return run_attention_bwd(
        dout, dlse, q, k, v, out, lse, table, softmax_scale, window_size, impl, q.dtype
    )


def _table_of(segments: Tensor, q: Tensor, k: Tensor) -> SegmentTable:
    return _cached_table(tuple(map(tuple, segments.tolist())), q.shape[0], k.shape[0])


@functools.lru_cache(maxsize=64)
def _cached_table(segments: tuple[tuple[int, ...], ...], num_q: int, num_k: int) -> SegmentTable:
    """All layers of a model, forward and backward, ask for the same few tables."""
    return SegmentTable(segments, num_q, num_k)


@torch.library.register_fake("lwz::attention")
def _attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@torch.library.register_fake("lwz::attention_backward")
def _attention_backward_fake(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    del dout, dlse
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, segments, *options = inputs
    ctx.save_for_backward(q, k, v, *output, segments)
    ctx.options = options


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _backward_op(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *(None,) * 4


torch.library.register_autograd("lwz::attention", _autograd, setup_context=_setup_context)
register_once_differentiable("lwz::attention_backward")


def with_lse_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
) -> Tensor:
    """`lse`, made differentiable in q and k; costs nothing where that gradient is not asked for."""
    if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad):
        return lse
    return _LseGradient.apply(q, k, v, out.detach(), lse, table, softmax_scale, window_size)


class _LseGradient(torch.autograd.Function):
    """Gradients are linear in those of out and lse: this is the part of lse, with dout 0."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        table: SegmentTable,
        softmax_scale: float,
        window_size: int | None,
    ) -> Tensor:
        lse = lse.clone()  # an input returned as it is would lose its gradient function
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.table, ctx.softmax_scale, ctx.window_size = table, softmax_scale, window_size
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        impl = choose_split_impl("auto", q, ctx.table, ctx.window_size)
        dq, dk, _ = run_attention_bwd(
            torch.zeros_like(out),
            dlse,
            q,
            k,
            v,
            out,
            lse,
            ctx.table,
            ctx.softmax_scale,
            ctx.window_size,
            impl,
            q.dtype,
        )
        return dq, dk, *(None,) * 6
