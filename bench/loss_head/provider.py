"""What a provider is, and how each measured case is made of its calls.

A provider names the package that it needs and the devices that it runs on. `load` imports that
package and gives its calls; it runs in the provider's own process only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.loss_head.problem import CLIP_RATIO_HIGH, CLIP_RATIO_LOW, Problem, make_logits

__all__ = [
    "CASES",
    "Calls",
    "Case",
    "Logprobs",
    "Outputs",
    "Provider",
    "clipped_loss",
    "prepare",
    "run_case",
]

Outputs = dict[str, torch.Tensor]
# log-probs [T], and entropy [T] where the provider computes it
Logprobs = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """One measured call of an op; `matmuls` of 2·T·V·D operations are its floor."""

    op: str
    mode: str
    matmuls: float
    logits_passes: int = 0  # times that logits-level memory must be read or written

    def __str__(self) -> str:
        return f"{self.op}/{self.mode}"


CASES = (
    Case("linear_logprobs", "fwd", 1),
    Case("linear_logprobs", "fwd_bwd", 3),
    Case("linear_policy_loss", "on_policy", 3),
    Case("linear_policy_loss", "off_policy", 3),
    # Half of the sequences have advantage zero: a head that leaves their rows out needs half.
    Case("linear_policy_loss", "half_zero", 1.5),
    # All advantages 1: the gradient of mean cross-entropy, so peers that have only that take part.
    Case("linear_policy_loss", "cross_entropy", 3),
    Case("logprobs_from_logits", "fwd", 0, logits_passes=1),
    Case("logprobs_from_logits", "fwd_bwd", 0, logits_passes=3),
)


@dataclass(frozen=True)
class Calls:
    """What a provider can do; None where it cannot.

    Without a policy loss of its own, a provider's differentiable log-probs go into
    `clipped_loss`, as its users do. `matmuls(problem, count)` is no provider but the floor.
    """

    logprobs: Callable[[Problem], Logprobs] | None = None
    policy_loss: Callable[[Problem], torch.Tensor] | None = None
    # the same, adding the weight's gradient to a caller's fp32 buffer
    policy_loss_into: Callable[[Problem, torch.Tensor], torch.Tensor] | None = None
    cross_entropy: Callable[[Problem], torch.Tensor] | None = None
    logprobs_from_logits: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    matmuls: Callable[[Problem, float], None] | None = None

    def supports(self, case: Case) -> bool:
        if self.matmuls is not None:
            return case.matmuls > 0
        if case.op == "linear_logprobs":
            return self.logprobs is not None
        if case.op == "logprobs_from_logits":
            return self.logprobs_from_logits is not None
        if case.mode == "cross_entropy" and self.cross_entropy is not None:
            return True
        losses = (self.policy_loss, self.policy_loss_into, self.logprobs)
        return any(call is not None for call in losses)


@dataclass(frozen=True)
class Provider:
    """`package`: the distribution whose version stands in the row; None for torch and ourselves."""

    package: str | None
    devices: tuple[str, ...]
    load: Callable[[], Calls]


def prepare(calls: Calls, case: Case, problem: Problem) -> Problem:
    """The case's own inputs and the buffers that its caller owns; not timed, not counted."""
    problem = problem.for_mode(case.mode)
    needs_grad = case.mode != "fwd"
    problem.hidden = problem.hidden.detach().requires_grad_(needs_grad)
    problem.weight = problem.weight.detach().requires_grad_(needs_grad)
    if case.op == "logprobs_from_logits":
        logits = make_logits(problem.shape, problem.labels, problem.hidden.dtype)
        problem.logits = logits.requires_grad_(needs_grad)
    if case.op == "linear_policy_loss" and calls.policy_loss_into is not None:
        problem.scratch["weight_grad"] = torch.zeros_like(problem.weight, dtype=torch.float32)
    return problem


def run_case(calls: Calls, case: Case, problem: Problem) -> Outputs:
    """The measured call: everything that it returns, none of it kept in a `.grad`."""
    if calls.matmuls is not None:
        calls.matmuls(problem, case.matmuls)
        return {}
    if case.op == "linear_logprobs":
        return _run_logprobs(calls, case, problem)
    if case.op == "linear_policy_loss":
        return _run_policy_loss(calls, case, problem)
    return _run_logprobs_from_logits(calls, case, problem)


def clipped_loss(logprobs: torch.Tensor, problem: Problem) -> torch.Tensor:
    """-Σ min(ratio·A, clip(ratio)·A) / T in the dtype of `logprobs`; ratio 1 on-policy."""
    old_logprobs = problem.old_logprobs
    ratio = torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))
    clipped_ratio = ratio.clamp(1 - CLIP_RATIO_LOW, 1 + CLIP_RATIO_HIGH)
    advantages = problem.advantages
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages).sum() / len(advantages)


def _run_logprobs(calls: Calls, case: Case, problem: Problem) -> Outputs:
    assert calls.logprobs is not None, "the caller asks supports() first"
    if case.mode == "fwd":
        with torch.no_grad():
            logprobs, entropy = calls.logprobs(problem)
        gradients: Outputs = {}
    else:
        logprobs, entropy = calls.logprobs(problem)
        dhidden, dweight = torch.autograd.grad(
            logprobs, (problem.hidden, problem.weight), problem.dlogprobs.to(logprobs.dtype)
        )
        gradients = {"dhidden": dhidden, "dweight": dweight}
    outputs = {"logprobs": logprobs.detach(), **gradients}
    return outputs if entropy is None else outputs | {"entropy": entropy.detach()}


def _run_policy_loss(calls: Calls, case: Case, problem: Problem) -> Outputs:
    if calls.policy_loss_into is not None:
        weight_grad = problem.scratch["weight_grad"]
        loss = calls.policy_loss_into(problem, weight_grad)
        (dhidden,) = torch.autograd.grad(loss, (problem.hidden,))
        outputs = {"loss": loss.detach(), "dhidden": dhidden, "dweight": weight_grad}
    else:
        loss = _policy_loss(calls, case, problem)
        dhidden, dweight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
        outputs = {"loss": loss.detach(), "dhidden": dhidden, "dweight": dweight}
    if case.mode == "cross_entropy":
        # Only the gradients agree: cross-entropy's value is not that of a policy loss.
        del outputs["loss"]
    return outputs


def _policy_loss(calls: Calls, case: Case, problem: Problem) -> torch.Tensor:
    if case.mode == "cross_entropy" and calls.cross_entropy is not None:
        return calls.cross_entropy(problem)
    if calls.policy_loss is not None:
        return calls.policy_loss(problem)
    assert calls.logprobs is not None, "the caller asks supports() first"
    return clipped_loss(calls.logprobs(problem)[0].float(), problem)


def _run_logprobs_from_logits(calls: Calls, case: Case, problem: Problem) -> Outputs:
    assert calls.logprobs_from_logits is not None, "the caller asks supports() first"
    logits = problem.logits
    assert logits is not None, "prepare() makes them"
    if case.mode == "fwd":
        with torch.no_grad():
            logprobs = calls.logprobs_from_logits(logits, problem.labels, problem.temperature)
        return {"logprobs": logprobs}
    logprobs = calls.logprobs_from_logits(logits, problem.labels, problem.temperature)
    (dlogits,) = torch.autograd.grad(logprobs, (logits,), problem.dlogprobs.to(logprobs.dtype))
    return {"logprobs": logprobs.detach(), "dlogits": dlogits}
