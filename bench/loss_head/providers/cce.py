"""Cut Cross-Entropy: as it comes (small gradients are skipped), with all gradients, compiled."""

from functools import partial

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Provider
from bench.loss_head.providers.pytorch import with_temperature

__all__ = ["PROVIDERS"]


def _load(impl: str, filter_eps: str | None) -> Calls:
    from cut_cross_entropy import linear_cross_entropy

    def nll(problem: Problem, reduction: str) -> torch.Tensor:
        return linear_cross_entropy(
            with_temperature(problem),
            problem.weight,
            problem.labels,
            reduction=reduction,
            filter_eps=filter_eps,
            impl=impl,
        )

    return Calls(
        logprobs=lambda problem: (-nll(problem, "none"), None),
        cross_entropy=lambda problem: nll(problem, "mean"),
    )


PROVIDERS = {
    "cce": Provider("cut-cross-entropy", ("cuda",), partial(_load, "cce", "high")),
    "cce_unfiltered": Provider("cut-cross-entropy", ("cuda",), partial(_load, "cce", None)),
    "cce_torch_compile": Provider(
        "cut-cross-entropy", ("cpu", "cuda"), partial(_load, "torch_compile", None)
    ),
}
