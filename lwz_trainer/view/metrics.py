"""Reads `metrics.jsonl`: one JSON object a step, columns out.

A run that was killed leaves a torn last line, a run that was resumed writes some steps twice, and a
run that diverged has NaN. All three are shown as what they are; any other broken line is an error.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from lwz_trainer.errors import UserError
from lwz_trainer.view.steps import format_steps

__all__ = ["Metrics", "json_number", "learned_changes", "read_metrics"]

WINDOW_STEPS = 5
"""How many steps at each end of a run are averaged to say what was learned."""


@dataclass
class Metrics:
    """The columns of one run: `series[key][i]` belongs to `steps[i]`, None where it is missing."""

    steps: list[int]
    series: dict[str, list[float | None]]
    warnings: dict[int, list[str]]
    notes: list[str] = field(default_factory=list)


def read_metrics(run_dir: Path) -> Metrics:
    """Reads `metrics.jsonl` of a run directory.

    Raises:
        UserError: there is no such file, or a line other than a torn last one is broken.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{run_dir} is not a run directory: expected metrics.jsonl in it, found none; "
            "pass a directory that `python -m lwz_trainer train` wrote"
        )
    records, notes = _read_records(path)
    record_of_step: dict[int, dict[str, Any]] = {}
    repeated: set[int] = set()
    step = 0
    for line_number, record in records:
        step = record.get("step", step + 1)
        if isinstance(step, bool) or not isinstance(step, int):
            raise UserError(
                f"{path} line {line_number}: step must be an integer, got {step!r}; "
                "repair or delete this line"
            )
        if step in record_of_step:
            repeated.add(step)
        record_of_step[step] = record
    if repeated:
        notes.append(
            f"Recorded more than once (resumed run), the latest is shown: "
            f"{format_steps(sorted(repeated))}."
        )
    if not record_of_step:
        notes.append("No step has been recorded yet.")
    return _to_columns(record_of_step, notes)


def _read_records(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    lines = [
        (number, line)
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
    records: list[tuple[int, dict[str, Any]]] = []
    notes: list[str] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            if number == lines[-1][0]:
                notes.append(
                    f"The last line of {path.name} (line {number}) is torn; it was left out."
                )
                break
            raise UserError(
                f"{path} line {number} is broken: expected one JSON object, got {error}; "
                "repair or delete this line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path} line {number} is broken: expected one JSON object, "
                f"got {type(record).__name__}; repair or delete this line"
            )
        records.append((number, record))
    return records, notes


def _to_columns(record_of_step: dict[int, dict[str, Any]], notes: list[str]) -> Metrics:
    steps = sorted(record_of_step)
    series: dict[str, list[float | None]] = {}
    warnings: dict[int, list[str]] = {}
    for row, step in enumerate(steps):
        record = record_of_step[step]
        for key, value in record.items():
            if value is None:
                value = math.nan  # the trainer writes numbers that are not finite as null
            if key != "step" and isinstance(value, int | float):
                series.setdefault(key, [None] * len(steps))[row] = float(value)
        step_warnings = record.get("warnings") or []
        if isinstance(step_warnings, str):
            step_warnings = [step_warnings]
        if step_warnings:
            warnings[step] = [str(warning) for warning in step_warnings]
    return Metrics(steps, series, warnings, notes)


def json_number(value: float | None) -> float | str | None:
    """A value as the page gets it: six digits; "NaN", "inf", "-inf" by name, as JSON has none."""
    if value is None:
        return None
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return float(f"{value:.6g}")


def learned_changes(metrics: Metrics) -> list[dict[str, Any]]:
    """Mean of the first steps → mean of the last steps, for every reward and what explains it.

    A change within two standard errors of the two means is called "unclear", as is any change
    between single steps. The windows never overlap: a run of fewer than ten steps is split in half.
    """
    changes = []
    for key, values in metrics.series.items():
        is_reward = key.startswith("reward/") and not key.endswith(
            ("_std", "_failed_frac", "/worker_failures")
        )
        if not is_reward and key not in {"words/answer_mean", "truncated_frac"}:
            continue
        finite = [value for value in values if value is not None and math.isfinite(value)]
        window = min(WINDOW_STEPS, len(finite) // 2)
        if window == 0:
            continue
        first, last = finite[:window], finite[-window:]
        before, after = fmean(first), fmean(last)
        error = math.sqrt((variance(first) + variance(last)) / window) if window > 1 else math.inf
        direction = "up" if after > before else "down"
        if first == last:
            direction = "same"
        elif abs(after - before) <= 2 * error:
            direction = "unclear"
        changes.append(
            {
                "key": key,
                "first": json_number(before),
                "last": json_number(after),
                "standard_error": json_number(error),
                "direction": direction,
                "good": _good_direction(key),
                "window": window,
            }
        )
    return changes


def _good_direction(key: str) -> str | None:
    if key in {"reward/redundancy", "truncated_frac"}:
        return "down"
    return "up" if key.startswith("reward/") else None
