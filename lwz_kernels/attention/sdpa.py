"""Packs on a CPU: one call of torch's fused CPU kernel per sequence, which returns the lse as well.

Sequences are taken apart with `split`, whose backward is one concatenation; slices would each add
a zero-filled gradient of the whole pack.
A sequence with a prefix runs in one of two ways. *Masked*: its queries against prefix and own keys
under a bottom-right causal mask; the kernel visits every key block. *Padded*: zero queries stand
in for the prefix, so the square causal kernel applies, which skips what lies above the diagonal and
needs no mask in memory. Their gradient is zero because their output is dropped.
Short bf16 sequences are multiplied as fp32 copies that live for one call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.attention.segments import SegmentTable

__all__ = ["sdpa_attention"]

# Padding beats masking where the prefix is short and the skipped blocks are many
# (fp32 forward and backward, torch 2.13, one thread: prefix 100, length 1000: 282 against 368 ms;
# prefix 200, length 300: 308 against 175 ms).
PADDING_MIN_LENGTH_RATIO = 3
PADDING_MIN_KEYS = 1024
# Above this size the mask itself is the cost.
MAX_MASK_ELEMENTS = 2**24
# Up to this many keys the kernel's bf16 backward pass is slower than its fp32 one, even where the
# CPU multiplies bf16 (127 queries, 139 keys, 9 heads of 64, AVX512-BF16, two threads, forward and
# backward: 3.5 against 2.0 ms; 1,024 keys: 60 against 73 ms).
MAX_WIDE_KEYS = 512


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, K] and lse [H, T]; only out is differentiable."""
    assert table.pack is not None, "other tables were refused"
    lengths, prefix_of = table.pack
    q_parts, k_parts, v_parts = (x.split(lengths) for x in (q, k, v))
    outs, lses = [], []
    for i, prefix in enumerate(prefix_of):
        if lengths[i] == 0:
            continue  # the kernel divides by it
        keys, values = k_parts[i], v_parts[i]
        if prefix >= 0:
            keys = torch.cat((k_parts[prefix], keys))
            values = torch.cat((v_parts[prefix], values))
        out_THK, lse_HT = _sequence(q_parts[i], keys, values, table, softmax_scale)
        outs.append(out_THK)
        lses.append(lse_HT)
    return torch.cat(outs), torch.cat(lses, 1)


def _sequence(
    q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, table: SegmentTable, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries are the last of the keys' positions."""
    prefix_len = k_TJK.shape[0] - q_THK.shape[0]
    if prefix_len == 0:
        return _fused(q_THK, k_TJK, v_TJK, scale, None)
    if not _is_padding_better(q_THK.shape[0], prefix_len):
        dtype = torch.float32 if _is_widened(k_TJK) else q_THK.dtype
        mask = _mask(table, q_THK.shape[0], prefix_len, dtype)
        return _fused(q_THK, k_TJK, v_TJK, scale, mask)
    padding_THK = q_THK.new_zeros(prefix_len, *q_THK.shape[1:])
    out_THK, lse_HT = _fused(torch.cat((padding_THK, q_THK)), k_TJK, v_TJK, scale, None)
    return out_THK[prefix_len:], lse_HT[:, prefix_len:]


def _is_padding_better(q_len: int, prefix_len: int) -> bool:
    num_keys = prefix_len + q_len
    if q_len * num_keys > MAX_MASK_ELEMENTS:
        return q_len >= prefix_len
    return num_keys >= PADDING_MIN_KEYS and q_len >= PADDING_MIN_LENGTH_RATIO * prefix_len


def _mask(table: SegmentTable, q_len: int, prefix_len: int, dtype: torch.dtype) -> Tensor:
    """[q_len, prefix_len + q_len] of 0, and −inf where query and key may not meet."""

    def build() -> tuple[Tensor]:
        shape = (q_len, prefix_len + q_len)
        hidden = torch.full(shape, float("-inf"), dtype=dtype, device="cpu")
        return (hidden.triu_(prefix_len + 1),)

    return table.cached(("mask", q_len, prefix_len, dtype), build)[0]


def _fused(
    q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence; causal where there is no mask.

    The operator behind `F.scaled_dot_product_attention` on a CPU, which has no public name for lse.
    """
    parts_1HTK = [x.transpose(0, 1)[None] for x in (q_THK, k_TJK, v_TJK)]
    if _is_widened(k_TJK):
        out_1HTK, lse_1HT = _Widened.apply(*parts_1HTK, mask, scale)
    else:
        out_1HTK, lse_1HT = _forward(
            *parts_1HTK, is_causal=mask is None, attn_mask=mask, scale=scale
        )
    return out_1HTK[0].transpose(0, 1), lse_1HT[0]


def _is_widened(k_TJK: Tensor) -> bool:
    return k_TJK.dtype in (torch.bfloat16, torch.float16) and k_TJK.shape[0] <= MAX_WIDE_KEYS


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Widened(torch.autograd.Function):
    """The kernel on fp32 copies and a mask in fp32; keeps what it was given."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = [x.float() for x in (q, k, v)]
        ctx.settings = {"attn_mask": mask, "scale": scale}
        out, lse = _forward(*wide, is_causal=mask is None, **ctx.settings)
        narrow = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, narrow, lse)
        ctx.mark_non_differentiable(lse)
        return narrow, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wide = [x.float() for x in (dout, q, k, v, out)]
        gradients = _backward(*wide, lse, 0.0, ctx.settings["attn_mask"] is None, **ctx.settings)
        return *(gradient.to(q.dtype) for gradient in gradients), None, None
