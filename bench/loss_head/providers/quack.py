"""quack: cross-entropy with the gradients taken in forward; its mean or sum only."""

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Provider
from bench.loss_head.providers.pytorch import with_temperature

__all__ = ["PROVIDERS"]


def _load() -> Calls:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def cross_entropy(problem: Problem) -> torch.Tensor:
        return chunked_linear_cross_entropy(
            with_temperature(problem), problem.weight, problem.labels, reduction="mean"
        )

    return Calls(cross_entropy=cross_entropy)


PROVIDERS = {"quack": Provider("quack-kernels", ("cuda",), _load)}
