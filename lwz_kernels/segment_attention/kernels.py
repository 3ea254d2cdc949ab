"""Triton kernels of segment_attention: one forward, and a backward of two, without atomics.

Forward and dq take tiles of queries, dk and dv tiles of keys over all query heads of their group:
seven products instead of five, and each sum has one order and one writer, so the same bits from run
to run. Scores are in units of log 2, so that exp2 needs no product of its own; lse is natural.
Each tile has two loops: over blocks with a mask, and over those where every query sees every key.
Offsets of rows are 64-bit up to the block and 32-bit within it. fp32 sums (fp64 for fp64).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwz_kernels.segment_attention.segments import SegmentTable
from lwz_kernels.segment_attention.tiles import key_tiles, query_tiles

__all__ = ["segment_attention_bwd_triton", "segment_attention_fwd_triton"]


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of one kernel."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class KernelConfigs:
    """One configuration for each kernel."""

    fwd: TileConfig
    dkv: TileConfig
    dq: TileConfig


# Chosen by spills and shared memory of the compiled kernels at K = 64 and 128, not by time.
_SM_80 = KernelConfigs(
    fwd=TileConfig(128, 32, num_warps=8, num_stages=3),
    dkv=TileConfig(32, 64, num_warps=8, num_stages=2),
    dq=TileConfig(64, 64, num_warps=8, num_stages=2),
)
_SM_90 = replace(_SM_80, fwd=TileConfig(128, 64, num_warps=8, num_stages=3))
_SM_100 = replace(_SM_90, dkv=TileConfig(64, 64, num_warps=8, num_stages=1))
# The interpreter pays by the operation; blocks of two sizes, so that they cannot be confused.
_INTERPRETED = KernelConfigs(
    fwd=TileConfig(16, 32, num_warps=1, num_stages=1),
    dkv=TileConfig(16, 32, num_warps=1, num_stages=1),
    dq=TileConfig(32, 16, num_warps=1, num_stages=1),
)


def segment_attention_fwd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, K] in the dtype of q and lse [H, Tq]; bf16 or fp16, K up to 128.

    The interpreter takes fp32 and fp64 (and no bf16).
    """
    num_tokens, num_heads, head_size = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Written by the kernel where a query sees a key.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_heads, num_tokens), float("-inf"), dtype=wide, device=q.device)
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        config = _configs(q).fwd
        tiles = _query_tiles_on(q.device, table, config.block_q, window_size)
        if tiles.shape[0] == 0:
            return out, lse
        segment_attention_fwd_kernel[(tiles.shape[0] * num_heads,)](
            q,
            k,
            v,
            out,
            lse,
            tiles,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            num_tokens,
            SCALE_LOG2=softmax_scale * math.log2(math.e),
            WINDOW=window_size,
            H=num_heads,
            G=num_heads // k.shape[1],
            D=head_size,
            ACC=_accumulator(q),
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            BLOCK_D=_padded(head_size),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


def segment_attention_bwd_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in `grad_dtype`, from p = exp(s − lse) and ds = p · (dp − delta).

    lse is +inf, not −inf, for a query whose softmax saw nothing.
    """
    num_tokens, num_heads, head_size = q.shape
    num_keys, num_kv_heads, _ = k.shape
    dq = torch.zeros(q.shape, dtype=grad_dtype, device=q.device)
    # Tiles of keys cover all keys.
    dk = torch.empty(k.shape, dtype=grad_dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=grad_dtype, device=v.device)
    dout, q, k, v = (_with_unit_stride(x) for x in (dout.to(q.dtype), q, k, v))
    lse, delta = lse.contiguous(), delta.contiguous()
    strides = (*dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    options = {
        "SCALE": softmax_scale,
        "SCALE_LOG2": softmax_scale * math.log2(math.e),
        "WINDOW": window_size,
        "G": num_heads // num_kv_heads,
        "D": head_size,
        "ACC": _accumulator(q),
        "BLOCK_D": _padded(head_size),
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        configs = _configs(q)
        config = configs.dkv
        if num_keys > 0:
            tiles, ranges = _key_tiles_on(q.device, table, config, window_size)
            segment_attention_bwd_dkv_kernel[(tiles.shape[0] * num_kv_heads,)](
                *(dout, q, k, v, lse, delta, dk, dv, tiles, ranges),
                *strides,
                num_tokens,
                num_keys,
                J=num_kv_heads,
                BLOCK_Q=config.block_q,
                BLOCK_K=config.block_k,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **options,
            )
        config = configs.dq
        tiles = _query_tiles_on(q.device, table, config.block_q, window_size)
        if tiles.shape[0] > 0:
            segment_attention_bwd_dq_kernel[(tiles.shape[0] * num_heads,)](
                *(dout, q, k, v, lse, delta, dq, tiles),
                *strides,
                num_tokens,
                H=num_heads,
                BLOCK_Q=config.block_q,
                BLOCK_K=config.block_k,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **options,
            )
    return dq, dk, dv


def _configs(q: Tensor) -> KernelConfigs:
    if q.device.type == "cpu":
        return _INTERPRETED
    capability = triton.runtime.driver.active.get_current_target().arch
    if capability == 90:
        return _SM_90
    # Other devices have less shared memory; the tiles of sm_80 fit into 99 KiB.
    return _SM_100 if capability in (100, 103) else _SM_80


def _padded(head_size: int) -> int:
    """A power of two, and at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(head_size))


