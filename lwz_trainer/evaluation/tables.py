"""Tables of the report; each is written as CSV, Markdown and HTML from the same cells."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lwz_trainer.evaluation.elo import ArenaScores
from lwz_trainer.evaluation.monitor import Overused, SystemSigns
from lwz_trainer.evaluation.published import PUBLISHED, SOURCE
from lwz_trainer.evaluation.questions import DIMENSIONS
from lwz_trainer.evaluation.scores import LengthScores, WritingScores

__all__ = [
    "Cell",
    "Table",
    "arena_tables",
    "cell_text",
    "length_tables",
    "monitor_tables",
    "table_csv",
    "table_markdown",
    "training_words_table",
    "writing_tables",
]

Cell = str | int | float | None
_HERE = "this evaluation"


@dataclass(frozen=True)
class Table:
    """Named cells: a file name, a title, a line on how to read it, columns and rows."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def cell_text(cell: Cell) -> str:
    """As people read it: two decimals, an em dash for what is not there."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "—"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def table_csv(table: Table) -> str:
    """Full precision; an empty field for what is not there."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow(
            "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell
            for cell in row
        )
    return out.getvalue()


def table_markdown(table: Table) -> str:
    """A heading, the note, and a GitHub table."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    rows = [
        "| " + " | ".join(cell_text(cell).replace("|", "\\|") for cell in row) + " |"
        for row in lines
    ]
    return "\n".join([f"### {table.title}", "", table.note, "", *rows, ""])


def writing_tables(scores: Mapping[str, WritingScores]) -> list[Table]:
    """WritingBench: overall beside published rows, by domain, by requirement."""
    overall: list[tuple[Cell, ...]] = [
        (name, s.overall, s.num_scores, s.num_missing, _HERE) for name, s in scores.items()
    ]
    overall += [
        (row.name, row.writingbench, None, None, SOURCE)
        for row in PUBLISHED
        if row.writingbench is not None
    ]
    tables = [
        Table(
            "overall",
            "WritingBench",
            "Mean over all criteria of all queries, 1 to 10. Published rows come from another "
            "judge and wording: compare them with each other, not with rows of this evaluation.",
            ("system", "score", "criteria judged", "criteria missing", "source"),
            tuple(overall),
        ),
        _by_name("domains", "By domain", "domain", {n: s.domains for n, s in scores.items()}),
        _by_name(
            "subdomains", "By subdomain", "subdomain", {n: s.subdomains for n, s in scores.items()}
        ),
    ]
    requirements = {
        name: {
            f"{requirement} {kind}": value
            for requirement, pair in s.requirements.items()
            for kind, value in zip("RC", pair, strict=True)
        }
        for name, s in scores.items()
    }
    if any(requirements.values()):
        table = _by_name("requirements", "By requirement", "requirement", requirements)
        note = (
            "R: mean of query means over the requirement's subset. C: mean over the criteria that "
            "test the requirement."
        )
        tables.append(Table(table.name, table.title, note, table.columns, table.rows))
    return tables


def arena_tables(scores: ArenaScores) -> list[Table]:
    """Arena-Write: ratings beside published ones, and win rates."""
    ordered = sorted(scores.ratings.items(), key=lambda entry: -entry[1][0])
    ratings: list[tuple[Cell, ...]] = [
        (
            name,
            *rating,
            scores.win_rate.get(name),
            scores.agreement.get(name),
            scores.num_pairings.get(name),
            _HERE if name in scores.win_rate else f"{_HERE} (baseline)",
        )
        for name, rating in ordered
    ]
    ratings += [
        (row.name, row.arena_elo, None, None, None, None, None, SOURCE)
        for row in PUBLISHED
        if row.arena_elo is not None
    ]
    baselines = sorted({name for rates in scores.win_rates.values() for name in rates})
    return [
        Table(
            "ratings",
            "Arena-Write",
            "Bradley–Terry ratings on the Elo scale with 95% bootstrap intervals over tasks; the "
            "baselines' mean is fixed. Agreement: pairs with one verdict in both orders. "
            f"{scores.num_missing} pairs are missing. Published ratings have another judge and "
            "another zero: their differences can be compared, the ratings cannot.",
            ("system", "Elo", "low", "high", "win rate", "agreement", "pairs", "source"),
            tuple(ratings),
        ),
        Table(
            "win_rates",
            "Win rates",
            "Share of comparisons that the system wins against each baseline, ties one half.",
            ("system", *baselines),
            tuple(
                (system, *(rates.get(baseline) for baseline in baselines))
                for system, rates in scores.win_rates.items()
            ),
        ),
    ]


def length_tables(scores: Mapping[str, LengthScores]) -> list[Table]:
    """LongBench-Write: S_l and S_q overall, by required length, by type, by dimension."""
    return [
        Table(
            "overall",
            "LongBench-Write",
            "S_l: how well the number of words fits, 0 to 100. S_q: the judge's six dimensions, "
            "0 to 100. Missing: tasks without an answer or a judgment.",
            ("system", "S_l", "S_q", "mean of both", "missing"),
            tuple(
                (name, s.length, s.quality, (s.length + s.quality) / 2, s.num_missing)
                for name, s in scores.items()
            ),
        ),
        _length_groups("bands", "By required words", {n: s.bands for n, s in scores.items()}),
        _length_groups("types", "By type", {n: s.types for n, s in scores.items()}),
        _by_name(
            "dimensions",
            "By dimension",
            "dimension",
            {
                name: {dimension: s.dimensions[dimension] for dimension in DIMENSIONS}
                for name, s in scores.items()
            },
        ),
    ]


def monitor_tables(
    signs: Mapping[str, SystemSigns], overused: Mapping[str, Sequence[Overused]]
) -> list[Table]:
    """Repetition and length of each system, and its pet words."""
    return [
        Table(
            "signs",
            "Length and repetition",
            "Redundancy: share of passages that restate an earlier one; repetitive: answers where "
            "it is above 0.2. Range: ±10% of the required words, or what the request says.",
            (
                "system",
                "answers",
                "empty",
                "words",
                "redundancy",
                "repetitive",
                "with range",
                "in range",
                "too short",
                "too long",
                "words / middle of range",
            ),
            tuple(
                (
                    name,
                    s.num_answers,
                    s.num_empty,
                    s.mean_words,
                    s.redundancy,
                    s.repetitive_frac,
                    s.num_with_range,
                    s.in_range_frac,
                    s.short_frac,
                    s.long_frac,
                    s.length_ratio,
                )
                for name, s in signs.items()
            ),
        ),
        Table(
            "overused",
            "Over-used words",
            "Words used more than in the baseline texts, by the z-value of their log-odds; what a "
            "reward model likes shows here first, and so does the subject of few tasks.",
            ("system", "word", "z", "log-odds", "uses", "uses in baseline"),
            tuple(
                (name, o.word, o.z, o.log_odds, o.count, o.baseline_count)
                for name, words in overused.items()
                for o in words
            ),
        ),
    ]


def training_words_table(favoured: Sequence[Overused], grown: Sequence[Overused]) -> Table:
    """What the reward model likes, and what became more frequent: the same words are a sign."""
    kinds = {"scored higher": favoured, "later steps": grown}
    return Table(
        "training_words",
        "Words over training",
        "Words of all samples of the steps that were read, by the z-value of their log-odds. "
        "“Scored higher”: in answers that the reward model put above their group's mean, against "
        "the group's others. “Later steps”: in the later half of the steps, against the earlier.",
        ("kind", "word", "z", "log-odds", "uses", "uses in the others"),
        tuple(
            (kind, o.word, o.z, o.log_odds, o.count, o.baseline_count)
            for kind, words in kinds.items()
            for o in words
        ),
    )


def _by_name(name: str, title: str, head: str, values: Mapping[str, Mapping[str, float]]) -> Table:
    rows = dict.fromkeys(key for by_key in values.values() for key in by_key)
    return Table(
        name,
        title,
        "A dash: nothing was judged.",
        (head, *values),
        tuple((row, *(by_key.get(row) for by_key in values.values())) for row in rows),
    )


def _length_groups(
    name: str, title: str, values: Mapping[str, Mapping[str, tuple[float, float, int]]]
) -> Table:
    return Table(
        name,
        title,
        "S_l and S_q of the answers of each group, and how many there are.",
        ("system", "group", "S_l", "S_q", "answers"),
        tuple(
            (system, group, *triple)
            for system, groups in values.items()
            for group, triple in groups.items()
        ),
    )
