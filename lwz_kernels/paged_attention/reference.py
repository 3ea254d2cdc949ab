"""Paged attention, one sequence and one head at a time: slow, and what correct means.

Computes in fp64 when the inputs are fp64, else in fp32. Reads only the keys that count.
"""

import torch

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
    """out[b, h] = softmax(scale * K_b[j] q[b, h]) V_b[j] with j = h // (H / J)."""
    num_heads = q.shape[1]
    page_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_BHK = torch.zeros_like(q)
    for b, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        positions = torch.arange(length, device=q.device)
        pages = page_table[b].long()[positions // page_size]
        k_LJK = k_cache[pages, positions % page_size].to(compute_dtype)
        v_LJK = v_cache[pages, positions % page_size].to(compute_dtype)
        for h in range(num_heads):
            j = h * num_kv_heads // num_heads
            scores_L = softmax_scale * (k_LJK[:, j] @ q[b, h].to(compute_dtype))
            weights_L = torch.exp(scores_L - scores_L.max())
            out_BHK[b, h] = (weights_L @ v_LJK[:, j] / weights_L.sum()).to(q.dtype)
    return out_BHK


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes token t to page slot // page_size, offset slot % page_size, unless slot < 0."""
    page_size = k_cache.shape[1]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // page_size, slot % page_size] = k[t]
            v_cache[slot // page_size, slot % page_size] = v[t]
