"""Oracle of linear_policy_loss: all logits, one sequence at a time, autograd. Not fast.

It shares no arithmetic with the objective; gradients are those of autograd through the formulas of
`docs/ops/policy_loss.md`. Only loss tokens are ever selected, so nothing here needs a mask.
"""

import itertools
import math

import torch
from torch import Tensor

from lwz_kernels.linear_policy_loss.config import PolicyLossConfig

__all__ = [
    "head_logprobs_reference",
    "linear_policy_loss_reference",
    "policy_loss_reference",
]


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None = None,
    sequence_loss_tokens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    config: PolicyLossConfig | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss of packed tokens from hidden states, with [T, V] logits.

    Arguments as in `linear_policy_loss`. Returns the loss, and its metrics with `logprobs` and
    `entropy` [T], all detached.
    """
    logprobs, entropy = head_logprobs_reference(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
    loss, metrics = policy_loss_reference(
        logprobs,
        entropy,
        advantages,
        loss_mask & (labels != ignore_index),
        cu_seqlens=cu_seqlens,
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
        sequence_loss_tokens=sequence_loss_tokens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        policy_mask=policy_mask,
        config=config or PolicyLossConfig(),
    )
    return loss, metrics | {"logprobs": logprobs.detach(), "entropy": entropy.detach()}


def head_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """log-probs and entropy [T] (fp32, or fp64 for fp64 input); 0 where a label is ignored."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits_TV = hidden.to(wide) @ weight.to(wide).t()
    if bias is not None:
        logits_TV = logits_TV + bias.to(wide)
    logits_TV = logits_TV * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(wide).expand(hidden.shape[0])[:, None]
    log_probs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    is_kept = labels != ignore_index
    chosen = torch.where(is_kept, labels, 0)[:, None]
    logprobs = log_probs_TV.gather(-1, chosen).squeeze(-1)
    entropy = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    return torch.where(is_kept, logprobs, 0), torch.where(is_kept, entropy, 0)