def _accumulator(q: Tensor) -> tl.dtype:
    return tl.float64 if q.dtype == torch.float64 else tl.float32


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _query_tiles_on(
    device: torch.device, table: SegmentTable, block_q: int, window_size: int | None
) -> Tensor:
    """[tiles, 4] int32; made once per table, device and size."""

    def build() -> list[Sequence[Sequence[int]]]:
        return [query_tiles(table.segments, block_q, window_size)]

    (tiles,) = table.tensors_on(device, ("queries", block_q, window_size), build)
    return tiles


def _key_tiles_on(
    device: torch.device, table: SegmentTable, config: TileConfig, window_size: int | None
) -> tuple[Tensor, Tensor]:
    """[tiles, 3] and [ranges, 6] int32; made once per table, device and size."""
    sizes = (config.block_k, config.block_q, window_size)

    def build() -> list[Sequence[Sequence[int]]]:
        return [*key_tiles(table.segments, table.num_k, *sizes)]

    tiles, ranges = table.tensors_on(device, ("keys", *sizes), build)
    return tiles, ranges


@triton.jit
def segment_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_tile,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    Tq,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of one tile of queries and one head; heads run fastest and share keys in L2."""
    i_h = tl.program_id(0) % H
    q_start, num_q, k_start, last_key = load_query_tile(p_tile + tl.program_id(0) // H * 4)
    p_q += q_start * stride_qt + i_h * stride_qh
    p_k += k_start * stride_kt + i_h // G * stride_kh
    p_v += k_start * stride_vt + i_h // G * stride_vh
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < num_q
    b_q = load_rows(p_q, o_q, stride_qt, m_q, True, D, BLOCK_D)  # [BQ, BD]
    o_last = last_key + o_q  # [BQ]

    b_m = tl.full([BLOCK_Q], float("-inf"), ACC)  # [BQ]
    b_l = tl.zeros([BLOCK_Q], ACC)  # [BQ]
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)  # [BQ, BD]
    start, full_start, full_end, end = key_range(last_key, num_q, WINDOW, BLOCK_Q, BLOCK_K)
    for i_block in range(num_masked(start, full_start, full_end, end, BLOCK_K)):
        i_k = masked_start(i_block, start, full_start, full_end, BLOCK_K)
        b_m, b_l, b_acc = fwd_block(
            *(b_q, b_m, b_l, b_acc, p_k, p_v, stride_kt, stride_vt, i_k, end, o_last),
            *(SCALE_LOG2, WINDOW, True, D, BLOCK_K, BLOCK_D, ACC),
        )
    for i_k in range(full_start, full_end, BLOCK_K):
        b_m, b_l, b_acc = fwd_block(
            *(b_q, b_m, b_l, b_acc, p_k, p_v, stride_kt, stride_vt, i_k, end, o_last),
            *(SCALE_LOG2, WINDOW, False, D, BLOCK_K, BLOCK_D, ACC),
        )
    LN_2: tl.constexpr = 0.6931471805599453
    p_lse += i_h.to(tl.int64) * Tq + q_start
    tl.store(p_lse + o_q, (b_m + tl.log2(b_l)) * LN_2, mask=m_q)
    p_out += q_start * H * D + i_h * D
    store_rows(p_out, b_acc / b_l[:, None], o_q, H * D, m_q, D, BLOCK_D)


@triton.jit
def segment_attention_bwd_dq_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_dq,
    p_tile,
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    Tq,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of one tile of queries and one head."""
    i_h = tl.program_id(0) % H
    q_start, num_q, k_start, last_key = load_query_tile(p_tile + tl.program_id(0) // H * 4)
    p_dout += q_start * stride_dt + i_h * stride_dh
    p_q += q_start * stride_qt + i_h * stride_qh
    p_k += k_start * stride_kt + i_h // G * stride_kh
    p_v += k_start * stride_vt + i_h // G * stride_vh
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < num_q
    b_q = load_rows(p_q, o_q, stride_qt, m_q, True, D, BLOCK_D)  # [BQ, BD]
    b_dout = load_rows(p_dout, o_q, stride_dt, m_q, True, D, BLOCK_D)  # [BQ, BD]
    o_row = i_h.to(tl.int64) * Tq + q_start + o_q
    b_lse = load_lse(p_lse + o_row, m_q, True)  # [BQ]
    b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)  # [BQ]
    o_last = last_key + o_q  # [BQ]

    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], ACC)  # [BQ, BD]
    start, full_start, full_end, end = key_range(last_key, num_q, WINDOW, BLOCK_Q, BLOCK_K)
    for i_block in range(num_masked(start, full_start, full_end, end, BLOCK_K)):
        i_k = masked_start(i_block, start, full_start, full_end, BLOCK_K)
        b_dq = dq_block(
            *(b_q, b_dout, b_lse, b_delta, b_dq, p_k, p_v, stride_kt, stride_vt, i_k, end),
            *(o_last, SCALE_LOG2, WINDOW, True, D, BLOCK_K, BLOCK_D, ACC),
        )
    for i_k in range(full_start, full_end, BLOCK_K):
        b_dq = dq_block(
            *(b_q, b_dout, b_lse, b_delta, b_dq, p_k, p_v, stride_kt, stride_vt, i_k, end),
            *(o_last, SCALE_LOG2, WINDOW, False, D, BLOCK_K, BLOCK_D, ACC),
        )
    p_dq += q_start * H * D + i_h * D
    store_rows(p_dq, b_dq * SCALE, o_q, H * D, m_q, D, BLOCK_D)


