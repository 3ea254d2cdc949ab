"""The policy-gradient loss family from hidden states, with its gradients taken in forward."""

from lwz_kernels.linear_policy_loss.api import linear_policy_loss
from lwz_kernels.linear_policy_loss.config import PolicyLossConfig

__all__ = ["PolicyLossConfig", "linear_policy_loss"]
