"""What a person sees: one line a step, and progress bars on a terminal."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["RunConsole", "learned_line", "step_line"]

WINDOW = 5
"""Steps averaged at either end when a run says what it learned."""


class RunConsole:
    """Prints on the main rank only."""

    def __init__(self, *, is_main: bool, progress: bool | None) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        shows = self._console.is_terminal if progress is None else progress
        self._shows_progress = shows and is_main

    def print(self, text: str) -> None:
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator["Bar"]:
        """A bar that disappears when the phase is over."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]} {task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._shows_progress,
        )
        with progress:
            yield Bar(progress, progress.add_task(title, total=total, unit=unit, note=""))


class Bar:
    """One running bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, completed: int, note: str = "", *, total: int | None = None) -> None:
        self._progress.update(self._task, completed=completed, note=note, total=total)


def step_line(metrics: dict[str, Any], num_steps: int) -> str:
    """The step in one line."""
    width = len(str(num_steps))
    rewards = "  ".join(
        f"{key.removeprefix('reward/')} {_number(metrics[key])}"
        for key in ("reward/length", "reward/format", "reward/writing")
        if key in metrics
    )
    line = (
        f"step {metrics['step']:>{width}}/{num_steps}  {rewards}  "
        f"strict {metrics['reward/strict_frac']:.0%}  "
        f"words {metrics['words/think_mean']:.0f}+{metrics['words/answer_mean']:.0f}  "
        f"truncated {metrics['truncated_frac']:.0%}  entropy {_number(metrics.get('entropy'))}  "
        f"grad {metrics.get('grad_norm', 0):.2f}  "
        f"{metrics['time/step_s']:.1f} s (rollout {metrics['time/rollout_s']:.1f}, "
        f"update {metrics['time/update_s']:.1f})"
    )
    return "\n".join([line, *(f"  warning: {text}" for text in metrics.get("warnings", []))])


def learned_line(history: list[dict[str, Any]], run_dir: Path) -> str:
    """First steps against last steps, and where to look."""
    window = min(WINDOW, max(1, len(history) // 2))
    changes = []
    for key in ("reward/length", "reward/format", "reward/writing", "reward/strict_frac"):
        values = [record[key] for record in history if record.get(key) is not None]
        if values:
            first, last = _mean(values[:window]), _mean(values[-window:])
            changes.append(f"{key.removeprefix('reward/')} {first:.2f} → {last:.2f}")
    return (
        f"Learned in {len(history)} steps (means of the first and last {window}): "
        f"{', '.join(changes)}. Look at {run_dir / 'report.html'}"
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _number(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.2f}"
