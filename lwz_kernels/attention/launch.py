"""Launches the Triton kernels: tile sizes, tables of tiles on the device, and outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lwz_kernels.attention.kernels import (
    attention_bwd_dkv_kernel,
    attention_bwd_dq_kernel,
    attention_fwd_kernel,
    target_arch,
)
from lwz_kernels.attention.segments import SegmentTable
from lwz_kernels.attention.tiles import key_tiles, query_tiles
from lwz_kernels.dtypes import wide_dtype

__all__ = ["attention_bwd_triton", "attention_fwd_triton"]


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
    dkv_narrow: TileConfig
    """With a window, whose bounds take registers, or with gradients in fp32."""
    dq: TileConfig


# Chosen by spills and shared memory at K = 64 and 128, as Triton 3.6 and 3.9 compile the kernels,
# not by time.
_SM_80 = KernelConfigs(
    fwd=TileConfig(128, 32, num_warps=8, num_stages=3),
    dkv=TileConfig(32, 64, num_warps=8, num_stages=1),
    dkv_narrow=TileConfig(16, 64, num_warps=8, num_stages=1),
    dq=TileConfig(64, 64, num_warps=8, num_stages=2),
)
_SM_90 = replace(
    _SM_80,
    fwd=TileConfig(128, 64, num_warps=8, num_stages=3),
    dkv=TileConfig(32, 64, num_warps=8, num_stages=2),
    dkv_narrow=TileConfig(16, 64, num_warps=8, num_stages=2),
)
_SM_100 = replace(
    _SM_90,
    dkv=TileConfig(64, 64, num_warps=8, num_stages=1),
    dkv_narrow=TileConfig(64, 64, num_warps=8, num_stages=1),
)
_SM_100_SMALL_HEADS = replace(
    _SM_100,
    dkv=TileConfig(128, 64, num_warps=8, num_stages=1),
    dkv_narrow=TileConfig(128, 64, num_warps=8, num_stages=1),
)
# The interpreter pays by the operation; blocks of two sizes, so that they cannot be confused.
_INTERPRETED = KernelConfigs(
    fwd=TileConfig(16, 32, num_warps=1, num_stages=1),
    dkv=TileConfig(16, 32, num_warps=1, num_stages=1),
    dkv_narrow=TileConfig(16, 32, num_warps=1, num_stages=1),
    dq=TileConfig(32, 16, num_warps=1, num_stages=1),
)


def attention_fwd_triton(
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
    is_fp64 = q.dtype == torch.float64
    wide = wide_dtype(q.dtype)
    # Written by the kernel where a query sees a key.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((num_heads, num_tokens), float("-inf"), dtype=wide, device=q.device)
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        config = _configs(q).fwd
        tiles = _query_tiles_on(q.device, table, config.block_q, window_size)
        if tiles.shape[0] == 0:
            return out, lse
        attention_fwd_kernel[(tiles.shape[0] * num_heads,)](
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
            FP64=is_fp64,
            HAS_PREFIX=table.has_prefixes,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            BLOCK_D=_padded(head_size),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


def attention_bwd_triton(
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
        "FP64": q.dtype == torch.float64,
        "HAS_PREFIX": table.has_prefixes,
        "BLOCK_D": _padded(head_size),
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        configs = _configs(q)
        takes_registers = window_size is not None or grad_dtype == torch.float32
        config = configs.dkv_narrow if takes_registers else configs.dkv
        if num_keys > 0:
            tiles, ranges = _key_tiles_on(q.device, table, config, window_size)
            attention_bwd_dkv_kernel[(tiles.shape[0] * num_kv_heads,)](
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
            attention_bwd_dq_kernel[(tiles.shape[0] * num_heads,)](
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
    capability = target_arch()
    if capability == 90:
        return _SM_90
    if capability in (100, 103):
        return _SM_100 if q.shape[2] > 64 else _SM_100_SMALL_HEADS
    # Other devices have less shared memory; the tiles of sm_80 fit into 99 KiB.
    return _SM_80


def _padded(head_size: int) -> int:
    """A power of two, and at least what a matrix product takes."""
    return max(16, 1 << (head_size - 1).bit_length())


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _query_tiles_on(
    device: torch.device, table: SegmentTable, block_q: int, window_size: int | None
) -> Tensor:
    """[tiles, 6] int32; made once per table, device and size."""

    def build() -> tuple[Tensor]:
        return (_rows_on(device, query_tiles(table.segments, block_q, window_size)),)

    return table.cached(("query_tiles", device, block_q, window_size), build)[0]


def _key_tiles_on(
    device: torch.device, table: SegmentTable, config: TileConfig, window_size: int | None
) -> tuple[Tensor, Tensor]:
    """[tiles, 3] and [ranges, 7] int32; made once per table, device and size."""
    sizes = (config.block_k, config.block_q, window_size)

    def build() -> tuple[Tensor, Tensor]:
        tiles, ranges = key_tiles(table.segments, table.num_k, *sizes)
        return _rows_on(device, tiles), _rows_on(device, ranges)

    tiles, ranges = table.cached(("key_tiles", device, *sizes), build)
    return tiles, ranges


def _rows_on(device: torch.device, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)
