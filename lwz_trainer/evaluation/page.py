"""The report as one HTML page: no script, no network; its style is the run page's and a little."""

import html
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lwz_trainer.evaluation.items import Item
from lwz_trainer.evaluation.outcome import Outcome
from lwz_trainer.evaluation.tables import Table, cell_text
from lwz_trainer.rewards.text import count_words

__all__ = ["report_page"]

_PLACEHOLDER = re.compile(r"<!-- insert (\w+) -->")


def report_page(
    outcome: Outcome,
    items: Sequence[Item],
    systems: Mapping[str, Mapping[int, str]],
    judgments: Mapping[tuple[str, int, str], Mapping[str, Any]],
    *,
    title: str,
    facts: str,
    max_items: int,
) -> str:
    """The page's text.

    Args:
        outcome: tables, figures and warnings.
        items: in the order in which they are read.
        systems: name to {index: answer}; a task's answers stand side by side.
        judgments: shown below the answers that they are about.
        title: heading.
        facts: one line below it.
        max_items: so many tasks can be read.
    """
    assets = files("lwz_trainer")
    style = [
        (assets / folder / "assets" / "page.css").read_text(encoding="utf-8")
        for folder in ("view", "evaluation")
    ]
    shown = [item for item in items if any(item.index in a for a in systems.values())][:max_items]
    verdicts: dict[tuple[str, int], list[str]] = {}
    for (system, index, part), judgment in judgments.items():
        verdicts.setdefault((system, index), []).append(_verdict(part, judgment))
    parts = {
        "title": html.escape(title),
        "facts": html.escape(facts),
        "style": "\n".join(style),
        "warnings": _warnings(outcome.warnings),
        "figures": "\n".join(outcome.figures),
        "tables": "\n".join(_table(table) for table in outcome.tables if table.rows),
        "reading_hint": f"{len(shown)} of {len(items)} tasks; open one to read.",
        "reading": "\n".join(_reading(item, systems, verdicts) for item in shown),
    }
    template = (assets / "evaluation" / "assets" / "page.html").read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], template)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return f'<ul class="warnings">{"".join(f"<li>{html.escape(w)}</li>" for w in warnings)}</ul>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(cell)}</td>"
            if isinstance(cell, str)
            else f'<td class="number">{cell_text(cell)}</td>'
            for cell in row
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<section class="result"><div class="section-title"><h2>{html.escape(table.title)}</h2>'
        f'<p class="hint">{html.escape(table.note)}</p></div><div class="table-scroll">'
        f'<table class="result-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></section>"
    )


def _reading(
    item: Item,
    systems: Mapping[str, Mapping[int, str]],
    verdicts: Mapping[tuple[str, int], Sequence[str]],
) -> str:
    sides = [
        _side(name, answers[item.index], verdicts.get((name, item.index), ()))
        for name, answers in systems.items()
        if item.index in answers
    ]
    sides += [_side(f"{name} (baseline)", text, ()) for name, text in item.baselines.items()]
    summary = " ".join(item.prompt.split())[:160]
    return (
        f'<details class="reading"><summary>{item.index} · {html.escape(item.group)} · '
        f'{html.escape(summary)}</summary><div class="request">{html.escape(item.prompt)}</div>'
        f'<div class="side-by-side">{"".join(sides)}</div></details>'
    )


def _side(name: str, text: str, verdicts: Sequence[str]) -> str:
    listed = "".join(f"<li>{html.escape(verdict)}</li>" for verdict in verdicts)
    return (
        f'<article class="side"><h3>{html.escape(name)}</h3>'
        f'<p class="hint">{count_words(text)} words</p>'
        f'<ul class="verdicts">{listed}</ul><div class="piece">{html.escape(text)}</div></article>'
    )


def _verdict(part: str, judgment: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{key} {value}" for key, value in judgment.items() if key != "reason")
    return f"{part}: {figures}. {judgment.get('reason', '')}".strip()
