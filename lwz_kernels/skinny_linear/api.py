"""The public contract of the linear layer for few rows: documentation, checks, choice of `impl`."""

import torch

from lwz_kernels import native
from lwz_kernels.dispatch import log_choice_once
from lwz_kernels.skinny_linear import reference
from lwz_kernels.skinny_linear.op import skinny_linear_op

__all__ = ["AUTO_MAX_ROWS", "skinny_linear"]

IMPLS = ("auto", "native", "torch", "reference")

# Beyond this many rows both are limited by multiply-adds and torch catches up. There is no lower
# limit although torch is faster for one row (bench/results/cpu/skinny_linear.csv): a sequence that
# is decoded alone has to get the bits that it gets in company.
AUTO_MAX_ROWS = 64

# x, weight, out
_DTYPES = frozenset(
    {
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    }
)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """x · weightᵀ + bias for few rows of x, limited by reading the weight.

    out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]. Inference only: there is no backward.

    Args:
        x: [M, K] fp32, or bf16 with a bf16 weight.
        weight: [N, K] fp32 or bf16.
        bias: [N], dtype of the weight, or None.
        out_dtype: fp32, or bf16 where x and weight are; None means the dtype of x.
        impl: "native" (CPU library), "torch" (F.linear, of widened copies where the dtypes
            differ), "reference", or "auto": native for CPU tensors where the library is available,
            K is a multiple of 8, the weight is contiguous and M <= AUTO_MAX_ROWS, else torch;
            logged once.

    Returns:
        [M, N] of `out_dtype`.

    Numerics: fp32 accumulation, one rounding to `out_dtype`. "native" sums over k in blocks of at
        most 64 (128 with AVX512-BF16, whose products take subnormal numbers for 0) whose order
        depends on K alone: a row's result has the same bits for any M, any other rows, and any
        number of threads.

    Raises:
        ValueError: shapes, devices, unknown impl.
        TypeError: dtypes.
        NotImplementedError: impl="native" for GPU tensors, a weight that is not contiguous, or a K
            that is not a multiple of 8.
        RuntimeError: impl="native" without the library, the message says why; tensors that require
            gradients while they are recorded.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
        >>> skinny_linear(x, torch.eye(8)[:3], torch.tensor([0.0, 0.0, 5.0]))
        tensor([[1., 2., 5.]])
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, weight, bias, dtype)
    chosen = _choose(impl, x, weight)
    if chosen == "reference":
        return reference.skinny_linear(x, weight, bias, out_dtype=dtype)
    if chosen == "native":
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
    return skinny_linear_op(x, weight, bias, dtype, chosen)


def _choose(impl: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(
            f"skinny_linear: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}"
        )
    if impl in ("torch", "reference"):
        return impl
    is_supported = (
        x.device.type == "cpu" and native.supports_depth(x.shape[1]) and weight.is_contiguous()
    )
    if impl == "native":
        if not is_supported:
            raise NotImplementedError(
                "skinny_linear: impl='native' needs CPU tensors, a contiguous weight, and K a "
                f"multiple of {native.DEPTH_STEP}, got K = {x.shape[1]} on {x.device}, weight "
                f"strides {list(weight.stride())}"
            )
        if not native.is_available():
            raise RuntimeError(
                f"skinny_linear: impl='native' is not available: {native.unavailable_reason()}"
            )
        return "native"
    if not is_supported:
        log_choice_once(
            "skinny_linear",
            "torch",
            f"no native kernel for K = {x.shape[1]} on {x.device.type} with weight strides "
            f"{list(weight.stride())}",
        )
        return "torch"
    if not native.is_available():
        log_choice_once("skinny_linear", "torch", native.unavailable_reason())
        return "torch"
    if x.shape[0] > AUTO_MAX_ROWS:
        log_choice_once("skinny_linear", "torch", f"more than {AUTO_MAX_ROWS} rows")
        return "torch"
    log_choice_once("skinny_linear", "native", f"CPU tensors, {native.best_level()}")
    return "native"


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> None:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("skinny_linear: has no backward; call it under torch.no_grad()")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "skinny_linear: expected x [M, K] and weight [N, K], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if (x.dtype, weight.dtype, out_dtype) not in _DTYPES:
        raise TypeError(
            "skinny_linear: expected x and weight fp32, or weight bf16 and x bf16 or fp32, and a "
            f"result in fp32 or in the dtype of both, got {x.dtype}, {weight.dtype} and "
            f"{out_dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"skinny_linear: expected bias [{weight.shape[0]}] {weight.dtype} as the weight, "
            f"got {list(bias.shape)} {bias.dtype}"
        )
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(
            f"skinny_linear: expected all tensors on {x.device}, "
            f"got {[str(tensor.device) for tensor in tensors]}"
        )
