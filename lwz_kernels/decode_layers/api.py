"""The public contract of the decoder layers: documentation, checks, choice of `impl`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.decode_layers.op import decode_layers_op
from lwz_kernels.dispatch import log_choice_once

__all__ = ["DecodeLayer", "can_run_native", "decode_layers"]

IMPLS = ("auto", "native", "reference")


@dataclass(frozen=True, eq=False)
class DecodeLayer:
    """Weights of one layer, all of one dtype; matrices [out, in]. D: hidden size, F: feed-forward
    size, H query heads, J KV heads of size K."""

    attn_norm: Tensor
    """[D]"""
    qkv_proj: Tensor
    """[(H + 2J)·K, D]: queries, keys, values."""
    o_proj: Tensor
    """[D, H·K]"""
    mlp_norm: Tensor
    """[D]"""
    gate_up_proj: Tensor
    """[2F, D]: gate, up."""
    down_proj: Tensor
    """[D, F]"""
    qkv_bias: Tensor | None = None
    """[(H + 2J)·K]"""
    q_norm: Tensor | None = None
    """[K]: RMSNorm of each query head before its rotation, together with `k_norm`."""
    k_norm: Tensor | None = None
    """[K]"""

    def tensors(self) -> list[Tensor | None]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def can_run_native(
    device: torch.device, dtype: torch.dtype, *, hidden: int, ff: int, head_size: int
) -> bool:
    """Whether impl="native" applies to a decoder of these sizes on this machine."""
    return not _native_obstacle(device, dtype, hidden, ff, head_size)


def decode_layers(
    x: Tensor,
    layers: Sequence[DecodeLayer],
    k_caches: Tensor,
    v_caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    norm_eps: float,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Llama-family decoder layers for one new token of each sequence, keys and values paged.

    For each layer: x += o_proj · attention(rotated q, k, v of norm(x)), then
    x += down_proj · (silu(gate) · up of norm(x)). One call for all layers, because on a CPU a step
    of a small model costs its caller as much as its arithmetic. Inference only.

    Args:
        x: [B, D] fp32 or bf16, embedded tokens; not changed.
        layers: L of them, dtype of x, contiguous.
        k_caches: [L, num_pages, page_size, J, K], dtype of x; each layer's contiguous; the new keys
            are written in place.
        v_caches: as k_caches.
        cos: [B, K], dtype of x: each token's own angles, both halves.
        sin: [B, K], negative in the first half: head · cos + swapped halves · sin.
        page_table: [B, max_pages] int32, as in `paged_attention`.
        context_lens: [B] int32, number of keys including the new token; 0 attends to nothing.
        slot_mapping: [B] int64: page · page_size + offset of the new token; negative: not stored.
        num_heads: H, a multiple of J.
        norm_eps: of the RMSNorms.
        softmax_scale: factor of the scores; None means 1 / sqrt(K).
        impl: "native" (CPU library; K, D and F multiples of 8), "reference" (slow), or "auto":
            native where it applies, else reference; logged once.

    Returns:
        [B, D], dtype of x: the residual stream behind the last layer, before the final norm.

    Numerics: each operation accumulates in fp32 and is rounded to the dtype of x. "native": a row's
        result does not depend on the rest of the batch nor on the number of threads.

    Raises:
        ValueError: shapes, contiguity, devices, unknown impl; with "native" also slots, pages or
            lengths that are out of range (no slot is written if one of them is).
        TypeError: dtypes.
        NotImplementedError: impl="native" where it does not apply.
        RuntimeError: tensors that require gradients while they are recorded.
    """
    tensors = [layer.tensors() for layer in layers]
    _check(x, tensors, k_caches, v_caches, cos, sin, num_heads)
    _check_tables(x, page_table, context_lens, slot_mapping)
    head_size = k_caches.shape[4]
    ff = layers[0].down_proj.shape[1] if layers else native.DEPTH_STEP
    chosen = _choose(impl, x, ff, head_size)
    return decode_layers_op(
        x,
        [tensor for layer in tensors for tensor in layer],
        k_caches,
        v_caches,
        cos.contiguous(),
        sin.contiguous(),
        page_table.contiguous(),
        context_lens.contiguous(),
        slot_mapping.contiguous(),
        num_heads,
        norm_eps,
        1.0 / math.sqrt(head_size) if softmax_scale is None else softmax_scale,
        chosen,
    )


def _choose(impl: str, x: Tensor, ff: int, head_size: int) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(
            f"decode_layers: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}"
        )
    if impl == "reference":
        return impl
    obstacle = _native_obstacle(x.device, x.dtype, x.shape[1], ff, head_size)
    if obstacle and impl == "native":
        raise NotImplementedError(f"decode_layers: impl='native' {obstacle}")
    chosen = "reference" if obstacle else "native"
    log_choice_once("decode_layers", chosen, obstacle or f"CPU tensors, {native.best_level()}")
    return chosen


