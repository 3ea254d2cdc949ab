"""The benchmarks' own files, from the directory that LWZ_BENCHMARKS names, with a judge by rule."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.config.evaluation import EloConfig
from lwz_trainer.evaluation.items import Benchmark, Item, Requirement, load_items, load_requirement
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.judging import JudgeCall, judge_all, judge_calls
from lwz_trainer.evaluation.outcome import evaluate
from tests.trainer.evaluation_case import StubJudge, quality_reply


def public_file(name: str) -> Path:
    path = Path(os.environ.get("LWZ_BENCHMARKS", "")) / name
    if not os.environ.get("LWZ_BENCHMARKS") or not path.exists():
        pytest.skip(f"LWZ_BENCHMARKS names no directory with {name}")
    return path


def scores_of(
    benchmark: Benchmark,
    items: list[Item],
    answers: dict[int, str],
    reply: Callable[[JudgeCall], str | None],
    journal: Path,
    requirements: tuple[Requirement, ...] = (),
) -> dict[str, Any]:
    calls = judge_calls(benchmark, items, {"a": answers})
    judged = judge_all(calls, StubJudge(reply), Journal(journal), lambda done, total: None)
    outcome = evaluate(
        benchmark,
        items,
        {"a": answers},
        judged.judgments,
        requirements=requirements,
        baseline_texts=None,
        elo=EloConfig(),
    )
    return outcome.scores["a"]


def places(items: list[Item]) -> dict[tuple[int, str], int]:
    """A criterion's place in its checklist, from 1."""
    return {
        (item.index, criterion.name): place
        for item in items
        for place, criterion in enumerate(item.criteria, start=1)
    }


def test_all_of_writingbench_aggregates_to_hand_computed_figures(tmp_path: Path) -> None:
    items = load_items("writingbench", public_file("benchmark_all.jsonl"))
    assert len(items) == 1000
    answers = {item.index: f"Piece {item.index}." for item in items}
    place_of = places(items)
    # A criterion scores its place, but for the first query's first one, which is missing.
    first = (items[0].index, items[0].criteria[0].name)

    def by_place(call: JudgeCall) -> str | None:
        key = (call.index, call.part)
        return None if key == first else json.dumps({"score": place_of[key]})

    scores = scores_of("writingbench", items, answers, by_place, tmp_path / "j.jsonl")
    assert scores["overall"] == pytest.approx((1000 * 15 - 1) / 4999)
    assert (scores["num_scores"], scores["num_missing"]) == (4999, 1)
    # Every query's mean is 3, the first one's (2 + 3 + 4 + 5)/4 = 3.5.
    domain_size = sum(item.group == items[0].group for item in items)
    assert scores["domains"][items[0].group] == pytest.approx(3 + 0.5 / domain_size)
    assert sum(math.isclose(mean, 3) for mean in scores["domains"].values()) == 5
    assert len(scores["subdomains"]) == 100


def test_writingbenchs_length_requirement_aggregates_to_hand_computed_figures(
    tmp_path: Path,
) -> None:
    subset = public_file("writingbench_length_100.jsonl")
    twin = public_file("writingbench_length_C_100.jsonl")
    items = load_items("writingbench", subset)
    requirement = load_requirement("length", subset, twin, items)
    assert len(items) == len(requirement.indices) == 100
    place_of = places(items)
    scores = scores_of(
        "writingbench",
        items,
        {item.index: "Piece." for item in items},
        lambda call: json.dumps({"score": place_of[call.index, call.part]}),
        tmp_path / "j.jsonl",
        (requirement,),
    )
    # From the twin's own lines: the places of the criteria that it keeps.
    kept = [
        place_of[record["index"], criterion["name"]]
        for record in map(json.loads, twin.read_text(encoding="utf-8").splitlines())
        for criterion in record["checklist"]
    ]
    assert 0 < len(kept) < 500
    assert scores["requirements"]["length"] == pytest.approx((3.0, sum(kept) / len(kept)))


def test_longbench_write_aggregates_to_hand_computed_figures(tmp_path: Path) -> None:
    items = load_items("longbench-write", public_file("longbench_write_en.jsonl"))
    assert len(items) == 60
    # The first half is as long as it should be, the others twice as long.
    answers = {
        item.index: "word " * ((1 + (item.index >= 30)) * (item.target or 0)) for item in items
    }
    scores = scores_of(
        "longbench-write",
        items,
        answers,
        lambda call: quality_reply(5, 5, 5, 5, 5, 3) if call.index % 2 else None,
        tmp_path / "j.jsonl",
    )
    assert scores["length"] == pytest.approx((30 * 100 + 30 * 200 / 3) / 60)
    assert scores["quality"] == pytest.approx((5 * 100 + 50) / 6)
    assert scores["dimensions"]["reading_experience"] == 50
    assert scores["num_missing"] == 30
    assert sum(answers for _, _, answers in scores["bands"].values()) == 60
