"""qkv_rope and its gradient in plain torch, each part written once to where it belongs."""

import torch
from torch import Tensor

__all__ = ["qkv_rope_bwd_torch", "qkv_rope_fwd_torch"]


def qkv_rope_fwd_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, K], k and v [T, J, K], contiguous."""
    cos_T1R, sin_T1R = _rows(cos, sin, position_ids)
    q_THK, k_TJK, v_TJK = _split(qkv, num_heads, num_kv_heads)
    q, k = qkv.new_empty(q_THK.shape), qkv.new_empty(k_TJK.shape)
    _rotate_into(q, q_THK, cos_T1R, sin_T1R, 1.0)
    _rotate_into(k, k_TJK, cos_T1R, sin_T1R, 1.0)
    return q, k, v_TJK.clone(memory_format=torch.contiguous_format)


def qkv_rope_bwd_torch(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
) -> Tensor:
    """[T, (H + 2J)·K]: the inverse rotation of dq and dk, and dv."""
    num_tokens, num_heads, head_size = dq.shape
    num_kv_heads = dk.shape[1]
    cos_T1R, sin_T1R = _rows(cos, sin, position_ids)
    dqkv = dq.new_empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_size)
    dq_THK, dk_TJK, dv_TJK = _split(dqkv, num_heads, num_kv_heads)
    _rotate_into(dq_THK, dq, cos_T1R, sin_T1R, -1.0)
    _rotate_into(dk_TJK, dk, cos_T1R, sin_T1R, -1.0)
    dv_TJK.copy_(dv)
    return dqkv


def _rows(cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, [T, 1, K/2]."""
    if position_ids is None:
        return cos[:, None], sin[:, None]
    _check_range(position_ids, cos.shape[0])
    return cos[position_ids, None], sin[position_ids, None]


def _check_range(position_ids: Tensor, num_positions: int) -> None:
    """On a GPU, reading positions would stop the device."""
    if position_ids.device.type == "cpu" and position_ids.numel() > 0:
        low, high = (int(x) for x in position_ids.aminmax())
        if low < 0 or high >= num_positions:
            raise ValueError(
                f"qkv_rope: expected 0 <= position_ids < {num_positions}, the rows of cos and sin, "
                f"got {low} to {high}"
            )


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [T, (H + 2J)·K]."""
    q_THK, k_TJK, v_TJK = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1)).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    return q_THK, k_TJK, v_TJK


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Turns x by the angles, or by their negatives where sign is −1."""
    x_first, x_second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(x_first, cos, out=out_first).addcmul_(x_second, sin, value=-sign)
    torch.mul(x_second, cos, out=out_second).addcmul_(x_first, sin, value=sign)
