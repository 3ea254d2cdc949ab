"""The rows of a CSV as Markdown, for a README: one table a case, fastest first."""

from collections.abc import Sequence
from typing import Any

__all__ = ["markdown_table"]

GIB_IN_MIB = 1024
HEADER = (
    "| provider | ms (p20-p80) | of the matmul bound | extra memory | error / eager's |\n"
    "|---|---|---|---|---|"
)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Headings say what was measured; providers that did not run stand below with the reason."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        keys = ("op", "mode", "dtype", "tokens", "width", "vocab", "device")
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return "\n\n".join(_table(key, group) for key, group in groups.items())


def _table(key: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    op, mode, dtype, tokens, width, vocab, device = key
    what = f"`{op}` {mode}" if op else "did not start"
    title = f"**{what}**, {dtype}, T={tokens} D={width} V={vocab}, {device}"
    measured = sorted(
        (row for row in rows if row["status"] == "ok"), key=lambda row: float(row["median_ms"])
    )
    lines = [_line(row) for row in measured]
    failed = [row for row in rows if row["status"] != "ok"]
    notes = [f"- {row['provider']}: {row['status']} ({row['reason']})" for row in failed]
    parts = [title, "\n".join([HEADER, *lines]) if lines else "", "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _line(row: dict[str, Any]) -> str:
    time = f"{_ms(row['median_ms'])} ({_ms(row['p20_ms'])}-{_ms(row['p80_ms'])})"
    floor = f"{100 * float(row['floor_frac']):.0f}%" if row["floor_frac"] else ""
    memory = f"{float(row['extra_mib']) / GIB_IN_MIB:.2f} GiB" if row["extra_mib"] else ""
    cells = (row["provider"], time, floor, memory, row["error_vs_eager"])
    return f"| {' | '.join(cells)} |"


def _ms(text: str) -> str:
    return f"{float(text):.3g}" if float(text) < 100 else f"{float(text):.0f}"