@triton.jit
def segment_attention_bwd_dkv_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_tile,
    p_range,
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    Tq,
    Tk,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of one tile of keys and one KV head, over all queries and heads that see it."""
    i_j = tl.program_id(0) % J
    p_tile += tl.program_id(0) // J * 3
    k_start = tl.load(p_tile).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < Tk - k_start
    p_k += k_start * stride_kt + i_j * stride_kh
    p_v += k_start * stride_vt + i_j * stride_vh
    b_k = load_rows(p_k, o_k, stride_kt, m_k, True, D, BLOCK_D)  # [BK, BD]
    b_v = load_rows(p_v, o_k, stride_vt, m_k, True, D, BLOCK_D)  # [BK, BD]

    b_dk = tl.zeros([BLOCK_K, BLOCK_D], ACC)  # [BK, BD]
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], ACC)  # [BK, BD]
    for i_range in range(tl.load(p_tile + 1), tl.load(p_tile + 2)):
        p_r = p_range + i_range * 6
        q_start = tl.load(p_r)
        full_start = tl.load(p_r + 1)
        full_end = tl.load(p_r + 2)
        q_end = tl.load(p_r + 3)
        # The last column that query 0 of the tensor would see.
        last_column = tl.load(p_r + 4)
        first_column = tl.load(p_r + 5)
        for i_h in range(i_j * G, i_j * G + G):
            o_row = tl.cast(i_h, tl.int64) * Tq
            p_dh = p_dout + i_h * stride_dh
            p_qh = p_q + i_h * stride_qh
            for i_block in range(num_masked(q_start, full_start, full_end, q_end, BLOCK_Q)):
                i_q = masked_start(i_block, q_start, full_start, full_end, BLOCK_Q)
                b_dk, b_dv = dkv_block(
                    *(b_k, b_v, b_dk, b_dv, p_dh, p_qh, p_lse + o_row, p_delta + o_row),
                    *(stride_dt, stride_qt, i_q, q_end, last_column, first_column),
                    *(SCALE_LOG2, WINDOW, True, D, BLOCK_Q, BLOCK_K, BLOCK_D, ACC),
                )
            for i_q in range(full_start, full_end, BLOCK_Q):
                b_dk, b_dv = dkv_block(
                    *(b_k, b_v, b_dk, b_dv, p_dh, p_qh, p_lse + o_row, p_delta + o_row),
                    *(stride_dt, stride_qt, i_q, q_end, last_column, first_column),
                    *(SCALE_LOG2, WINDOW, False, D, BLOCK_Q, BLOCK_K, BLOCK_D, ACC),
                )
    o_out = k_start * J * D + i_j * D
    store_rows(p_dk + o_out, b_dk * SCALE, o_k, J * D, m_k, D, BLOCK_D)
    store_rows(p_dv + o_out, b_dv, o_k, J * D, m_k, D, BLOCK_D)


@triton.jit
def fwd_block(
    b_q,
    b_m,
    b_l,
    b_acc,
    p_k,
    p_v,
    stride_kt,
    stride_vt,
    i_k,
    end,
    o_last,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Takes the keys from i_k on into the running maximum, sum and output of each query."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < end - i_k
    b_k = load_rows(
        p_k + tl.cast(i_k, tl.int64) * stride_kt, o_k, stride_kt, m_k, MASKED, D, BLOCK_D
    )
    b_v = load_rows(
        p_v + tl.cast(i_k, tl.int64) * stride_vt, o_k, stride_vt, m_k, MASKED, D, BLOCK_D
    )
    b_s = product(b_q, b_k.T, ACC) * SCALE_LOG2  # [BQ, BK]
    if MASKED:
        m_qk = visible(o_last[:, None], (i_k + o_k)[None, :], WINDOW)
        b_s = tl.where(m_qk, b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_shift = b_new
    if MASKED:
        # With a window a query may see nothing of the first blocks: no −inf − (−inf).
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])  # [BQ, BK]
    b_decay = tl.exp2(b_m - b_shift)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None] + product(b_p.to(b_v.dtype), b_v, ACC)
    return b_new, b_l, b_acc


@triton.jit
def dq_block(
    b_q,
    b_dout,
    b_lse,
    b_delta,
    b_dq,
    p_k,
    p_v,
    stride_kt,
    stride_vt,
    i_k,
    end,
    o_last,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq / scale plus what the keys from i_k on add to it."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < end - i_k
    b_k = load_rows(
        p_k + tl.cast(i_k, tl.int64) * stride_kt, o_k, stride_kt, m_k, MASKED, D, BLOCK_D
    )
    b_v = load_rows(
        p_v + tl.cast(i_k, tl.int64) * stride_vt, o_k, stride_vt, m_k, MASKED, D, BLOCK_D
    )
    b_p = tl.exp2(product(b_q, b_k.T, ACC) * SCALE_LOG2 - b_lse[:, None])  # [BQ, BK]
    if MASKED:
        m_qk = visible(o_last[:, None], (i_k + o_k)[None, :], WINDOW)
        b_p = tl.where(m_qk, b_p, 0.0)
    b_ds = b_p * (product(b_dout, b_v.T, ACC) - b_delta[:, None])  # [BQ, BK]
    return b_dq + product(b_ds.to(b_k.dtype), b_k, ACC)


@triton.jit
def dkv_block(
    b_k,
    b_v,
    b_dk,
    b_dv,
    p_dout,
    p_q,
    p_lse,
    p_delta,
    stride_dt,
    stride_qt,
    i_q,
    q_end,
    last_column,
    first_column,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk / scale and dv plus what the queries from i_q on add to them; blocks are transposed."""
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < q_end - i_q
    i_row = tl.cast(i_q, tl.int64)
    b_q = load_rows(p_q + i_row * stride_qt, o_q, stride_qt, m_q, MASKED, D, BLOCK_D)
    b_dout = load_rows(p_dout + i_row * stride_dt, o_q, stride_dt, m_q, MASKED, D, BLOCK_D)
    b_lse = load_lse(p_lse + i_row + o_q, m_q, MASKED)  # [BQ]
    if MASKED:
        b_delta = tl.load(p_delta + i_row + o_q, mask=m_q, other=0.0)  # [BQ]
    else:
        b_delta = tl.load(p_delta + i_row + o_q)
    b_p = tl.exp2(product(b_k, b_q.T, ACC) * SCALE_LOG2 - b_lse[None, :])  # [BK, BQ]
    if MASKED:
        o_k = tl.arange(0, BLOCK_K)[:, None]
        m_kq = visible((i_q + o_q + last_column)[None, :], o_k, WINDOW)
        b_p = tl.where(m_kq & (o_k >= first_column) & m_q[None, :], b_p, 0.0)
    b_dv += product(b_p.to(b_dout.dtype), b_dout, ACC)
    b_ds = b_p * (product(b_v, b_dout.T, ACC) - b_delta[None, :])  # [BK, BQ]
    b_dk += product(b_ds.to(b_q.dtype), b_q, ACC)
    return b_dk, b_dv


