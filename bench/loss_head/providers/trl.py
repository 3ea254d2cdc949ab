"""TRL: the chunked log-probs that its trainers use, and its log-softmax over logits."""

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Logprobs, Provider

__all__ = ["PROVIDERS"]

# The vocabulary chunk with which TRL's trainers call it.
VOCAB_CHUNK = 32768


def _load() -> Calls:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import selective_log_softmax

    def logprobs(problem: Problem) -> Logprobs:
        chosen, entropy, *_ = ChunkedLogProbFunction.apply(
            problem.hidden,
            problem.weight,
            None,
            problem.labels,
            problem.temperature,
            VOCAB_CHUNK,
            None,
            1.0,
            ("log_probs", "entropy"),
        )
        return chosen, entropy

    def from_logits(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        return selective_log_softmax(logits, labels, temperature)

    return Calls(logprobs=logprobs, logprobs_from_logits=from_logits)


PROVIDERS = {"trl": Provider("trl", ("cpu", "cuda"), _load)}
