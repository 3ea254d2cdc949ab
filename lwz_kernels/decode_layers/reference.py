"""Decoder layers for one new token of each sequence, operation by operation: what correct means.

Computes in fp64 when the inputs are fp64, else in fp32, and rounds every operation's result to the
dtype of the inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decode_layers"]

LayerTensors = Sequence[Tensor | None]


def decode_layers(
    x: Tensor,
    layers: Sequence[LayerTensors],
    k_caches: Tensor,
    v_caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    norm_eps: float,
    softmax_scale: float,
) -> Tensor:
    """The residual stream after all layers; `layers` has the fields of `DecodeLayer` in order."""
    num_kv_heads, head_size = k_caches.shape[3:]
    for layer, k_cache, v_cache in zip(layers, k_caches, v_caches, strict=True):
        attn_norm, qkv_proj, o_proj, mlp_norm, gate_up_proj, down_proj, *optional = layer
        qkv_bias, q_norm, k_norm = optional
        qkv = _linear(_rms_norm(x, attn_norm, norm_eps), qkv_proj, qkv_bias)
        q, k, v = qkv.view(len(x), -1, head_size).split(
            [num_heads, num_kv_heads, num_kv_heads], dim=1
        )
        if q_norm is not None and k_norm is not None:
            q, k = _head_norm(q, q_norm, norm_eps), _head_norm(k, k_norm, norm_eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        _store(k, v, k_cache, v_cache, slot_mapping)
        attended = _attend(q, k_cache, v_cache, page_table, context_lens, softmax_scale)
        x = x + _linear(attended.flatten(1), o_proj, None)
        gate, up = _linear(_rms_norm(x, mlp_norm, norm_eps), gate_up_proj, None).chunk(2, dim=-1)
        silu = (_wide(gate) / (1 + (-_wide(gate)).exp())).to(x.dtype)
        x = x + _linear(silu * up, down_proj, None)
    return x


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    assert weight is not None
    wide = _wide(x)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * _wide(weight)).to(x.dtype)


def _head_norm(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm is rounded before its weight comes in, as in the decoder."""
    return _rms_norm(heads, torch.ones_like(weight), eps) * weight


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    out = _wide(x) @ _wide(weight).T
    return (out if bias is None else out + _wide(bias)).to(x.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = torch.cat((*reversed(heads.chunk(2, dim=-1)),), dim=-1)
    first = heads * cos[:, None]
    return (_wide(first) + _wide(swapped) * _wide(sin[:, None])).to(heads.dtype)


def _store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    page_size = k_cache.shape[1]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // page_size, slot % page_size] = k[row]
            v_cache[slot // page_size, slot % page_size] = v[row]


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    softmax_scale: float,
) -> Tensor:
    out = torch.zeros_like(q)
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        positions = torch.arange(length, device=q.device)
        pages = page_table[row].long()[positions // page_size]
        k_LHK = _wide(k_cache[pages, positions % page_size]).repeat_interleave(group, dim=1)
        v_LHK = _wide(v_cache[pages, positions % page_size]).repeat_interleave(group, dim=1)
        scores_HL = softmax_scale * torch.einsum("hk,lhk->hl", _wide(q[row]), k_LHK)
        out[row] = torch.einsum("hl,lhk->hk", scores_HL.softmax(-1), v_LHK).to(q.dtype)
    return out
