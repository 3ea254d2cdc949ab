"""The public contract of the AdamW step: documentation, checks, choice of `impl`."""

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.adamw.factors import Factors
from lwz_kernels.adamw.torch_step import adamw_torch_
from lwz_kernels.dispatch import log_choice_once

__all__ = ["adamw_"]

IMPLS = ("auto", "triton", "native", "torch")
_MOMENT_DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def adamw_(
    weights: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    lower: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One step of AdamW in one pass over memory, in place on weights and moments.

        g = grad_scale · grad
        m = beta1 · m + (1 − beta1) · g
        v = beta2 · v + (1 − beta2) · g²
        p = (1 − lr · weight_decay) · p − lr · m̂ / (√v̂ + eps)

    with m̂ = m / (1 − beta1^step) and v̂ = v / (1 − beta2^step).

    The master p is `weights`, or in halves: bf16 weights that a model computes with, and `lower`
    beside them (`split_halves`), together the exact fp32 value in 4 bytes. It never exists whole.

    Args:
        weights: [n], fp32; bf16 with `lower`.
        grad: [n], fp32; not changed.
        exp_avg: m, [n], fp32 or bf16.
        exp_avg_sq: v, as `exp_avg`. In bf16 a v that moves by less than 0.4% of itself stays:
            keep beta2 at 0.98 or less.
        step: number of this step, from 1.
        lr: learning rate.
        beta1, beta2: decay of the moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled.
        grad_scale: factor of the gradient, as of clipping.
        lower: [n] int16, the lower halves of the masters; None where `weights` is fp32.
        impl: "triton" (CUDA), "native" (CPU library), "torch", or "auto": the first of them that
            applies; logged once.

    Numerics: fp32 arithmetic, moments rounded to nearest where they are bf16. An element's bits
        depend on its own values alone, neither on its place nor on the number of threads.

    Raises:
        ValueError: shapes, devices, tensors that are not contiguous, step < 1, unknown impl.
        TypeError: dtypes.
        NotImplementedError: impl="triton" or "native" where it does not apply.
        RuntimeError: impl="native" without the library, the message says why.

    Source: Decoupled weight decay, arXiv 1711.05101; split masters, arXiv 2005.04680; bf16 moments
        with fp32 masters, arXiv 2412.19437 (section 3.3.3).

    Example:
        >>> weights, grad = torch.tensor([1.0]), torch.tensor([0.5])
        >>> moments = torch.zeros(1), torch.zeros(1)
        >>> adamw_(weights, grad, *moments, step=1, lr=0.25)
        >>> weights
        tensor([0.7500])
    """
    _check(weights, grad, exp_avg, exp_avg_sq, lower, step)
    by = Factors.of_step(
        step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )
    chosen = _choose(impl, weights.device)
    if chosen == "triton":
        from lwz_kernels.adamw.kernels import adamw_triton_

        adamw_triton_(weights, lower, grad, exp_avg, exp_avg_sq, by)
    elif chosen == "native":
        native.adamw_(weights, lower, grad, exp_avg, exp_avg_sq, **vars(by))
    else:
        adamw_torch_(weights, lower, grad, exp_avg, exp_avg_sq, by)


def _choose(impl: str, device: torch.device) -> str:
    """The implementation to run; raises where the one asked for by name cannot."""
    if impl not in IMPLS:
        raise ValueError(f"adamw_: unknown impl {impl!r}, expected one of {', '.join(IMPLS)}")
    if impl == "triton" and device.type != "cuda":
        raise NotImplementedError(f"adamw_: impl='triton' needs CUDA tensors, got {device.type}")
    if impl == "native" and device.type != "cpu":
        raise NotImplementedError(f"adamw_: impl='native' needs CPU tensors, got {device.type}")
    if impl == "native" and not native.is_available():
        reason = native.unavailable_reason()
        raise RuntimeError(f"adamw_: impl='native' is not available: {reason}")
    if impl != "auto":
        return impl
    if device.type == "cuda":
        chosen, reason = "triton", "CUDA tensors"
    elif device.type != "cpu":
        chosen, reason = "torch", f"{device.type} tensors"
    elif native.is_available():
        chosen, reason = "native", f"CPU tensors, {native.best_level()}"
    else:
        chosen, reason = "torch", native.unavailable_reason()
    log_choice_once("adamw_", chosen, reason)
    return chosen


def _check(
    weights: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lower: Tensor | None,
    step: int,
) -> None:
    tensors = [weights, grad, exp_avg, exp_avg_sq] + ([] if lower is None else [lower])
    if any(tensor.shape != weights.shape for tensor in tensors) or weights.ndim != 1:
        raise ValueError(
            f"adamw_: expected vectors of one length, got {[[*tensor.shape] for tensor in tensors]}"
        )
    if any(tensor.device != weights.device for tensor in tensors):
        raise ValueError(
            f"adamw_: expected all tensors on {weights.device}, "
            f"got {[str(tensor.device) for tensor in tensors]}"
        )
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("adamw_: expected contiguous tensors")
    if step < 1:
        raise ValueError(f"adamw_: expected step >= 1, got {step}")
    dtype = torch.float32 if lower is None else torch.bfloat16
    if weights.dtype != dtype or (lower is not None and lower.dtype != torch.int16):
        raise TypeError(
            "adamw_: expected fp32 weights, or bf16 weights with int16 lower halves, got "
            f"{weights.dtype} and {None if lower is None else lower.dtype}"
        )
    if grad.dtype != torch.float32:
        raise TypeError(f"adamw_: expected a fp32 gradient, got {grad.dtype}")
    if exp_avg.dtype not in _MOMENT_DTYPES or exp_avg_sq.dtype != exp_avg.dtype:
        raise TypeError(
            f"adamw_: expected both moments fp32 or bf16, got {exp_avg.dtype}, {exp_avg_sq.dtype}"
        )
