"""Numbers of a step, its warnings, and where they are sent."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.config.sections import LogConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.train.console import learned_line, step_line
from lwz_trainer.train.metrics import sample_metrics, step_warnings
from lwz_trainer.train.recorder import Recorder


def make_record(group: int, member: int, **changes: Any) -> dict[str, Any]:
    return {
        "group": group,
        "member": member,
        "reward_length": 0.5,
        "structure": 1.0,
        "redundancy": 0.0,
        "num_completion_tokens": 10,
        "truncated": False,
        "words_answer": 6,
        "words_think": 2,
        "advantage": 0.5,
        "completion_ids": [group, member],
    } | changes


def test_sample_metrics_leaves_missing_rewards_out() -> None:
    metrics = sample_metrics(
        [make_record(0, 0, reward_length=math.nan), make_record(0, 1, reward_length=0.2)]
    )
    assert metrics["reward/length"] == pytest.approx(0.2)


def test_sample_metrics_counts_truncation_spread_and_copies() -> None:
    records = [
        make_record(0, 0, truncated=True, num_completion_tokens=30),
        make_record(0, 1),
        make_record(1, 0, advantage=0.0),
        make_record(1, 1, advantage=0.0, completion_ids=[1, 0]),
    ]
    metrics = sample_metrics(records)
    assert metrics["truncated_frac"] == 0.25
    assert metrics["tokens/completion_mean_untruncated"] == 10
    assert metrics["zero_spread_frac"] == 0.5
    assert metrics["distinct_frac"] == 0.75


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("truncated_frac", 1.0, "every completion was truncated"),
        ("zero_spread_frac", 0.75, "no spread"),
        ("clip_frac_low", 0.4, "clipped below"),
        ("clip_frac_high", 0.4, "clipped above"),
        ("sampler/prob_diff_mean", 0.02, "disagree"),
        ("distinct_frac", 0.9, "identical"),
    ],
)
def test_step_warnings_names_what_is_wrong(name: str, value: float, expected: str) -> None:
    healthy = {"truncated_frac": 0.3, "distinct_frac": 1.0, "zero_spread_frac": 0.5}
    assert step_warnings(healthy, truncates_sampling=False) == []
    (warning,) = step_warnings(healthy | {name: value}, truncates_sampling=False)
    assert expected in warning


def test_step_warnings_expects_truncated_sampling_to_differ() -> None:
    metrics = {"distinct_frac": 1.0, "sampler/prob_diff_mean": 0.3}
    assert step_warnings(metrics, truncates_sampling=True) == []


def test_recorder_goes_on_with_the_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    module = types.ModuleType("wandb")
    module.init = lambda **settings: opened.append(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = TrainConfig(log=LogConfig(tensorboard=False, wandb="project"))
    for name in ("run", "run", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        Recorder(config, tmp_path / name, num_steps_done=0)
    ids = [settings["id"] for settings in opened]
    assert ids[0] == ids[1] != ids[2]
    assert {settings["resume"] for settings in opened} == {"allow"}


def test_recorder_sends_finite_numbers_to_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init = lambda **settings: types.SimpleNamespace(  # type: ignore[attr-defined]
            log=lambda numbers, step: sent.append(("wandb", step, numbers)), finish=lambda: None
        )
        module.log = lambda numbers, step: sent.append(  # type: ignore[attr-defined]
            ("trackio", step, numbers)
        )
        module.finish = lambda: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    config = TrainConfig(log=LogConfig(tensorboard=False, wandb="project", trackio="project"))
    recorder = Recorder(config, tmp_path, num_steps_done=0)
    recorder.write({"step": 1, "loss": 0.5, "reward/length": math.nan, "warnings": ["w"]})
    recorder.close()
    assert sent == [("wandb", 1, {"loss": 0.5}), ("trackio", 1, {"loss": 0.5})]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1,
        "loss": 0.5,
        "reward/length": None,
        "warnings": ["w"],
    }


def test_learned_line_compares_first_and_last_steps() -> None:
    history = [{"step": step, "reward/length": step / 10} for step in range(1, 11)]
    line = learned_line(history, Path("runs/x"))
    assert "length 0.30 → 0.80" in line
    assert "10 steps (means of the first and last 5)" in line


def test_step_line_shows_missing_rewards_and_warnings() -> None:
    metrics = sample_metrics([make_record(0, 0, reward_length=math.nan)]) | {
        "step": 3,
        "time/step_s": 2.0,
        "time/rollout_s": 1.0,
        "time/update_s": 1.0,
        "warnings": ["something"],
    }
    first, second = step_line(metrics, 10).splitlines()
    assert "length n/a" in first
    assert "step  3/10" in first
    assert second.strip() == "warning: something"
