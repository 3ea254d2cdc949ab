"""Log-probabilities, entropy and log-sum-exp for those who already have logits."""

from lwz_kernels.logprobs_from_logits.api import logprobs_from_logits

__all__ = ["logprobs_from_logits"]
