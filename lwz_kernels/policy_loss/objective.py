"""The token-level objective: loss, its derivative with respect to the log-prob, and metrics.

Everything here is elementwise on [R] fp32 tensors, one entry per completion token, so a caller that
knows a row's log-prob knows dL/dlogprob at once and can take gradients in forward.

Sources: GRPO arXiv 2402.03300, DAPO arXiv 2503.14476 (asymmetric clip, token mean),
Dr. GRPO arXiv 2503.20783 (constant normaliser), KL estimators http://joschu.net/blog/kl-approx.html,
truncated importance sampling https://fengyao.notion.site/off-policy-rl.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["PolicyLossConfig", "token_objective"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """What is computed for each completion token; the normaliser arrives as weights."""

    clip_ratio_low: float = 0.2
    """The ratio is kept above 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.2
    """The ratio is kept below 1 + clip_ratio_high."""
    kl_coef: float = 0.0
    """Weight of the KL estimate against the reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimate of KL(policy || reference)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus (full-vocabulary entropy, nats)."""
    tis_cap: float = 0.0
    """Cap of the importance weight exp(old_logprobs - sampling_logprobs); 0 switches it off."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_ratio_low < 1:
            raise ValueError(f"clip_ratio_low must be in [0, 1), got {self.clip_ratio_low}")
        for name in ("clip_ratio_high", "kl_coef", "entropy_coef", "tis_cap"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def token_objective(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weighted loss of each token, without the entropy bonus, and its derivative.

        loss = w · ρ · (−min(r·A, clip(r)·A)) + w · kl_coef · KL

    with r = exp(logprobs − old_logprobs) and ρ = min(exp(old − sampling), tis_cap), no gradient.

    Args:
        logprobs: [R] fp32, log-prob of the chosen token under the current policy.
        advantages, weights: [R] fp32; a weight of 0 removes the token from everything.
        old_logprobs: [R] fp32 or None: on-policy, the ratio is exactly 1 with gradient.
        ref_logprobs: [R] fp32, needed when config.kl_coef > 0.
        sampling_logprobs: [R] fp32, needed when config.tis_cap > 0; otherwise for metrics only.

    Returns:
        loss [R], dloss/dlogprob [R], and metrics as device sums over tokens with weight > 0
        (names ending in ``_sum``) and maxima (``_max``).
    """
    counted = (weights > 0).float()
    old = logprobs if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    rho = torch.ones_like(logprobs)
    if config.tis_cap > 0:
        assert sampling_logprobs is not None, "checked by the api"
        rho = torch.exp(old - sampling_logprobs).clamp(max=config.tis_cap)

    clipped_ratio = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    is_low = (ratio < 1 - config.clip_ratio_low) & (advantages < 0)
    is_high = (ratio > 1 + config.clip_ratio_high) & (advantages > 0)
    has_gradient = ~(is_low | is_high)
    loss = -gain * rho
    dlogprobs = -ratio * advantages * rho * has_gradient

    metrics = {
        "clip_low_sum": (is_low * counted).sum(),
        "clip_high_sum": (is_high * counted).sum(),
        "ratio_sum": (ratio * counted).sum(),
        "ratio_max": (ratio * counted).amax() if ratio.numel() else ratio.new_zeros(()),
        "num_tokens_sum": counted.sum(),
    }
    if ref_logprobs is not None:
        log_ratio = ref_logprobs - logprobs
        if config.kl_estimator == "k1":
            kl, dkl = -log_ratio, torch.ones_like(log_ratio)
        elif config.kl_estimator == "k2":
            kl, dkl = log_ratio.square() / 2, -log_ratio
        else:
            kl, dkl = torch.expm1(log_ratio) - log_ratio, -torch.expm1(log_ratio)
        loss = loss + config.kl_coef * kl
        dlogprobs = dlogprobs + config.kl_coef * dkl
        metrics["kl_sum"] = (kl * counted).sum()
    if sampling_logprobs is not None:
        metrics |= _sampler_metrics(old, sampling_logprobs, counted)
    return loss * weights, dlogprobs * weights, metrics


def _sampler_metrics(old: Tensor, sampling: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, and the effective sample size."""
    diff = (old - sampling).abs() * counted
    prob_diff = (old.exp() - sampling.exp()).abs() * counted
    importance = torch.exp(old - sampling) * counted
    zero = diff.new_zeros(())
    return {
        "logprob_diff_sum": diff.sum(),
        "logprob_diff_max": diff.amax() if diff.numel() else zero,
        "prob_diff_sum": prob_diff.sum(),
        "importance_sum": importance.sum(),
        "importance_sq_sum": importance.square().sum(),
    }
