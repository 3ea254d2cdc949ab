"""Triton kernels of attention: one forward, and a backward of two, without atomics.

Forward and dq take tiles of queries, dk and dv tiles of keys over all query heads of their group:
seven products instead of five, and each sum has one order and one writer, so the same bits from run
to run. Scores are in units of log 2, so that exp2 needs no product of its own; lse is natural.
Each tile has two loops: over blocks with a mask, and over those where every query sees every key.
A table with prefixes compiles its own variant, in which keys are rows of two ranges.
Offsets of heads and rows are 64-bit up to the block, 32-bit within it. fp32 sums (fp64 for fp64).
"""

import triton
import triton.language as tl

__all__ = [
    "attention_bwd_dkv_kernel",
    "attention_bwd_dq_kernel",
    "attention_fwd_kernel",
    "target_arch",
]


def target_arch() -> int:
    """Compute capability of the current device, 90 for sm_90."""
    return triton.runtime.driver.active.get_current_target().arch


@triton.jit
def attention_fwd_kernel(
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
    FP64: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse of one tile of queries and one head; heads run fastest and share keys in L2."""
    i_h = tl.cast(tl.program_id(0) % H, tl.int64)
    q_start, num_q, k_start, last_key, prefix_len, prefix_jump = load_query_tile(
        p_tile + tl.program_id(0) // H * 6, HAS_PREFIX
    )
    p_q += q_start * stride_qt + i_h * stride_qh
    p_k += k_start * stride_kt + i_h // G * stride_kh
    p_v += k_start * stride_vt + i_h // G * stride_vh
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < num_q
    b_q = load_rows(p_q, o_q, stride_qt, m_q, True, D, BLOCK_D)  # [BQ, BD]

    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    b_m = tl.full([BLOCK_Q], float("-inf"), ACC)  # [BQ]
    b_l = tl.zeros([BLOCK_Q], ACC)  # [BQ]
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)  # [BQ, BD]
    start, full_start, full_end, end = key_range(last_key, num_q, WINDOW, BLOCK_Q, BLOCK_K)
    queries = (b_q, last_key + o_q)
    keys = (p_k, p_v, stride_kt, stride_vt, end, prefix_len, prefix_jump)
    for i_block in range(num_masked(start, full_start, full_end, end, BLOCK_K)):
        i_k = masked_start(i_block, start, full_start, full_end, BLOCK_K)
        b_m, b_l, b_acc = fwd_block(
            queries, b_m, b_l, b_acc, keys, i_k, SCALE_LOG2, WINDOW, HAS_PREFIX, True, D, BLOCK_K
        )
    for i_k in range(full_start, full_end, BLOCK_K):
        b_m, b_l, b_acc = fwd_block(
            queries, b_m, b_l, b_acc, keys, i_k, SCALE_LOG2, WINDOW, HAS_PREFIX, False, D, BLOCK_K
        )
    LN_2: tl.constexpr = 0.6931471805599453
    p_lse += i_h * Tq + q_start
    tl.store(p_lse + o_q, (b_m + tl.log2(b_l)) * LN_2, mask=m_q)
    p_out += q_start * H * D + i_h * D
    store_rows(p_out, b_acc / b_l[:, None], o_q, H * D, m_q, D, BLOCK_D)


@triton.jit
def attention_bwd_dq_kernel(
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
    FP64: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq of one tile of queries and one head."""
    i_h = tl.cast(tl.program_id(0) % H, tl.int64)
    q_start, num_q, k_start, last_key, prefix_len, prefix_jump = load_query_tile(
        p_tile + tl.program_id(0) // H * 6, HAS_PREFIX
    )
    p_dout += q_start * stride_dt + i_h * stride_dh
    p_q += q_start * stride_qt + i_h * stride_qh
    p_k += k_start * stride_kt + i_h // G * stride_kh
    p_v += k_start * stride_vt + i_h // G * stride_vh
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < num_q
    b_q = load_rows(p_q, o_q, stride_qt, m_q, True, D, BLOCK_D)  # [BQ, BD]
    b_dout = load_rows(p_dout, o_q, stride_dt, m_q, True, D, BLOCK_D)  # [BQ, BD]
    o_row = i_h * Tq + q_start + o_q
    b_lse = load_lse(p_lse + o_row, m_q, True)  # [BQ]
    b_delta = tl.load(p_delta + o_row, mask=m_q, other=0.0)  # [BQ]

    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float64 if FP64 else tl.float32)  # [BQ, BD]
    start, full_start, full_end, end = key_range(last_key, num_q, WINDOW, BLOCK_Q, BLOCK_K)
    queries = (b_q, b_dout, b_lse, b_delta, last_key + o_q)
    keys = (p_k, p_v, stride_kt, stride_vt, end, prefix_len, prefix_jump)
    for i_block in range(num_masked(start, full_start, full_end, end, BLOCK_K)):
        i_k = masked_start(i_block, start, full_start, full_end, BLOCK_K)
        b_dq = dq_block(queries, b_dq, keys, i_k, SCALE_LOG2, WINDOW, HAS_PREFIX, True, D, BLOCK_K)
    for i_k in range(full_start, full_end, BLOCK_K):
        b_dq = dq_block(queries, b_dq, keys, i_k, SCALE_LOG2, WINDOW, HAS_PREFIX, False, D, BLOCK_K)
    p_dq += q_start * H * D + i_h * D
    store_rows(p_dq, b_dq * SCALE, o_q, H * D, m_q, D, BLOCK_D)


