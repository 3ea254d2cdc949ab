"""References of rising quality, and prompts that carry them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.rewards import RewardsConfig, WritingRewardConfig
from lwz_trainer.data.prompts import Prompt, load_prompts
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.references import ReferenceSchedule, start_references

PROMPTS = [
    Prompt("a", None, "en", 1, references=("poor", "fair", "good")),
    Prompt("b", None, "en", 2, references=("only",)),
    Prompt("c", None, "en", 3),
]


def test_reference_schedule_goes_on_when_the_reference_is_beaten() -> None:
    schedule = ReferenceSchedule(PROMPTS, advance_above=0.5)
    assert [schedule.current(name) for name in "abc"] == ["poor", "only", ""]
    schedule.advance(["a", "a", "b", "c"], [0.5, 0.5, 1.0, 1.0])
    assert [schedule.current(name) for name in "abc"] == ["poor", "only", ""]
    schedule.advance(["a", "b", "a", "a"], [1.0, 1.0, 0.5, math.nan])
    assert [schedule.current(name) for name in "abc"] == ["fair", "only", ""]
    assert schedule.mean_level == 0.5
    schedule.advance(["a"], [math.nan])
    schedule.advance(["a"], [1.0])
    schedule.advance(["a"], [1.0])
    assert schedule.current("a") == "good"  # there is no better one


def test_reference_schedule_is_restored() -> None:
    schedule = ReferenceSchedule(PROMPTS, advance_above=0.5)
    schedule.advance(["a"], [1.0])
    other = ReferenceSchedule(PROMPTS, advance_above=0.5)
    other.restore(json.loads(json.dumps(schedule.levels)))
    assert other.current("a") == "fair"
    other.restore({"a": 9, "gone": 1})
    assert other.current("a") == "good"
    assert other.levels == {"a": 2}


@pytest.mark.parametrize("source", ["checklist", "references"])
def test_start_references_needs_prompts_that_have_what_is_asked_for(source: Any) -> None:
    endpoint = EndpointConfig(base_url="http://localhost:1/v1", model="judge")
    section = WritingRewardConfig(weight=1.0, source=source, endpoint=endpoint)
    with pytest.raises(UserError, match=f"no prompt has {source}"):
        start_references(RewardsConfig(writing=section), PROMPTS[2:])


def test_prompts_carry_checklists_and_references(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "a", "checklist": ["names the sea"], "references": ["poor", "good"]},
        {"prompt": "b", "length_range": [10, 20], "checklist": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = load_prompts(str(path))
    assert first.checklist == ("names the sea",)
    assert first.references == ("poor", "good")
    assert second.checklist == second.references == ()


@pytest.mark.parametrize("value", ["text", [1], ["good", " "], {"a": 1}])
def test_prompts_refuse_a_checklist_that_is_none(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "checklist": value}))
    with pytest.raises(UserError, match="line 1: checklist must be a list of texts"):
        load_prompts(str(path))
