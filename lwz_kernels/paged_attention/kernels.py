"""Triton kernels of paged decoding: attention in two passes over splits of contexts, cache writes.

A program of the first pass takes the keys of one split and one KV head, and all query heads of that
KV head as the rows of one tile, so each key is read once. The second pass merges the splits of one
row in order. Splits have one length whatever the batch: a row's bits depend on nothing but the row,
and the grid follows from shapes alone, without a host synchronisation, so that a captured CUDA
graph stays valid while contexts grow. Programs past a context's end leave at once.
Scores are in units of log 2, for exp2. fp32 sums (fp64 for fp64). Rows are addressed in 64 bits.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwz_kernels.dtypes import wide_dtype

__all__ = ["paged_attention_triton", "store_kv_triton"]


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes and launch options of both passes."""

    split: int
    """Keys of one program of the first pass, a multiple of `block_k`."""
    block_k: int
    block_s: int
    """Splits that the second pass reads at once."""
    num_warps: int
    num_stages: int


# Chosen by spills and shared memory of the compiled kernels (`bench/results/triton/resources.csv`),
# not by time. Writing and reading a bf16 split's partial results adds G / 256 to its bytes.
_NARROW = DecodeConfig(split=512, block_k=64, block_s=16, num_warps=4, num_stages=3)
# Heads above 128.
_WIDE = DecodeConfig(split=512, block_k=32, block_s=16, num_warps=4, num_stages=3)
# Exact fp32 products do not run on the matrix units.
_FLOAT = DecodeConfig(split=512, block_k=32, block_s=16, num_warps=8, num_stages=3)
# The interpreter pays by the operation: small blocks, so that small cases have several.
_INTERPRETED = DecodeConfig(split=32, block_k=16, block_s=2, num_warps=1, num_stages=1)
# A row tile of a matrix product.
_MIN_ROWS = 16
_STORE_BLOCK = 1024


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """[B, H, K] contiguous; arguments as in the public function, q with any strides of B and H."""
    batch, num_heads, head_size = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    out = q.new_empty(q.shape)
    config = _config(q)
    num_splits = triton.cdiv(page_table.shape[1] * page_size, config.split)
    if out.numel() == 0:
        return out
    if num_splits == 0:
        return out.zero_()
    q = q if q.stride(2) == 1 else q.contiguous()
    wide = wide_dtype(q.dtype)
    partial_BHSK = q.new_empty((batch, num_heads, num_splits, head_size), dtype=wide)
    lse_BHS = q.new_empty((batch, num_heads, num_splits), dtype=wide)
    accumulator = tl.float64 if q.dtype == torch.float64 else tl.float32
    block_d = max(16, triton.next_power_of_2(head_size))
    with torch.cuda.device_of(q):
        paged_attention_split_kernel[(batch * num_kv_heads, num_splits)](
            q,
            k_cache,
            v_cache,
            page_table,
            context_lens,
            partial_BHSK,
            lse_BHS,
            *q.stride()[:2],
            page_table.shape[1],
            num_splits,
            SCALE_LOG2=softmax_scale * math.log2(math.e),
            J=num_kv_heads,
            G=group,
            D=head_size,
            PAGE=page_size,
            SPLIT=config.split,
            ACC=accumulator,
            BLOCK_G=max(_MIN_ROWS, triton.next_power_of_2(group)),
            BLOCK_K=config.block_k,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        paged_attention_merge_kernel[(batch * num_heads,)](
            partial_BHSK,
            lse_BHS,
            context_lens,
            out,
            num_splits,
            H=num_heads,
            D=head_size,
            SPLIT=config.split,
            ACC=accumulator,
            BLOCK_S=config.block_s,
            BLOCK_D=block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out


def store_kv_triton(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes k and v of any token stride into the caches, in place; skips negative slots."""
    num_tokens, num_kv_heads, head_size = k.shape
    width = num_kv_heads * head_size
    if num_tokens * width == 0:
        return
    k, v = _with_whole_rows(k), _with_whole_rows(v)
    with torch.cuda.device_of(k):
        store_kv_kernel[(num_tokens, triton.cdiv(width, _STORE_BLOCK))](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            WIDTH=width,
            BLOCK=min(_STORE_BLOCK, triton.next_power_of_2(width)),
        )


def _config(q: Tensor) -> DecodeConfig:
    if q.device.type == "cpu":
        return _INTERPRETED
    if q.dtype == torch.float32:
        return _FLOAT
    return _NARROW if q.shape[2] <= 128 else _WIDE


def _with_whole_rows(x: Tensor) -> Tensor:
    """x [T, J, K] as it is if each token's heads lie in one piece, else a copy."""
    is_whole = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if is_whole else x.contiguous()


# Widths that change as contexts grow: a compiled kernel serves them all.
@triton.jit(do_not_specialize=["num_columns", "num_splits"])
def paged_attention_split_kernel(
    p_q,
    p_k,
    p_v,
    p_table,
    p_len,
    p_partial,
    p_lse,
    stride_qb,
    stride_qh,
    num_columns,
    num_splits,
    SCALE_LOG2: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Output and log2-sum-exp2 of the query heads of KV head i_j over the keys of split i_s.

    KV heads run fastest: those of one token lie side by side in a page.
    """
    i_j = tl.program_id(0) % J
    i_b = (tl.program_id(0) // J).to(tl.int64)
    i_s = tl.program_id(1)
    start = i_s * SPLIT
    end = tl.minimum(tl.load(p_len + i_b), start + SPLIT)
    if start >= end:
        return
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_k = tl.arange(0, BLOCK_K)
    m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
    o_h = (i_j * G + o_g).to(tl.int64)
    p_q += i_b * stride_qb
    b_q = tl.load(p_q + o_h[:, None] * stride_qh + o_d[None, :], mask=m_gd, other=0.0)  # [BG, BD]
    p_table += i_b * num_columns

    b_m = tl.full([BLOCK_G], float("-inf"), ACC)  # [BG]
    b_l = tl.zeros([BLOCK_G], ACC)  # [BG]
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], ACC)  # [BG, BD]
    for i_k in range(start, end, BLOCK_K):
        o_key = i_k + o_k
        m_k = o_key < end
        b_page = tl.load(p_table + o_key // PAGE, mask=m_k, other=0).to(tl.int64)  # [BK]
        o_row = (b_page * PAGE + o_key % PAGE) * (J * D) + i_j * D
        o_kv = o_row[:, None] + o_d[None, :]
        # What lies behind a context may be NaN: 0 · NaN would survive.
        m_kd = m_k[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k + o_kv, mask=m_kd, other=0.0)  # [BK, BD]
        b_v = tl.load(p_v + o_kv, mask=m_kd, other=0.0)  # [BK, BD]
        b_s = product(b_q, b_k.T, ACC) * SCALE_LOG2  # [BG, BK]
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])  # [BG, BK]
        b_decay = tl.exp2(b_m - b_new)
        b_l = b_l * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None] + product(b_p.to(b_v.dtype), b_v, ACC)
        b_m = b_new
    o_part = (i_b * (J * G) + o_h) * num_splits + i_s  # [BG]
    tl.store(p_lse + o_part, b_m + tl.log2(b_l), mask=o_g < G)
    p_out = p_partial + o_part[:, None] * D + o_d[None, :]
    tl.store(p_out, b_acc / b_l[:, None], mask=m_gd)


@triton.jit(do_not_specialize=["num_splits"])
def paged_attention_merge_kernel(
    p_partial,
    p_lse,
    p_len,
    p_out,
    num_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_s 2^lse_s · partial_s / Σ_s 2^lse_s over the splits of one row; 0 where there are none."""
    i_row = tl.program_id(0).to(tl.int64)
    num_used = tl.cdiv(tl.load(p_len + i_row // H), SPLIT)
    o_d = tl.arange(0, BLOCK_D)
    o_s = tl.arange(0, BLOCK_S)
    p_lse += i_row * num_splits
    p_partial += i_row * num_splits * D

    b_m = tl.full([1], float("-inf"), ACC)  # [1]
    b_l = tl.zeros([1], ACC)  # [1]
    b_acc = tl.zeros([BLOCK_D], ACC)  # [BD]
    for i_s in range(0, num_used, BLOCK_S):
        m_s = i_s + o_s < num_used
        b_lse = tl.load(p_lse + i_s + o_s, mask=m_s, other=float("-inf"))  # [BS]
        o_part = (i_s + o_s)[:, None] * D + o_d[None, :]
        m_sd = m_s[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_partial + o_part, mask=m_sd, other=0.0)  # [BS, BD]
        b_new = tl.maximum(b_m, tl.max(b_lse, 0))
        b_w = tl.exp2(b_lse - b_new)  # [BS]
        b_decay = tl.exp2(b_m - b_new)
        b_l = b_l * b_decay + tl.sum(b_w, 0)
        b_acc = b_acc * b_decay + tl.sum(b_w[:, None] * b_part, 0)
        b_m = b_new
    b_out = b_acc / tl.where(num_used == 0, 1.0, b_l)
    tl.store(p_out + i_row * D + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def store_kv_kernel(
    p_k,
    p_v,
    p_k_cache,
    p_v_cache,
    p_slot,
    stride_kt,
    stride_vt,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies one token's keys and values, BLOCK numbers of each, into its slot."""
    i_t = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_slot + i_t)
    if i_slot < 0:
        return
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < WIDTH
    b_k = tl.load(p_k + i_t * stride_kt + o_x, mask=m_x)
    b_v = tl.load(p_v + i_t * stride_vt + o_x, mask=m_x)
    tl.store(p_k_cache + i_slot * WIDTH + o_x, b_k, mask=m_x)
    tl.store(p_v_cache + i_slot * WIDTH + o_x, b_v, mask=m_x)


@triton.jit
def product(b_a, b_b, ACC: tl.constexpr):
    """ "ieee" is for fp32 operands, which would otherwise be cut to tf32."""
    return tl.dot(b_a, b_b, input_precision="ieee", out_dtype=ACC)
