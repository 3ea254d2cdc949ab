"""All figures of one evaluation: scores, item by item rows, tables and plots. Pure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lwz_trainer.config.evaluation import EloConfig
from lwz_trainer.evaluation.elo import arena_scores, pairings
from lwz_trainer.evaluation.figures import Series, figure_svg
from lwz_trainer.evaluation.items import Benchmark, Item, Requirement
from lwz_trainer.evaluation.means import mean_of
from lwz_trainer.evaluation.monitor import (
    TrainingSample,
    favoured_words,
    grown_words,
    overused_words,
    rank_correlation,
    system_signs,
    wanted_range,
)
from lwz_trainer.evaluation.scores import length_scores, quality_score, writing_scores
from lwz_trainer.evaluation.tables import (
    Table,
    arena_tables,
    cell_text,
    length_tables,
    monitor_tables,
    training_words_table,
    writing_tables,
)
from lwz_trainer.rewards.text import count_words

__all__ = ["ItemRow", "Outcome", "evaluate", "training_outcome", "training_system"]

Judgments = Mapping[tuple[str, int, str], Mapping[str, Any]]
_SCORE_LABEL: dict[Benchmark, str] = {
    "writingbench": "mean score, 1 to 10",
    "arena-write": "share of comparisons won",
    "longbench-write": "S_q, 0 to 100",
}


@dataclass(frozen=True)
class ItemRow:
    """One answer; NaN for a score that is missing."""

    system: str
    index: int
    group: str
    words: int
    wanted: tuple[int, int] | None
    score: float


@dataclass(frozen=True)
class Outcome:
    """What is written.

    Attributes:
        scores: for results.json, by system ("ratings" and so on for Arena-Write).
        rows: one for each answer.
        tables, figures: in the order of the report; figures are SVG.
        warnings: lines at its head.
        training: for results.json, rank correlations of reward model and judge.
    """

    scores: dict[str, Any]
    rows: list[ItemRow]
    tables: list[Table]
    figures: list[str]
    warnings: list[str]
    training: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Figures:
    """Of one benchmark: for results.json, as tables, and one score for each (system, index)."""

    scores: dict[str, Any]
    tables: list[Table]
    items: dict[tuple[str, int], float]


def evaluate(
    benchmark: Benchmark,
    items: Sequence[Item],
    systems: Mapping[str, Mapping[int, str]],
    judgments: Judgments,
    *,
    requirements: Sequence[Requirement],
    baseline_texts: Sequence[str] | None,
    elo: EloConfig,
) -> Outcome:
    """Aggregates one benchmark.

    Args:
        benchmark: which.
        items: its tasks.
        systems: name to {index: answer without thinking}.
        judgments: by (system, index, part); may be empty.
        requirements: of WritingBench.
        baseline_texts: for over-used words; None takes the other systems' answers and the
            benchmark's baselines.
        elo: how Arena-Write is rated.
    """
    if benchmark == "writingbench":
        figures = _writing_figures(items, systems, judgments, requirements)
    elif benchmark == "longbench-write":
        figures = _length_figures(items, systems, judgments)
    else:
        figures = _arena_figures(items, systems, judgments, elo)
    rows = [
        ItemRow(
            name,
            item.index,
            item.group,
            count_words(answers[item.index]),
            wanted_range(item),
            figures.items.get((name, item.index), math.nan),
        )
        for name, answers in systems.items()
        for item in items
        if item.index in answers
    ]
    signs = {name: system_signs(items, answers) for name, answers in systems.items()}
    overused = {
        name: overused_words(
            list(answers.values()),
            baseline_texts
            if baseline_texts is not None
            else _other_texts(items, systems, without=name),
        )
        for name, answers in systems.items()
    }
    return Outcome(
        scores=figures.scores,
        rows=rows,
        tables=figures.tables + monitor_tables(signs, overused),
        figures=_item_figures(rows, list(systems), _SCORE_LABEL[benchmark]),
        warnings=_coverage_warnings(items, systems),
    )


def _writing_figures(
    items: Sequence[Item],
    systems: Mapping[str, Mapping[int, str]],
    judgments: Judgments,
    requirements: Sequence[Requirement],
) -> _Figures:
    scores = {name: writing_scores(items, judgments, name, requirements) for name in systems}
    return _Figures(
        {name: dataclasses.asdict(s) for name, s in scores.items()},
        writing_tables(scores),
        {(name, index): mean for name, s in scores.items() for index, mean in s.items.items()},
    )


def _length_figures(
    items: Sequence[Item], systems: Mapping[str, Mapping[int, str]], judgments: Judgments
) -> _Figures:
    scores = {
        name: length_scores(items, answers, judgments, name) for name, answers in systems.items()
    }
    return _Figures(
        {name: dataclasses.asdict(s) for name, s in scores.items()},
        length_tables(scores),
        {(name, index): row[2] for name, s in scores.items() for index, row in s.items.items()},
    )


def _arena_figures(
    items: Sequence[Item],
    systems: Mapping[str, Mapping[int, str]],
    judgments: Judgments,
    elo: EloConfig,
) -> _Figures:
    played, num_missing = pairings(items, judgments, list(systems))
    if not played:
        return _Figures({}, [], {})
    scores = arena_scores(
        played,
        num_missing=num_missing,
        anchor=elo.anchor,
        virtual_ties=elo.virtual_ties,
        num_bootstrap=elo.num_bootstrap,
        seed=elo.seed,
    )
    won: dict[tuple[str, int], list[float]] = {}
    for pairing in played:
        won.setdefault((pairing.system, pairing.index), []).extend(pairing.outcomes)
    return _Figures(
        dataclasses.asdict(scores),
        arena_tables(scores),
        {key: fmean(outcomes) for key, outcomes in won.items()},
    )


def training_system(step: int) -> str:
    """The name under which a training step's samples are judged."""
    return f"training step {step}"


