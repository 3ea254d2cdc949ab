"""Public contract of attention: documentation, checks and dispatch."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lwz_kernels.attention.backends import choose_impl, choose_split_impl
from lwz_kernels.attention.library import LIBRARY_IMPLS, library_attention
from lwz_kernels.attention.native_packs import native_attention
from lwz_kernels.attention.op import (
    attention_op,
    run_attention_bwd,
    run_attention_fwd,
    with_lse_gradient,
)
from lwz_kernels.attention.reference import attention_bwd_reference, attention_reference
from lwz_kernels.attention.sdpa import sdpa_attention
from lwz_kernels.attention.segments import SegmentTable
from lwz_kernels.dtypes import wide_dtype

__all__ = ["attention", "attention_bwd", "attention_fwd", "resolve_impl"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    *,
    segments: SegmentTable | None = None,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of packed tokens within their segments, with the log-sum-exp.

        s[h, i, j] = softmax_scale · q[i, h] · k[j, h J // H]      for the keys j that i sees
        lse[h, i] = log Σ_j exp s[h, i, j]
        out[i, h] = Σ_j exp(s[h, i, j] − lse[h, i]) v[j, h J // H]

    Of a pack, token i sees the tokens j <= i of its own sequence. A `SegmentTable` says more: other
    ranges of keys, and prefixes that many sequences share. With a window only the last
    `window_size` keys are seen. A query that sees nothing has out 0 and lse −inf.

    Args:
        q: [Tq, H, K], floating point.
        k: [Tk, J, K], dtype of q; J divides H.
        v: [Tk, J, K], dtype of q.
        cu_seqlens: N + 1 ascending offsets from 0 to T = Tq = Tk: a sequence, or an int32 tensor
            (on a GPU each call then waits for it). Give this or `segments`.
        segments: made once and shared by all layers.
        softmax_scale: None means 1 / sqrt(K).
        window_size: number of keys that a query sees at most, at least 1; None for all.
        impl: "auto" takes the first that applies and logs it once: "flash_attn_3",
            "flash_attn_4", "flash_attn_2" where installed, "varlen" (torch.nn.attention.varlen;
            these need a pack without prefixes), "triton" (ours; K up to 128), all of them on CUDA
            in bf16 or fp16; "native" (ours; a CPU with AVX512-BF16, packs of bf16, prefixes too, K
            in 64s); "sdpa" (a CPU; packs, prefixes too); "torch" (blocks of queries, any device).
            One that is named runs, or there is an error. "reference" is one mask and autograd.

    Returns:
        out: [Tq, H, K], dtype of q.
        lse: [H, Tq] fp32 (fp64 for fp64 inputs), natural log. Both are differentiable; where the
            implementation's own backward has no gradient for lse, "triton" or "torch" adds it.

    Numerics: scores, sums and gradients accumulate in fp32 (fp64 for fp64), under autocast too.
        The same bits from run to run on a CPU and by "triton"; flash-attn's backward is
        deterministic under `torch.use_deterministic_algorithms`.

    Raises:
        ValueError: shapes, devices, offsets, a table of other sizes, window_size, unknown impl.
        TypeError: dtypes; both or none of cu_seqlens and segments.
        NotImplementedError: an impl that was named and does not apply.

    Example:
        >>> v = torch.tensor([[1.0], [3.0], [10.0]]).view(3, 1, 1)
        >>> zero = torch.zeros(3, 1, 1)
        >>> out, lse = attention(zero, zero, v, [0, 2, 3])
        >>> out.flatten().tolist()
        [1.0, 2.0, 10.0]
        >>> lse.exp().round().flatten().tolist()  # keys seen, as all scores are 0
        [1.0, 2.0, 1.0]
        >>> table = SegmentTable.from_cu_seqlens([0, 2, 3], prefix_of=[-1, 0])
        >>> out, _ = attention(zero, zero, v, segments=table)
        >>> round(out[2].item(), 4)  # (1 + 3 + 10) / 3
        4.6667
    """
    table = _table_of(cu_seqlens, segments)
    _check_inputs(q, k, v, table, window_size)
    scale = _scale_of(softmax_scale, q)
    chosen = choose_impl(impl, q, table, window_size)
    if chosen == "reference":
        return attention_reference(
            q, k, v, segments=table.segments, softmax_scale=scale, window_size=window_size
        )
    if chosen == "native":
        out, lse = native_attention(q, k, v, table, scale)
    elif chosen == "sdpa":
        out, lse = sdpa_attention(q, k, v, table, scale)
    elif chosen in LIBRARY_IMPLS:
        out, lse = library_attention(q, k, v, table, scale, window_size, chosen)
    else:
        return attention_op(q, k, v, table.rows, scale, window_size, chosen)
    return out, with_lse_gradient(q, k, v, out, lse, table, scale, window_size)


def resolve_impl(
    q: Tensor,
    segments: SegmentTable,
    *,
    window_size: int | None = None,
    impl: str = "auto",
) -> str:
    """The implementation that `attention` runs for such tensors; its errors are the same."""
    return choose_impl(impl, q, segments, window_size)


