"""Paged attention in plain torch: copy the pages into one padded batch, then masked SDPA.

No host synchronisation in `paged_attention`: the whole width of the page table is gathered.
"""

import torch
import torch.nn.functional as F

__all__ = ["paged_attention", "store_kv"]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float,
) -> torch.Tensor:
    """Same contract as the public function, on any device."""
    batch, max_pages = page_table.shape
    _, page_size, num_kv_heads, head_size = k_cache.shape
    max_length = max_pages * page_size
    positions = torch.arange(max_length, device=q.device)
    valid_BL = positions < context_lens[:, None]
    used_pages = page_table.masked_fill(~valid_BL[:, ::page_size], 0).long()
    # What lies behind the context may be uninitialised: 0 * NaN would survive the mask.
    unused_BLJK = ~valid_BL[:, :, None, None]
    shape = (batch, max_length, num_kv_heads, head_size)
    k_BLJK = k_cache[used_pages].view(shape).masked_fill_(unused_BLJK, 0)
    v_BLJK = v_cache[used_pages].view(shape).masked_fill_(unused_BLJK, 0)
    out_BH1K = F.scaled_dot_product_attention(
        q[:, :, None],
        k_BLJK.transpose(1, 2),
        v_BLJK.transpose(1, 2),
        attn_mask=valid_BL[:, None, None],
        scale=softmax_scale,
        enable_gqa=q.shape[1] != num_kv_heads,
    )
    is_empty_B11 = (context_lens == 0)[:, None, None]
    return out_BH1K[:, :, 0].masked_fill(is_empty_B11, 0).contiguous()


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Same contract as the public function; selecting the kept slots synchronises the device."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    k_cache.flatten(0, 1)[slots] = k[kept]
    v_cache.flatten(0, 1)[slots] = v[kept]
