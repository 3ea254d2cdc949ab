"""The `loss` section: which policy loss, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from lwz_kernels.linear_policy_loss import PolicyLossConfig
from lwz_trainer.errors import UserError

__all__ = ["LossConfig"]


@dataclass(frozen=True)
class LossConfig(PolicyLossConfig):
    """Which policy loss; docs/ops/policy_loss.md has the formula of each."""

    impl: Literal["auto", "triton", "native", "torch", "reference"] = "auto"
    """How log-probs and losses are computed; "reference" holds all logits and is for checks."""
    chunk_mb: int = 0
    """Size of one fp32 chunk of logits in MB; 0 is the kernels' choice (1250 on a GPU, 64 on a
    CPU). [T, V] never exists."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(f"loss: {error}") from error
        if self.chunk_mb < 0:
            raise UserError(f"loss.chunk_mb must be at least 0, got {self.chunk_mb}")

    @property
    def chunk_bytes(self) -> int | None:
        """`chunk_mb` as the kernels take it."""
        return self.chunk_mb * 1_000_000 or None
