"""verl: the chunked torch head, the Triton head, and log-probs of logits.

verl's packages import ray and more as they start. What is measured here needs none of that, so
the packages are entered without running their own start; a module that still lacks something
is reported as missing, with the name of what it lacks.
"""

import importlib
import importlib.util
import sys
import types
from types import ModuleType

import torch

from bench.loss_head.problem import Problem
from bench.loss_head.provider import Calls, Logprobs, Provider

__all__ = ["PROVIDERS"]

PACKAGES = ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel")


def _import(module: str) -> ModuleType:
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("No module named 'verl'")
        root = spec.submodule_search_locations[0]
        for name in PACKAGES:
            package = types.ModuleType(name)
            package.__path__ = ["/".join((root, *name.split(".")[1:]))]
            sys.modules[name] = package
    return importlib.import_module(module)


def _load_torch() -> Calls:
    head = _import("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def logprobs(problem: Problem) -> Logprobs:
        return head(problem.hidden, problem.weight, problem.labels, problem.temperature)

    return Calls(logprobs=logprobs)


def _load_triton() -> Calls:
    linear_cross_entropy = _import("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def logprobs(problem: Problem) -> Logprobs:
        return linear_cross_entropy(
            problem.hidden, problem.weight, problem.labels, problem.temperature, "none"
        )

    return Calls(logprobs=logprobs)


def _load_logits() -> Calls:
    from_logits = _import("verl.utils.torch_functional").logprobs_from_logits

    def logprobs(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        return from_logits(logits / temperature, labels, inplace_backward=False)

    return Calls(logprobs_from_logits=logprobs)


PROVIDERS = {
    "verl_torch": Provider("verl", ("cpu", "cuda"), _load_torch),
    "verl_triton": Provider("verl", ("cuda",), _load_triton),
    "verl_logits": Provider("verl", ("cpu", "cuda"), _load_logits),
}
