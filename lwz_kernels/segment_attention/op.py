"""torch.library operators of segment_attention: schema, dispatch, fake, autograd.

Segments enter as [S, 4] int64 on the CPU, so that compiled graphs do not depend on their values.
Backward saves q, k, v, out and lse, and computes the scores again.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lwz_kernels.segment_attention.segments import Segment, SegmentTable
from lwz_kernels.segment_attention.torch_blocks import (
    segment_attention_bwd_blocks,
    segment_attention_fwd_blocks,
)

__all__ = ["run_segment_attention_bwd", "run_segment_attention_fwd", "segment_attention_op"]

torch.library.define(
    "lwz::segment_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor segments, float softmax_scale, int? window_size, "
    "str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "lwz::segment_attention_backward",
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor segments, float softmax_scale, int? window_size, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
segment_attention_op = torch.ops.lwz.segment_attention.default
_backward_op = torch.ops.lwz.segment_attention_backward.default


def run_segment_attention_fwd(
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
            from lwz_kernels.segment_attention.kernels import segment_attention_fwd_triton

            return segment_attention_fwd_triton(q, k, v, table, softmax_scale, window_size)
        return segment_attention_fwd_blocks(q, k, v, table.segments, softmax_scale, window_size)


def run_segment_attention_bwd(
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
            from lwz_kernels.segment_attention.kernels import segment_attention_bwd_triton

            return segment_attention_bwd_triton(
                dout, q, k, v, lse, delta_HT, table, softmax_scale, window_size, grad_dtype
            )
        dq, dk, dv = segment_attention_bwd_blocks(
            dout, q, k, v, lse, delta_HT, table.segments, softmax_scale, window_size
        )
    return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)


@torch.library.impl("lwz::segment_attention", "default")
def _segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    table = _table_of(segments, q, k)
    return run_segment_attention_fwd(q, k, v, table, softmax_scale, window_size, impl)


@torch.library.impl("lwz::segment_attention_backward", "default")
def _segment_attention_backward(
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
    return run_segment_attention_bwd(
        dout, dlse, q, k, v, out, lse, table, softmax_scale, window_size, impl, q.dtype
    )


def _table_of(segments: Tensor, q: Tensor, k: Tensor) -> SegmentTable:
    return _cached_table(tuple(map(tuple, segments.tolist())), q.shape[0], k.shape[0])


@functools.lru_cache(maxsize=64)
def _cached_table(segments: tuple[Segment, ...], num_q: int, num_k: int) -> SegmentTable:
    """All layers of a model, forward and backward, ask for the same few tables."""
    return SegmentTable(segments, num_q, num_k)


@torch.library.register_fake("lwz::segment_attention")
def _segment_attention_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@torch.library.register_fake("lwz::segment_attention_backward")
def _segment_attention_backward_fake(
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


torch.library.register_autograd("lwz::segment_attention", _autograd, setup_context=_setup_context)
