"""Writes one HTML page about one run, or about several runs (seeds) on top of each other.

The page needs no network and no server: style, script and data are inside it, and a content
security policy forbids it to load anything. Data are JSON in inert script elements, one for the
curves and one for each step of samples, which the page parses only when that step is opened.
"""

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.errors import UserError
from lwz_trainer.view.metrics import json_number, learned_changes, read_metrics
from lwz_trainer.view.samples import SampleFile, find_sample_files, read_sample_step
from lwz_trainer.view.settings import read_settings
from lwz_trainer.view.steps import format_steps, spread_steps

__all__ = ["write_page"]

MAX_SAMPLES_WITH_TOKENS = 2_000
MAX_EMBEDDED_TOKENS = 2_000_000  # about 13 bytes each: an id and a log-probability
SCRIPTS = (
    "dom.js",
    "charts.js",
    "chart_list.js",
    "overview.js",
    "samples.js",
    "card.js",
    "main.js",
)
PLACEHOLDER = re.compile(r"<!-- insert (\w+) -->")


def write_page(
    run_dirs: list[Path], out: Path | None = None, *, max_sample_steps: int = 40
) -> Path:
    """Writes the page and returns where it is.

    Args:
        run_dirs: run directories, each with `metrics.jsonl`; `config.yaml` and `samples/` are shown
            where they exist. Curves are overlaid; samples of each run can be browsed.
        out: the HTML file; default `report.html` in the first run directory.
        max_sample_steps: at most so many steps of samples per run are embedded.

    Raises:
        UserError: no run was given, a directory holds no metrics, or a file in it is broken.
    """
    if not run_dirs:
        raise UserError("view needs at least one run directory, got none; pass the path of a run")
    if max_sample_steps < 0:
        raise UserError(
            f"max_sample_steps must be 0 or more, got {max_sample_steps}; 0 embeds no samples"
        )
    out = run_dirs[0] / "report.html" if out is None else out
    names = _run_names(run_dirs)
    runs: list[dict[str, Any]] = []
    chosen: list[list[SampleFile]] = []
    for run_dir, name in zip(run_dirs, names, strict=True):
        run, sample_files = _describe_run(run_dir, name, max_sample_steps)
        runs.append(run)
        chosen.append(sample_files)
    with_tokens = _tokens_fit(chosen)
    if not with_tokens:
        runs[0]["notes"].append(
            "Token ids are left out to keep the page small; log-probability statistics are kept."
        )
    blocks = [_data_block("curves", {"runs": runs})]
    for run_index, sample_files in enumerate(chosen):
        for file in sample_files:
            step = read_sample_step(file, with_tokens=with_tokens)
            blocks.append(_data_block(f"samples-{run_index}-{file.step}", step))
    write_text_atomically(out, _assemble(title=" · ".join(names), data="\n".join(blocks)))
    return out


def _run_names(run_dirs: list[Path]) -> list[str]:
    """Directory names, with as many parents as it takes to tell the runs apart."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    if len(set(paths)) < len(paths):
        raise UserError("the same run directory was given twice; pass each run once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _describe_run(
    run_dir: Path, name: str, max_sample_steps: int
) -> tuple[dict[str, Any], list[SampleFile]]:
    metrics = read_metrics(run_dir)
    sample_files, sample_notes = find_sample_files(run_dir)
    all_steps = [file.step for file in sample_files]
    kept = set(spread_steps(all_steps, max_sample_steps))
    notes = metrics.notes + sample_notes
    left_out = [step for step in all_steps if step not in kept]
    if left_out:
        notes.append(
            f"Samples of {len(kept)} of {len(all_steps)} steps are in this page; "
            f"left out: {format_steps(left_out)}."
        )
    run = {
        "name": name,
        "settings": read_settings(run_dir),
        "steps": metrics.steps,
        "series": {
            key: [json_number(value) for value in values] for key, values in metrics.series.items()
        },
        "warnings": metrics.warnings,
        "learned": learned_changes(metrics),
        "notes": notes,
        "sample_steps": sorted(kept),
    }
    return run, [file for file in sample_files if file.step in kept]


def _tokens_fit(chosen: list[list[SampleFile]]) -> bool:
    sample_files = [file for run_files in chosen for file in run_files]
    return (
        sum(file.num_samples for file in sample_files) <= MAX_SAMPLES_WITH_TOKENS
        and sum(file.num_tokens for file in sample_files) <= MAX_EMBEDDED_TOKENS
    )


def _data_block(element_id: str, data: dict[str, Any]) -> str:
    """JSON as an inert script element; without `<` no text in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{element_id}">{text}</script>'


def _assemble(*, title: str, data: str) -> str:
    assets = files("lwz_trainer.view") / "assets"
    parts = {
        "title": html.escape(title),
        "style": (assets / "page.css").read_text(encoding="utf-8"),
        "data": data,
        "script": "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    return PLACEHOLDER.sub(lambda match: parts[match[1]], template)
