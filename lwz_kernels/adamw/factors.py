"""The factors of one step of AdamW, each computed in double precision from the settings."""

import math
from dataclasses import dataclass

__all__ = ["Factors"]


@dataclass(frozen=True)
class Factors:
    """m += (1 − beta1)(g − m), v = beta2·v + (1 − beta2)·g², with g = grad_scale · grad; then

    p = decay · p − step_size · m / (√v · inverse_correction + eps).
    """

    grad_scale: float
    beta1: float
    beta2: float
    decay: float
    step_size: float
    inverse_correction: float
    eps: float

    @classmethod
    def of_step(
        cls,
        step: int,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        grad_scale: float,
    ) -> "Factors":
        """Arguments as in `adamw_`."""
        return cls(
            grad_scale=grad_scale,
            beta1=beta1,
            beta2=beta2,
            decay=1 - lr * weight_decay,
            step_size=lr / (1 - beta1**step),
            inverse_correction=1 / math.sqrt(1 - beta2**step),
            eps=eps,
        )
