"""Advantages: each reward is normalised within its group on its own, and then averaged.

Advantage averaging, not reward averaging (LongWriter-Zero, arXiv 2506.18841): rewards of different
scale and spread get the say that their weights give them.

A score that is not finite is missing. It is left out of its group's statistics and adds 0 to the
advantage. It counts as failed where the reward applies, and not where it does not.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lwz_trainer.config.rewards import ConstraintConfig
from lwz_trainer.errors import TrainingStopped, UserError

__all__ = [
    "GroupAdvantages",
    "broken_constraints",
    "check_failures",
    "constrain_advantages",
    "group_advantages",
]

# Rewards of one group that differ by no more than this are equal but for rounding (a reward model
# scores in fp32), and a z-score would blow the difference up to a full advantage.
_ABSOLUTE_SPREAD = 1e-6
_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of P groups of G completions, and where they come from.

    Args:
        advantages_PG: weighted mean of the normalised rewards, [P, G] float64.
        normalized: each reward after normalisation, [P, G].
        weighted: each reward's part of the advantage, [P, G]; the parts add up to `advantages_PG`,
            but for what constraints add to that.
        num_zero_spread: groups, by reward, with at least two scores that are all equal.
        num_compared: groups, by reward, with at least two scores.
        num_failed: missing scores, by reward, where it applies.
        num_applicable: completions, by reward, where it applies.
    """

    advantages_PG: np.ndarray
    normalized: dict[str, np.ndarray]
    weighted: dict[str, np.ndarray]
    num_zero_spread: dict[str, int]
    num_compared: dict[str, int]
    num_failed: dict[str, int]
    num_applicable: dict[str, int]


