"""Packs of bf16 on a CPU that multiplies pairs of them: all sequences in one native call.

Sequences that share a prefix add to its gradients inside the call, so nothing is copied or joined
around it. csrc/attention.h has the mathematics.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels import native
from lwz_kernels.attention.segments import SegmentTable

__all__ = ["native_attention"]


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, K] and lse [H, T]; only out is differentiable."""
    return _NativeAttention.apply(q, k, v, table, softmax_scale)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_with_even_strides(x) for x in (q, k, v))
        sequences = _sequences(table)
        out, lse = native.attention(q, k, v, *sequences, softmax_scale=softmax_scale)
        ctx.save_for_backward(q, k, v, out, lse, *sequences)
        ctx.softmax_scale = softmax_scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = native.attention_backward(
            _with_even_strides(dout), *ctx.saved_tensors, softmax_scale=ctx.softmax_scale
        )
        return *gradients, None, None


def _sequences(table: SegmentTable) -> tuple[Tensor, ...]:
    """Lengths and prefixes, [N] int64 each."""
    assert table.pack is not None, "other tables were refused"
    pack = table.pack

    def build() -> tuple[Tensor, ...]:
        return tuple(torch.tensor(x, dtype=torch.int64, device="cpu") for x in pack)

    return table.cached(("native",), build)


def _with_even_strides(x: Tensor) -> Tensor:
    """`x` [T, H, K] as the kernel reads it, in pairs along K: copied if it has to be."""
    is_readable = x.stride(2) == 1 and not any(n % 2 for n in x.stride()[:2])
    return x if is_readable and x.data_ptr() % 4 == 0 else x.contiguous()
