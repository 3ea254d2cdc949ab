"""The fp32 gradient that a parameter's products add to directly, `main_grad` as in Megatron-LM.

Whoever owns the gradients (the optimizer) attaches one; the model's products then add to it inside
their backward pass, in fp32 and without a temporary of the weight's size, and autograd sees no
gradient. A parameter without one gets its gradient from autograd, as everywhere in torch, in the
type that torch's own `grad_dtype` asks for.
"""

import torch
from torch import Tensor

from lwz_kernels.dtypes import wide_dtype

__all__ = ["attach_main_grad", "grad_buffer", "grad_dtype", "main_grad"]


def attach_main_grad(parameter: Tensor, grad: Tensor) -> None:
    """Lets products add to `grad`, fp32 in the shape of the parameter."""
    assert grad.shape == parameter.shape
    parameter.main_grad = grad  # type: ignore[attr-defined]


def main_grad(parameter: Tensor) -> Tensor | None:
    """The attached gradient, or None."""
    return getattr(parameter, "main_grad", None)


def grad_buffer(parameter: Tensor) -> Tensor:
    """What the head may add its dW to: the attached gradient, else `.grad`, made if missing."""
    total = main_grad(parameter)
    if total is not None:
        return total
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype))
    return parameter.grad


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """Type in which autograd is to have the gradient; the parameter's own unless it says more."""
    wanted = parameter.grad_dtype if parameter.is_leaf else None
    return wanted or parameter.dtype
