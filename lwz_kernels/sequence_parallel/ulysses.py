"""Ulysses: tokens for heads. One all-to-all of q, k and v, attention to whole documents, one back.

Jacobs et al., DeepSpeed Ulysses (arXiv:2309.14509). Each rank ends with all tokens of H / P query
heads and max(J / P, 1) key/value heads: where J < P, a head goes to each of the P / J ranks whose
queries use it, and their gradients are summed in fp32. The send buffer is written in one pass and
what arrives is already the stream in order, so attention reads it by strides.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.sequence_parallel.communication import all_to_all, transpose_ranks

__all__ = ["gather_heads", "merge_heads", "pack_heads", "scatter_heads", "ulysses_attention"]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    group: dist.ProcessGroup,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    need_lse: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a stream whose contiguous shards lie on the ranks of `group`.

    Args:
        q: [n, H, K], P divides H.
        k, v: [n, J, K]; P divides J, or J divides P.
        table: the documents of the whole stream, `SegmentTable.from_cu_seqlens`.
        group: P ranks.
        softmax_scale, window_size, impl: as in `attention`.
        need_lse: also exchange lse, a third collective.

    Returns:
        out [n, H, K], and lse [H, n] fp32 (fp64 for fp64) or None; both differentiable.

    Raises:
        ValueError: heads that do not divide.
    """
    q_THK, k_TJK, v_TJK = scatter_heads(q, k, v, group)
    out_THK, lse_HT = attention(
        q_THK,
        k_TJK,
        v_TJK,
        segments=table,
        softmax_scale=softmax_scale,
        window_size=window_size,
        impl=impl,
    )
    lse = gather_heads(lse_HT.t(), group).t() if need_lse else None
    return gather_heads(out_THK, group), lse


def scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, H, K] and [n, J, K] to [T, H / P, K] and [T, max(J / P, 1), K], in one collective."""
    num_ranks, heads, kv_heads = dist.get_world_size(group), q.shape[1], k.shape[1]
    if heads % num_ranks or (kv_heads % num_ranks and num_ranks % kv_heads):
        raise ValueError(
            f"Ulysses over {num_ranks} ranks needs query heads in multiples of it and KV heads "
            f"that divide it or are multiples of it, got {heads} and {kv_heads}; "
            "use scheme 'gather_kv'"
        )
    return _ScatterHeads.apply(q, k, v, group)


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H / P, ...] to [n, H, ...]: the way back of `scatter_heads`, in one collective."""
    num_ranks = dist.get_world_size(group)
    return merge_heads(all_to_all(x.reshape(num_ranks, -1, *x.shape[1:]), group))


def pack_heads(q: Tensor, k: Tensor, v: Tensor, num_ranks: int) -> Tensor:
    """What `scatter_heads` sends: [P, n, H / P + 2 · max(J / P, 1), K], a row for each rank."""
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    own, own_kv = heads // num_ranks, max(kv_heads // num_ranks, 1)
    send_SNHK = q.new_empty((num_ranks, tokens, own + 2 * own_kv, size))
    q_SNHK, k_SNJK, v_SNJK = send_SNHK.split((own, own_kv, own_kv), 2)
    q_SNHK.copy_(q.reshape(tokens, num_ranks, own, size).transpose(0, 1))
    copies = max(num_ranks // kv_heads, 1)
    for target_SNJK, x in ((k_SNJK, k), (v_SNJK, v)):
        # [n, J, K] as [P / copies, 1, n, own_kv, K]: neighbours share a head.
        x_S1NJK = x.reshape(tokens, -1, 1, own_kv, size).permute(1, 2, 0, 3, 4)
        target_SNJK.unflatten(0, (-1, copies)).copy_(x_S1NJK)
    return send_SNHK


def merge_heads(received_SN: Tensor) -> Tensor:
    """What `gather_heads` received, [P, n, H / P, ...], as [n, H, ...]."""
    return received_SN.transpose(0, 1).flatten(1, 2)


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_ranks = dist.get_world_size(group)
        own, own_kv = q.shape[1] // num_ranks, max(k.shape[1] // num_ranks, 1)
        send_SNHK = pack_heads(q, k, v, num_ranks)
        ctx.group, ctx.kv_heads = group, k.shape[1]
        stream_THK = transpose_ranks(send_SNHK, group).flatten(0, 1)
        return stream_THK.split((own, own_kv, own_kv), 1)  # views, without a copy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        num_ranks = dist.get_world_size(ctx.group)
        tokens, own_kv = dq.shape[0] // num_ranks, dk.shape[1]
        send_THK = torch.cat((dq, dk, dv), 1)
        received_SNHK = transpose_ranks(
            send_THK.view(num_ranks, tokens, *send_THK.shape[1:]), ctx.group
        )
        dq_SNHK, *dkv_SNJK = received_SNHK.split((dq.shape[1], own_kv, own_kv), 2)
        dq = merge_heads(dq_SNHK)
        dk, dv = (_sum_copies(x_SNJK, ctx.kv_heads) for x_SNJK in dkv_SNJK)
        return dq, dk, dv, None


def _sum_copies(x_SNJK: Tensor, kv_heads: int) -> Tensor:
    """[P, n, own, K] to [n, J, K]; the copies of a head are summed in fp32, rounded once."""
    num_ranks, tokens, own_kv, size = x_SNJK.shape
    copies = num_ranks * own_kv // kv_heads
    x_JCNK = x_SNJK.transpose(1, 2).reshape(kv_heads, copies, tokens, size)
    summed_JNK = x_JCNK.sum(1, dtype=wide_dtype(x_SNJK.dtype)) if copies > 1 else x_JCNK[:, 0]
    return summed_JNK.to(x_SNJK.dtype).transpose(0, 1)
