"""Ratings from pairwise judgments: Bradley–Terry by maximum likelihood, on the Elo scale.

P(i beats j) = 1 / (1 + 10^((R_j − R_i) / 400)), a tie is half a win for each. The ratings maximise
the likelihood of all comparisons at once, so they depend on no order of games and on no K factor.
Their zero is free; it is fixed by setting the mean of the baselines to a given number. (Bradley and
Terry, Biometrika 1952. Which prompt, K, anchors and tie handling LongWriter-Zero's authors used is
not known.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.items import Item

__all__ = ["ArenaScores", "Pairing", "arena_scores", "fit_ratings", "pairings"]

_SCALE = 400 / math.log(10)
_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Pairing:
    """A system's answer against a baseline's in both orders.

    Attributes:
        system, baseline, index: of whom, and on which item.
        outcomes: of the system, where it stood first and where it stood second: 1, 0.5 or 0.
    """

    system: str
    baseline: str
    index: int
    outcomes: tuple[float, float]


@dataclass(frozen=True)
class ArenaScores:
    """Arena-Write of all systems.

    Attributes:
        ratings: name to (rating, low, high), the bounds of the 95% bootstrap interval; baselines
            too.
        win_rates: system to {baseline: share of comparisons won, ties half}.
        win_rate: system to its share over all comparisons.
        agreement: system to the share of pairings with one verdict in both orders.
        num_pairings: system to the number of pairings.
        num_missing: pairings that were left out, because one of their two orders is missing.
    """

    ratings: dict[str, tuple[float, float, float]]
    win_rates: dict[str, dict[str, float]]
    win_rate: dict[str, float]
    agreement: dict[str, float]
    num_pairings: dict[str, int]
    num_missing: int


def pairings(
    items: Sequence[Item],
    judgments: Mapping[tuple[str, int, str], Mapping[str, Any]],
    systems: Sequence[str],
) -> tuple[list[Pairing], int]:
    """All pairings that were judged in both orders, and the number of those that were not.

    A judge that favours one place would lift whoever stood there more often, so half a pairing
    does not count.
    """
    complete: list[Pairing] = []
    num_missing = 0
    for system in systems:
        for item in items:
            for baseline in item.baselines:
                verdicts = [
                    judgments.get((system, item.index, f"{baseline}/{place}"))
                    for place in ("first", "second")
                ]
                if verdicts[0] is None or verdicts[1] is None:
                    num_missing += 1
                    continue
                outcomes = (
                    _outcome(verdicts[0]["winner"], mine="A"),
                    _outcome(verdicts[1]["winner"], mine="B"),
                )
                complete.append(Pairing(system, baseline, item.index, outcomes))
    return complete, num_missing


def arena_scores(
    played: Sequence[Pairing],
    *,
    num_missing: int,
    anchor: float,
    virtual_ties: float,
    num_bootstrap: int,
    seed: int,
) -> ArenaScores:
    """Ratings with intervals, and win rates.

    Args:
        played: from `pairings`, at least one.
        num_missing: from `pairings`.
        anchor: mean rating of the baselines.
        virtual_ties: as in `fit_ratings`.
        num_bootstrap: resamples of the items. An item is drawn with all its comparisons, as they
            share its prompt and answers.
        seed: of the resampling.

    Raises:
        UserError: as `fit_ratings`.
    """
    baselines = sorted({pairing.baseline for pairing in played})
    systems = list(dict.fromkeys(pairing.system for pairing in played))
    row_of = {name: row for row, name in enumerate([*baselines, *systems])}
    indices = sorted({pairing.index for pairing in played})
    place_of = {index: place for place, index in enumerate(indices)}
    wins_INN = np.zeros((len(indices), len(row_of), len(row_of)))
    for pairing in played:
        a, b = row_of[pairing.system], row_of[pairing.baseline]
        won = sum(pairing.outcomes)
        wins_INN[place_of[pairing.index], a, b] += won
        wins_INN[place_of[pairing.index], b, a] += 2 - won

    generator = np.random.default_rng(seed)
    counts_RI = generator.multinomial(
        len(indices), np.full(len(indices), 1 / len(indices)), size=num_bootstrap
    )
    wins_RNN = np.concatenate(
        [wins_INN.sum(0, keepdims=True), np.einsum("ri,ijk->rjk", counts_RI, wins_INN)]
    )
    ratings_RN = fit_ratings(wins_RNN, virtual_ties=virtual_ties)
    ratings_RN += anchor - ratings_RN[:, : len(baselines)].mean(axis=1, keepdims=True)
    low_N, high_N = (
        np.quantile(ratings_RN[1:], [0.025, 0.975], axis=0)
        if num_bootstrap
        else np.full((2, len(row_of)), math.nan)
    )
    return ArenaScores(
        ratings={
            name: (float(ratings_RN[0, row]), float(low_N[row]), float(high_N[row]))
            for name, row in row_of.items()
        },
        win_rates={
            system: {
                baseline: _win_rate([p for p in of_system if p.baseline == baseline])
                for baseline in baselines
                if any(p.baseline == baseline for p in of_system)
            }
            for system in systems
            for of_system in [[p for p in played if p.system == system]]
        },
        win_rate={s: _win_rate([p for p in played if p.system == s]) for s in systems},
        agreement={
            s: float(np.mean([p.outcomes[0] == p.outcomes[1] for p in played if p.system == s]))
            for s in systems
        },
        num_pairings={s: sum(p.system == s for p in played) for s in systems},
        num_missing=num_missing,
    )


def fit_ratings(wins_RNN: np.ndarray, *, virtual_ties: float) -> np.ndarray:
    """Maximum-likelihood ratings on the Elo scale, each row with mean 0.

        max over θ of Σ_ij w_ij log σ(θ_i − θ_j),   R = θ·400 / ln 10

    by Newton's method; the problem is concave.

    Args:
        wins_RNN: [R, N, N], w_ij: times that i beat j plus half their ties, in each of R problems.
        virtual_ties: ties added to each pair that has met in any of the problems. Above 0, a player
            who won or lost every comparison has a finite rating.

    Returns:
        [R, N].

    Raises:
        UserError: ratings without bound (with `virtual_ties` 0), or players who never met, not even
            through others.
    """
    met_NN = (wins_RNN + wins_RNN.transpose(0, 2, 1) > 0).any(0)
    wins_RNN = wins_RNN + 0.5 * virtual_ties * met_NN
    games_RNN = wins_RNN + wins_RNN.transpose(0, 2, 1)
    num_players = wins_RNN.shape[1]
    if not _is_connected(wins_RNN):
        raise UserError(
            "no finite Elo ratings: some answers won or lost every comparison, or were never "
            "compared; set elo.virtual_ties above 0, and judge more items"
        )
    theta_RN = np.zeros(wins_RNN.shape[:2])
    for _ in range(_MAX_NEWTON_STEPS):
        difference_RNN = theta_RN[:, :, None] - theta_RN[:, None, :]
        expected_RNN = 1 / (1 + np.exp(-np.clip(difference_RNN, -60, 60)))
        gradient_RN = (wins_RNN - games_RNN * expected_RNN).sum(-1)
        weight_RNN = games_RNN * expected_RNN * (1 - expected_RNN)
        # The Laplacian is singular along (1, …, 1); the constant fixes the mean and nothing else.
        hessian_RNN = -weight_RNN + 1 / num_players
        diagonal = np.arange(num_players)
        hessian_RNN[:, diagonal, diagonal] += weight_RNN.sum(-1)
        step_RN = np.linalg.solve(hessian_RNN, gradient_RN[..., None])[..., 0]
        # Full Newton steps overshoot where the likelihood is flat.
        step_RN *= np.minimum(1, 2 / np.maximum(np.abs(step_RN).max(-1, keepdims=True), 1e-300))
        theta_RN += step_RN
        if np.abs(step_RN).max() < _TOLERANCE:
            break
    return _SCALE * (theta_RN - theta_RN.mean(-1, keepdims=True))


def _is_connected(wins_RNN: np.ndarray) -> bool:
    """Whether everyone has beaten everyone through some chain, in each problem (Ford, 1957)."""
    reach_RNN = (wins_RNN > 0) | np.eye(wins_RNN.shape[1], dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(wins_RNN.shape[1])))):
        reach_RNN = (reach_RNN.astype(float) @ reach_RNN.astype(float)) > 0
    return bool(reach_RNN.all())


def _outcome(winner: str, *, mine: str) -> float:
    return 0.5 if winner == "tie" else float(winner == mine)


def _win_rate(played: Sequence[Pairing]) -> float:
    return float(np.mean([outcome for p in played for outcome in p.outcomes]))
