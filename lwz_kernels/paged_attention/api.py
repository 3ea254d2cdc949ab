"""The public contract of paged attention: documentation, and checks of shapes and dtypes."""

import math

import torch

from lwz_kernels.paged_attention import reference
from lwz_kernels.paged_attention.op import paged_attention_op, store_kv_op
from lwz_kernels.paged_attention.ranges import check_pages, check_slots

__all__ = ["paged_attention", "store_kv"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        q: [B, H, K] bf16, fp16 or fp32.
        k_cache: [num_pages, page_size, J, K], dtype of q, contiguous; J divides H.
        v_cache: as k_cache.
        page_table: [B, max_pages] int32. Entries that no key below context_lens needs are not read.
        context_lens: [B] int32, number of keys including the current token; 0 gives zeros.
        softmax_scale: factor of the scores; None means 1 / sqrt(K).
        impl: "triton" (CUDA from sm_80 on, K up to 256, H / J up to 64, in fp32 up to 16), "native"
            (CPU library, bf16 or fp32, K a multiple of 8 up to 512), "torch" (gathers the pages),
            "reference", or "auto": triton for CUDA tensors and native for CPU tensors where they
            apply, else torch; logged once.

    Returns:
        [B, H, K], dtype of q.

    Numerics: fp32 accumulation. "native" and "triton" are deterministic, and a row's result depends
        neither on the rest of the batch, nor on max_pages, nor on the number of threads. With
        AVX512-BF16, "native" rounds the softmax weights of bf16 caches to bf16 if K is a multiple
        of 32. "triton" launches the same work for the same shapes, whatever the contexts: it can be
        captured in a CUDA graph.

    Raises:
        ValueError: shapes, devices, contiguity, unknown impl; on a CPU also pages or lengths that
            are out of range (on a GPU they are undefined behaviour).
        TypeError: dtypes.
        NotImplementedError: impl="triton" or "native" where it does not apply.
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
    if k_cache.shape[2] == 0 or num_heads % k_cache.shape[2] != 0:
        raise ValueError(
            "paged_attention: the number of query heads must be a multiple of the number of KV "
            f"heads, got {num_heads} and {k_cache.shape[2]}"
        )
    scale = 1.0 / math.sqrt(head_size) if softmax_scale is None else softmax_scale
    tensors = (q, k_cache, v_cache, page_table, context_lens)
    if impl == "reference":
        check_pages(k_cache, page_table, context_lens)
        return reference.paged_attention(*tensors, softmax_scale=scale)
    return paged_attention_op(*tensors, scale, impl)


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
        impl: as in `paged_attention`. "torch" on a GPU synchronises the device.

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
    if impl == "reference":
        check_slots(k_cache, slot_mapping)
        reference.store_kv(k, v, k_cache, v_cache, slot_mapping)
    else:
        store_kv_op(k, v, k_cache, v_cache, slot_mapping, impl)


def _check_no_grad(op: str, *tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op}: has no backward; call it under torch.no_grad()")


def _check_caches(x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, name: str) -> None:
    if x.ndim != 3 or k_cache.ndim != 4 or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"expected {name} of 3 dimensions and two caches [num_pages, page_size, J, K] of one "
            f"shape, got {list(x.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}"
        )
    if k_cache.shape[1] == 0:
        raise ValueError(
            f"expected caches with a page_size of at least 1, got {list(k_cache.shape)}"
        )
    if x.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"head size of {name} is {x.shape[2]}, of the caches {k_cache.shape[3]}: expected equal"
        )
    if x.dtype not in DTYPES or {k_cache.dtype, v_cache.dtype} != {x.dtype}:
        raise TypeError(
            f"expected {name} and caches of one dtype, bfloat16, float16 or float32, "
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
