"""What shows the result of a reproduction, in one folder that is small enough to be committed."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from bench import report
from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.evaluation import EvalConfig
from lwz_trainer.evaluation.run import run_evaluation
from lwz_trainer.view.metrics import learned_changes, read_metrics
from lwz_trainer.view.page import write_page

__all__ = ["difference", "publish"]

COMPARED = (
    ("rl_think", "pretrained_think"),
    ("rl_direct", "pretrained_direct"),
    ("sft", "pretrained_direct"),
    ("rl_think", "sft"),
    ("rl_direct", "sft"),
)
TRAINED = ("pretrain", "sft", "reward_model", "rl_think", "rl_direct")
PAGES = {
    "pretraining.html": ("pretrain", "sft"),
    "reward_model.html": ("reward_model",),
    "rl.html": ("rl_think", "rl_direct"),
}
MAX_SAMPLE_STEPS = 4
MAX_BYTES = 3 * 2**20
NUM_RESAMPLES = 10_000

NOT_SHOWN = """
## What this does not show

- Requests are LongBench-Write's English ones with 30 to 100 words asked for instead of 100 to
  12,000: nothing here is about long text.
- Nobody judged the answers: S_l is about the number of words, not about quality.
- The reward model has seen real speeches against shuffled, repeated and cut-off copies of them. It
  tells these apart and knows nothing else about writing.
- SFT learns from speeches of plays, whose requests are unlike the benchmark's; RL trains on short
  writing requests that are more like it, with a reward for the number of words. The comparison is
  of the two ways as they are used here, not of algorithms on equal data.
- One seed. Intervals are 95%, by a bootstrap over requests: they say nothing about other seeds.
"""


def publish(out: Path, target: Path, *, systems: Sequence[str], num_requests: int) -> None:
    """Replaces `target` by a summary, curves, tables, metrics and answers of a finished run.

    Requests of the benchmark are left out, as they are not ours.

    Args:
        out: where all stages have left their results, relative to the working directory.
        target: a folder that is not there, or that an earlier call has written.
        systems: names of what was evaluated, in the order of the tables.
        num_requests: as many were evaluated; 0 is all.

    Raises:
        SystemExit: `target` is something else, or the result is above 3 MiB.
    """
    if target.exists() and not (target / "summary.json").is_file():
        raise SystemExit(f"{target} was not written by this program: pass another folder")
    commit = report.commit()  # before the tree is changed below
    shutil.rmtree(target, ignore_errors=True)
    for name in TRAINED:
        _copy_run(out / name, target / name)
    for page, names in PAGES.items():
        write_page([out / n for n in names], target / page, max_sample_steps=MAX_SAMPLE_STEPS)
    responses = {name: out / f"evaluate_{name}" / "responses" / f"{name}.jsonl" for name in systems}
    run_evaluation(
        "longbench-write",
        EvalConfig(
            data=str(out / "requests.jsonl"),
            output_dir=str(target / "evaluation"),
            responses=tuple(f"{name}={path}" for name, path in responses.items()),
            limit=num_requests,
            page_items=0,
        ),
    )
    (target / "evaluation" / "responses").mkdir()
    for path in responses.values():
        shutil.copy(path, target / "evaluation" / "responses")
    summary = _summary(out, target / "evaluation", systems, commit)
    write_text_atomically(target / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text_atomically(target / "README.md", _readme(summary))
    _name_no_folders(target, out)
    num_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"{target} has {num_bytes} bytes, expected at most {MAX_BYTES}")


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first − second, request by request, and its 95% interval by a bootstrap."""
    return _interval(np.asarray(first) - np.asarray(second))