def training_outcome(samples: Sequence[TrainingSample], judgments: Judgments) -> Outcome:
    """A run's words; reward model against judge over its steps, with a warning if they part."""
    steps: dict[int, list[tuple[TrainingSample, float]]] = {}
    for sample in samples:
        if not sample.is_judged:
            continue
        judgment = judgments.get((training_system(sample.step), sample.item.index, "quality"))
        score = math.nan if judgment is None else quality_score(judgment)
        steps.setdefault(sample.step, []).append((sample, score))
    rows = [
        (
            step,
            len(pairs),
            mean_of([sample.reward for sample, _ in pairs]),
            mean_of([score for _, score in pairs]),
            mean_of([sample.redundancy for sample, _ in pairs]),
            mean_of([float(sample.num_words) for sample, _ in pairs]),
        )
        for step, pairs in steps.items()
    ]
    scored = [
        (sample.reward, score)
        for pairs in steps.values()
        for sample, score in pairs
        if math.isfinite(sample.reward) and math.isfinite(score)
    ]
    over_samples = rank_correlation([r for r, _ in scored], [s for _, s in scored])
    whole = [row for row in rows if math.isfinite(row[2]) and math.isfinite(row[3])]
    over_steps = rank_correlation([row[2] for row in whole], [row[3] for row in whole])
    table = Table(
        "training",
        "Reward model against judge over training",
        "Means over some samples of each step; the judge's score is S_q, 0 to 100. "
        f"Spearman correlation of the two: {cell_text(over_samples)} over {len(scored)} samples, "
        f"{cell_text(over_steps)} over {len(whole)} steps.",
        ("step", "samples", "reward model", "judge", "redundancy", "words"),
        tuple(rows),
    )
    figure = figure_svg(
        [
            Series("reward model", tuple((row[0], z) for row, z in _standard(whole, 2)), True),
            Series("judge", tuple((row[0], z) for row, z in _standard(whole, 3)), True),
        ],
        title="Reward model and judge over training",
        x_label="step",
        y_label="standard deviations from the mean",
    )
    return Outcome(
        scores={},
        rows=[],
        tables=[table, training_words_table(favoured_words(samples), grown_words(samples))],
        figures=[figure] if figure else [],
        warnings=_drift_warning(whole),
        training={"over_samples": over_samples, "over_steps": over_steps},
    )


def _drift_warning(rows: Sequence[tuple[float, ...]]) -> list[str]:
    """The reward model's later half is above its earlier one, the judge's below."""
    half = len(rows) // 2
    if half == 0:
        return []
    earlier, later = rows[:half], rows[-half:]
    reward = mean_of([row[2] for row in later]) - mean_of([row[2] for row in earlier])
    judge = mean_of([row[3] for row in later]) - mean_of([row[3] for row in earlier])
    if reward <= 0 or judge >= 0:
        return []
    return [
        f"The reward model's score rose by {reward:.3g} from the run's earlier to its later half, "
        f"the judge's fell by {-judge:.3g}: the policy may be gaming the reward model."
    ]


def _standard(
    rows: Sequence[tuple[float, ...]], column: int
) -> list[tuple[tuple[float, ...], float]]:
    """Each row with its column's z-value, so that two scales fit one axis."""
    values = [row[column] for row in rows]
    mean = mean_of(values)
    spread = math.sqrt(mean_of([(value - mean) ** 2 for value in values])) or 1.0
    return [(row, (value - mean) / spread) for row, value in zip(rows, values, strict=True)]


def _item_figures(rows: Sequence[ItemRow], systems: Sequence[str], score_label: str) -> list[str]:
    of_system = [(name, [row for row in rows if row.system == name]) for name in systems]
    following = figure_svg(
        [
            Series(
                name,
                tuple((sum(row.wanted) / 2, row.words) for row in mine if row.wanted is not None),
            )
            for name, mine in of_system
        ],
        title="Length following",
        x_label="words asked for (middle of the range)",
        y_label="words written",
        is_log=True,
        diagonal=True,
    )
    by_length = figure_svg(
        [
            Series(name, tuple((float(row.words), row.score) for row in mine))
            for name, mine in of_system
        ],
        title="Score by length",
        x_label="words written",
        y_label=score_label,
    )
    return [figure for figure in (following, by_length) if figure]


def _coverage_warnings(
    items: Sequence[Item], systems: Mapping[str, Mapping[int, str]]
) -> list[str]:
    warnings = []
    for name, answers in systems.items():
        answered = [item for item in items if item.index in answers]
        if len(answered) < len(items):
            warnings.append(f"{name} answers {len(answered)} of {len(items)} tasks.")
        empty = sum(not answers[item.index] for item in answered)
        if empty:
            warnings.append(
                f"{empty} of {name}'s responses hold no answer (thinking that never ended, or "
                "nothing); they have the lowest score and need no judge."
            )
    return warnings


def _other_texts(
    items: Sequence[Item], systems: Mapping[str, Mapping[int, str]], *, without: str
) -> list[str]:
    texts = [text for item in items for text in item.baselines.values()]
    for name, answers in systems.items():
        if name != without:
            texts += answers.values()
    return texts
