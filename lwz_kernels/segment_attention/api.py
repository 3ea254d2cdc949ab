"""Public contract of segment_attention: documentation, checks and dispatch."""

import math

import torch
from torch import Tensor

from lwz_kernels.dispatch import log_choice_once
from lwz_kernels.segment_attention.op import (
    run_segment_attention_bwd,
    run_segment_attention_fwd,
    segment_attention_op,
)
from lwz_kernels.segment_attention.reference import (
    segment_attention_bwd_reference,
    segment_attention_reference,
)
from lwz_kernels.segment_attention.segments import SegmentTable

__all__ = ["segment_attention", "segment_attention_bwd", "segment_attention_fwd"]

IMPLS = ("auto", "triton", "torch", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_SIZE = 128
TRITON_MIN_CAPABILITY = (8, 0)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: SegmentTable,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of each segment's queries to its keys, with the log-sum-exp.

        s[h, i, j] = softmax_scale · q[i, h] · k[j, h J // H]      for the keys j that i sees
        lse[h, i] = log Σ_j exp s[h, i, j]
        out[i, h] = Σ_j exp(s[h, i, j] − lse[h, i]) v[j, h J // H]

    Query i of a segment, counted from its start, sees the keys j <= i + k_len − q_len, and with a
    window only the last `window_size` of them. A query that sees nothing, or is in no segment, has
    out 0 and lse −inf.

    Args:
        q: [Tq, H, K], floating point.
        k: [Tk, J, K], dtype of q; J divides H.
        v: [Tk, J, K], dtype of q.
        segments: of Tq queries and Tk keys; made once and shared by all layers.
        softmax_scale: None means 1 / sqrt(K).
        window_size: number of keys that a query sees at most, at least 1; None for all.
        impl: "triton" (CUDA from sm_80 on, bf16 or fp16, K up to 128), "torch" (blocks of queries,
            any device), "reference" (one mask, autograd), or "auto": triton where it applies, else
            torch; logged once.

    Returns:
        out: [Tq, H, K], dtype of q.
        lse: [H, Tq] fp32 (fp64 for fp64 inputs), natural log. Both are differentiable.

    Numerics: scores, sums and gradients accumulate in fp32 (fp64 for fp64), under autocast too;
        deterministic on a CPU, and by "triton".

    Raises:
        ValueError: shapes, devices, a table of other sizes, window_size, unknown impl.
        TypeError: dtypes.
        NotImplementedError: impl="triton" where it does not apply.

    Example:
        >>> table = SegmentTable.from_cu_seqlens([0, 2, 3])
        >>> v = torch.tensor([[1.0], [3.0], [10.0]]).view(3, 1, 1)
        >>> zero = torch.zeros(3, 1, 1)
        >>> out, lse = segment_attention(zero, zero, v, table)
        >>> out.flatten().tolist()
        [1.0, 2.0, 10.0]
        >>> lse.exp().round().flatten().tolist()  # keys seen, as all scores are 0
        [1.0, 2.0, 1.0]
    """
    _check_inputs(q, k, v, segments, window_size)
    scale = _scale_of(softmax_scale, q)
    chosen = _choose(impl, q)
    if chosen == "reference":
        return segment_attention_reference(
            q, k, v, segments=segments.segments, softmax_scale=scale, window_size=window_size
        )
    return segment_attention_op(q, k, v, segments.rows, scale, window_size, chosen)


@torch.no_grad()
def segment_attention_fwd(
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

    Arguments, results and errors are those of `segment_attention`.
    """
    _check_inputs(q, k, v, segments, window_size)
    scale = _scale_of(softmax_scale, q)
    chosen = _choose(impl, q)
    if chosen == "reference":
        return segment_attention_reference(
            q, k, v, segments=segments.segments, softmax_scale=scale, window_size=window_size
        )
    return run_segment_attention_fwd(q, k, v, segments, scale, window_size, chosen)


@torch.no_grad()
def segment_attention_bwd(
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
        q, k, v, segments, softmax_scale, window_size, impl: as in `segment_attention`.
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
    chosen = _choose(impl, q)
    grad_dtype = q.dtype if grad_dtype is None else grad_dtype
    if chosen == "reference":
        dq, dk, dv = segment_attention_bwd_reference(
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
    return run_segment_attention_bwd(
        dout, dlse, q, k, v, out, lse, segments, scale, window_size, chosen, grad_dtype
    )


def _choose(impl: str, q: Tensor) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(
            f"segment_attention: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}"
        )
    if impl in ("torch", "reference"):
        return impl
    obstacle = _triton_obstacle(q)
    if not obstacle:
        if impl == "auto":
            log_choice_once("segment_attention", "triton", "CUDA tensors")
        return "triton"
    if impl == "triton":
        raise NotImplementedError(
            f"segment_attention: impl='triton' {obstacle}; use impl='torch' or 'auto'"
        )
    log_choice_once("segment_attention", "torch", f"triton {obstacle}")
    return "torch"


def _triton_obstacle(q: Tensor) -> str:
    """Why the Triton kernels cannot run; empty if they can."""
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < TRITON_MIN_CAPABILITY:
        return f"needs sm_80 or later, got {torch.cuda.get_device_name(q.device)}"
    if q.dtype not in TRITON_DTYPES:
        return f"needs bfloat16 or float16, got {q.dtype}"
    if q.shape[2] > TRITON_MAX_HEAD_SIZE:
        return f"needs a head size up to {TRITON_MAX_HEAD_SIZE}, got {q.shape[2]}"
    return ""


def _scale_of(softmax_scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, segments: SegmentTable, window_size: int | None
) -> None:
    shapes = f"got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"segment_attention: expected q [Tq, H, K] and k, v [Tk, J, K], {shapes}")
    if 0 in (q.shape[1], k.shape[1], q.shape[2]) or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"segment_attention: expected K > 0 and query heads in multiples of KV heads, {shapes}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "segment_attention: expected q, k, v of one floating point dtype, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"segment_attention: q is on {q.device}, k on {k.device}, v on {v.device}")
    if not isinstance(segments, SegmentTable):
        raise TypeError(
            f"segment_attention: expected a SegmentTable, got {type(segments).__name__}"
        )
    if (segments.num_q, segments.num_k) != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"segment_attention: the table is for {segments.num_q} queries and {segments.num_k} "
            f"keys, q has {q.shape[0]} tokens and k {k.shape[0]}"
        )
    if window_size is not None and window_size < 1:
        raise ValueError(
            f"segment_attention: expected window_size >= 1, or None for all keys, got {window_size}"
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
            raise ValueError(
                f"segment_attention_bwd: expected {name} {[*q.shape]}, got {[*tensor.shape]}"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"segment_attention_bwd: expected a floating point {name}, got {tensor.dtype}"
            )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, statistic in (("lse", lse), ("dlse", dlse)):
        if statistic is None:
            continue
        if statistic.shape != (q.shape[1], q.shape[0]):
            raise ValueError(
                f"segment_attention_bwd: expected {name} {[q.shape[1], q.shape[0]]}, "
                f"got {[*statistic.shape]}"
            )
        if statistic.dtype != wide:
            raise TypeError(
                f"segment_attention_bwd: expected {name} in {wide}, got {statistic.dtype}"
            )
    devices = {x.device for x in (dout, out, lse, dlse, q) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            "segment_attention_bwd: expected all tensors on one device, "
            f"got {', '.join(sorted(map(str, devices)))}"
        )
    if grad_dtype is not None and not grad_dtype.is_floating_point:
        raise TypeError(
            f"segment_attention_bwd: expected a floating point grad_dtype, got {grad_dtype}"
        )