def _native_obstacle(
    device: torch.device, dtype: torch.dtype, hidden: int, ff: int, head_size: int
) -> str:
    """Why the native library cannot run; empty if it can."""
    if device.type != "cpu":
        return f"needs CPU tensors, got {device.type}"
    if dtype not in native.DTYPE_CODES:
        return f"needs bfloat16 or float32, got {dtype}"
    if not (native.supports_depth(hidden) and native.supports_depth(ff)):
        return f"needs sizes that are multiples of {native.DEPTH_STEP}, got {hidden} and {ff}"
    if not native.supports_head_size(head_size):
        return (
            f"needs a head size that is a multiple of {native.HEAD_SIZE_STEP} up to "
            f"{native.MAX_HEAD_SIZE}, got {head_size}"
        )
    return "" if native.is_available() else f"is not available: {native.unavailable_reason()}"


def _check(
    x: Tensor,
    layers: list[list[Tensor | None]],
    k_caches: Tensor,
    v_caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
) -> None:
    if x.ndim != 2 or k_caches.ndim != 5 or v_caches.shape != k_caches.shape:
        raise ValueError(
            "decode_layers: expected x [B, D] and two caches [L, num_pages, page_size, J, K] of "
            f"one shape, got {[*x.shape]}, {[*k_caches.shape]} and {[*v_caches.shape]}"
        )
    num_layers, _, page_size, num_kv_heads, head_size = k_caches.shape
    if num_layers != len(layers) or page_size == 0:
        raise ValueError(
            f"decode_layers: expected caches of {len(layers)} layers with pages of at least one "
            f"token, got {[*k_caches.shape]}"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0 or head_size % 2 != 0:
        raise ValueError(
            f"decode_layers: expected {num_heads} query heads to be a multiple of the KV heads and "
            f"an even head size, got {num_kv_heads} and {head_size}"
        )
    if cos.shape != (len(x), head_size) or sin.shape != cos.shape:
        raise ValueError(
            f"decode_layers: expected cos and sin [{len(x)}, {head_size}], "
            f"got {[*cos.shape]} and {[*sin.shape]}"
        )
    for layer in layers:
        _check_layer(layer, layers[0], x.shape[1], num_heads, num_kv_heads, head_size)
    weights = [tensor for layer in layers for tensor in layer if tensor is not None]
    everything = (x, k_caches, v_caches, cos, sin, *weights)
    if any(tensor.dtype != x.dtype for tensor in everything) or not x.is_floating_point():
        found = sorted({str(tensor.dtype) for tensor in everything})
        raise TypeError(f"decode_layers: expected one floating point dtype, got {found}")
    if any(tensor.device != x.device for tensor in everything):
        raise ValueError(f"decode_layers: expected all tensors on {x.device}")
    per_layer = (*k_caches[:1], *v_caches[:1], *weights)
    if not all(tensor.is_contiguous() for tensor in per_layer):
        raise ValueError("decode_layers: expected contiguous weights and contiguous layers' caches")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in everything):
        raise RuntimeError("decode_layers: has no backward; call it under torch.no_grad()")


def _check_layer(
    layer: list[Tensor | None],
    first: list[Tensor | None],
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
) -> None:
    """All layers have the feed-forward size of the first one."""
    down_proj, q_norm, k_norm = first[5], layer[7], layer[8]
    assert down_proj is not None
    q_size, ff = num_heads * head_size, down_proj.shape[-1]
    qkv_size = q_size + 2 * num_kv_heads * head_size
    expected = (
        (hidden,),
        (qkv_size, hidden),
        (hidden, q_size),
        (hidden,),
        (2 * ff, hidden),
        (hidden, ff),
        (qkv_size,),
        (head_size,),
        (head_size,),
    )
    for field, tensor, shape in zip(fields(DecodeLayer), layer, expected, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"decode_layers: expected {field.name} {[*shape]}, got {[*tensor.shape]}"
            )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("decode_layers: expected q_norm and k_norm, or neither")


def _check_tables(
    x: Tensor, page_table: Tensor, context_lens: Tensor, slot_mapping: Tensor
) -> None:
    batch = len(x)
    if (page_table.dtype, context_lens.dtype, slot_mapping.dtype) != (
        torch.int32,
        torch.int32,
        torch.int64,
    ):
        raise TypeError(
            "decode_layers: expected page_table and context_lens int32 and slot_mapping int64, "
            f"got {page_table.dtype}, {context_lens.dtype} and {slot_mapping.dtype}"
        )
    if (
        page_table.ndim != 2
        or page_table.shape[0] != batch
        or context_lens.shape != (batch,)
        or slot_mapping.shape != (batch,)
    ):
        raise ValueError(
            f"decode_layers: expected page_table [{batch}, max_pages], context_lens and "
            f"slot_mapping [{batch}], got {[*page_table.shape]}, {[*context_lens.shape]} and "
            f"{[*slot_mapping.shape]}"
        )
    if any(table.device != x.device for table in (page_table, context_lens, slot_mapping)):
        raise ValueError(f"decode_layers: expected all tables on {x.device}")
