"""Public contract of qkv_rope: documentation and checks."""

import torch
from torch import Tensor

from lwz_kernels.qkv_rope.op import qkv_rope_op
from lwz_kernels.qkv_rope.reference import qkv_rope_reference

__all__ = ["qkv_rope"]


def qkv_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    position_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection, the first two rotated by their positions.

    Dimension i of a head turns together with dimension i + K/2, by the angle in row p of tables:

        y[i]       = x[i] · cos[p, i] − x[i + K/2] · sin[p, i]
        y[i + K/2] = x[i + K/2] · cos[p, i] + x[i] · sin[p, i]       p = position_ids[t], or t

    Values are copied. One pass over the projection, and one over its gradient, which is the inverse
    rotation.

    Args:
        qkv: [T, (H + 2J)·K], floating point: H query heads, then J key heads, then J value heads.
        cos: [P, K/2], floating point; no gradient. Of a table that repeats its halves (as
            transformers has them), pass the first.
        sin: as cos.
        num_heads: H.
        num_kv_heads: J.
        position_ids: [T] int32 or int64, rows of the tables; None means row t, and P = T.
        impl: "triton" (CUDA; bf16, fp16 or fp32), "torch" (any device), "reference" (autograd of
            the formula), or "auto": triton where it applies, else torch; logged once.

    Returns:
        q [T, H, K], k and v [T, J, K], contiguous, dtype of qkv. Differentiable once in qkv.

    Numerics: "triton" computes in fp32 and rounds once. "torch" rounds the first product to the
        dtype of qkv, as transformers does. Deterministic.

    Raises:
        ValueError: shapes, devices, unknown impl; on a CPU also positions that are out of range (on
            a GPU they are undefined behaviour).
        TypeError: dtypes.
        NotImplementedError: impl="triton" where it does not apply.
        RuntimeError: tables that require gradients while they are recorded.

    Source: RoFormer, arXiv 2104.09864, with halves instead of neighbours.

    Example:
        >>> import math
        >>> quarter = torch.full((1, 1), math.pi / 2)
        >>> qkv = torch.tensor([[1.0, 0.0, 0.0, 2.0, 5.0, 6.0]])
        >>> q, k, v = qkv_rope(qkv, quarter.cos(), quarter.sin(), num_heads=1, num_kv_heads=1)
        >>> [x.round().flatten().tolist() for x in (q, k, v)]
        [[-0.0, 1.0], [-2.0, -0.0], [5.0, 6.0]]
    """
    _check_inputs(qkv, cos, sin, num_heads, num_kv_heads)
    _check_positions(qkv, cos, position_ids)
    if impl == "reference":
        return qkv_rope_reference(qkv, cos, sin, num_heads, num_kv_heads, position_ids)
    return qkv_rope_op(qkv, cos, sin, position_ids, num_heads, num_kv_heads, impl)


def _check_inputs(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"qkv_rope: expected heads >= 1, got {num_heads} and {num_kv_heads}")
    total = num_heads + 2 * num_kv_heads
    if qkv.ndim != 2 or qkv.shape[1] == 0 or qkv.shape[1] % (2 * total) != 0:
        raise ValueError(
            f"qkv_rope: expected qkv [T, {total} * K] with an even K for {num_heads} + 2 * "
            f"{num_kv_heads} heads, got {[*qkv.shape]}"
        )
    half = qkv.shape[1] // (2 * total)
    if cos.ndim != 2 or cos.shape[1] != half or sin.shape != cos.shape:
        raise ValueError(
            f"qkv_rope: expected cos and sin [P, {half}], got {[*cos.shape]} and {[*sin.shape]}"
        )
    if not (qkv.is_floating_point() and cos.is_floating_point() and sin.dtype == cos.dtype):
        raise TypeError(
            "qkv_rope: expected floating point tensors, cos and sin of one dtype, "
            f"got {qkv.dtype}, {cos.dtype}, {sin.dtype}"
        )
    if cos.device != qkv.device or sin.device != qkv.device:
        raise ValueError(f"qkv_rope: qkv is on {qkv.device}, cos {cos.device}, sin {sin.device}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise RuntimeError("qkv_rope: cos and sin get no gradient; detach them")


def _check_positions(qkv: Tensor, cos: Tensor, position_ids: Tensor | None) -> None:
    num_tokens = qkv.shape[0]
    if position_ids is None:
        if cos.shape[0] != num_tokens:
            raise ValueError(
                f"qkv_rope: expected one row of cos and sin for each of {num_tokens} tokens, got "
                f"{cos.shape[0]}; pass position_ids to choose rows"
            )
        return
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"qkv_rope: expected position_ids of dtype int32 or int64, got {position_ids.dtype}"
        )
    if position_ids.shape != (num_tokens,) or position_ids.device != qkv.device:
        raise ValueError(
            f"qkv_rope: expected position_ids [{num_tokens}] on {qkv.device}, "
            f"got {[*position_ids.shape]} on {position_ids.device}"
        )