@triton.jit
def attention_bwd_dkv_kernel(
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
    FP64: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of one tile of keys and one KV head, over all queries and heads that see it."""
    i_j = tl.cast(tl.program_id(0) % J, tl.int64)
    p_tile += tl.program_id(0) // J * 3
    k_start = tl.load(p_tile).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < Tk - k_start
    p_k += k_start * stride_kt + i_j * stride_kh
    p_v += k_start * stride_vt + i_j * stride_vh
    b_k = load_rows(p_k, o_k, stride_kt, m_k, True, D, BLOCK_D)  # [BK, BD]
    b_v = load_rows(p_v, o_k, stride_vt, m_k, True, D, BLOCK_D)  # [BK, BD]

    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], ACC)  # [BK, BD]
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], ACC)  # [BK, BD]
    for i_range in range(tl.load(p_tile + 1), tl.load(p_tile + 2)):
        p_r = p_range + i_range * 7
        q_start = tl.load(p_r)
        full_start = tl.load(p_r + 1)
        full_end = tl.load(p_r + 2)
        q_end = tl.load(p_r + 3)
        # The last column that query 0 of the tensor would see, and the columns of the range.
        last_column = tl.load(p_r + 4)
        first_column = tl.load(p_r + 5)
        end_column = tl.load(p_r + 6)
        keys = (b_k, b_v, last_column, first_column, end_column)
        for i_g in range(G):
            i_h = i_j * G + i_g
            o_row = i_h * Tq
            p_dh = p_dout + i_h * stride_dh
            p_qh = p_q + i_h * stride_qh
            rows = (p_dh, p_qh, p_lse + o_row, p_delta + o_row, stride_dt, stride_qt, q_end)
            for i_block in range(num_masked(q_start, full_start, full_end, q_end, BLOCK_Q)):
                i_q = masked_start(i_block, q_start, full_start, full_end, BLOCK_Q)
                b_dk, b_dv = dkv_block(
                    keys, b_dk, b_dv, rows, i_q, SCALE_LOG2, WINDOW, HAS_PREFIX, True, D, BLOCK_Q
                )
            for i_q in range(full_start, full_end, BLOCK_Q):
                b_dk, b_dv = dkv_block(
                    keys, b_dk, b_dv, rows, i_q, SCALE_LOG2, WINDOW, HAS_PREFIX, False, D, BLOCK_Q
                )
    o_out = k_start * J * D + i_j * D
    store_rows(p_dk + o_out, b_dk * SCALE, o_k, J * D, m_k, D, BLOCK_D)
    store_rows(p_dv + o_out, b_dv, o_k, J * D, m_k, D, BLOCK_D)


@triton.jit
def fwd_block(
    queries,
    b_m,
    b_l,
    b_acc,
    keys,
    i_k,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Takes the keys from i_k on into the running maximum, sum and output of each query."""
    b_q, o_last = queries
    b_k, b_v = load_keys(keys, i_k, HAS_PREFIX, MASKED, D, BLOCK_K, b_q.shape[1])  # [BK, BD]
    b_s = product(b_q, b_k.T, b_acc.dtype) * SCALE_LOG2  # [BQ, BK]
    if MASKED:
        m_qk = visible(o_last[:, None], (i_k + tl.arange(0, BLOCK_K))[None, :], WINDOW)
        b_s = tl.where(m_qk, b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_shift = b_new
    if MASKED:
        # With a window a query may see nothing of the first blocks: no −inf − (−inf).
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_shift[:, None])  # [BQ, BK]
    b_decay = tl.exp2(b_m - b_shift)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None] + product(b_p.to(b_v.dtype), b_v, b_acc.dtype)
    return b_new, b_l, b_acc


