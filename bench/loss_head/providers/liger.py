"""Liger: chunked GRPO (torch), scaled cross-entropy (CuTe on sm_90), fused linear cross-entropy.

The scaled cross-entropy runs as a 512-token chunked fallback where it has no kernel. The fused
linear cross-entropy gets the fp32 weight gradient that its documentation recommends.
"""

import torch

from bench.loss_head.problem import CLIP_RATIO_HIGH, CLIP_RATIO_LOW, Problem
from bench.loss_head.provider import Calls, Logprobs, Provider
from bench.loss_head.providers.pytorch import with_temperature

__all__ = ["PROVIDERS"]


def _load_grpo() -> Calls:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def policy_loss(problem: Problem) -> torch.Tensor:
        head = LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            epsilon_low=CLIP_RATIO_LOW,
            epsilon_high=CLIP_RATIO_HIGH,
            loss_type="dapo",
            temperature=problem.temperature,
        )
        num_sequences = problem.num_sequences
        labels_NL = problem.labels.view(num_sequences, -1)
        old_logprobs = problem.old_logprobs
        loss, _ = head(
            problem.hidden.view(*labels_NL.shape, -1),
            problem.weight,
            labels_NL,
            torch.ones_like(labels_NL),
            problem.advantages.view(num_sequences, -1)[:, 0],
            old_per_token_logps=None if old_logprobs is None else old_logprobs.view_as(labels_NL),
            num_items_in_batch=problem.shape.tokens,
        )
        return loss

    return Calls(policy_loss=policy_loss)


def _load_scaled_cross_entropy() -> Calls:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def logprobs(problem: Problem) -> Logprobs:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden,
            problem.weight,
            problem.labels,
            temperature=problem.temperature,
            return_entropy=True,
        )
        return -nll, entropy

    return Calls(logprobs=logprobs)


def _load_cross_entropy() -> Calls:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def nll(problem: Problem, reduction: str) -> torch.Tensor:
        return liger_fused_linear_cross_entropy(
            with_temperature(problem),
            problem.weight,
            problem.labels,
            reduction=reduction,
            accum_dtype=torch.float32,
        )

    return Calls(
        logprobs=lambda problem: (-nll(problem, "none"), None),
        cross_entropy=lambda problem: nll(problem, "mean"),
    )


PROVIDERS = {
    "liger_grpo": Provider("liger-kernel", ("cpu", "cuda"), _load_grpo),
    "liger_scaled_cross_entropy": Provider(
        "liger-kernel", ("cpu", "cuda"), _load_scaled_cross_entropy
    ),
    "liger_cross_entropy": Provider("liger-kernel", ("cuda",), _load_cross_entropy),
}
