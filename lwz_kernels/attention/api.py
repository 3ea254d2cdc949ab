"""The public contract of packed attention: documentation, checks, and the choice of `impl`."""

import math
from collections.abc import Sequence

import torch

from lwz_kernels.attention import reference, sdpa, varlen
from lwz_kernels.attention.plan import AttentionPlan
from lwz_kernels.dispatch import log_choice_once

__all__ = ["attention"]

IMPLS = ("auto", "sdpa", "varlen", "reference")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: AttentionPlan | Sequence[int] | torch.Tensor,
    *,
    prefix_of: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal attention inside each sequence of a pack, after an optional shared prefix.

    out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, j]) v[s, j], j = h // (H / J), over the keys
    s <= t of t's own sequence and all keys of the sequence that `prefix_of` names for it.

    With a prefix, the prompt of a group is computed once and serves all its completions; the
    gradients of its keys and values are the sums over them. Positions (RoPE) are the caller's.

    Args:
        q: [T, H, K], floating point.
        k: [T, J, K], dtype of q; J divides H.
        v: as k.
        cu_seqlens: N + 1 ascending offsets from 0 to T: a list, an int32 tensor (one device
            synchronisation if it is on a GPU), or an `AttentionPlan`, which is made once and
            shared by all layers.
        prefix_of: N entries or None; sequence i also attends to all keys of sequence prefix_of[i],
            -1 for none. One level only. Part of the plan where a plan is given.
        softmax_scale: factor of the scores; None means 1 / sqrt(K).
        impl: "sdpa" (a call per sequence), "varlen" (one GPU kernel, bf16 or fp16, no prefixes),
            "reference", or "auto": varlen where it applies, else sdpa; logged once.

    Returns:
        [T, H, K], dtype of q.

    Numerics: scores and sums in fp32 (fp64 for fp64 inputs), natural exponentials; deterministic
        on a CPU.

    Raises:
        ValueError: shapes, offsets, prefixes, unknown impl, devices.
        TypeError: dtypes; prefix_of beside a plan.
        NotImplementedError: impl="varlen" with prefixes, on a CPU, or for another dtype.

    Example:
        >>> import torch
        >>> v = torch.tensor([[1.0], [3.0], [10.0]]).view(3, 1, 1)
        >>> zero = torch.zeros(3, 1, 1)
        >>> attention(zero, zero, v, [0, 2, 3]).flatten().tolist()
        [1.0, 2.0, 10.0]
        >>> out = attention(zero, zero, v, [0, 2, 3], prefix_of=[-1, 0])
        >>> round(out[2].item(), 4)  # (1 + 3 + 10) / 3
        4.6667
    """
    _check_tensors(q, k, v)
    plan = _plan_of(cu_seqlens, prefix_of)
    if plan.num_tokens != q.shape[0]:
        raise ValueError(
            f"attention: cu_seqlens ends at {plan.num_tokens}, q has {q.shape[0]} tokens"
        )
    scale = 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    chosen = _choose(impl, q, plan)
    if chosen == "reference":
        return reference.attention(
            q, k, v, cu_seqlens=plan.cu_seqlens, prefix_of=plan.prefix_of, softmax_scale=scale
        )
    run = varlen.attention if chosen == "varlen" else sdpa.attention
    return run(q, k, v, plan, softmax_scale=scale)


def _choose(impl: str, q: torch.Tensor, plan: AttentionPlan) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(f"attention: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl in ("sdpa", "reference"):
        return impl
    obstacle = _varlen_obstacle(q, plan)
    if impl == "varlen":
        if obstacle:
            raise NotImplementedError(
                f"attention: impl='varlen' {obstacle}; use impl='sdpa' or 'auto'"
            )
        return "varlen"
    if obstacle:
        log_choice_once("attention", "sdpa", f"varlen {obstacle}")
        return "sdpa"
    log_choice_once("attention", "varlen", f"CUDA tensors, {varlen.backend()}")
    return "varlen"


def _varlen_obstacle(q: torch.Tensor, plan: AttentionPlan) -> str:
    """Why the single GPU kernel cannot run; empty if it can."""
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device.type}"
    if plan.prefix_of is not None:
        return "does not support prefix_of"
    if q.dtype not in varlen.DTYPES:
        return f"needs bfloat16 or float16, got {q.dtype}"
    return ""


def _plan_of(
    cu_seqlens: AttentionPlan | Sequence[int] | torch.Tensor, prefix_of: Sequence[int] | None
) -> AttentionPlan:
    if isinstance(cu_seqlens, AttentionPlan):
        if prefix_of is not None:
            raise TypeError("attention: prefix_of belongs into the AttentionPlan that was given")
        return cu_seqlens
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
            raise TypeError(
                "attention: expected cu_seqlens as a one-dimensional int32 tensor, "
                f"got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        cu_seqlens = cu_seqlens.tolist()
    return AttentionPlan(cu_seqlens, prefix_of)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.shape != k.shape:
        raise ValueError(
            "attention: expected q [T, H, K] and k, v [T, J, K], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q and k differ in tokens or head size: {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            "attention: the number of query heads must be a multiple of the number of KV heads, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "attention: expected q, k, v of one floating point dtype, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"attention: expected k and v on {q.device} as q, got {k.device} and {v.device}"
        )
