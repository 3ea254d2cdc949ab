"""The fp32 gradient that a parameter's products add to directly, `main_grad` as in Megatron-LM.

Whoever owns the gradients (the optimizer) attaches one; the model's products then add to it inside
their backward pass, in fp32 and without a temporary of the weight's size, and autograd sees no
gradient. A parameter without one gets its gradient from autograd, as everywhere in torch.
"""

from torch import Tensor

__all__ = ["attach_main_grad", "main_grad"]


def attach_main_grad(parameter: Tensor, grad: Tensor) -> None:
    """Lets products add to `grad`, fp32 in the shape of the parameter."""
    assert grad.shape == parameter.shape
    parameter.main_grad = grad  # type: ignore[attr-defined]


def main_grad(parameter: Tensor) -> Tensor | None:
    """The attached gradient, or None."""
    return getattr(parameter, "main_grad", None)
