"""Packs on a GPU by other people's kernels: flash-attn 4, 3 or 2, and torch.nn.attention.varlen.

All take fp16 and bf16, know neither prefixes nor key ranges of their own, and ignore the gradient
of lse, so lse comes back detached. Only public functions are called.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lwz_kernels.attention.segments import SegmentTable

__all__ = ["LIBRARY_IMPLS", "is_installed", "library_attention"]

LIBRARY_IMPLS = ("flash_attn_3", "flash_attn_4", "flash_attn_2", "varlen")


@functools.cache
def is_installed(impl: str) -> bool:
    """Whether the package behind `impl` is there; nothing is imported."""
    if impl == "varlen":
        return True
    if impl == "flash_attn_3":
        return importlib.util.find_spec("flash_attn_interface") is not None
    try:
        # flash-attn 4 and 2 share the name of their package, but not of their distribution.
        importlib.metadata.version("flash-attn-4" if impl == "flash_attn_4" else "flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def library_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    softmax_scale: float,
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """out [T, H, K], differentiable, and lse [H, T]."""
    assert table.pack is not None, "other tables were refused"
    lengths = table.pack.lengths

    def build() -> tuple[Tensor]:
        offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return (offsets.to(q.device),)

    (cu_seqlens,) = table.cached(("cu_seqlens", q.device), build)
    pack = (cu_seqlens, max(lengths, default=0))
    if impl == "varlen":
        out, lse = _varlen(q, k, v, pack, softmax_scale, window_size)
    else:
        out, lse = _flash_attn(impl, q, k, v, pack, softmax_scale, window_size)
    expected = (q.shape[1], q.shape[0])
    assert lse.shape == expected, f"{impl} returned lse {[*lse.shape]}, expected {[*expected]}"
    return out, lse.detach()


def _flash_attn(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: tuple[Tensor, int],
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    cu_seqlens, max_seqlen = pack
    all_keys = None if impl == "flash_attn_4" else -1
    left = all_keys if window_size is None else window_size - 1
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": softmax_scale,
        "causal": True,
        "window_size": (left, all_keys if window_size is None else 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    options["return_lse" if impl == "flash_attn_4" else "return_attn_probs"] = True
    results = _flash_attn_function(impl)(q, k, v, **options)
    return results[0], results[1]


def _flash_attn_function(impl: str) -> Callable[..., Any]:
    if impl == "flash_attn_4":
        from flash_attn.cute import flash_attn_varlen_func
    elif impl == "flash_attn_3":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: tuple[Tensor, int],
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    cu_seqlens, max_seqlen = pack
    # torch 2.11 groups query heads by itself; later versions refuse unless told to.
    takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if takes_gqa else {}
    results = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=softmax_scale,
        window_size=(-1 if window_size is None else window_size - 1, 0),
        return_aux=AuxRequest(lse=True),
        **options,
    )
    return results[0], results[1]