def group_advantages(
    rewards: dict[str, np.ndarray],
    weights: dict[str, float],
    normalization: Literal["zscore", "minmax"],
    *,
    is_applicable: dict[str, np.ndarray] | None = None,
    relative: Collection[str] = (),
    constraints: ConstraintConfig | None = None,
) -> GroupAdvantages:
    """A = Σ_r w_r · z_r / Σ_r w_r, with z_r the reward r normalised within its group.

    "zscore" is (x - mean) / std with the population's standard deviation (divided by the number of
    scores, not one less), so two different scores become -1 and 1 in either normalisation. "minmax"
    is 2 (x - min) / (max - min) - 1; its mean over a group is not 0 in general.

    A group without spread, or with fewer than two scores, gets z = 0. The divisor is the sum of all
    weights, also where a reward is missing: the other rewards do not gain weight by it.

    Args:
        rewards: name to [P, G], not finite where missing.
        weights: name to weight, for the same names.
        normalization: how one reward is put on a common scale.
        is_applicable: name to [P, G] bool, False where a missing score is no failure because the
            prompt does not call for that reward; a name that is not there always applies.
        relative: rewards that compare within the group already (BRPO's ±1): z is the reward itself.
        constraints: rewards that a sample must not fail; None or one without names: none.
    """
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(
            f"rewards and weights must name the same rewards, got {sorted(rewards)} and "
            f"{sorted(weights)}"
        )
    shapes = {values.shape for values in rewards.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        raise ValueError(
            "rewards must all be [P, G] of one shape, got "
            + ", ".join(f"{name} {list(values.shape)}" for name, values in rewards.items())
        )
    if not all(0 <= weight < np.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {weights}")
    if normalization not in ("zscore", "minmax"):
        raise ValueError(f"normalization must be 'zscore' or 'minmax', got {normalization!r}")

    applicable = {
        name: np.broadcast_to((is_applicable or {}).get(name, np.True_), shape) for name in rewards
    }
    has_score = {name: np.isfinite(rewards[name]) & applicable[name] for name in rewards}
    compared = {name: has_score[name].sum(axis=1) >= 2 for name in rewards}
    has_spread = {name: _has_spread(rewards[name], has_score[name]) for name in rewards}
    normalized = {
        name: np.where(has_score[name], rewards[name], 0.0)
        if name in relative
        else _normalized(rewards[name], has_score[name] & has_spread[name][:, None], normalization)
        for name in rewards
    }
    total_weight = sum(weights.values())
    weighted = {name: normalized[name] * (weights[name] / total_weight) for name in rewards}
    advantages_PG = np.sum(list(weighted.values()), axis=0)
    if constraints is not None and constraints.rewards:
        broken_PG = broken_constraints(
            rewards, applicable, constraints.rewards, constraints.minimum
        )
        advantages_PG = constrain_advantages(advantages_PG, broken_PG, constraints.gap)
    return GroupAdvantages(
        advantages_PG=advantages_PG,
        normalized=normalized,
        weighted=weighted,
        num_zero_spread={name: int((compared[name] & ~has_spread[name]).sum()) for name in rewards},
        num_compared={name: int(compared[name].sum()) for name in rewards},
        num_failed={name: int((applicable[name] & ~has_score[name]).sum()) for name in rewards},
        num_applicable={name: int(applicable[name].sum()) for name in rewards},
    )


def broken_constraints(
    rewards: dict[str, np.ndarray],
    is_applicable: dict[str, np.ndarray],
    names: Collection[str],
    minimum: float,
) -> np.ndarray:
    """[P, G] bool: whether one of the named rewards is below the minimum; a missing one is not."""
    below = [
        np.isfinite(rewards[name]) & is_applicable[name] & (rewards[name] < minimum)
        for name in names
    ]
    return np.any(below, axis=0)


def constrain_advantages(
    advantages: np.ndarray, breaks_constraint: np.ndarray, gap: float
) -> np.ndarray:
    """Advantages under which every sample that breaks a constraint has at most −gap.

        A'_i = A_i − w (v_i − f)

    with v_i = 1 for a sample that breaks a constraint and else 0, f their share of the group, and w
    the smallest weight >= 0 that is enough, chosen for each group anew (RLMR, arXiv 2508.18642:
    weights of a constraint that follow the group; the formula is ours). The mean of the group stays
    what it was: what the violators lose, the others gain. Where all break it, the group is shifted
    so that its best has −gap.

    Args:
        advantages: [P, G].
        breaks_constraint: [P, G] bool.
        gap: above 0.
    """
    constrained_PG = advantages.astype(np.float64)
    for group, breaks in enumerate(breaks_constraint):
        if not breaks.any():
            continue
        advantages_G = constrained_PG[group]
        excess = max(0.0, advantages_G[breaks].max() + gap)
        share = breaks.mean()
        if share == 1:
            constrained_PG[group] = advantages_G - excess
        else:
            constrained_PG[group] = advantages_G - excess / (1 - share) * (breaks - share)
    return constrained_PG


def check_failures(
    num_failed: dict[str, int],
    num_applicable: dict[str, int],
    max_failed_frac: float,
    *,
    is_first_step: bool,
) -> None:
    """Ends the run where too many scores are missing for the rest to be trusted.

    Args:
        num_failed: missing scores, by reward, over all ranks.
        num_applicable: completions, by reward, that should have a score.
        max_failed_frac: the largest share that may be missing.
        is_first_step: no score of a reward has been seen before.
    Raises:
        UserError: in the first step a reward has no score at all, so it was never set up right.
        TrainingStopped: above the limit in any other way. Both name the reward and the share.
    """
    for name, failed in num_failed.items():
        if failed > max_failed_frac * num_applicable[name]:
            what = (
                f"reward '{name}' failed for {failed / num_applicable[name]:.0%} of "
                f"{num_applicable[name]} completions (limit {max_failed_frac:.0%}); see the log "
                "for the reasons"
            )
            if is_first_step and failed == num_applicable[name]:
                raise UserError(f"{what}, and mend how it is set up")
            raise TrainingStopped(
                f"{what}; when it scores again the same command goes on, or raise "
                "rewards.max_failed_frac"
            )


def _has_spread(rewards_PG: np.ndarray, has_score_PG: np.ndarray) -> np.ndarray:
    """[P], whether a group's scores differ by more than rounding."""
    lowest_P = np.where(has_score_PG, rewards_PG, np.inf).min(axis=1, initial=np.inf)
    highest_P = np.where(has_score_PG, rewards_PG, -np.inf).max(axis=1, initial=-np.inf)
    has_two_P = has_score_PG.sum(axis=1) >= 2
    lowest_P, highest_P = np.where(has_two_P, (lowest_P, highest_P), 0.0)
    magnitude_P = np.maximum(np.abs(lowest_P), np.abs(highest_P))
    return highest_P - lowest_P > _ABSOLUTE_SPREAD + _RELATIVE_SPREAD * magnitude_P


def _normalized(
    rewards_PG: np.ndarray, counts_PG: np.ndarray, normalization: Literal["zscore", "minmax"]
) -> np.ndarray:
    """[P, G], each group's counting members on a common scale and 0 for all others."""
    normalized_PG = np.zeros(rewards_PG.shape, np.float64)
    for group, counts in enumerate(counts_PG):
        if not counts.any():
            continue
        scores = rewards_PG[group, counts].astype(np.float64)
        if normalization == "zscore":
            scores = (scores - scores.mean()) / scores.std()
        else:
            scores = 2 * (scores - scores.min()) / (scores.max() - scores.min()) - 1
        normalized_PG[group, counts] = scores
    return normalized_PG
