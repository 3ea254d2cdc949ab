"""Log-probabilities and policy losses computed from hidden states, never from [T, V] logits."""

from lwz_kernels.policy_loss.api import (
    PolicyLossConfig,
    linear_logprobs,
    linear_policy_loss,
    loss_token_weights,
)
from lwz_kernels.policy_loss.head import head_operand, matmul_wide

__all__ = [
    "PolicyLossConfig",
    "head_operand",
    "linear_logprobs",
    "linear_policy_loss",
    "loss_token_weights",
    "matmul_wide",
]
