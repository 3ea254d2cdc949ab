"""The loss family's arithmetic: weights, loss, dloss/dlogprob and metrics, from log-probs alone.

Everything here is torch on [R] or [T] vectors of fp32 (fp64 in tests) without autograd, so that a
caller that knows a row's log-prob knows its gradient at once. `token_objective` needs nothing but
a token's own row; `sequence_objective` needs the log-probs of whole sequences. Formulas and papers:
`docs/ops/policy_loss.md`.

Conventions: natural log; losses are weighted (see `loss_token_weights`), so that a plain sum over
tokens, micro-batches and ranks is the loss; derivatives are of that sum with respect to each
token's own log-prob; a token outside the loss mask has weight 0, and loss and derivative 0 whatever
else its row holds.
A NaN in `sampling_logprobs` marks a token that the sampler did not score: it counts as equal to
the trainer's. Ratios saturate at the largest finite number, so that an advantage of 0 gives 0.
Sums over sequences are segmented reductions in fp64: a fixed order, and no atomics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lwz_kernels.linear_policy_loss.config import PolicyLossConfig

__all__ = [
    "ObjectiveRows",
    "entropy_token_weights",
    "is_token_level",
    "loss_metrics",
    "loss_token_weights",
    "sequence_log_ratio",
    "sequence_objective",
    "token_level_rows",
    "token_objective",
]

# VESPO bounds log-ratios as its authors do: exp(20) above, 1e-8 below for whole weights.
VESPO_LOG_MAX = 20.0
VESPO_LOG_MIN = math.log(1e-8)

SumOverShards = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ObjectiveRows:
    """What the objective needs of each row beside its log-prob; every tensor is [R]."""

    advantages: Tensor
    """fp32."""
    weights: Tensor
    """fp32 from `loss_token_weights`; 0 removes the row from loss, gradient and metrics."""
    policy_mask: Tensor | None = None
    """bool; False removes the policy term of a row, not its KL."""
    old_logprobs: Tensor | None = None
    """fp32; None is on-policy: the ratio is exactly 1, with gradient."""
    ref_logprobs: Tensor | None = None
    """fp32; needed when kl_coef > 0, otherwise for the metric."""
    sampling_logprobs: Tensor | None = None
    """fp32; needed by a sampler correction, otherwise for metrics and off_policy_kl_max."""

    def select(self, index: Tensor | slice) -> "ObjectiveRows":
        """The rows at `index` of every tensor."""

        def of(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return ObjectiveRows(
            self.advantages[index],
            self.weights[index],
            of(self.policy_mask),
            of(self.old_logprobs),
            of(self.ref_logprobs),
            of(self.sampling_logprobs),
        )


def loss_token_weights(
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: PolicyLossConfig,
    *,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None = None,
    sequence_loss_tokens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token, so that a plain sum over all tokens is the normalised loss.

    grpo, gspo, sapo: 1 / (num_sequences · loss tokens of its sequence); bnpo, dapo, cispo, vespo:
    1 / num_loss_tokens; dr_grpo: 1 / (num_sequences · max_completion_tokens); luspo:
    1 / num_sequences. Counts are global, over every micro-batch and rank, so that splitting the
    batch changes nothing; a count of 0 counts as 1.

    Args:
        loss_mask: [T] bool.
        cu_seqlens: [N+1] int32 from 0 to T.
        num_loss_tokens, num_sequences: int or 0-d tensor; num_sequences is not needed by types
            that divide by num_loss_tokens.
        sequence_loss_tokens: [N] loss tokens of each whole sequence, where T holds only a shard.

    Returns:
        [T] of `dtype`, 0 where the mask is False.

    Raises:
        ValueError: num_sequences or config.max_completion_tokens missing where the loss type
            divides by it, or a negative count.
    """
    if config.needs_num_sequences:
        if num_sequences is None:
            raise ValueError(
                f"loss_type={config.loss_type!r} divides by the number of sequences: "
                "num_sequences must be the global count, got None"
            )
        divisor = _count("num_sequences", num_sequences)
    else:
        divisor = _count("num_loss_tokens", num_loss_tokens)
    if config.loss_type == "dr_grpo":
        if config.max_completion_tokens is None:
            raise ValueError(
                "loss_type='dr_grpo' divides by a constant length: set max_completion_tokens"
            )
        divisor = divisor * config.max_completion_tokens
    elif config.loss_type in ("grpo", "gspo", "sapo"):
        counts_N = _sequence_counts(loss_mask, cu_seqlens, sequence_loss_tokens)
        divisor = divisor * counts_N[_sequence_of_token(loss_mask, cu_seqlens)]
    return (loss_mask.double() / divisor).to(dtype)


