"""Our heads, one provider an implementation.

`*_weight_grad` adds the weight's gradient to a fp32 buffer of the caller, as a trainer with main
gradients does: that buffer is the caller's memory and does not count.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.loss_head.problem import CLIP_RATIO_HIGH, CLIP_RATIO_LOW, Problem
from bench.loss_head.provider import Calls, Logprobs, Provider

__all__ = ["PROVIDERS"]


def _load(impl: str) -> Calls:
    from lwz_kernels.logprobs_from_logits import logprobs_from_logits

    def from_logits(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        return logprobs_from_logits(logits, labels, temperature=temperature, impl=impl)[0]

    return Calls(
        logprobs=partial(_logprobs, impl=impl),
        policy_loss=partial(_policy_loss, weight_grad=None, impl=impl),
        logprobs_from_logits=from_logits,
    )


def _load_into(impl: str) -> Calls:
    return Calls(policy_loss_into=partial(_policy_loss, impl=impl))


def _logprobs(problem: Problem, *, impl: str) -> Logprobs:
    from lwz_kernels.linear_logprobs import linear_logprobs

    logprobs, entropy, _ = linear_logprobs(
        problem.hidden,
        problem.weight,
        problem.labels,
        temperature=problem.temperature,
        impl=impl,
    )
    return logprobs, entropy


def _policy_loss(problem: Problem, weight_grad: torch.Tensor | None, *, impl: str) -> torch.Tensor:
    from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss

    loss, _ = linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        problem.advantages,
        torch.ones_like(problem.labels, dtype=torch.bool),
        cu_seqlens=problem.cu_seqlens,
        num_loss_tokens=problem.shape.tokens,
        old_logprobs=problem.old_logprobs,
        temperature=problem.temperature,
        weight_grad=weight_grad,
        config=PolicyLossConfig(
            loss_type="dapo", clip_ratio_low=CLIP_RATIO_LOW, clip_ratio_high=CLIP_RATIO_HIGH
        ),
        impl=impl,
    )
    return loss


def _provider(impl: str, devices: tuple[str, ...], load: Callable[[str], Calls]) -> Provider:
    return Provider(None, devices, partial(load, impl))


PROVIDERS = {
    "lwz_triton": _provider("triton", ("cuda",), _load),
    "lwz_triton_weight_grad": _provider("triton", ("cuda",), _load_into),
    "lwz_native": _provider("native", ("cpu",), _load),
    "lwz_native_weight_grad": _provider("native", ("cpu",), _load_into),
    "lwz_torch": _provider("torch", ("cpu", "cuda"), _load),
}
