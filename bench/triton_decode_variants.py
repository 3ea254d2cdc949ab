"""Launches of decoding kernels, qkv_rope and AdamW that `bench.triton_resources` compiles.

Heads of Qwen2.5-7B and 1.5B (K = 128), SmolLM2 (64), and others at the limits of the kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lwz_kernels.adamw.factors import Factors
from lwz_kernels.adamw.kernels import adamw_triton_
from lwz_kernels.paged_attention.kernels import paged_attention_triton, store_kv_triton
from lwz_kernels.qkv_rope.kernels import qkv_rope_bwd_triton, qkv_rope_fwd_triton

__all__ = ["decode_variants"]

# 14,336 keys, as in the published runs; more tokens than a grid's second dimension takes.
BATCH, CONTEXT, TOKENS = 32, 14_336, 70_000
BF16, FP32 = torch.bfloat16, torch.float32


def decode_variants() -> dict[str, Callable[[], object]]:
    """Launchers by the name of their row; each row's kernel has its own columns."""
    return {
        "decode bf16 H28 J4 K128 page16": lambda: _attention(28, 4, 128, 16, BF16),
        "decode bf16 H12 J2 K128 page256": lambda: _attention(12, 2, 128, 256, BF16),
        "decode bf16 H9 J3 K64 page16": lambda: _attention(9, 3, 64, 16, BF16),
        "decode bf16 H32 J32 K80 page16": lambda: _attention(32, 32, 80, 16, BF16),
        "decode bf16 H64 J1 K128 page16": lambda: _attention(64, 1, 128, 16, BF16),
        "decode bf16 H64 J1 K256 page16": lambda: _attention(64, 1, 256, 16, BF16),
        "decode fp32 H28 J4 K128 page16": lambda: _attention(28, 4, 128, 16, FP32),
        "decode fp32 H16 J1 K256 page16": lambda: _attention(16, 1, 256, 16, FP32),
        "store bf16 J4 K128": lambda: _store(4, 128, BF16),
        "rope bf16 H28 J4 K128": lambda: _rope(28, 4, 128, BF16, has_positions=True),
        "rope bf16 H9 J3 K64": lambda: _rope(9, 3, 64, BF16, has_positions=False),
        "adamw halves bf16": lambda: _adamw(BF16, is_split=True),
        "adamw halves fp32": lambda: _adamw(FP32, is_split=True),
        "adamw fp32": lambda: _adamw(FP32, is_split=False),
        "rope fp32 H32 J8 K96": lambda: _rope(32, 8, 96, FP32, has_positions=False),
    }


def _attention(
    num_heads: int, num_kv_heads: int, head_size: int, page_size: int, dtype: torch.dtype
) -> None:
    cache = _meta(1000, page_size, num_kv_heads, head_size, dtype=dtype)
    paged_attention_triton(
        _meta(BATCH, num_heads, head_size, dtype=dtype),
        cache,
        cache,
        _meta(BATCH, CONTEXT // page_size, dtype=torch.int32),
        _meta(BATCH, dtype=torch.int32),
        softmax_scale=head_size**-0.5,
    )


def _store(num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    rows = _meta(TOKENS, num_kv_heads, head_size, dtype=dtype)
    cache = _meta(1000, 16, num_kv_heads, head_size, dtype=dtype)
    store_kv_triton(rows, rows, cache, cache, _meta(TOKENS, dtype=torch.int64))


def _rope(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, *, has_positions: bool
) -> None:
    table = _meta(CONTEXT if has_positions else TOKENS, head_size // 2, dtype=dtype)
    positions = _meta(TOKENS, dtype=torch.int64) if has_positions else None
    qkv = _meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_size, dtype=dtype)
    qkv_rope_fwd_triton(qkv, table, table, positions, num_heads, num_kv_heads)
    dk = _meta(TOKENS, num_kv_heads, head_size, dtype=dtype)
    dq = _meta(TOKENS, num_heads, head_size, dtype=dtype)
    qkv_rope_bwd_triton(dq, dk, dk, table, table, positions)


def _adamw(moments: torch.dtype, *, is_split: bool) -> None:
    by = Factors.of_step(
        3, lr=1e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.5
    )
    size = 3_000_000_000
    weights = _meta(size, dtype=torch.bfloat16 if is_split else torch.float32)
    lower = _meta(size, dtype=torch.int16) if is_split else None
    exp_avg, grad = _meta(size, dtype=moments), _meta(size, dtype=torch.float32)
    adamw_triton_(weights, lower, grad, exp_avg, exp_avg, by)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