def entropy_token_weights(
    loss_mask: Tensor,
    policy_mask: Tensor | None,
    config: PolicyLossConfig,
    *,
    num_loss_tokens: int | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[T] weights w of the entropy bonus: the loss holds −Σ w·entropy, whatever the loss type."""
    mask = loss_mask if policy_mask is None else loss_mask & policy_mask
    divisor = _count("num_loss_tokens", num_loss_tokens)
    return (mask.double() * config.entropy_coef / divisor).to(dtype)


def is_token_level(
    config: PolicyLossConfig, *, is_on_policy: bool, has_policy_mask: bool = False
) -> bool:
    """Whether `token_objective` can do it: a row's coefficient needs no other row's log-prob.

    On-policy a sequence-level ratio is 1, and its gradient an average over the sequence of things
    that are known before any log-prob: `token_level_rows` takes that average.
    """
    if config.off_policy_kl_max is not None:
        return False
    if config.sampler_correction is not None and (
        config.sampler_correction_level == "sequence" or config.loss_type == "vespo"
    ):
        return False
    if not is_on_policy:
        return config.ratio_level == "token" and config.loss_type != "vespo"
    if config.ratio_level == "token":
        return True
    if config.kl_importance_correction:
        return False
    if not config.has_ratio_gradient:
        return True
    # A mask, a weight per token, or a gate that depends on the advantage's sign is averaged over
    # the sequence in the gradient but not in the value, which one advantage a row cannot say.
    return not (
        has_policy_mask or config.sampler_correction is not None or config.loss_type == "sapo"
    )


def token_level_rows(
    rows: ObjectiveRows,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: PolicyLossConfig,
    sequence_loss_tokens: Tensor | None = None,
    *,
    sum_over_shards: SumOverShards | None = None,
) -> ObjectiveRows:
    """The rows that `token_objective` needs when `is_token_level` holds; call it once on all T.

    On-policy with a sequence-level ratio, a token's gradient is that of its sequence's mean
    advantage; with equal advantages in a sequence nothing changes. All else is returned as it is.
    Arguments as in `sequence_objective`.
    """
    if config.ratio_level == "token" or not config.has_ratio_gradient:
        return rows
    _check_shards(sequence_loss_tokens, sum_over_shards)
    sequence = _Sequences(loss_mask, cu_seqlens, sequence_loss_tokens, sum_over_shards)
    return replace(rows, advantages=sequence.mean(rows.advantages))


def token_objective(
    logprobs_R: Tensor, rows: ObjectiveRows, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Weighted loss of each row, without the entropy bonus, and its derivative.

        loss = w · (m · ρ · surrogate(ratio, advantage) + kl_coef · KL)

    with m the policy mask and ρ the token-level sampler correction.

    Args:
        logprobs_R: [R] fp32 or fp64, log-probs under the current policy.
        rows: their other inputs; with a sequence-level ratio, through `token_level_rows`.

    Returns:
        loss, dloss/dlogprob: [R].

    Raises:
        ValueError: `is_token_level` is False, or a tensor that the config needs is missing.
    """
    is_on_policy = rows.old_logprobs is None
    if not is_token_level(
        config, is_on_policy=is_on_policy, has_policy_mask=rows.policy_mask is not None
    ):
        raise ValueError(
            f"loss_type={config.loss_type!r} with these settings needs whole sequences: use "
            "sequence_objective"
        )
    _check_rows(rows, config)
    old, log_ratio = _old_and_log_ratio(logprobs_R, rows)
    ratio = _ratio(log_ratio)
    if config.loss_type == "vespo":  # on-policy: the sequence weight is 1, and phi(1) = 1
        policy, dpolicy = _weighted_logprob(torch.ones_like(ratio), logprobs_R, rows.advantages)
    elif config.loss_type == "cispo":
        coefficient = ratio.clamp(max=config.cispo_ratio_max)
        policy, dpolicy = _weighted_logprob(coefficient, logprobs_R, rows.advantages)
    else:
        policy, dpolicy = _surrogate(ratio, rows.advantages, config)
    scale = _policy_scale(rows.policy_mask, rows.weights)
    if config.sampler_correction is not None:
        assert rows.sampling_logprobs is not None, "checked by _check_rows"
        scale = scale * _sampler_weight(_log_importance(old, rows.sampling_logprobs), config)
    loss, dlogprobs = policy * scale, dpolicy * scale
    if config.kl_coef > 0:
        assert rows.ref_logprobs is not None, "checked by _check_rows"
        kl, dkl = _kl(logprobs_R, rows.ref_logprobs, config)
        if config.kl_importance_correction:
            kl, dkl = kl * ratio, (dkl + kl) * ratio
        loss = loss + rows.weights * config.kl_coef * kl
        dlogprobs = dlogprobs + rows.weights * config.kl_coef * dkl
    is_out = rows.weights == 0
    return loss.masked_fill(is_out, 0), dlogprobs.masked_fill(is_out, 0)


def sequence_objective(
    logprobs_T: Tensor,
    rows: ObjectiveRows,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    config: PolicyLossConfig,
    sequence_loss_tokens: Tensor | None = None,
    *,
    sum_over_shards: SumOverShards | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `token_objective` for every config, from the log-probs of whole sequences.

        ratio of a sequence = exp(mean of log_ratio over its loss tokens)

    Args:
        logprobs_T: [T] fp32 or fp64; masked tokens may hold anything.
        rows: advantages may differ within a sequence.
        loss_mask: [T] bool, the tokens that make up a sequence's sums.
        cu_seqlens: [N+1] int32 from 0 to T.
        sequence_loss_tokens: [N] loss tokens of each whole sequence, where T holds only a shard.
        sum_over_shards: completes [N] sums over the shards of each sequence (an all-reduce);
            required with sequence_loss_tokens.

    Returns:
        loss, dloss/dlogprob: [T].

    Numerics: sums over sequences in fp64, in a fixed order.

    Raises:
        ValueError: a tensor that the config needs is missing.
        NotImplementedError: sharded sequences without sum_over_shards.
    """
    _check_rows(rows, config)
    _check_shards(sequence_loss_tokens, sum_over_shards)
    sequence = _Sequences(loss_mask, cu_seqlens, sequence_loss_tokens, sum_over_shards)
    old, log_ratio = _old_and_log_ratio(logprobs_T, rows)
    is_sequence_ratio = config.ratio_level == "sequence"
    ratio = _ratio(sequence.mean(log_ratio) if is_sequence_ratio else log_ratio)

    if config.loss_type == "vespo":
        coefficient = _vespo_weight(log_ratio, old, rows, sequence, config)
        policy, dpolicy = _weighted_logprob(coefficient, logprobs_T, rows.advantages)
    elif config.loss_type == "cispo":
        coefficient = ratio.clamp(max=config.cispo_ratio_max)
        policy, dpolicy = _weighted_logprob(coefficient, logprobs_T, rows.advantages)
    else:
        policy, dpolicy = _surrogate(ratio, rows.advantages, config)
    scale = _policy_scale(rows.policy_mask, rows.weights)
    if config.off_policy_kl_max is not None:
        scale = scale * _keep_on_policy(logprobs_T, old, rows, sequence, config.off_policy_kl_max)
    if config.sampler_correction is not None and config.loss_type != "vespo":
        assert rows.sampling_logprobs is not None, "checked by _check_rows"
        log_importance = _log_importance(old, rows.sampling_logprobs)
        if config.sampler_correction_level == "sequence":
            log_importance = sequence.sum(log_importance)
        scale = scale * _sampler_weight(log_importance, config)

    # dlogprobs is what a token's own log-prob does, dlog_ratio what it does through the ratio.
    loss, dlogprobs = policy * scale, dpolicy * scale
    dlog_ratio = torch.zeros_like(loss)
    if config.has_ratio_gradient:
        dlogprobs, dlog_ratio = dlog_ratio, dlogprobs
    if config.kl_coef > 0:
        assert rows.ref_logprobs is not None, "checked by _check_rows"
        kl, dkl = _kl(logprobs_T, rows.ref_logprobs, config)
        if config.kl_importance_correction:
            kl, dkl = kl * ratio, dkl * ratio
            dlog_ratio = dlog_ratio + rows.weights * config.kl_coef * kl
        loss = loss + rows.weights * config.kl_coef * kl
        dlogprobs = dlogprobs + rows.weights * config.kl_coef * dkl
    if is_sequence_ratio:
        dlog_ratio = sequence.mean(dlog_ratio)
    dlogprobs = dlogprobs + dlog_ratio
    return loss.masked_fill(~loss_mask, 0), dlogprobs.masked_fill(~loss_mask, 0)


def sequence_log_ratio(
    logprobs_T: Tensor,
    old_logprobs: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    sequence_loss_tokens: Tensor | None = None,
    *,
    sum_over_shards: SumOverShards | None = None,
) -> Tensor:
    """[T] log of each token's sequence-level ratio, for `loss_metrics`."""
    _check_shards(sequence_loss_tokens, sum_over_shards)
    sequence = _Sequences(loss_mask, cu_seqlens, sequence_loss_tokens, sum_over_shards)
    return sequence.mean(logprobs_T - old_logprobs)


def loss_metrics(
    logprobs_R: Tensor,
    entropy_R: Tensor,
    rows: ObjectiveRows,
    config: PolicyLossConfig,
    *,
    log_ratio_R: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums (`*_sum`) and maxima (`*_max`) over the rows with weight above 0, on the device.

    Args:
        logprobs_R, entropy_R: [R].
        log_ratio_R: from `sequence_log_ratio`, needed off-policy with a sequence-level ratio.

    Returns:
        num_tokens, entropy, ratio, clip_low and clip_high always; kl with ref_logprobs; with
        sampling_logprobs |logprob difference|, |probability difference|, and the importance weight
        and its square, from which the effective sample size follows.

    Raises:
        ValueError: log_ratio_R is missing.
    """
    counted = rows.weights > 0
    old, log_ratio = _old_and_log_ratio(logprobs_R, rows)
    if log_ratio_R is None:
        if config.ratio_level == "sequence" and rows.old_logprobs is not None:
            raise ValueError("a sequence-level ratio needs log_ratio_R from sequence_log_ratio")
        log_ratio_R = log_ratio
    ratio = _ratio(log_ratio_R)
    is_low, is_high = _is_clipped(ratio, rows.advantages, config)
    metrics = {
        "num_tokens_sum": counted.to(logprobs_R.dtype).sum(),
        "entropy_sum": _masked_sum(entropy_R, counted),
        "ratio_sum": _masked_sum(ratio, counted),
        "ratio_max": _masked_max(ratio, counted),
        "clip_low_sum": _masked_sum(is_low.to(ratio.dtype), counted),
        "clip_high_sum": _masked_sum(is_high.to(ratio.dtype), counted),
    }
    if rows.ref_logprobs is not None:
        kl, _ = _kl(logprobs_R, rows.ref_logprobs, config)
        metrics["kl_sum"] = _masked_sum(kl, counted)
    if rows.sampling_logprobs is not None:
        log_importance = _log_importance(old, rows.sampling_logprobs)
        importance = _ratio(log_importance)
        prob_diff = (old.exp() - (old - log_importance).exp()).abs()
        metrics |= {
            "logprob_diff_sum": _masked_sum(log_importance.abs(), counted),
            "logprob_diff_max": _masked_max(log_importance.abs(), counted),
            "prob_diff_sum": _masked_sum(prob_diff, counted),
            "importance_sum": _masked_sum(importance, counted),
            "importance_sq_sum": _masked_sum(importance.square(), counted),
        }
    return metrics


class _Sequences:
    """Sums and means over each sequence's loss tokens, given back to its tokens."""

    def __init__(
        self,
        loss_mask: Tensor,
        cu_seqlens: Tensor,
        sequence_loss_tokens: Tensor | None,
        sum_over_shards: SumOverShards | None,
    ) -> None:
        self.loss_mask = loss_mask
        self.cu_seqlens = cu_seqlens
        self.sum_over_shards = sum_over_shards
        self.sequence_of_token = _sequence_of_token(loss_mask, cu_seqlens)
        self.counts_N = _sequence_counts(loss_mask, cu_seqlens, sequence_loss_tokens)

    def sum(self, values_T: Tensor) -> Tensor:
        return self._sums(values_T)[self.sequence_of_token].to(values_T.dtype)

    def mean(self, values_T: Tensor) -> Tensor:
        means_N = self._sums(values_T) / self.counts_N
        return means_N[self.sequence_of_token].to(values_T.dtype)

    def _sums(self, values_T: Tensor) -> Tensor:
        # where, not a product: a masked token may hold infinities.
        sums_N = _segment_sum(torch.where(self.loss_mask, values_T, 0), self.cu_seqlens)
        return sums_N if self.sum_over_shards is None else self.sum_over_shards(sums_N)


def _segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(
        values_T.double(), "sum", offsets=cu_seqlens, axis=0, initial=0, unsafe=True
    )


def _sequence_of_token(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths_N = cu_seqlens[1:] - cu_seqlens[:-1]
    sequences = torch.arange(lengths_N.shape[0], device=cu_seqlens.device)
    # With its size given, repeat_interleave does not wait for the device.
    return sequences.repeat_interleave(lengths_N, output_size=loss_mask.shape[0])


def _sequence_counts(
    loss_mask: Tensor, cu_seqlens: Tensor, sequence_loss_tokens: Tensor | None
) -> Tensor:
    counts_N = sequence_loss_tokens
    if counts_N is None:
        counts_N = _segment_sum(loss_mask, cu_seqlens)
    return counts_N.double().clamp_min(1)


def _count(name: str, value: int | Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.double().clamp_min(1)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(max(value, 1))


def _check_rows(rows: ObjectiveRows, config: PolicyLossConfig) -> None:
    if config.kl_coef > 0 and rows.ref_logprobs is None:
        raise ValueError(f"kl_coef={config.kl_coef} needs ref_logprobs, got None")
    if config.sampler_correction is not None and rows.sampling_logprobs is None:
        raise ValueError(
            f"sampler_correction={config.sampler_correction!r} needs sampling_logprobs, got None"
        )


def _check_shards(
    sequence_loss_tokens: Tensor | None, sum_over_shards: SumOverShards | None
) -> None:
    if sequence_loss_tokens is not None and sum_over_shards is None:
        raise NotImplementedError(
            "sequence-level terms are sums over whole sequences, and sequence_loss_tokens says "
            "that these are sharded: sum_over_shards must complete the sums"
        )


def _old_and_log_ratio(logprobs: Tensor, rows: ObjectiveRows) -> tuple[Tensor, Tensor]:
    if rows.old_logprobs is None:
        return logprobs, torch.zeros_like(logprobs)
    return rows.old_logprobs, logprobs - rows.old_logprobs


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.exp().clamp(max=torch.finfo(log_ratio.dtype).max)


def _surrogate(
    ratio: Tensor, advantages: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """−gain(ratio)·advantage and its derivative with respect to log ratio."""
    if config.loss_type == "sapo":
        tau = _by_sign(
            ratio, advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg
        )
        gate = torch.sigmoid(tau * (ratio - 1))
        closed = torch.sigmoid(-tau * (ratio - 1))
        return -4 / tau * gate * advantages, -4 * gate * closed * ratio * advantages
    capped = ratio
    if config.clip_ratio_delta is not None:
        capped = ratio.clamp(max=config.clip_ratio_delta)
    clipped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = -torch.minimum(capped * advantages, clipped * advantages)
    is_low, is_high = _is_clipped(ratio, advantages, config)
    is_flat = is_low | is_high
    if config.clip_ratio_delta is not None:
        is_flat = is_flat | ((ratio > config.clip_ratio_delta) & (advantages < 0))
    return loss, torch.where(is_flat, 0, -ratio * advantages)


def _by_sign(like: Tensor, is_positive: Tensor, positive: float, negative: float) -> Tensor:
    return torch.full_like(like, negative).masked_fill(is_positive, positive)


def _weighted_logprob(
    coefficient: Tensor, logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """−coefficient·advantage·logprob, the coefficient without gradient, and its derivative."""
    dlogprobs = -coefficient * advantages
    return dlogprobs * logprobs, dlogprobs


def _is_clipped(
    ratio: Tensor, advantages: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Where the lower and the upper bound of the ratio is in force."""
    if config.loss_type == "cispo":
        return torch.zeros_like(ratio, dtype=torch.bool), (
            (ratio > config.cispo_ratio_max) & (advantages > 0)
        )
    if config.loss_type in ("sapo", "vespo"):
        never = torch.zeros_like(ratio, dtype=torch.bool)
        return never, never
    is_low = (ratio < 1 - config.clip_ratio_low) & (advantages < 0)
    is_high = (ratio > 1 + config.clip_ratio_high) & (advantages > 0)
    return is_low, is_high


def _policy_scale(policy_mask: Tensor | None, weights: Tensor) -> Tensor:
    return weights if policy_mask is None else weights * policy_mask


def _log_importance(old: Tensor, sampling: Tensor) -> Tensor:
    return torch.where(sampling.isnan(), 0, old - sampling)


def _sampler_weight(log_importance: Tensor, config: PolicyLossConfig) -> Tensor:
    importance = _ratio(log_importance)
    if config.sampler_correction == "truncate":
        return importance.clamp(max=config.sampler_ratio_max)
    is_inside = importance >= config.sampler_ratio_min
    is_inside &= importance <= config.sampler_ratio_max
    return torch.where(is_inside, importance, 0)


def _keep_on_policy(
    logprobs: Tensor, old: Tensor, rows: ObjectiveRows, sequence: _Sequences, kl_max: float
) -> Tensor:
    """True but for negative advantages in a sequence that the policy has moved away from."""
    sampled = old if rows.sampling_logprobs is None else rows.sampling_logprobs
    kl = torch.where(sampled.isnan(), 0, sampled - logprobs)
    return (rows.advantages >= 0) | (sequence.mean(kl) <= kl_max)


def _vespo_weight(
    log_ratio: Tensor,
    old: Tensor,
    rows: ObjectiveRows,
    sequence: _Sequences,
    config: PolicyLossConfig,
) -> Tensor:
    """phi(w) = e^λ · w^k · e^(−λ·w), with w the product of the sequence's ratios."""
    log_ratio = log_ratio.clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX)
    if config.sampler_correction is not None:
        assert rows.sampling_logprobs is not None, "checked by _check_rows"
        sampler = _sampler_weight(_log_importance(old, rows.sampling_logprobs), config)
        # A masked token (weight 0) counts as the smallest weight.
        log_ratio = log_ratio + sampler.log().clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)
    log_w = sequence.sum(log_ratio).clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)
    is_positive = rows.advantages >= 0
    k = _by_sign(log_w, is_positive, config.vespo_k_pos, config.vespo_k_neg)
    decay = _by_sign(log_w, is_positive, config.vespo_lambda_pos, config.vespo_lambda_neg)
    return torch.exp(decay + k * log_w - decay * log_w.exp())


def _kl(logprobs: Tensor, ref: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Per-token estimate of KL(policy || reference) and its derivative."""
    delta = ref - logprobs
    if config.kl_estimator == "k1":
        return -delta, torch.ones_like(delta)
    if config.kl_estimator == "k2":
        return delta.square() / 2, -delta
    growth = torch.expm1(delta)
    return growth - delta, -growth


def _masked_sum(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum()


def _masked_max(values: Tensor, counted: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    return torch.where(counted, values, 0).amax()
