"""The public contract of paged attention: documentation, checks, and the choice of `impl`."""

import math

import torch

from lwz_kernels import native
from lwz_kernels.dispatch import log_choice_once
from lwz_kernels.paged_attention import reference
from lwz_kernels.paged_attention.op import paged_attention_op, store_kv_op

__all__ = ["paged_attention", "store_kv"]

IMPLS = ("auto", "native", "torch", "reference")


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of one query token per sequence over the paged keys of its sequence.

    out[b, h] = sum_i softmax_i(scale * q[b, h] . k[b, i, j]) v[b, i, j], j = h // (H / J), over the
    keys i < context_lens[b]; key i lies in page page_table[b, i // page_size] at offset
    i % page_size. Inference only: there is no backward.

    Args:
        q: [B, H, K] bf16 or fp32.
        k_cache: [num_pages, page_size, J, K], dtype of q, contiguous; J divides H.
        v_cache: as k_cache.
        page_table: [B, max_pages] int32. Entries that no key below context_lens needs are not read.
        context_lens: [B] int32, number of keys including the current token; 0 gives zeros.
        softmax_scale: factor of the scores; None means 1 / sqrt(K).
        impl: "native" (CPU library), "torch" (gathers the pages), "reference", or "auto": native
            for CPU tensors where the library is available and K is a multiple of 8 up to 512,
            else torch; logged once.

    Returns:
        [B, H, K], dtype of q.

    Numerics: fp32 accumulation, natural exponentials. "native" is deterministic, and a row's result
        depends neither on the rest of the batch nor on the number of threads.

    Raises:
        ValueError: shapes, devices, contiguity, unknown impl; on a CPU also pages or lengths that
            are out of range (on a GPU they are undefined behaviour).
        TypeError: dtypes.
        NotImplementedError: impl="native" for GPU tensors or an unsupported head size.
        RuntimeError: impl="native" without the library, the message says why; tensors that require
            gradients while they are recorded.

    Example:
        >>> import torch
        >>> k_cache = torch.zeros(4, 2, 1, 8)
        >>> v_cache = torch.arange(8.0).view(4, 2, 1, 1).expand(4, 2, 1, 8).contiguous()
        >>> page_table = torch.tensor([[3, 0]], dtype=torch.int32)
        >>> lens = torch.tensor([3], dtype=torch.int32)
        >>> q = torch.ones(1, 1, 8)
        >>> out = paged_attention(q, k_cache, v_cache, page_table, lens)
        >>> round(out[0, 0, 0].item(), 4)  # (6 + 7 + 0) / 3
        4.3333
    """
    _check_no_grad("paged_attention", q, k_cache, v_cache)
    _check_caches(q, k_cache, v_cache, "q")
    _check_table(q, page_table, context_lens)
    num_heads, head_size = q.shape[1], q.shape[2]
    if num_heads % k_cache.shape[2] != 0:
        raise ValueError(
            "paged_attention: the number of query heads must be a multiple of the number of KV "
            f"heads, got {num_heads} and {k_cache.shape[2]}"
        )
    scale = 1.0 / math.sqrt(head_size) if softmax_scale is None else softmax_scale
    chosen = _choose("paged_attention", impl, q, head_size)
    if chosen != "native" and q.device.type == "cpu":
        _check_ranges(k_cache, page_table, context_lens)
    tensors = (q.contiguous(), k_cache, v_cache, page_table.contiguous(), context_lens.contiguous())
    if chosen == "reference":
        return reference.paged_attention(*tensors, softmax_scale=scale)
    return paged_attention_op(*tensors, scale, chosen)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Writes new keys and values into their cache slots, in place.

    Slot s is offset s % page_size of page s // page_size. Two tokens with the same slot are a
    caller's mistake: which one remains is undefined.

    Args:
        k: [T, J, K], dtype of the caches.
        v: as k.
        k_cache: [num_pages, page_size, J, K], contiguous; changed in place.
        v_cache: as k_cache.
        slot_mapping: [T] int64; tokens with a negative slot are skipped.
        impl: as in `paged_attention`. On a GPU, skipping synchronises the device.

    Raises: as `paged_attention`; no slot is written if one is out of range.
    """
    _check_no_grad("store_kv", k, v, k_cache, v_cache)
    _check_caches(k, k_cache, v_cache, "k")
    if v.shape != k.shape or k.shape[1] != k_cache.shape[2]:
        raise ValueError(
            f"store_kv: expected k and v of shape [T, {k_cache.shape[2]}, {k_cache.shape[3]}], "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if v.dtype != k.dtype or v.device != k.device:
        raise TypeError(
            f"store_kv: k and v differ: {k.dtype} on {k.device}, {v.dtype} on {v.device}"
        )
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != k.shape[:1]:
        raise TypeError(
            f"store_kv: expected slot_mapping [{k.shape[0]}] int64, "
            f"got {list(slot_mapping.shape)} {slot_mapping.dtype}"
        )
    if slot_mapping.device != k.device:
        raise ValueError(f"store_kv: slot_mapping is on {slot_mapping.device}, expected {k.device}")
    chosen = _choose("store_kv", impl, k, k.shape[2])
    if chosen != "native" and k.device.type == "cpu" and slot_mapping.numel() > 0:
        num_slots = k_cache.shape[0] * k_cache.shape[1]
        if int(slot_mapping.max()) >= num_slots:
            raise ValueError(
                "slot_mapping is out of range: expected slot < num_pages * page_size = "
                f"{num_slots}, got {int(slot_mapping.max())}"
            )
    tensors = (k.contiguous(), v.contiguous(), k_cache, v_cache, slot_mapping.contiguous())
    if chosen == "reference":
        reference.store_kv(*tensors)
    else:
        store_kv_op(*tensors, chosen)


def _choose(op: str, impl: str, x: torch.Tensor, head_size: int) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl in ("torch", "reference"):
        return impl
    is_supported = x.device.type == "cpu" and native.supports_head_size(head_size)
    if impl == "native":
        if not is_supported:
            raise NotImplementedError(
                f"{op}: impl='native' needs CPU tensors and a head size that is a multiple of "
                f"{native.HEAD_SIZE_STEP} up to {native.MAX_HEAD_SIZE}, got {head_size} on "
                f"{x.device}"
            )
        if not native.is_available():
            raise RuntimeError(
                f"{op}: impl='native' is not available: {native.unavailable_reason()}"
            )
        return "native"
    if not is_supported:
        log_choice_once(
            op, "torch", f"no native kernel for head size {head_size} on {x.device.type}"
        )
        return "torch"
    if not native.is_available():
        log_choice_once(op, "torch", native.unavailable_reason())
        return "torch"
    log_choice_once(op, "native", f"CPU tensors, {native.best_level()}")
    return "native"


def _check_no_grad(op: str, *tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op}: has no backward; call it under torch.no_grad()")


def _check_caches(x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, name: str) -> None:
    if x.ndim != 3 or k_cache.ndim != 4 or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"expected {name} of 3 dimensions and two caches [num_pages, page_size, J, K] of one "
            f"shape, got {list(x.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}"
        )
    if x.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"head size of {name} is {x.shape[2]}, of the caches {k_cache.shape[3]}: expected equal"
        )
    if x.dtype not in native.DTYPE_CODES or {k_cache.dtype, v_cache.dtype} != {x.dtype}:
        raise TypeError(
            f"expected {name} and caches of one dtype, bfloat16 or float32, "
            f"got {x.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if k_cache.device != x.device or v_cache.device != x.device:
        raise ValueError(
            f"expected the caches on {x.device} as {name}, got {k_cache.device}, {v_cache.device}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("expected contiguous caches: a copy of a cache would lose its writes")


def _check_table(q: torch.Tensor, page_table: torch.Tensor, context_lens: torch.Tensor) -> None:
    batch = q.shape[0]
    if page_table.dtype != torch.int32 or context_lens.dtype != torch.int32:
        raise TypeError(
            "expected page_table and context_lens of dtype int32, "
            f"got {page_table.dtype} and {context_lens.dtype}"
        )
    if page_table.ndim != 2 or page_table.shape[0] != batch or context_lens.shape != (batch,):
        raise ValueError(
            f"expected page_table [{batch}, max_pages] and context_lens [{batch}], "
            f"got {list(page_table.shape)} and {list(context_lens.shape)}"
        )
    if page_table.device != q.device or context_lens.device != q.device:
        raise ValueError(
            f"expected page_table and context_lens on {q.device}, "
            f"got {page_table.device} and {context_lens.device}"
        )


def _check_ranges(
    k_cache: torch.Tensor, page_table: torch.Tensor, context_lens: torch.Tensor
) -> None:
    """What the native library checks for itself."""
    num_pages, page_size = k_cache.shape[:2]
    capacity = page_table.shape[1] * page_size
    if bool(((context_lens < 0) | (context_lens > capacity)).any()):
        raise ValueError(
            "context_lens is out of range: expected 0 <= length <= max_pages * page_size = "
            f"{capacity}, got {context_lens.tolist()}"
        )
    first_keys = torch.arange(page_table.shape[1]) * page_size
    is_used = first_keys < context_lens[:, None]
    if bool((is_used & ((page_table < 0) | (page_table >= num_pages))).any()):
        raise ValueError(
            "page_table names a page that is out of range: expected 0 <= page < num_pages = "
            f"{num_pages}"
        )
