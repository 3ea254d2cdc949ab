"""What became of every row: kept, or dropped at which stage and why."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.prepare import PrepareConfig

__all__ = ["Candidate", "PrepareReport"]

_STAGES = ("rules", "duplicates", "explicit counts", "draw", "quality", "range")
_RANGE_EDGES = (0, 500, 1000, 2000, 3000, 4000, 6000, 8000, 10_000, 12_001)


@dataclass
class Candidate:
    """A request that is still in.

    Attributes:
        text: the request.
        where: the row it comes from.
        language: "en" or "zh".
        length_range: words of a good reply, once they are known.
        range_from: "data", "rules" or "judge".
    """

    text: str
    where: str
    language: str
    length_range: tuple[int, int] | None
    range_from: str


@dataclass
class PrepareReport:
    """Counts every row exactly once: rows read = rows dropped + rows kept."""

    config: PrepareConfig
    rows_read: Counter[str] = field(default_factory=Counter)
    """By input."""
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (stage, reason)."""
    kept: Sequence[Candidate] = ()
    judge_usage: dict[str, int] = field(default_factory=dict)
    """Of this run; answers of an earlier one are cache hits."""

    def drop(self, stage: str, reason: str, rows: int = 1) -> None:
        if rows:
            self.dropped[stage, reason] += rows

    def write(self, output: Path) -> None:
        """`NAME.report.json` and `NAME.report.md` beside `NAME.jsonl`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        write_text_atomically(output.with_suffix(".report.json"), text)
        write_text_atomically(output.with_suffix(".report.md"), self.as_markdown())

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows_read": dict(self.rows_read),
            "dropped": [
                {"stage": stage, "reason": reason, "rows": rows}
                for (stage, reason), rows in self._dropped_in_order()
            ],
            "kept": len(self.kept),
            "kept_by_language": dict(Counter(kept.language for kept in self.kept)),
            "range_from": dict(Counter(kept.range_from for kept in self.kept)),
            "ranges_by_middle": self._ranges(),
            "judge_usage_of_this_run": self.judge_usage,
            "config": dataclasses.asdict(self.config),
        }

    def as_markdown(self) -> str:
        total = sum(self.rows_read.values())
        rows = [("read", name, count) for name, count in self.rows_read.items()]
        rows += [(stage, reason, -count) for (stage, reason), count in self._dropped_in_order()]
        for language, count in sorted(Counter(kept.language for kept in self.kept).items()):
            rows.append(("kept", language, count))
        lines = ["| stage | what | rows | of all |", "|---|---|---|---|"]
        for stage, what, count in rows:
            share = f"{abs(count) / total:.1%}" if total else "n/a"
            lines.append(f"| {stage} | {what.replace('|', '/')} | {count:,} | {share} |")
        lines += ["", "| middle of the range, words | rows |", "|---|---|"]
        for bucket in self._ranges():
            lines.append(f"| {bucket['from']:,} to {bucket['below'] - 1:,} | {bucket['rows']:,} |")
        return "\n".join(lines) + "\n"

    def _dropped_in_order(self) -> list[tuple[tuple[str, str], int]]:
        """By stage, then the most frequent reason first."""
        return sorted(
            self.dropped.items(), key=lambda item: (_STAGES.index(item[0][0]), -item[1], item[0][1])
        )

    def _ranges(self) -> list[dict[str, int]]:
        middles = [sum(kept.length_range) // 2 for kept in self.kept if kept.length_range]
        return [
            {"from": low, "below": high, "rows": sum(low <= middle < high for middle in middles)}
            for low, high in itertools.pairwise(_RANGE_EDGES)
        ]
