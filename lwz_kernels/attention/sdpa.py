"""Packed causal attention as one scaled_dot_product_attention call per sequence.

Sequences are taken apart with `split`, whose backward is one concatenation; slices would each add
a zero-filled gradient of the whole pack.
A sequence with a prefix runs in one of two ways. *Masked*: its queries against prefix and own keys
under a bottom-right causal mask; the kernel visits every key block. *Padded*: zero queries stand
in for the prefix, so the square causal kernel applies, which skips what lies above the diagonal and
needs no mask in memory. Their gradient is zero because their output is dropped.
"""

import torch
import torch.nn.functional as F

from lwz_kernels.attention.plan import AttentionPlan

__all__ = ["attention"]

# Padding beats masking on a CPU where the prefix is short and the skipped blocks are many
# (fp32 forward and backward, torch 2.13, one thread: prefix 100, length 1000: 282 against 368 ms;
# prefix 200, length 300: 308 against 175 ms).
PADDING_MIN_LENGTH_RATIO = 3
PADDING_MIN_KEYS = 1024
# Above this size the mask itself is the cost: the CPU kernel makes a float copy of it per call.
MAX_MASK_ELEMENTS = 2**24


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, softmax_scale: float
) -> torch.Tensor:
    """Same contract as the public function, after its checks."""
    lengths = list(plan.lengths)
    q_parts, k_parts, v_parts = (x.split(lengths) for x in (q, k, v))
    prefixes = plan.prefix_of or [-1] * len(lengths)
    outs = []
    for i, prefix in enumerate(prefixes):
        if lengths[i] == 0:
            continue
        if prefix < 0 or lengths[prefix] == 0:
            out_THK = _causal(q_parts[i], k_parts[i], v_parts[i], softmax_scale)
        else:
            k_THK = torch.cat([k_parts[prefix], k_parts[i]])
            v_THK = torch.cat([v_parts[prefix], v_parts[i]])
            out_THK = _with_prefix(q_parts[i], k_THK, v_THK, plan, softmax_scale)
        outs.append(out_THK)
    return torch.cat(outs) if outs else torch.empty_like(q)


def _with_prefix(
    q_THK: torch.Tensor, k_TJK: torch.Tensor, v_TJK: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Queries are the last of the keys' positions."""
    q_len, prefix_len = q_THK.shape[0], k_TJK.shape[0] - q_THK.shape[0]
    if not _is_padding_better(q_len, prefix_len, q_THK.device):
        mask = plan.prefix_mask(q_len, prefix_len, q_THK.device)
        return _sdpa(q_THK, k_TJK, v_TJK, scale, mask)
    padding_THK = q_THK.new_zeros(prefix_len, *q_THK.shape[1:])
    return _causal(torch.cat([padding_THK, q_THK]), k_TJK, v_TJK, scale)[prefix_len:]


def _is_padding_better(q_len: int, prefix_len: int, device: torch.device) -> bool:
    if device.type != "cpu":
        return True  # fused GPU kernels take no mask
    num_keys = prefix_len + q_len
    if q_len * num_keys > MAX_MASK_ELEMENTS:
        return q_len >= prefix_len
    return num_keys >= PADDING_MIN_KEYS and q_len >= PADDING_MIN_LENGTH_RATIO * prefix_len


def _causal(
    q_THK: torch.Tensor, k_TJK: torch.Tensor, v_TJK: torch.Tensor, scale: float
) -> torch.Tensor:
    return _sdpa(q_THK, k_TJK, v_TJK, scale, None)


def _sdpa(
    q_THK: torch.Tensor,
    k_TJK: torch.Tensor,
    v_TJK: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence; causal where there is no mask."""
    out_1HTK = F.scaled_dot_product_attention(
        q_THK.transpose(0, 1)[None],
        k_TJK.transpose(0, 1)[None],
        v_TJK.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_TJK.shape[1],
    )
    return out_1HTK[0].transpose(0, 1)
