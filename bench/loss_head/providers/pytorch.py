"""PyTorch itself: full logits by autograd, the same compiled, and `F.linear_cross_entropy`.

Eager rounds logits to the inputs' dtype and takes the softmax in fp32: log-probs only, no entropy.
"""

import torch
import torch.nn.functional as F

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Logprobs, Provider, clipped_loss

__all__ = ["PROVIDERS", "with_temperature"]


def with_temperature(problem: Problem) -> torch.Tensor:
    """The hidden states that give a head without a temperature the right logits."""
    return problem.hidden / problem.temperature


def _load_eager() -> Calls:
    return Calls(
        logprobs=_logprobs,
        policy_loss=_policy_loss,
        cross_entropy=_cross_entropy,
        logprobs_from_logits=_logprobs_from_logits,
    )


def _load_compiled() -> Calls:
    return Calls(
        logprobs=torch.compile(_logprobs, dynamic=False),
        policy_loss=torch.compile(_policy_loss, dynamic=False),
        cross_entropy=torch.compile(_cross_entropy, dynamic=False),
        logprobs_from_logits=torch.compile(_logprobs_from_logits, dynamic=False),
    )


def _load_linear_cross_entropy() -> Calls:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("F.linear_cross_entropy needs PyTorch 2.13 or newer")

    def nll(problem: Problem, reduction: str) -> torch.Tensor:
        return F.linear_cross_entropy(
            with_temperature(problem),
            problem.weight,
            problem.labels,
            reduction=reduction,
            options=torch.nn.LinearCrossEntropyOptions(),
        )

    return Calls(
        logprobs=lambda problem: (-nll(problem, "none"), None),
        cross_entropy=lambda problem: nll(problem, "mean"),
    )


def _logprobs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logprobs.gather(1, labels[:, None])[:, 0]


def _logprobs(problem: Problem) -> Logprobs:
    logits = F.linear(problem.hidden, problem.weight)
    return _logprobs_from_logits(logits, problem.labels, problem.temperature), None


def _policy_loss(problem: Problem) -> torch.Tensor:
    return clipped_loss(_logprobs(problem)[0], problem)


def _cross_entropy(problem: Problem) -> torch.Tensor:
    return -_logprobs(problem)[0].mean()


PROVIDERS = {
    "eager": Provider(None, ("cpu", "cuda"), _load_eager),
    "torch_compile": Provider(None, ("cpu", "cuda"), _load_compiled),
    "linear_cross_entropy": Provider(None, ("cpu", "cuda"), _load_linear_cross_entropy),
}
