"""Fused no-grad forward: hidden · weightᵀ with an online softmax for epilogue, no logits in memory.

Persistent programs take work items of (row tile, split of the vocabulary). The number of splits
depends on nothing but the configuration, every item leaves its own four numbers a row, and a second
kernel merges them in one fixed order: no atomics, the same bits from run to run, and a row's
result does not depend on how many rows there are. Natural log; fp32 accumulators (fp64 for fp64).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.loss_head.rows import finish_statistics
from lwz_kernels.loss_head.triton_rows import merge_lanes, scaled_logits

__all__ = ["linear_logprobs_fwd", "linear_statistics"]


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of one kind of device and operand."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    num_halves: int = 1
    """2: the epilogue takes the columns of a tile in two halves, which needs fewer registers."""
    num_splits: int = 32
    """Splits of the vocabulary, a power of two."""
    group_t: int = 16
    """Row tiles that run side by side: their hidden states should stay in L2."""


# Chosen by registers, spills and shared memory (`bench/results/triton/resources.csv`), not by time.
_WIDE = TileConfig(128, 256, 64, num_warps=8, num_stages=4)
_NARROW = TileConfig(128, 128, 64, num_warps=8, num_stages=3)
# On sm_100 products come out of tensor memory, a half at a time; sm_90 has them in registers.
_HALVED = TileConfig(128, 256, 64, num_warps=8, num_stages=4, num_halves=2)
# For 99 KiB of shared memory.
_SMALL = TileConfig(64, 128, 64, num_warps=8, num_stages=3)
# Rows off 16-byte boundaries are loaded by the element, with an address each.
_UNALIGNED = TileConfig(64, 64, 32, num_warps=8, num_stages=2)
# Exact fp32 products do not run on the matrix units.
_FLOAT = TileConfig(64, 64, 32, num_warps=8, num_stages=2)
# The interpreter pays by the operation: small tiles, so that small cases have several.
_INTERPRETED = TileConfig(
    16, 32, 16, num_warps=1, num_stages=1, num_halves=2, num_splits=4, group_t=2
)
_MERGE_BLOCK_T = 128
# A tensor descriptor wants its rows on 16-byte boundaries.
_TMA_ALIGNMENT = 16


def linear_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature_T: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and lse [T]; arguments as in `linear_statistics`."""
    return finish_statistics(
        linear_statistics(
            hidden,
            weight,
            labels,
            temperature_T,
            bias,
            logit_scale=logit_scale,
            softcap=softcap,
        )
    )


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature_T: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """max, Σ exp(z − max), Σ exp(z − max)·(z − max) and z[label] of each row, [4, T] fp32.

    Args:
        hidden: [T, D] fp16, bf16 or fp32 (fp64 in the interpreter), unit stride along D.
        weight: [V, D], same dtype, unit stride along D.
        labels: [T] int64; outside [0, V) the last number is 0.
        temperature_T: [T] fp32.
        bias: [V] or None.
        logit_scale, softcap: z = softcap · tanh(logit_scale · x / softcap) / temperature.

    Numerics: fp32 products exact to fp32 (no tf32), fp32 accumulation in one order for each V.

    Raises:
        ValueError: dtypes differ, or a stride along D is not 1.
    """
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one")
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(
            "hidden and weight need unit stride along D, "
            f"got strides {[*hidden.stride()]} and {[*weight.stride()]}"
        )
    num_rows, depth = hidden.shape
    vocab_size = weight.shape[0]
    wide = wide_dtype(hidden.dtype)
    out_4T = torch.empty(4, num_rows, dtype=wide, device=hidden.device)
    if num_rows == 0:
        return out_4T
    with torch.cuda.device_of(hidden):
        capability, num_multiprocessors = _device(hidden)
        is_aligned = _is_aligned(hidden) and _is_aligned(weight)
        use_tma = is_aligned and capability >= 90
        is_plain = bias is None and softcap is None
        config = _config(hidden.dtype, capability, is_aligned=is_aligned, is_plain=is_plain)
        block_t = [config.block_t, config.block_d]
        block_v = [config.block_v, config.block_d]
        partials_S4T = out_4T.new_empty(config.num_splits, 4, num_rows)
        num_items = triton.cdiv(num_rows, config.block_t) * config.num_splits
        linear_logprobs_fwd_kernel[(min(num_items, num_multiprocessors),)](
            TensorDescriptor.from_tensor(hidden, block_t) if use_tma else hidden,
            TensorDescriptor.from_tensor(weight, block_v) if use_tma else weight,
            labels.contiguous(),
            temperature_T.contiguous(),
            None if bias is None else bias.contiguous(),
            partials_S4T,
            hidden.stride(0),
            weight.stride(0),
            num_rows,
            vocab_size,
            depth,
            LOGIT_SCALE=float(logit_scale),
            SOFTCAP=softcap,
            USE_TMA=use_tma,
            ACC=tl.float64 if wide == torch.float64 else tl.float32,
            NUM_HALVES=config.num_halves,
            NUM_SPLITS=config.num_splits,
            GROUP_T=config.group_t,
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        merge_splits_kernel[(triton.cdiv(num_rows, _MERGE_BLOCK_T),)](
            partials_S4T,
            out_4T,
            num_rows,
            NUM_SPLITS=config.num_splits,
            BLOCK_T=_MERGE_BLOCK_T,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out_4T


def _config(dtype: torch.dtype, capability: int, *, is_aligned: bool, is_plain: bool) -> TileConfig:
    """Depends on nothing that changes with the number of rows."""
    if capability == 0:
        return _INTERPRETED
    if dtype.itemsize > 2:
        return _FLOAT
    if not is_aligned:
        return _UNALIGNED
    if capability == 80:
        return _NARROW
    if capability == 90:
        # A cap or a bias keeps more beside the product than the registers of a wide tile hold.
        return _WIDE if is_plain else _NARROW
    return _HALVED if capability in (100, 103) else _SMALL


def _device(tensor: Tensor) -> tuple[int, int]:
    """Compute capability, times ten, and number of multiprocessors; 0 and 1 when interpreted."""
    if tensor.device.type == "cpu":
        return 0, 1
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return driver.get_current_target().arch, properties["multiprocessor_count"]


def _is_aligned(matrix: Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return row_bytes % _TMA_ALIGNMENT == 0 and matrix.data_ptr() % _TMA_ALIGNMENT == 0


@triton.jit
def linear_logprobs_fwd_kernel(
    hidden,
    weight,
    p_label,
    p_temperature,
    p_bias,
    p_partial,
    stride_h,
    stride_w,
    T,
    V,
    D,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    ACC: tl.constexpr,
    NUM_HALVES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[splits, 4, T] from hidden [T, D] and weight [V, D]: descriptors with TMA, else pointers."""
    num_t = tl.cdiv(T, BLOCK_T)
    num_v = tl.cdiv(V, BLOCK_V)
    for i_item in range(tl.program_id(0), num_t * NUM_SPLITS, tl.num_programs(0)):
        # Row tiles run fastest, within groups: programs side by side share weight tiles and a
        # group's hidden states, and both stay in L2.
        i_group = i_item // (GROUP_T * NUM_SPLITS)
        group_size = tl.minimum(num_t - i_group * GROUP_T, GROUP_T)
        i_in_group = i_item % (GROUP_T * NUM_SPLITS)
        i_t = i_group * GROUP_T + i_in_group % group_size
        i_s = i_in_group // group_size

        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        b_temperature = tl.load(p_temperature + o_t, mask=m_t, other=1.0)[:, None]  # [BT, 1]
        b_label = tl.load(p_label + o_t, mask=m_t, other=-1)  # [BT]
        # A label past V must not meet a phantom column of the last tile.
        b_is_here = (b_label >= 0) & (b_label < V)
        b_label = tl.where(b_is_here, b_label, -1).to(tl.int32)[:, None]  # [BT, 1]

        b_m = tl.full([BLOCK_T], float("-inf"), ACC)  # [BT]
        b_s = tl.zeros([BLOCK_T], ACC)  # [BT]
        b_u = tl.zeros([BLOCK_T], ACC)  # [BT], Σ exp(z − max)·(z − max)
        b_z_label = tl.zeros([BLOCK_T], ACC)  # [BT]
        for i_v in range(i_s * num_v // NUM_SPLITS, (i_s + 1) * num_v // NUM_SPLITS):
            b_x = logits_tile(
                hidden,
                weight,
                i_t * BLOCK_T,
                i_v * BLOCK_V,
                stride_h,
                stride_w,
                T,
                V,
                D,
                USE_TMA,
                ACC,
                BLOCK_T,
                BLOCK_V,
                BLOCK_D,
            )
            if NUM_HALVES == 2:
                b_x, b_rest = halves(b_x)  # [BT, BV / 2]
                b_m, b_s, b_u, b_z_label = take_columns(
                    b_m,
                    b_s,
                    b_u,
                    b_z_label,
                    b_rest,
                    i_v * BLOCK_V + BLOCK_V // 2,
                    b_label,
                    b_temperature,
                    p_bias,
                    V,
                    LOGIT_SCALE,
                    SOFTCAP,
                )
            b_m, b_s, b_u, b_z_label = take_columns(
                b_m,
                b_s,
                b_u,
                b_z_label,
                b_x,
                i_v * BLOCK_V,
                b_label,
                b_temperature,
                p_bias,
                V,
                LOGIT_SCALE,
                SOFTCAP,
            )

        p_item = p_partial + i_s.to(tl.int64) * 4 * T + o_t
        tl.store(p_item, b_m, mask=m_t)
        tl.store(p_item + T, b_s, mask=m_t)
        tl.store(p_item + 2 * T, b_u, mask=m_t)
        tl.store(p_item + 3 * T, b_z_label, mask=m_t)


@triton.jit
def logits_tile(
    hidden,
    weight,
    i_t,
    i_v,
    stride_h,
    stride_w,
    T,
    V,
    D,
    USE_TMA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden[i_t:, :] · weight[i_v:, :]ᵀ, 0 beyond either edge: [BT, BV]."""
    b_x = tl.zeros([BLOCK_T, BLOCK_V], ACC)
    # 64-bit for the tile, 32-bit within it.
    o_t = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    if not USE_TMA:
        hidden += tl.cast(i_t, tl.int64) * stride_h
        weight += tl.cast(i_v, tl.int64) * stride_w
    for i_d in range(0, D, BLOCK_D):
        if USE_TMA:
            b_h = hidden.load([i_t, i_d])
            b_w = weight.load([i_v, i_d])
        else:
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_td = (o_t < T - i_t)[:, None] & (o_d < D)[None, :]
            m_vd = (o_v < V - i_v)[:, None] & (o_d < D)[None, :]
            p_h = hidden + (o_t[:, None] * stride_h + o_d[None, :])
            p_w = weight + (o_v[:, None] * stride_w + o_d[None, :])
            b_h = tl.load(p_h, mask=m_td, other=0.0)  # [BT, BD]
            b_w = tl.load(p_w, mask=m_vd, other=0.0)  # [BV, BD]
        # "ieee" is for fp32 operands, which would otherwise be cut to tf32.
        b_x = tl.dot(b_h, b_w.T, b_x, input_precision="ieee", out_dtype=ACC)
    return b_x


@triton.jit
def halves(b_x):
    """The left and the right half of a tile's columns."""
    BLOCK_T: tl.constexpr = b_x.shape[0]
    HALF_V: tl.constexpr = b_x.shape[1] // 2
    return tl.split(tl.reshape(b_x, [BLOCK_T, 2, HALF_V]).permute(0, 2, 1))


@triton.jit
def take_columns(
    b_m,
    b_s,
    b_u,
    b_z_label,
    b_x,
    i_v,
    b_label,
    b_temperature,
    p_bias,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Takes products [BT, BV] of columns from i_v on into the four running numbers of each row."""
    o_v = i_v + tl.arange(0, b_x.shape[1])
    m_v = o_v < V
    if p_bias is not None:
        b_x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(b_x.dtype)[None, :]
    b_z, _ = scaled_logits(b_x, b_temperature, LOGIT_SCALE, SOFTCAP)
    # After the transform, which would give the columns past V mass: exp(0) or exp(−cap).
    b_z += tl.where(m_v, 0.0, float("-inf"))[None, :]  # [BT, BV]
    b_z_label += tl.sum(tl.where(o_v[None, :] == b_label, b_z, 0.0), 1)

    b_new = tl.maximum(b_m, tl.max(b_z, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_d = b_z - b_shift[:, None]  # [BT, BV]
    b_e = tl.exp(b_d)
    b_d_old = b_m - b_shift
    b_e_old = tl.exp(b_d_old)
    # Where exp is 0 its factor may be −inf: bounded, the product is 0 and no NaN.
    b_u = b_e_old * (b_u + b_s * tl.maximum(b_d_old, -1e4))
    b_u += tl.sum(b_e * tl.maximum(b_d, -1e4), 1)
    return b_new, b_s * b_e_old + tl.sum(b_e, 1), b_u, b_z_label


@triton.jit
def merge_splits_kernel(p_partial, p_out, T, NUM_SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """[4, T] from [splits, 4, T], all splits of a row at once and in one order."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_s = tl.arange(0, NUM_SPLITS).to(tl.int64)
    p_st = p_partial + o_s[:, None] * 4 * T + o_t[None, :]  # [S, BT]
    m_st = (o_s >= 0)[:, None] & m_t[None, :]
    b_m = tl.load(p_st, mask=m_st, other=float("-inf"))
    b_s = tl.load(p_st + T, mask=m_st, other=0.0)
    b_u = tl.load(p_st + 2 * T, mask=m_st, other=0.0)
    b_z_label = tl.load(p_st + 3 * T, mask=m_st, other=0.0)
    b_m, b_s, b_u = merge_lanes(b_m, b_s, b_u, 0)
    tl.store(p_out + o_t, b_m, mask=m_t)
    tl.store(p_out + T + o_t, b_s, mask=m_t)
    tl.store(p_out + 2 * T + o_t, b_u, mask=m_t)
    tl.store(p_out + 3 * T + o_t, tl.sum(b_z_label, 0), mask=m_t)
