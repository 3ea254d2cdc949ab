"""Says of a backward operator that it has no gradient of its own, instead of giving a wrong one."""

from typing import Any, NoReturn

import torch

__all__ = ["register_once_differentiable"]


def register_once_differentiable(backward_op: str) -> None:
    """A gradient of `backward_op` ("lwz::name_backward"), as create_graph asks for, raises."""
    name = backward_op.removeprefix("lwz::").removesuffix("_backward")

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{name}: differentiable once; second derivatives need impl='reference'")

    torch.library.register_autograd(backward_op, refuse)