@torch.no_grad()
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: SegmentTable,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out and lse without autograd, for schemes that have a backward of their own.

    Arguments, results and errors are those of `attention`; impl is "triton", "torch", "reference"
    or "auto", the first of them that applies.
    """
    _check_inputs(q, k, v, segments, window_size)
    scale = _scale_of(softmax_scale, q)
    chosen = choose_split_impl(impl, q, segments, window_size)
    if chosen == "reference":
        return attention_reference(
            q, k, v, segments=segments.segments, softmax_scale=scale, window_size=window_size
        )
    return run_attention_fwd(q, k, v, segments, scale, window_size, chosen)


@torch.no_grad()
def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: SegmentTable,
    *,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part of a softmax that `segments` covers.

        p = exp(s − lse),  delta = Σ dout · out − dlse,  ds = p · (dout · v − delta)
        dq = softmax_scale · ds k,  dk = softmax_scale · dsᵀ q,  dv = pᵀ dout

    `out` and `lse` may be those of a larger softmax, over more keys than `segments` names: then
    the results are the shares of these keys, and the sum over all parts is the whole gradient.

    Args:
        dout: [Tq, H, K], floating point.
        q, k, v, segments, softmax_scale, window_size, impl: as in `attention_fwd`.
        out: [Tq, H, K], floating point.
        lse: [H, Tq] fp32 (fp64 for fp64 inputs), natural log; −inf means that p is 0.
        dlse: [H, Tq], gradient of lse, or None for 0.
        grad_dtype: of the results; None means the dtype of q. fp32 for parts that will be summed.

    Returns:
        dq [Tq, H, K], dk and dv [Tk, J, K]: 0 where nothing is seen.

    Raises:
        ValueError: shapes, devices, a table of other sizes, window_size, unknown impl.
        TypeError: dtypes.
        NotImplementedError: impl="triton" where it does not apply.
    """
    _check_inputs(q, k, v, segments, window_size)
    _check_gradients(dout, q, out, lse, dlse, grad_dtype)
    scale = _scale_of(softmax_scale, q)
    chosen = choose_split_impl(impl, q, segments, window_size)
    grad_dtype = q.dtype if grad_dtype is None else grad_dtype
    if chosen == "reference":
        dq, dk, dv = attention_bwd_reference(
            dout,
            q,
            k,
            v,
            out,
            lse,
            segments=segments.segments,
            dlse=dlse,
            softmax_scale=scale,
            window_size=window_size,
        )
        return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)
    return run_attention_bwd(
        dout, dlse, q, k, v, out, lse, segments, scale, window_size, chosen, grad_dtype
    )


def _table_of(
    cu_seqlens: Sequence[int] | Tensor | None, segments: SegmentTable | None
) -> SegmentTable:
    if (cu_seqlens is None) == (segments is None):
        raise TypeError(
            "attention: expected cu_seqlens or segments, "
            f"got {'neither' if segments is None else 'both'}"
        )
    if segments is not None:
        return segments
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
            raise TypeError(
                "attention: expected cu_seqlens as a one-dimensional int32 tensor, "
                f"got {[*cu_seqlens.shape]} {cu_seqlens.dtype}"
            )
        return _pack_table(tuple(cu_seqlens.tolist()))
    return _pack_table(tuple(cu_seqlens or ()))


@functools.lru_cache(maxsize=64)
def _pack_table(cu_seqlens: tuple[int, ...]) -> SegmentTable:
    """All layers of a model ask for the same pack."""
    return SegmentTable.from_cu_seqlens(cu_seqlens)


def _scale_of(softmax_scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentTable, window_size: int | None
) -> None:
    shapes = f"got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: expected q [Tq, H, K] and k, v [Tk, J, K], {shapes}")
    if 0 in (q.shape[1], k.shape[1], q.shape[2]) or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"attention: expected K > 0 and query heads in multiples of KV heads, {shapes}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "attention: expected q, k, v of one floating point dtype, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"attention: q is on {q.device}, k on {k.device}, v on {v.device}")
    if not isinstance(segments, SegmentTable):
        raise TypeError(f"attention: expected a SegmentTable, got {type(segments).__name__}")
    if (segments.num_q, segments.num_k) != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"attention: the table is for {segments.num_q} queries and {segments.num_k} "
            f"keys, q has {q.shape[0]} tokens and k {k.shape[0]}"
        )
    if window_size is not None and window_size < 1:
        raise ValueError(
            f"attention: expected window_size >= 1, or None for all keys, got {window_size}"
        )


def _check_gradients(
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> None:
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape:
            raise ValueError(f"attention_bwd: expected {name} {[*q.shape]}, got {[*tensor.shape]}")
        if not tensor.is_floating_point():
            raise TypeError(f"attention_bwd: expected a floating point {name}, got {tensor.dtype}")
    wide = wide_dtype(q.dtype)
    for name, statistic in (("lse", lse), ("dlse", dlse)):
        if statistic is None:
            continue
        if statistic.shape != (q.shape[1], q.shape[0]):
            raise ValueError(
                f"attention_bwd: expected {name} {[q.shape[1], q.shape[0]]}, "
                f"got {[*statistic.shape]}"
            )
        if statistic.dtype != wide:
            raise TypeError(f"attention_bwd: expected {name} in {wide}, got {statistic.dtype}")
    devices = {x.device for x in (dout, out, lse, dlse, q) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            "attention_bwd: expected all tensors on one device, "
            f"got {', '.join(sorted(map(str, devices)))}"
        )
    if grad_dtype is not None and not grad_dtype.is_floating_point:
        raise TypeError(f"attention_bwd: expected a floating point grad_dtype, got {grad_dtype}")