def _interval(values_N: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the 95% interval by a bootstrap over the values."""
    drawn = np.random.default_rng(0).integers(len(values_N), size=(NUM_RESAMPLES, len(values_N)))
    low, high = np.quantile(values_N[drawn].mean(axis=1), [0.025, 0.975])
    return float(values_N.mean()), float(low), float(high)


def _copy_run(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "report.json", "report.md"):
        if (source / name).is_file():
            shutil.copy(source / name, target)


def _name_no_folders(target: Path, out: Path) -> None:
    """Takes this machine's folders out of all files: what is outside the checkout is absolute."""
    model = json.loads((out / "settings.json").read_text(encoding="utf-8"))["model"]
    folders = [folder for folder in (target, out, Path(model)) if folder.is_absolute()]
    for path in target.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            for folder in folders:
                text = text.replace(str(folder), folder.name)
            write_text_atomically(path, text)


def _summary(out: Path, evaluation: Path, systems: Sequence[str], commit: str) -> dict[str, Any]:
    results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    # Per request: words, S_l, and S_q, which nobody has given.
    items = {name: results["scores"][name]["items"] for name in systems}
    scores = {name: [row[1] for row in items[name].values()] for name in systems}
    with (evaluation / "tables" / "signs.csv").open(encoding="utf-8") as file:
        signs = {row["system"]: row for row in csv.DictReader(file)}
    reward_model = json.loads((out / "reward_model" / "report.json").read_text(encoding="utf-8"))
    pretraining = _records(out / "pretrain")
    held_out = [row["held_out/plays_loss"] for row in pretraining if "held_out/plays_loss" in row]
    seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
    return {
        "num_requests": len(scores["sft"]),
        "systems": {
            name: {
                "length_score": _interval(np.asarray(scores[name])),
                "mean_words": fmean(row[0] for row in items[name].values()),
                "in_range_frac": _number(signs[name]["in range"]),
                "redundancy": _number(signs[name]["redundancy"]),
                "num_empty": int(signs[name]["empty"]),
            }
            for name in systems
        },
        "differences": [
            {"first": a, "second": b, "length_score": difference(scores[a], scores[b])}
            for a, b in COMPARED
        ],
        "rl": {name: _changes(out / name) for name in ("rl_think", "rl_direct")},
        "reward_model": {
            name: reward_model[name]
            for name in (
                "num_pairs",
                "accuracy",
                "accuracy_matched_length",
                "num_matched_length",
                "longer_is_better_accuracy",
            )
        },
        "pretraining": {"held_out_loss_before": held_out[0], "held_out_loss_after": held_out[-1]},
        "seconds": seconds,
        "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
        "machine": report.machine("cpu", torch.get_num_threads()) | {"commit": commit},
    }


def _changes(run_dir: Path) -> dict[str, tuple[float, float]]:
    """Mean of the first and of the last steps of each reward, and of the words of the answer."""
    names = ("reward/length", "reward/format", "reward/writing", "words/answer_mean")
    changes = {change["key"]: change for change in learned_changes(read_metrics(run_dir))}
    return {name: (changes[name]["first"], changes[name]["last"]) for name in names}


def _number(cell: str) -> float | None:
    """A cell of a CSV table, which is empty where there is nothing."""
    return float(cell) if cell else None


def _records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _readme(summary: Mapping[str, Any]) -> str:
    machine, settings = summary["machine"], summary["settings"]
    reward_model, pretraining = summary["reward_model"], summary["pretraining"]
    minutes = sum(summary["seconds"].values()) / 60
    lines = [
        "# The small reproduction",
        "",
        f"`make reproduce-small` with `{settings['model']}`: {settings['pretrain_steps']} steps of "
        f"pretraining on plays, {settings['sft_steps']} steps of SFT, a reward model from "
        f"{settings['num_pairs']} pairs, {settings['rl_steps']} steps of RL with and without "
        f"thinking, {summary['num_requests']} requests. {minutes:.0f} minutes on "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}.",
        "",
        "## Length score",
        "",
        "S_l of LongBench-Write, 0 to 100: 100 where the answer has the words that are asked for. "
        "In range: ±10%.",
        "",
        "| system | S_l | 95% interval | words | in range | redundancy | no answer |",
        "|---|---|---|---|---|---|---|",
        *(_system_row(name, row) for name, row in summary["systems"].items()),
        "",
        *(_comparison(entry) for entry in summary["differences"]),
        "",
        "## RL",
        "",
        "Means of the first and the last steps, five of each where there are ten or more.",
        "",
        "| run | length | format | writing | words of the answer |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {' | '.join(f'{a:.2f} → {b:.2f}' for a, b in changes.values())} |"
            for name, changes in summary["rl"].items()
        ),
        "",
        "## Reward model and pretraining",
        "",
        f"On {reward_model['num_pairs']} held-out pairs the reward model is right in "
        f"{_share(reward_model['accuracy'])}, at matched length in "
        f"{_share(reward_model['accuracy_matched_length'])} of "
        f"{reward_model['num_matched_length']}; “the longer is better” in "
        f"{_share(reward_model['longer_is_better_accuracy'])}.",
        "",
        f"Loss on held-out plays: {pretraining['held_out_loss_before']:.3f} before pretraining, "
        f"{pretraining['held_out_loss_after']:.3f} after it.",
        "",
        "## Seconds",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {stage} | {value:.0f} |" for stage, value in summary["seconds"].items()),
        NOT_SHOWN,
        "## Files",
        "",
        "`rl.html`, `pretraining.html`, `reward_model.html`: curves, and samples of RL. "
        "`evaluation/`: tables, report and answers. A folder for each training run holds its "
        "settings and metrics; `summary.json` has the figures of this page.",
        "",
    ]
    return "\n".join(lines)


def _system_row(name: str, row: Mapping[str, Any]) -> str:
    mean, low, high = row["length_score"]
    return (
        f"| {name} | {mean:.1f} | {low:.1f} to {high:.1f} | {row['mean_words']:.0f} | "
        f"{_share(row['in_range_frac'])} | {_share(row['redundancy'])} | {row['num_empty']} |"
    )


def _comparison(entry: Mapping[str, Any]) -> str:
    mean, low, high = entry["length_score"]
    if low > 0:
        verdict = f"{entry['first']} is better than {entry['second']}"
    elif high < 0:
        verdict = f"{entry['first']} is worse than {entry['second']}"
    else:
        verdict = f"{entry['first']} and {entry['second']} are not told apart"
    return f"- {verdict}: {mean:+.1f} ({low:+.1f} to {high:+.1f}) points of S_l."


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