@triton.jit
def load_query_tile(p_tile):
    """q_start, num_q, k_start, last_key; what will be multiplied by a stride in 64 bits."""
    q_start = tl.load(p_tile).to(tl.int64)
    k_start = tl.load(p_tile + 2).to(tl.int64)
    return q_start, tl.load(p_tile + 1), k_start, tl.load(p_tile + 3)


@triton.jit
def key_range(last_key, num_q, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the keys of a tile of queries start, are seen by all its queries, no longer, and end.

    The first three are multiples of a block, counted from the first key of the segment.
    """
    full_end = (last_key + 1) // BLOCK_K * BLOCK_K
    start = 0
    full_start = 0
    if WINDOW is not None:
        start = tl.maximum(last_key + 1 - WINDOW, 0) // BLOCK_K * BLOCK_K
        full_start = tl.cdiv(tl.maximum(last_key + BLOCK_Q - WINDOW, 0), BLOCK_K) * BLOCK_K
        full_start = tl.minimum(full_start, full_end)
    return start, full_start, full_end, last_key + num_q


@triton.jit
def num_masked(start, full_start, full_end, end, BLOCK: tl.constexpr):
    """Number of blocks before and after the full ones."""
    return (full_start - start) // BLOCK + tl.cdiv(end - full_end, BLOCK)


@triton.jit
def masked_start(i_block, start, full_start, full_end, BLOCK: tl.constexpr):
    """Where the masked block i_block starts: one loop for both sides takes fewer registers."""
    i_before = start + i_block * BLOCK
    return tl.where(i_before < full_start, i_before, i_before - full_start + full_end)


@triton.jit
def visible(o_last, o_k, WINDOW: tl.constexpr):
    """Whether a query whose last key is o_last sees the key o_k."""
    m_visible = o_k <= o_last
    if WINDOW is not None:
        m_visible &= o_k > o_last - WINDOW
    return m_visible


@triton.jit
def product(b_a, b_b, ACC: tl.constexpr):
    """ "ieee" is for fp32 operands, which would otherwise be cut to tf32."""
    return tl.dot(b_a, b_b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def load_lse(p_lse, m_q, MASKED: tl.constexpr):
    """In units of log 2; +inf past the end, which makes p 0."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if MASKED:
        return tl.load(p_lse, mask=m_q, other=float("inf")) * LOG2_E
    else:
        return tl.load(p_lse) * LOG2_E


@triton.jit
def load_rows(
    p_x, o_row, stride, m_row, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[rows, BD], 0 beyond the mask and the head size."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + (o_row[:, None] * stride + o_d[None, :])
    if BLOCK_D != D:
        m_d = (o_d < D)[None, :]
        return tl.load(p_rows, mask=m_row[:, None] & m_d if MASKED else m_d, other=0.0)
    elif MASKED:
        return tl.load(p_rows, mask=m_row[:, None], other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def store_rows(p_x, b_x, o_row, stride, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores [rows, BD] in the type of p_x."""
    o_d = tl.arange(0, BLOCK_D)
    m_td = m_row[:, None] & (o_d < D)[None, :]
    p_rows = p_x + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_td)
