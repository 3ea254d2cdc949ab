"""Gather-KV: each rank's queries meet the keys and values of the whole stream, a head at a time.

The scheme of Llama 3 (arXiv:2407.21783, 3.3.2), with chunks assigned by their work instead of
zigzag. While one KV head is worked on, the next one is gathered, and in backward the gradients of
the one before are reduce-scattered in fp32. Backward gathers again instead of keeping the stream.
Every rank issues J gathers and J scatters, whatever its segments are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.attention import (
    SegmentTable,
    attention_bwd,
    attention_fwd,
)
from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.sequence_parallel.communication import (
    PendingTensor,
    start_all_gather,
    start_reduce_scatter,
)
from lwz_kernels.sequence_parallel.layout import SequenceLayout

__all__ = ["GatherPlan", "gather_kv_attention"]


class GatherPlan:
    """What one KV rank needs at every layer: its segments, and the order of gathered chunks.

    Args:
        layout: of scheme `gather_kv` or `two_d`.
        kv_rank: rank within the group that exchanges keys and values.
        device: where the attention runs.
    """

    def __init__(self, layout: SequenceLayout, kv_rank: int, device: torch.device) -> None:
        gathered = [chunk for held in layout.chunks for chunk in held]
        order = sorted(range(len(gathered)), key=gathered.__getitem__)
        queries = layout.padded_tokens // layout.kv_ranks
        self.table = SegmentTable(layout.segments(kv_rank), queries, layout.padded_tokens)
        self.chunk_tokens = layout.chunk_tokens
        self.kv_ranks = layout.kv_ranks
        self._gathered = torch.tensor(gathered, device=device)
        self._order = torch.tensor(order, device=device)

    def to_stream(self, kv_S2NK: Tensor) -> tuple[Tensor, Tensor]:
        """What was gathered, [S, 2, n, K], as keys and values of the stream, [T, 1, K]."""
        size = kv_S2NK.shape[-1]
        kv_2CBK = kv_S2NK.transpose(0, 1).unflatten(2, (-1, self.chunk_tokens)).flatten(1, 2)
        kv_2TK = kv_2CBK.index_select(1, self._order).view(2, -1, size)
        return kv_2TK[0].unsqueeze(1), kv_2TK[1].unsqueeze(1)

    def to_ranks(self, dk_T1K: Tensor, dv_T1K: Tensor) -> Tensor:
        """The inverse of `to_stream`."""
        size = dk_T1K.shape[-1]
        dkv_2CBK = torch.stack((dk_T1K, dv_T1K)).view(2, -1, self.chunk_tokens, size)
        dkv_2CBK = dkv_2CBK.index_select(1, self._gathered)
        return dkv_2CBK.view(2, self.kv_ranks, -1, size).transpose(0, 1)


def gather_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: GatherPlan,
    group: dist.ProcessGroup,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of a stream whose chunks lie on the ranks of `group`.

    Args:
        q: [n, H, K].
        k, v: [n, J, K]; J divides H.
        plan: of this rank in `group`.
        group: the ranks that exchange keys and values.
        softmax_scale, window_size, impl: as in `attention`.

    Returns:
        out [n, H, K] and lse [H, n] fp32 (fp64 for fp64); both differentiable.
    """
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return _GatherKv.apply(q, k, v, plan, group, scale, window_size, impl)


def _start_gather(k: Tensor, v: Tensor, head: int, group: dist.ProcessGroup) -> PendingTensor:
    return start_all_gather(torch.stack((k[:, head], v[:, head])), group)


class _GatherKv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: GatherPlan,
        group: dist.ProcessGroup,
        scale: float,
        window_size: int | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, _ = q.shape
        out_NHK = q.new_empty(q.shape)
        lse_HN = q.new_empty((heads, tokens), dtype=wide_dtype(q.dtype))
        ctx.options = {"softmax_scale": scale, "window_size": window_size, "impl": impl}
        pending = _start_gather(k, v, 0, group)
        for head, queries in enumerate(_query_heads(q, k)):
            k_T1K, v_T1K = plan.to_stream(pending.wait())
            if head + 1 < k.shape[1]:
                pending = _start_gather(k, v, head + 1, group)
            out_NHK[:, queries], lse_HN[queries] = attention_fwd(
                q[:, queries], k_T1K, v_T1K, plan.table, **ctx.options
            )
        ctx.save_for_backward(q, k, v, out_NHK, lse_HN)
        ctx.plan, ctx.group = plan, group
        return out_NHK, lse_HN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_NHK, lse_HN = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        pending = _start_gather(k, v, 0, ctx.group)
        scattered: PendingTensor | None = None
        for head, queries in enumerate(_query_heads(q, k)):
            k_T1K, v_T1K = ctx.plan.to_stream(pending.wait())
            if head + 1 < k.shape[1]:
                pending = _start_gather(k, v, head + 1, ctx.group)
            dq_NHK, dk_T1K, dv_T1K = attention_bwd(
                dout[:, queries],
                q[:, queries],
                k_T1K,
                v_T1K,
                out_NHK[:, queries],
                lse_HN[queries],
                ctx.plan.table,
                dlse=dlse[queries],
                grad_dtype=wide_dtype(q.dtype),
                **ctx.options,
            )
            dq[:, queries] = dq_NHK
            if scattered is not None:
                dk[:, head - 1], dv[:, head - 1] = scattered.wait()
            scattered = start_reduce_scatter(ctx.plan.to_ranks(dk_T1K, dv_T1K), ctx.group)
        assert scattered is not None, "there is at least one KV head"
        dk[:, -1], dv[:, -1] = scattered.wait()
        return dq, dk, dv, *(None,) * 5


def _query_heads(q: Tensor, k: Tensor) -> list[slice]:
    """For each KV head, the query heads that share it."""
    shared = q.shape[1] // k.shape[1]
    return [slice(start, start + shared) for start in range(0, q.shape[1], shared)]
