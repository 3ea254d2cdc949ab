"""Which implementation runs: the order under "auto", and what stands in the way of each."""

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.attention.library import LIBRARY_IMPLS, is_installed
from lwz_kernels.attention.segments import SegmentTable
from lwz_kernels.dispatch import log_choice_once

__all__ = ["IMPLS", "choose_impl", "choose_split_impl"]

IMPLS = ("auto", *LIBRARY_IMPLS, "triton", "native", "sdpa", "torch", "reference")
SPLIT_IMPLS = ("auto", "triton", "torch", "reference")
# On a GPU one of the first five or torch, on a CPU native, sdpa or torch.
AUTO_ORDER = (*LIBRARY_IMPLS, "triton", "native", "sdpa")
HALF_DTYPES = (torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_SIZE = 128
LIBRARY_MAX_HEAD_SIZE = 256
# Compute capabilities, lowest and highest major.
CAPABILITIES = {
    "flash_attn_3": (8, 9),
    "flash_attn_4": (9, 11),
    "flash_attn_2": (8, 12),
    "varlen": (8, 12),
    "triton": (8, 99),
}


def choose_impl(impl: str, q: Tensor, table: SegmentTable, window_size: int | None) -> str:
    """The implementation of `attention` to run; raises where the one asked for by name cannot."""
    return _choose("attention", IMPLS, impl, q, table, window_size)


def choose_split_impl(impl: str, q: Tensor, table: SegmentTable, window_size: int | None) -> str:
    """As `choose_impl`, for those whose forward and backward take any part of a softmax."""
    return _choose("attention_fwd", SPLIT_IMPLS, impl, q, table, window_size)


def _choose(
    op: str,
    impls: tuple[str, ...],
    impl: str,
    q: Tensor,
    table: SegmentTable,
    window_size: int | None,
) -> str:
    if impl not in impls:
        raise ValueError(f"{op}: unknown impl {impl!r}, expected one of {', '.join(impls)}")
    if impl in ("torch", "reference"):
        return impl
    if impl != "auto":
        if obstacle := _obstacle(impl, q, table, window_size):
            raise NotImplementedError(f"{op}: impl={impl!r} {obstacle}; use impl='auto'")
        return impl
    chosen = "torch"
    refused: dict[str, list[str]] = {}
    for candidate in AUTO_ORDER:
        if candidate in impls:
            obstacle = _obstacle(candidate, q, table, window_size)
            if not obstacle:
                chosen = candidate
                break
            refused.setdefault(obstacle, []).append(candidate)
    reasons = (f"{', '.join(names)} {obstacle}" for obstacle, names in refused.items())
    log_choice_once(op, chosen, "; ".join(reasons) or "first choice")
    return chosen


def _obstacle(impl: str, q: Tensor, table: SegmentTable, window_size: int | None) -> str:
    """Why `impl` cannot run; empty if it can."""
    if impl in ("native", "sdpa"):
        if q.device.type != "cpu":
            return f"needs CPU tensors, got {q.device.type}"
        if impl == "native" and q.dtype != torch.bfloat16:
            return f"needs bfloat16, got {q.dtype}"
        if impl == "native" and not native.supports_attention(q.shape[2]):
            return (
                "needs the native library, AVX512-BF16 without AMX and a head size in 64s up to "
                f"256, got {q.shape[2]}"
            )
        if table.pack is None or table.num_q == 0:
            return "needs a pack of whole sequences"
        longest = max(row.prefix_len + row.k_len for row in table.segments)
        if window_size is not None and window_size < longest:
            return "knows no windows"
        return ""
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device.type}"
    if not _is_supported_gpu(impl, q):
        return f"does not run on {torch.cuda.get_device_name(q.device)}"
    if q.dtype not in HALF_DTYPES:
        return f"needs bfloat16 or float16, got {q.dtype}"
    if impl == "triton":
        if q.shape[2] > TRITON_MAX_HEAD_SIZE:
            return f"needs a head size up to {TRITON_MAX_HEAD_SIZE}, got {q.shape[2]}"
        return ""
    if not is_installed(impl):
        return "is not installed"
    if q.shape[2] > LIBRARY_MAX_HEAD_SIZE or q.shape[2] % 8:
        return f"needs a head size in eights up to {LIBRARY_MAX_HEAD_SIZE}, got {q.shape[2]}"
    if table.pack is None:
        return "needs a pack of whole sequences"
    return "knows no prefixes" if table.pack.has_prefixes else ""


def _is_supported_gpu(impl: str, q: Tensor) -> bool:
    lowest, highest = CAPABILITIES[impl]
    return lowest <= torch.cuda.get_device_capability(q.device)[0] <= highest
