"""What each Triton kernel takes of an A100, H100 and B200, without any of them.

    python -m bench.triton_resources --csv bench/results/triton/resources.csv

Compiles the kernels as their launchers start them (`bench/triton_targets.py`) and writes registers,
stack, shared memory and the matrix instruction of each. A stack means spilled registers.
`tests/kernels/test_triton_compile.py` holds the limits and compares the table with a fresh compile.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from bench.report import write_csv
from bench.triton_decode_variants import decode_variants
from bench.triton_targets import CAPABILITIES, CompiledLaunch, compile_launches
from lwz_kernels.attention import SegmentTable
from lwz_kernels.attention.launch import attention_bwd_triton, attention_fwd_triton
from lwz_kernels.linear_logprobs.kernels import linear_statistics
from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
from lwz_kernels.linear_policy_loss.kernels import policy_loss_rows
from lwz_kernels.linear_policy_loss.objective import ObjectiveRows
from lwz_kernels.loss_head.triton_rows import row_statistics, write_dlogits_

__all__ = ["main"]

COLUMNS = (
    "kernel",
    "variant",
    "target",
    "grid",
    "num_warps",
    "num_stages",
    "registers",
    "stack_bytes",
    "shared_bytes",
    "matrix_instruction",
    "async_copy",
    "stores_behind_barrier",
    "fp64",
    "triton",
)
# More rows than a grid's second or third dimension takes; T and D of Qwen2.5-7B for the product.
ROWS, TOKENS, DEPTH = 70_000, 16_384, 3584
# Rows on 16-byte boundaries and not: GPT-2's odd vocabulary gets loads by the element.
ALIGNED_VOCAB, ODD_VOCAB = 152_064, 50_257
CAP = 30.0
# Heads of Qwen2.5-7B; a prompt of 1,000 tokens and one completion.
HEADS, KV_HEADS, OFFSETS = 28, 4, (0, 1000, TOKENS)
BF16, FP32 = torch.bfloat16, torch.float32

Variants = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, help="file that gets the rows; default: print them")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    write_csv(options.csv, COLUMNS, list(_rows()))


def _rows() -> Iterator[dict[str, Any]]:
    seen: set[tuple[str, int]] = set()
    for capability in CAPABILITIES:
        variants = {
            **_row_variants(),
            **_product_variants(),
            **decode_variants(),
            **_attention_variants(),
        }
        for variant, launch in variants.items():
            with compile_launches(capability) as launches:
                launch()
            for compiled in launches:
                # The merge of splits is one kernel whatever is merged.
                key = (compiled.kernel, capability)
                if compiled.kernel == "merge_splits_kernel" and key in seen:
                    continue
                seen.add(key)
                yield _row(compiled, variant, capability)


def _row(compiled: CompiledLaunch, variant: str, capability: int) -> dict[str, Any]:
    usage = compiled.resource_usage()
    return {
        "kernel": compiled.kernel,
        "variant": variant,
        "target": f"sm_{capability}",
        "grid": "x".join(map(str, compiled.grid)),
        "num_warps": compiled.num_warps,
        "num_stages": compiled.num_stages,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.shared_bytes,
        "matrix_instruction": compiled.matrix_instruction,
        "async_copy": compiled.async_copy,
        "stores_behind_barrier": compiled.stores_behind_barrier,
        "fp64": compiled.uses_fp64,
        "triton": triton.__version__,
    }


def _row_variants() -> Variants:
    """The row passes and the fused row kernel over fp32 logits."""
    plain = PolicyLossConfig()
    full = PolicyLossConfig(
        clip_ratio_delta=2.0,
        kl_coef=0.01,
        kl_importance_correction=True,
        entropy_coef=0.01,
        sampler_correction="mask",
    )
    even, odd = ALIGNED_VOCAB, ODD_VOCAB
    return {
        "plain": lambda: _statistics(even, None),
        "softcap": lambda: _statistics(even, CAP),
        "softcap + odd V": lambda: _statistics(odd, CAP),
        "to bf16": lambda: _dlogits(even, BF16, is_full=False),
        "to bf16 + all terms + softcap": lambda: _dlogits(even, BF16, is_full=True),
        "to bf16 + all terms + softcap + odd V": lambda: _dlogits(odd, BF16, is_full=True),
        "to fp32 + all terms + softcap": lambda: _dlogits(even, FP32, is_full=True),
        "grpo on-policy": lambda: _policy(even, plain, is_full=False),
        "grpo + all terms + softcap": lambda: _policy(even, full, is_full=True),
        "grpo + all terms + softcap + odd V": lambda: _policy(odd, full, is_full=True),
        "cispo": lambda: _policy(even, PolicyLossConfig(loss_type="cispo"), is_full=True),
        "sapo": lambda: _policy(even, PolicyLossConfig(loss_type="sapo"), is_full=True),
    }


def _product_variants() -> Variants:
    """The fused product and softmax."""
    return {
        "bf16": lambda: _product(BF16),
        "bf16 + softcap": lambda: _product(BF16, softcap=CAP),
        "bf16 + bias": lambda: _product(BF16, has_bias=True),
        "bf16 + softcap + bias": lambda: _product(BF16, softcap=CAP, has_bias=True),
        "bf16 + softcap + bias + odd D": lambda: _product(
            BF16, depth=DEPTH + 1, softcap=CAP, has_bias=True
        ),
        "fp32 + softcap + bias": lambda: _product(FP32, softcap=CAP, has_bias=True),
    }


def _attention_variants() -> Variants:
    """Forward, dK/dV and dQ; gradients in bf16 as autograd asks for them, or fp32 to be summed."""
    return {
        "K=64": lambda: _attention(64),
        "K=128": lambda: _attention(128),
        "K=64 + window": lambda: _attention(64, window_size=1024),
        "K=128 + window": lambda: _attention(128, window_size=1024),
        "K=128 + to fp32": lambda: _attention(128, grad_dtype=FP32),
        "K=128 + window + to fp32": lambda: _attention(128, window_size=1024, grad_dtype=FP32),
        "K=128 + prefixes": lambda: _attention(128, prefix_of=(-1, 0)),
    }


def _statistics(vocab_size: int, softcap: float | None) -> None:
    row_statistics(
        _meta(ROWS, vocab_size), _labels(ROWS), _meta(ROWS), logit_scale=1.0, softcap=softcap
    )


def _dlogits(vocab_size: int, out_dtype: torch.dtype, *, is_full: bool) -> None:
    vector = _meta(ROWS)
    extra = vector if is_full else None
    write_dlogits_(
        _meta(ROWS, vocab_size),
        _labels(ROWS),
        *(vector,) * 4,
        extra,
        extra,
        logit_scale=1.0,
        softcap=CAP if is_full else None,
        out_dtype=out_dtype,
    )


def _policy(vocab_size: int, config: PolicyLossConfig, *, is_full: bool) -> None:
    vector = _meta(ROWS)
    rows = ObjectiveRows(vector, vector)
    if is_full:
        rows = ObjectiveRows(vector, vector, _meta(ROWS, dtype=torch.bool), vector, vector, vector)
    policy_loss_rows(
        _meta(ROWS, vocab_size),
        _labels(ROWS),
        vector,
        vector if is_full else None,
        rows,
        config,
        logit_scale=1.0,
        softcap=CAP if is_full else None,
        out_dtype=BF16,
    )


def _product(
    dtype: torch.dtype,
    *,
    depth: int = DEPTH,
    softcap: float | None = None,
    has_bias: bool = False,
) -> None:
    linear_statistics(
        _meta(TOKENS, depth, dtype=dtype),
        _meta(ALIGNED_VOCAB, depth, dtype=dtype),
        _labels(TOKENS),
        _meta(TOKENS),
        _meta(ALIGNED_VOCAB, dtype=dtype) if has_bias else None,
        logit_scale=1.0,
        softcap=softcap,
    )


def _attention(
    head_size: int,
    *,
    prefix_of: tuple[int, ...] | None = None,
    window_size: int | None = None,
    grad_dtype: torch.dtype = BF16,
) -> None:
    table = SegmentTable.from_cu_seqlens(OFFSETS, prefix_of)
    q, k, v = (_meta(TOKENS, n, head_size, dtype=BF16) for n in (HEADS, KV_HEADS, KV_HEADS))
    scale = head_size**-0.5
    attention_fwd_triton(q, k, v, table, scale, window_size)
    lse = _meta(HEADS, TOKENS)
    attention_bwd_triton(q, q, k, v, lse, lse, table, scale, window_size, grad_dtype)


def _meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _labels(num_rows: int) -> torch.Tensor:
    return _meta(num_rows, dtype=torch.int64)


if __name__ == "__main__":
    main()