def policy_loss_reference(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None = None,
    sequence_loss_tokens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss and its metrics from log-probs and entropies, differentiable in both."""
    sequences = []
    bounds = cu_seqlens.tolist() if len(cu_seqlens) > 1 else [0, 0]
    for start, end in itertools.pairwise(bounds):
        tokens = start + torch.nonzero(loss_mask[start:end]).squeeze(1)
        sequences.append(
            _Sequence(
                tokens,
                config,
                logprobs,
                entropy,
                advantages,
                old_logprobs,
                ref_logprobs,
                sampling_logprobs,
                policy_mask,
            )
        )
    loss = logprobs[:0].sum()
    for n, sequence in enumerate(sequences):
        count = len(sequence.tokens)
        if sequence_loss_tokens is not None:
            _require_token_level(config)
            count = int(sequence_loss_tokens[n])
        scale = 1 / _divisor(config, num_loss_tokens, num_sequences, count)
        loss = loss + sequence.token_losses().sum() * scale
        bonus = (sequence.entropy * sequence.policy_mask).sum()
        loss = loss - config.entropy_coef * bonus / max(float(num_loss_tokens), 1.0)
    return loss, _metrics(sequences, logprobs.new_zeros(()))


class _Sequence:
    """The loss tokens of one sequence."""

    def __init__(
        self,
        tokens: Tensor,
        config: PolicyLossConfig,
        logprobs: Tensor,
        entropy: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        sampling_logprobs: Tensor | None,
        policy_mask: Tensor | None,
    ) -> None:
        self.tokens = tokens
        self.config = config
        self.logprobs = logprobs[tokens]
        self.entropy = entropy[tokens]
        self.advantages = advantages[tokens].to(logprobs.dtype)
        self.old = self.logprobs.detach() if old_logprobs is None else old_logprobs[tokens]
        self.ref = None if ref_logprobs is None else ref_logprobs[tokens]
        self.sampling = None if sampling_logprobs is None else sampling_logprobs[tokens]
        self.policy_mask = torch.ones_like(self.logprobs)
        if policy_mask is not None:
            self.policy_mask = policy_mask[tokens].to(logprobs.dtype)

    def token_losses(self) -> Tensor:
        """[R] losses of the tokens, not yet normalised, without the entropy bonus."""
        config = self.config
        losses = self._policy_term() * self._is_kept() * self.policy_mask
        if config.sampler_correction is not None and config.loss_type != "vespo":
            losses = losses * self._sampler_weight()
        if config.kl_coef > 0:
            kl = self.kl()
            if config.kl_importance_correction:
                kl = kl * self.ratio()
            losses = losses + config.kl_coef * kl
        return losses

    def ratio(self) -> Tensor:
        log_ratio = self.logprobs - self.old
        if self.config.ratio_level == "sequence":
            log_ratio = (log_ratio.sum() / max(len(self.tokens), 1)).expand(len(self.tokens))
        return torch.exp(log_ratio)

    def kl(self) -> Tensor:
        assert self.ref is not None, "kl_coef needs ref_logprobs"
        delta = self.ref - self.logprobs
        if self.config.kl_estimator == "k1":
            return -delta
        if self.config.kl_estimator == "k2":
            return delta**2 / 2
        return torch.exp(delta) - delta - 1

    def sampler_log_ratio(self) -> Tensor:
        """log of old over sampling probability; 0 for a token that the sampler did not score."""
        assert self.sampling is not None, "sampler_correction needs sampling_logprobs"
        return torch.where(self.sampling.isnan(), 0, self.old - self.sampling).detach()

    def clipped(self) -> tuple[Tensor, Tensor]:
        """Where the ratio is held back by the lower and by the upper bound."""
        config, ratio = self.config, self.ratio()
        never = torch.zeros_like(ratio, dtype=torch.bool)
        if config.loss_type in ("sapo", "vespo"):
            return never, never
        if config.loss_type == "cispo":
            return never, (self.advantages > 0) & (ratio > config.cispo_ratio_max)
        return (
            (self.advantages < 0) & (ratio < 1 - config.clip_ratio_low),
            (self.advantages > 0) & (ratio > 1 + config.clip_ratio_high),
        )

    def _policy_term(self) -> Tensor:
        config, advantages = self.config, self.advantages
        if config.loss_type == "vespo":
            return -self._vespo_weight() * advantages * self.logprobs
        ratio = self.ratio()
        if config.loss_type == "cispo":
            capped = torch.clamp(ratio, max=config.cispo_ratio_max).detach()
            return -capped * advantages * self.logprobs
        if config.loss_type == "sapo":
            tau = torch.full_like(advantages, config.sapo_temperature_neg)
            tau[advantages > 0] = config.sapo_temperature_pos
            return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages
        clipped = torch.clamp(ratio, 1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        if config.clip_ratio_delta is not None:
            ratio = torch.clamp(ratio, max=config.clip_ratio_delta)
        return -torch.min(ratio * advantages, clipped * advantages)

    def _sampler_weight(self) -> Tensor:
        config = self.config
        log_weight = self.sampler_log_ratio()
        if config.sampler_correction_level == "sequence":
            log_weight = log_weight.sum().expand(len(self.tokens))
        weight = torch.exp(log_weight)
        if config.sampler_correction == "truncate":
            return torch.clamp(weight, max=config.sampler_ratio_max)
        is_outside = (weight < config.sampler_ratio_min) | (weight > config.sampler_ratio_max)
        return weight.masked_fill(is_outside, 0.0)

    def _vespo_weight(self) -> Tensor:
        config = self.config
        log_w = torch.clamp(self.logprobs.detach() - self.old, -20, 20).sum()
        if config.sampler_correction is not None:
            log_w = log_w + torch.clamp(self._sampler_weight().log(), math.log(1e-8), 20).sum()
        log_w = torch.clamp(log_w, math.log(1e-8), 20)
        positive = config.vespo_lambda_pos - config.vespo_lambda_pos * log_w.exp()
        negative = config.vespo_lambda_neg - config.vespo_lambda_neg * log_w.exp()
        return torch.where(
            self.advantages >= 0,
            torch.exp(positive + config.vespo_k_pos * log_w),
            torch.exp(negative + config.vespo_k_neg * log_w),
        )

    def _is_kept(self) -> Tensor:
        if self.config.off_policy_kl_max is None:
            return torch.ones_like(self.advantages)
        sampled = self.old if self.sampling is None else self.sampling
        kl = torch.where(sampled.isnan(), 0, sampled - self.logprobs.detach())
        is_near = kl.sum() / max(len(self.tokens), 1) <= self.config.off_policy_kl_max
        return ((self.advantages >= 0) | is_near).to(self.advantages.dtype)


def _require_token_level(config: PolicyLossConfig) -> None:
    is_sequence_level = (
        config.ratio_level == "sequence"
        or config.loss_type == "vespo"
        or config.off_policy_kl_max is not None
        or config.sampler_correction_level == "sequence"
    )
    if is_sequence_level:
        raise NotImplementedError(
            "the reference of a sequence-level objective needs whole sequences, got "
            "sequence_loss_tokens, which says that they are sharded"
        )


def _divisor(
    config: PolicyLossConfig,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None,
    sequence_count: int,
) -> float:
    if config.loss_type in ("bnpo", "dapo", "cispo", "vespo"):
        return max(float(num_loss_tokens), 1.0)
    if num_sequences is None:
        raise ValueError(f"loss_type={config.loss_type!r} needs num_sequences, got None")
    sequences = max(float(num_sequences), 1.0)
    if config.loss_type == "luspo":
        return sequences
    if config.loss_type == "dr_grpo":
        if config.max_completion_tokens is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_tokens, got None")
        return sequences * config.max_completion_tokens
    return sequences * max(sequence_count, 1)


def _metrics(sequences: list[_Sequence], zero: Tensor) -> dict[str, Tensor]:
    lists: dict[str, list[Tensor]] = {}
    has_ref = any(sequence.ref is not None for sequence in sequences)
    has_sampling = any(sequence.sampling is not None for sequence in sequences)
    for sequence in sequences:
        is_low, is_high = sequence.clipped()
        values = {
            "num_tokens": torch.ones_like(sequence.logprobs),
            "entropy": sequence.entropy,
            "ratio": sequence.ratio(),
            "clip_low": is_low.to(zero.dtype),
            "clip_high": is_high.to(zero.dtype),
        }
        if has_ref:
            values["kl"] = sequence.kl()
        if has_sampling:
            diff = sequence.sampler_log_ratio()
            values["logprob_diff"] = diff.abs()
            values["prob_diff"] = (sequence.old.exp() - (sequence.old - diff).exp()).abs()
            values["importance"] = diff.exp()
            values["importance_sq"] = (2 * diff).exp()
        for name, value in values.items():
            lists.setdefault(name, []).append(value.detach())
    joined = {name: torch.cat(parts) for name, parts in lists.items()}
    metrics = {f"{name}_sum": values.sum() for name, values in joined.items()}
    for name in ("ratio", "logprob_diff"):
        if name in joined:
            has_tokens = len(joined[name]) > 0
            metrics[f"{name}_max"] = joined[name].max() if has_tokens else zero
    return metrics
