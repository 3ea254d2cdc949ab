"""The two passes over a chunk of logits in Triton, and the block arithmetic that they share.

One program works through one row in blocks of BLOCK_V columns. Every lane keeps its own running
maximum and sums, merged once at the end of the row: the loop has no reduction, needs one exp a
logit, and its order depends on nothing but V, so a row's bits do not depend on its neighbours.
Natural log throughout; accumulators have the type of the logits. Offsets of rows are 64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwz_kernels.loss_head.torch_rows import narrow_view

__all__ = [
    "BLOCK_V",
    "NUM_WARPS",
    "check_logits",
    "label_logit",
    "merge_lanes",
    "online_update",
    "row_statistics",
    "scaled_logits",
    "scan_row",
    "write_dlogits_",
    "write_row",
]

# 16 fp32 logits a thread: four 16-byte loads in flight, and lane sums that stay in registers.
BLOCK_V = 4096
NUM_WARPS = 8


def row_statistics(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """max, Σ exp(z − max), Σ exp(z − max)·(z − max) and z[label] of each row, [4, C].

    Args:
        logits_CV: [C, V] fp32 (fp64), unit stride along V.
        labels_C: [C] int64; outside [0, V) the last number is 0.
        temperature_C: [C], dtype of the logits.
        logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.
    """
    num_rows, vocab_size = check_logits(logits_CV)
    partials_4C = logits_CV.new_empty(4, num_rows)
    if num_rows:
        with torch.cuda.device_of(logits_CV):
            row_statistics_kernel[(num_rows,)](
                logits_CV,
                labels_C.contiguous(),
                temperature_C.contiguous(),
                partials_4C,
                logits_CV.stride(0),
                num_rows,
                vocab_size,
                LOGIT_SCALE=float(logit_scale),
                SOFTCAP=softcap,
                BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return partials_4C


def write_dlogits_(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    dlogprobs_C: Tensor,
    dentropy_C: Tensor | None,
    dlse_C: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Overwrites x with dL/dx, as `out_dtype` in the storage of the logits: [C, V].

        dL/dz = dlogprob · (onehot − p) − dentropy · p · (log p + entropy) + dlse · p

    A narrower `out_dtype` fills the front of each row: strides (2V, 1) for bf16 in fp32.
    """
    num_rows, vocab_size = check_logits(logits_CV)
    out_CV = narrow_view(logits_CV, out_dtype)
    if num_rows:
        with torch.cuda.device_of(logits_CV):
            write_dlogits_kernel[(num_rows,)](
                logits_CV,
                labels_C.contiguous(),
                temperature_C.contiguous(),
                lse_C.contiguous(),
                entropy_C.contiguous(),
                dlogprobs_C.contiguous(),
                None if dentropy_C is None else dentropy_C.contiguous(),
                None if dlse_C is None else dlse_C.contiguous(),
                out_CV,
                logits_CV.stride(0),
                out_CV.stride(0),
                vocab_size,
                LOGIT_SCALE=float(logit_scale),
                SOFTCAP=softcap,
                BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return out_CV


def check_logits(logits_CV: Tensor) -> tuple[int, int]:
    """Number of rows and vocabulary size of logits that the row kernels can work on."""
    if logits_CV.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be fp32 (fp64 in tests), got {logits_CV.dtype}")
    num_rows, vocab_size = logits_CV.shape
    if vocab_size == 0 or logits_CV.stride(1) != 1:
        raise ValueError(
            "logits must be [C, V] with V > 0 and unit stride along V, "
            f"got {[*logits_CV.shape]} with strides {[*logits_CV.stride()]}"
        )
    return num_rows, vocab_size


@triton.jit
def row_statistics_kernel(
    p_x,
    p_label,
    p_temperature,
    p_out,
    stride_x,
    C,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """[4, C] from [C, V]: one program a row."""
    i_c = tl.program_id(0).to(tl.int64)
    p_x += i_c * stride_x
    label = tl.load(p_label + i_c)
    temperature = tl.load(p_temperature + i_c)

    m, s, t = scan_row(p_x, temperature, V, LOGIT_SCALE, SOFTCAP, BLOCK_V)
    z_label = label_logit(p_x, label, temperature, V, LOGIT_SCALE, SOFTCAP)
    tl.store(p_out + i_c, m)
    tl.store(p_out + C + i_c, s)
    tl.store(p_out + 2 * C + i_c, t)
    tl.store(p_out + 3 * C + i_c, z_label)


@triton.jit
def write_dlogits_kernel(
    p_x,
    p_label,
    p_temperature,
    p_lse,
    p_entropy,
    p_dlogprob,
    p_dentropy,
    p_dlse,
    p_dx,
    stride_x,
    stride_dx,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx [C, V] over x [C, V]: one program a row."""
    i_c = tl.program_id(0).to(tl.int64)
    dentropy = None
    dlse = None
    if p_dentropy is not None:
        dentropy = tl.load(p_dentropy + i_c)
    if p_dlse is not None:
        dlse = tl.load(p_dlse + i_c)
    write_row(
        p_x + i_c * stride_x,
        p_dx + i_c * stride_dx,
        tl.load(p_label + i_c),
        tl.load(p_temperature + i_c),
        tl.load(p_lse + i_c),
        tl.load(p_entropy + i_c),
        tl.load(p_dlogprob + i_c),
        dentropy,
        dlse,
        V,
        LOGIT_SCALE,
        SOFTCAP,
        BLOCK_V,
    )


@triton.jit
def scan_row(
    p_x, temperature, V, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """max, Σ exp(z − max) and Σ exp(z − max)·(z − max) of one row."""
    ACC: tl.constexpr = p_x.dtype.element_ty
    b_m = tl.full([BLOCK_V], float("-inf"), ACC)  # [BV]
    b_s = tl.zeros([BLOCK_V], ACC)  # [BV]
    b_t = tl.zeros([BLOCK_V], ACC)  # [BV]
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_x = tl.load(p_x + o_v, mask=m_v, other=0.0)
        b_z, _ = scaled_logits(b_x, temperature, LOGIT_SCALE, SOFTCAP)
        # After the transform: a cap would turn −inf into −cap, and give it mass.
        b_z = tl.where(m_v, b_z, float("-inf"))
        b_m, b_s, b_t = online_update(b_m, b_s, b_t, b_z)
    return merge_lanes(b_m, b_s, b_t, 0)


@triton.jit
def label_logit(p_x, label, temperature, V, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z[label], or 0 for a label that another shard of the vocabulary holds."""
    is_here = (label >= 0) & (label < V)
    x = tl.load(p_x + label, mask=is_here, other=0.0)
    z, _ = scaled_logits(x, temperature, LOGIT_SCALE, SOFTCAP)
    return tl.where(is_here, z, 0.0)


@triton.jit
def write_row(
    p_x,
    p_dx,
    label,
    temperature,
    lse,
    entropy,
    dlogprob,
    dentropy,
    dlse,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Overwrites one row of x with dx, front to back; a row without gradient is not read."""
    is_live = dlogprob != 0.0
    if dentropy is not None:
        is_live |= dentropy != 0.0
    if dlse is not None:
        is_live |= dlse != 0.0
    V_live = tl.where(is_live, V, 0)
    for i_v in range(V_live, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_zero = tl.zeros([BLOCK_V], p_dx.dtype.element_ty)
        tl.store(p_dx + o_v, b_zero, mask=o_v < V)
    for i_v in range(0, V_live, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_x = tl.load(p_x + o_v, mask=m_v, other=0.0)
        if p_dx.dtype.element_ty != p_x.dtype.element_ty:
            # A narrower block lands on bytes that *other* threads read, in this iteration (the
            # first) or in an earlier one: block k writes where block k // 2 was read. No thread
            # may store before all have loaded, so the barrier stands between load and store of
            # every iteration. Loads of later blocks may move ahead of it, they are not written
            # yet. At equal width a thread's store waits for that very element, nothing more.
            tl.debug_barrier()
        b_dx = dlogits_block(
            b_x,
            o_v,
            label,
            temperature,
            lse,
            entropy,
            dlogprob,
            dentropy,
            dlse,
            LOGIT_SCALE,
            SOFTCAP,
        )
        tl.store(p_dx + o_v, b_dx.to(p_dx.dtype.element_ty), mask=m_v)


@triton.jit
def dlogits_block(
    b_x,
    o_v,
    label,
    temperature,
    lse,
    entropy,
    dlogprob,
    dentropy,
    dlse,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """dx of one block of a row; `dentropy` and `dlse` may be None."""
    b_z, b_slope = scaled_logits(b_x, temperature, LOGIT_SCALE, SOFTCAP)
    b_log_p = b_z - lse
    b_p = tl.exp(b_log_p)
    factor = -dlogprob
    if dlse is not None:
        factor += dlse
    b_dz = b_p * factor
    if dentropy is not None:
        # p · log p is 0 where p is, also for a logit of −inf.
        b_log_p = tl.where(b_p == 0.0, 0.0, b_log_p)
        b_dz -= dentropy * b_p * (b_log_p + entropy)
    b_dz += tl.where(o_v == label, dlogprob, 0.0)
    b_dx = b_dz * (LOGIT_SCALE / temperature)
    if SOFTCAP is not None:
        b_dx *= b_slope
    return b_dx


@triton.jit
def scaled_logits(b_x, temperature, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z, and the slope 1 − tanh² of the cap (1 without one)."""
    if SOFTCAP is None:
        b_z = b_x * (LOGIT_SCALE / temperature)
        b_slope = 1.0
    else:
        # tanh(u) = sign(u) · (1 − e) / (1 + e) with e = exp(−2|u|), which cannot overflow.
        b_u = b_x * (LOGIT_SCALE / SOFTCAP)
        b_e = tl.exp(-2.0 * tl.abs(b_u))
        b_r = 1.0 / (1.0 + b_e)
        b_tanh = (1.0 - b_e) * b_r
        b_z = tl.where(b_u < 0.0, -b_tanh, b_tanh) * (SOFTCAP / temperature)
        b_slope = 4.0 * b_e * b_r * b_r
    return b_z, b_slope


@triton.jit
def online_update(b_m, b_s, b_t, b_z):
    """Takes one more z into the running max, Σ exp(z − max) and Σ exp(z − max)·(z − max)."""
    b_is_new = b_z > b_m
    b_d = tl.where(b_is_new, b_m - b_z, b_z - b_m)
    # −inf − (−inf) is NaN, but a logit of −inf adds nothing. A NaN logit stays NaN.
    b_d = tl.where(b_z == float("-inf"), float("-inf"), b_d)
    b_e = tl.exp(b_d)
    b_d = tl.where(b_e == 0.0, 0.0, b_d)  # never 0 · −inf
    b_t = tl.where(b_is_new, b_e * (b_t + b_s * b_d), b_t + b_e * b_d)
    b_s = tl.where(b_is_new, b_s * b_e + 1.0, b_s + b_e)
    return tl.where(b_is_new, b_z, b_m), b_s, b_t


@triton.jit
def merge_lanes(b_m, b_s, b_t, AXIS: tl.constexpr):
    """The three running numbers of all lanes along an axis, as one."""
    b_max = tl.max(b_m, AXIS)
    b_d = b_m - tl.expand_dims(b_max, AXIS)
    b_d = tl.where(b_m == float("-inf"), float("-inf"), b_d)
    b_e = tl.exp(b_d)
    b_d = tl.where(b_e == 0.0, 0.0, b_d)
    return b_max, tl.sum(b_s * b_e, AXIS), tl.sum(b_e * (b_t + b_s * b_d), AXIS)
