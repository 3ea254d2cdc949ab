"""Packed causal attention with one explicit T x T mask: slow, differentiable, what correct means.

Computes in fp64 when the inputs are fp64, else in fp32; memory grows with T squared.
"""

from collections.abc import Sequence

import torch

__all__ = ["attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: Sequence[int],
    prefix_of: Sequence[int] | None,
    softmax_scale: float,
) -> torch.Tensor:
    """out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, j]) v[s, j], visible s, j = h J // H."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    visible_TT = _visible_keys(cu_seqlens, prefix_of).to(q.device)
    heads = torch.arange(num_heads, device=q.device) * num_kv_heads // num_heads
    q_HTK, k_HTK, v_HTK = (
        x.to(compute_dtype).transpose(0, 1) for x in (q, k[:, heads], v[:, heads])
    )
    scores_HTT = softmax_scale * q_HTK @ k_HTK.transpose(1, 2)
    scores_HTT = scores_HTT.masked_fill(~visible_TT, float("-inf"))
    return (torch.softmax(scores_HTT, dim=-1) @ v_HTK).transpose(0, 1).to(q.dtype)


def _visible_keys(cu_seqlens: Sequence[int], prefix_of: Sequence[int] | None) -> torch.Tensor:
    """[T, T] bool: may query t see key s?"""
    offsets = torch.tensor(cu_seqlens)
    sequence_T = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    token_T = torch.arange(len(sequence_T))
    is_own_TT = sequence_T[:, None] == sequence_T[None, :]
    visible_TT = is_own_TT & (token_T[None, :] <= token_T[:, None])
    if prefix_of is not None:
        prefix_T = torch.tensor(prefix_of)[sequence_T]
        visible_TT |= prefix_T[:, None] == sequence_T[None, :]
    return visible_TT
