"""Oracle of the loss head: full logits, autograd, torch alone. Correct by reading, not fast."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["linear_logprobs_reference", "policy_loss_reference"]


def linear_logprobs_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, entropy and lse [T] from materialised [T, V] logits."""
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logits_TV = (hidden @ weight.t()) / scale
    log_probs_TV = torch.log_softmax(logits_TV, dim=-1)
    logprobs = log_probs_TV.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    return logprobs, entropy, torch.logsumexp(logits_TV, dim=-1)


def policy_loss_reference(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
    entropy_coef: float = 0.0,
    tis_cap: float = 0.0,
) -> Tensor:
    """The scalar loss, differentiable by autograd through logprobs and entropy."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    if tis_cap > 0:
        assert sampling_logprobs is not None, "tis_cap needs sampling_logprobs"
        loss = loss * torch.exp(old - sampling_logprobs).clamp(max=tis_cap)
    if ref_logprobs is not None:
        delta = ref_logprobs - logprobs
        kl = {"k1": -delta, "k2": delta**2 / 2, "k3": delta.exp() - delta - 1}[kl_estimator]
        loss = loss + kl_coef * kl
    return ((loss - entropy_coef * entropy) * loss_weights).sum()
