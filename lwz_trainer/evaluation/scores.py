"""From judgments to the figures of each benchmark. Pure: no files, no clocks.

What was not judged is missing: it lowers no mean, and its number stands beside each mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lwz_trainer.evaluation.items import Item, Requirement
from lwz_trainer.evaluation.means import mean_of
from lwz_trainer.evaluation.questions import DIMENSIONS
from lwz_trainer.rewards.text import count_words

__all__ = [
    "LENGTH_BANDS",
    "LengthScores",
    "WritingScores",
    "length_score",
    "length_scores",
    "quality_score",
    "writing_scores",
]

LENGTH_BANDS = ((0, 500), (500, 2000), (2000, 4000), (4000, math.inf))

Judgments = Mapping[tuple[str, int, str], Mapping[str, Any]]


@dataclass(frozen=True)
class WritingScores:
    """WritingBench of one system; NaN where nothing was judged.

    Attributes:
        overall: mean over all (query, criterion) scores.
        domains, subdomains: mean of the means of their queries.
        requirements: name to (R, C): mean of query means over the subset, and mean over the
            criteria that test the requirement.
        items: index to the mean of its scores.
        num_scores, num_missing: judged (query, criterion) pairs, and those without a score, those
            of unanswered queries included.
    """

    overall: float
    domains: dict[str, float]
    subdomains: dict[str, float]
    requirements: dict[str, tuple[float, float]]
    items: dict[int, float]
    num_scores: int
    num_missing: int


@dataclass(frozen=True)
class LengthScores:
    """LongBench-Write of one system; NaN where nothing was judged.

    Attributes:
        length: mean S_l, 0 to 100.
        quality: mean S_q over the six dimensions, 0 to 100.
        dimensions: mean of each, 0 to 100.
        bands: "[lo, hi)" of required words to (S_l, S_q, number of answers).
        types: type to (S_l, S_q, number of answers).
        items: index to (words, S_l, S_q).
        num_missing: answers without a judgment, and items without an answer.
    """

    length: float
    quality: float
    dimensions: dict[str, float]
    bands: dict[str, tuple[float, float, int]]
    types: dict[str, tuple[float, float, int]]
    items: dict[int, tuple[int, float, float]]
    num_missing: int


def writing_scores(
    items: Sequence[Item],
    judgments: Judgments,
    system: str,
    requirements: Sequence[Requirement] = (),
) -> WritingScores:
    """Aggregates criterion scores; every (query, criterion) counts once."""
    scores: dict[int, dict[str, float]] = {}
    for item in items:
        judged = {
            criterion.name: float(judgments[system, item.index, criterion.name]["score"])
            for criterion in item.criteria
            if (system, item.index, criterion.name) in judgments
        }
        if judged:
            scores[item.index] = judged
    means = {index: fmean(judged.values()) for index, judged in scores.items()}
    num_scores = sum(map(len, scores.values()))
    return WritingScores(
        overall=mean_of(score for judged in scores.values() for score in judged.values()),
        domains=_group_means((item.group, means.get(item.index)) for item in items),
        subdomains=_group_means((item.subgroup, means.get(item.index)) for item in items),
        requirements={
            requirement.name: (
                mean_of(means[index] for index in requirement.indices if index in means),
                mean_of(
                    scores[index][name]
                    for index, name in requirement.criteria
                    if name in scores.get(index, {})
                ),
            )
            for requirement in requirements
        },
        items=means,
        num_scores=num_scores,
        num_missing=sum(len(item.criteria) for item in items) - num_scores,
    )


def length_score(num_words: int, target: int) -> float:
    """LongBench-Write's S_l, 0 to 100.

        y > x:  100·max(0, 1 − (y/x − 1)/3)
        else:   100·max(0, 1 − (x/y − 1)/2), and 0 for y = 0

    Args:
        num_words: y, words of the answer.
        target: x, required words, above 0.
    """
    if target <= 0:
        raise ValueError(f"target must be above 0, got {target}")
    if num_words == 0:
        return 0.0
    if num_words > target:
        return 100 * max(0.0, 1 - (num_words / target - 1) / 3)
    return 100 * max(0.0, 1 - (target / num_words - 1) / 2)


def quality_score(judgment: Mapping[str, Any]) -> float:
    """LongBench-Write's S_q of one answer: the mean over dimensions of (score − 1)·25."""
    return fmean((judgment[name] - 1) * 25 for name in DIMENSIONS)


def length_scores(
    items: Sequence[Item], answers: Mapping[int, str], judgments: Judgments, system: str
) -> LengthScores:
    """Aggregates S_l, which needs no judge, and S_q."""
    answered = [item for item in items if item.index in answers]
    rows: dict[int, tuple[int, float, float]] = {}
    for item in answered:
        assert item.target is not None, "LongBench-Write records have a length"
        num_words = count_words(answers[item.index])
        judgment = judgments.get((system, item.index, "quality"))
        quality = math.nan if judgment is None else quality_score(judgment)
        rows[item.index] = (num_words, length_score(num_words, item.target), quality)
    judged = [
        judgments[system, item.index, "quality"]
        for item in answered
        if (system, item.index, "quality") in judgments
    ]
    means = {name: mean_of((j[name] - 1) * 25 for j in judged) for name in DIMENSIONS}
    return LengthScores(
        length=mean_of(row[1] for row in rows.values()),
        quality=mean_of(means.values()),
        dimensions=means,
        bands={
            f"[{low}, {high})": _pair_means(
                rows[item.index]
                for item in answered
                if item.target is not None and low <= item.target < high
            )
            for low, high in LENGTH_BANDS
        },
        types={
            group: _pair_means(rows[item.index] for item in answered if item.group == group)
            for group in dict.fromkeys(item.group for item in answered)
        },
        items=rows,
        num_missing=len(items) - len(judged),
    )


def _pair_means(rows: Iterable[tuple[int, float, float]]) -> tuple[float, float, int]:
    rows = list(rows)
    return mean_of(row[1] for row in rows), mean_of(row[2] for row in rows), len(rows)


def _group_means(pairs: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for name, value in pairs:
        values = groups.setdefault(name, [])
        if value is not None:
            values.append(value)
    return {name: mean_of(values) for name, values in groups.items()}
