"""Oracle of attention: one explicit Tq x Tk mask, softmax and autograd.

Computes in fp64 when the inputs are fp64, else in fp32; natural log; memory grows with Tq · Tk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attention_bwd_reference", "attention_reference"]

Segments = Sequence[Sequence[int]]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, K] in the dtype of q and lse [H, Tq], both differentiable."""
    visible_TT = _visible_keys(segments, q.shape[0], k.shape[0], window_size).to(q.device)
    has_key_T = visible_TT.any(1)
    with torch.autocast(q.device.type, enabled=False):
        scores_HTT = _scores(q, k, softmax_scale).masked_fill(~visible_TT, float("-inf"))
        # Queries without a key take a row of zeros, so that no gradient passes through −inf.
        scores_HTT = scores_HTT.masked_fill(~has_key_T[:, None], 0.0)
        lse_HT = torch.logsumexp(scores_HTT, -1).masked_fill(~has_key_T, float("-inf"))
        out_HTK = torch.softmax(scores_HTT, -1) @ _heads_of(v, q)
    out_HTK = out_HTK.masked_fill(~has_key_T[:, None], 0.0)
    return out_HTK.transpose(0, 1).to(q.dtype), lse_HT


def attention_bwd_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    segments: Segments,
    dlse: Tensor | None,
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in fp32 or fp64, by the formula, with the out and lse of any larger softmax."""
    visible_TT = _visible_keys(segments, q.shape[0], k.shape[0], window_size).to(q.device)
    # A query has p = 0 for what it does not see, and where its larger softmax saw nothing at all.
    visible_HTT = visible_TT & (lse != float("-inf"))[..., None]
    probs_HTT = torch.exp(_scores(q, k, softmax_scale) - lse[..., None])
    probs_HTT = torch.where(visible_HTT, probs_HTT, 0.0)
    wide = probs_HTT.dtype
    dout_HTK, out_HTK = (x.to(wide).transpose(0, 1) for x in (dout, out))
    delta_HT = (dout_HTK * out_HTK).sum(-1)
    if dlse is not None:
        delta_HT = delta_HT - dlse
    dprobs_HTT = dout_HTK @ _heads_of(v, q).transpose(1, 2)
    dscores_HTT = softmax_scale * probs_HTT * (dprobs_HTT - delta_HT[..., None])
    # The gradient of an lse of −inf may be no number.
    dscores_HTT = torch.where(visible_HTT, dscores_HTT, 0.0)
    dq_THK = (dscores_HTT @ _heads_of(k, q)).transpose(0, 1)
    group = (k.shape[1], q.shape[1] // k.shape[1])
    dk_HTK = dscores_HTT.transpose(1, 2) @ q.to(wide).transpose(0, 1)
    dv_HTK = probs_HTT.transpose(1, 2) @ dout_HTK
    dk_JTK, dv_JTK = (x.unflatten(0, group).sum(1) for x in (dk_HTK, dv_HTK))
    return dq_THK, dk_JTK.transpose(0, 1), dv_JTK.transpose(0, 1)


def _visible_keys(segments: Segments, num_q: int, num_k: int, window_size: int | None) -> Tensor:
    """[Tq, Tk] bool: may query i see key j?"""
    visible_TT = torch.zeros(num_q, num_k, dtype=torch.bool)
    for q_start, q_len, k_start, k_len, prefix_start, prefix_len in segments:
        prefix = torch.arange(prefix_start, prefix_start + prefix_len)
        keys = torch.cat((prefix, torch.arange(k_start, k_start + k_len)))
        last_key = torch.arange(q_len)[:, None] + (len(keys) - q_len)
        place = torch.arange(len(keys))[None, :]
        visible = place <= last_key
        if window_size is not None:
            visible &= place > last_key - window_size
        queries = torch.arange(q_start, q_start + q_len)[:, None]
        visible_TT[queries, keys] = visible
    return visible_TT


def _scores(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """scale · q kᵀ, [H, Tq, Tk]."""
    k_HTK = _heads_of(k, q)
    return softmax_scale * q.to(k_HTK.dtype).transpose(0, 1) @ k_HTK.transpose(1, 2)


def _heads_of(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [H, Tk, K] for the heads of q, in the dtype of the computation."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_heads, num_kv_heads = q.shape[1], x.shape[1]
    heads = torch.arange(num_heads, device=x.device) * num_kv_heads // num_heads
    return x[:, heads].to(wide).transpose(0, 1)
