"""Triton kernels of qkv_rope: one pass over the projection, one over its gradient.

A program takes some heads of one token: queries and keys turn, values are copied. fp32 arithmetic
(fp64 for fp64), rounded once. Tokens are addressed in 64 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["qkv_rope_bwd_triton", "qkv_rope_fwd_triton"]

# Numbers of each half that a program takes.
_BLOCK = 1024
_INTERPRETED_BLOCK = 128


def qkv_rope_fwd_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, K], k and v [T, J, K], contiguous."""
    num_tokens, half = qkv.shape[0], cos.shape[1]
    q = qkv.new_empty(num_tokens, num_heads, 2 * half)
    k = qkv.new_empty(num_tokens, num_kv_heads, 2 * half)
    v = torch.empty_like(k)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    if num_tokens > 0:
        _launch(qkv_rope_fwd_kernel, qkv, q, k, v, cos, sin, position_ids)
    return q, k, v


def qkv_rope_bwd_triton(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
) -> Tensor:
    """[T, (H + 2J)·K]: the inverse rotation of dq and dk, and dv."""
    num_tokens, num_heads, head_size = dq.shape
    dqkv = dq.new_empty(num_tokens, (num_heads + 2 * dk.shape[1]) * head_size)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    if num_tokens > 0:
        _launch(qkv_rope_bwd_kernel, dqkv, dq, dk, dv, cos, sin, position_ids)
    return dqkv


def _launch(
    kernel: triton.JITFunction,
    qkv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
) -> None:
    if cos.stride(1) != 1 or sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    num_tokens, num_heads, head_size = q.shape
    total = num_heads + 2 * k.shape[1]
    block_r = triton.next_power_of_2(head_size // 2)
    block = _INTERPRETED_BLOCK if q.device.type == "cpu" else _BLOCK
    block_h = max(1, min(triton.next_power_of_2(total), block // block_r))
    with torch.cuda.device_of(q):
        kernel[(num_tokens, triton.cdiv(total, block_h))](
            qkv,
            q,
            k,
            v,
            cos,
            sin,
            None if position_ids is None else position_ids.contiguous(),
            qkv.stride(0),
            cos.stride(0),
            H=num_heads,
            J=k.shape[1],
            R=head_size // 2,
            ACC=tl.float64 if q.dtype == torch.float64 else tl.float32,
            BLOCK_H=block_h,
            BLOCK_R=block_r,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def qkv_rope_fwd_kernel(
    p_qkv,
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_position,
    stride_t,
    stride_p,
    H: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Splits and turns BLOCK_H heads of one token."""
    i_t = tl.program_id(0).to(tl.int64)
    b_cos, b_sin = load_angles(p_cos, p_sin, p_position, i_t, stride_p, R, ACC, BLOCK_R)  # [BR]
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_r = tl.arange(0, BLOCK_R)
    m_r = (o_r < R)[None, :]
    m_hr = (o_h < H + 2 * J)[:, None] & m_r
    p_first = p_qkv + i_t * stride_t + o_h[:, None] * (2 * R) + o_r[None, :]
    b_first = tl.load(p_first, mask=m_hr, other=0.0).to(ACC)  # [BH, BR]
    b_second = tl.load(p_first + R, mask=m_hr, other=0.0).to(ACC)  # [BH, BR]
    b_x, b_y = turn(b_first, b_second, b_cos, b_sin)
    store_heads(p_q + i_t * (H * 2 * R), b_x, b_y, o_h, o_r, H, m_r, R)
    store_heads(p_k + i_t * (J * 2 * R), b_x, b_y, o_h - H, o_r, J, m_r, R)
    store_heads(p_v + i_t * (J * 2 * R), b_first, b_second, o_h - H - J, o_r, J, m_r, R)


@triton.jit
def qkv_rope_bwd_kernel(
    p_dqkv,
    p_dq,
    p_dk,
    p_dv,
    p_cos,
    p_sin,
    p_position,
    stride_t,
    stride_p,
    H: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Turns BLOCK_H heads of one token back, next to each other."""
    i_t = tl.program_id(0).to(tl.int64)
    b_cos, b_sin = load_angles(p_cos, p_sin, p_position, i_t, stride_p, R, ACC, BLOCK_R)  # [BR]
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_r = tl.arange(0, BLOCK_R)
    m_r = (o_r < R)[None, :]
    # Each head is in one of the three; the other two give zeros.
    b_qx, b_qy = load_heads(p_dq + i_t * (H * 2 * R), o_h, o_r, H, m_r, R, ACC)  # [BH, BR]
    b_kx, b_ky = load_heads(p_dk + i_t * (J * 2 * R), o_h - H, o_r, J, m_r, R, ACC)
    b_vx, b_vy = load_heads(p_dv + i_t * (J * 2 * R), o_h - H - J, o_r, J, m_r, R, ACC)
    b_x, b_y = turn(b_qx + b_kx, b_qy + b_ky, b_cos, -b_sin)
    m_value = (o_h >= H + J)[:, None]
    b_x = tl.where(m_value, b_vx, b_x)
    b_y = tl.where(m_value, b_vy, b_y)
    store_heads(p_dqkv + i_t * stride_t, b_x, b_y, o_h, o_r, H + 2 * J, m_r, R)


@triton.jit
def load_angles(
    p_cos,
    p_sin,
    p_position,
    i_t,
    stride_p,
    R: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """cos and sin [BR] of token i_t."""
    i_p = i_t if p_position is None else tl.load(p_position + i_t).to(tl.int64)
    o_p = i_p * stride_p + tl.arange(0, BLOCK_R)
    m_r = tl.arange(0, BLOCK_R) < R
    b_cos = tl.load(p_cos + o_p, mask=m_r, other=0.0).to(ACC)
    b_sin = tl.load(p_sin + o_p, mask=m_r, other=0.0).to(ACC)
    return b_cos, b_sin


@triton.jit
def turn(b_first, b_second, b_cos, b_sin):
    """Both halves [BH, BR] turned by the angles [BR]."""
    b_cos = b_cos[None, :]
    b_sin = b_sin[None, :]
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def load_heads(p_x, o_h, o_r, NUM: tl.constexpr, m_r, R: tl.constexpr, ACC: tl.constexpr):
    """Both halves [BH, BR] of the heads o_h that lie in [0, NUM), else 0."""
    m_hr = ((o_h >= 0) & (o_h < NUM))[:, None] & m_r
    p_first = p_x + o_h[:, None] * (2 * R) + o_r[None, :]
    b_first = tl.load(p_first, mask=m_hr, other=0.0).to(ACC)
    return b_first, tl.load(p_first + R, mask=m_hr, other=0.0).to(ACC)


@triton.jit
def store_heads(p_x, b_x, b_y, o_h, o_r, NUM: tl.constexpr, m_r, R: tl.constexpr):
    """Both halves [BH, BR] of the heads o_h that lie in [0, NUM)."""
    m_hr = ((o_h >= 0) & (o_h < NUM))[:, None] & m_r
    p_first = p_x + o_h[:, None] * (2 * R) + o_r[None, :]
    tl.store(p_first, b_x.to(p_x.dtype.element_ty), mask=m_hr)
    tl.store(p_first + R, b_y.to(p_x.dtype.element_ty), mask=m_hr)