@triton.jit
def dq_block(
    queries,
    b_dq,
    keys,
    i_k,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq / scale plus what the keys from i_k on add to it."""
    b_q, b_dout, b_lse, b_delta, o_last = queries
    b_k, b_v = load_keys(keys, i_k, HAS_PREFIX, MASKED, D, BLOCK_K, b_q.shape[1])  # [BK, BD]
    b_p = tl.exp2(product(b_q, b_k.T, b_dq.dtype) * SCALE_LOG2 - b_lse[:, None])  # [BQ, BK]
    if MASKED:
        m_qk = visible(o_last[:, None], (i_k + tl.arange(0, BLOCK_K))[None, :], WINDOW)
        b_p = tl.where(m_qk, b_p, 0.0)
    b_ds = b_p * (product(b_dout, b_v.T, b_dq.dtype) - b_delta[:, None])  # [BQ, BK]
    return b_dq + product(b_ds.to(b_k.dtype), b_k, b_dq.dtype)


@triton.jit
def dkv_block(
    keys,
    b_dk,
    b_dv,
    rows,
    i_q,
    SCALE_LOG2: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dk / scale and dv plus what the queries from i_q on add to them; blocks are transposed."""
    b_k, b_v, last_column, first_column, end_column = keys
    p_dout, p_q, p_lse, p_delta, stride_dt, stride_qt, q_end = rows
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < q_end - i_q
    i_row = tl.cast(i_q, tl.int64)
    b_q = load_rows(p_q + i_row * stride_qt, o_q, stride_qt, m_q, MASKED, D, b_k.shape[1])
    b_dout = load_rows(p_dout + i_row * stride_dt, o_q, stride_dt, m_q, MASKED, D, b_k.shape[1])
    b_lse = load_lse(p_lse + i_row + o_q, m_q, MASKED)  # [BQ]
    if MASKED:
        b_delta = tl.load(p_delta + i_row + o_q, mask=m_q, other=0.0)  # [BQ]
    else:
        b_delta = tl.load(p_delta + i_row + o_q)
    b_p = tl.exp2(product(b_k, b_q.T, b_dk.dtype) * SCALE_LOG2 - b_lse[None, :])  # [BK, BQ]
    if MASKED:
        o_k = tl.arange(0, b_k.shape[0])[:, None]
        m_kq = visible((i_q + o_q + last_column)[None, :], o_k, WINDOW)
        m_kq = m_kq & (o_k >= first_column) & m_q[None, :]
        if HAS_PREFIX:
            # Own keys end with the last one that the last query sees, those of a prefix do not.
            m_kq = m_kq & (o_k < end_column)
        b_p = tl.where(m_kq, b_p, 0.0)
    b_dv += product(b_p.to(b_dout.dtype), b_dout, b_dk.dtype)
    b_ds = b_p * (product(b_v, b_dout.T, b_dk.dtype) - b_delta[None, :])  # [BK, BQ]
    b_dk += product(b_ds.to(b_q.dtype), b_q, b_dk.dtype)
    return b_dk, b_dv


@triton.jit
def load_query_tile(p_tile, HAS_PREFIX: tl.constexpr):
    """The fields of a QueryTile; in 64 bits what will be multiplied by a stride."""
    q_start = tl.load(p_tile).to(tl.int64)
    k_start = tl.load(p_tile + 2).to(tl.int64)
    prefix_len = 0
    prefix_jump = 0
    if HAS_PREFIX:
        prefix_len = tl.load(p_tile + 4)
        prefix_jump = tl.load(p_tile + 5).to(tl.int64)
    return q_start, tl.load(p_tile + 1), k_start, tl.load(p_tile + 3), prefix_len, prefix_jump


@triton.jit
def load_keys(
    keys,
    i_k,
    HAS_PREFIX: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values from the key i_k of the segment on, [BK, BD] each."""
    p_k, p_v, stride_kt, stride_vt, end, prefix_len, prefix_jump = keys
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < end - i_k
    o_row = o_k
    if HAS_PREFIX:
        o_row = o_k + tl.where(i_k + o_k < prefix_len, prefix_jump, 0)
    i_row = tl.cast(i_k, tl.int64)
    b_k = load_rows(p_k + i_row * stride_kt, o_row, stride_kt, m_k, MASKED, D, BLOCK_D)
    b_v = load_rows(p_v + i_row * stride_vt, o_row, stride_vt, m_k, MASKED, D, BLOCK_D)
    return b_k, b_v


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
