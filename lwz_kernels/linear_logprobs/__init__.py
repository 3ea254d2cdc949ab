"""Log-probabilities, entropy and log-sum-exp from hidden states, never from [T, V] logits."""

from lwz_kernels.linear_logprobs.api import linear_logprobs

__all__ = ["linear_logprobs"]
