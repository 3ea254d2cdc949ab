"""The rotation as its formula, differentiable: what correct means."""

import torch
from torch import Tensor

__all__ = ["qkv_rope_reference"]


def qkv_rope_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, K], k and v [T, J, K]; arguments as in the public function."""
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos_T1R, sin_T1R = cos[:, None], sin[:, None]
    q_THK, k_TJK, v_TJK = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1)).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = (first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R)
        return torch.cat(turned, dim=-1).to(x.dtype)

    return rotate(q_THK), rotate(k_TJK), v_TJK.contiguous()
