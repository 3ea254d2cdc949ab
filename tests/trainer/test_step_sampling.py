"""Groups that are replaced, dropped, or penalised for their length."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.config.rewards import OverlongRewardConfig, RewardsConfig
from lwz_trainer.data.prompts import replacement_index
from lwz_trainer.rewards.overlong import overlong_reward
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer
from lwz_trainer.rewards.shared_source import Asker
from lwz_trainer.train import reward_pool
from tests.trainer.test_interleave import MIXED
from tests.trainer.test_train import assert_same_runs
from tests.trainer.train_case import make_run_args, read_metrics


def samples_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run_dir / "samples" / f"step_{step:06d}.parquet").to_pylist()


class LevelScorer(Scorer):
    """All completions of a prompt with an even number of words are worth the same."""

    def is_level(self, sample: RewardSample) -> bool:
        return int(sample.prompt.split()[1]) % 2 == 0

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        parts = super().score_samples(samples, asker)
        for sample, part in zip(samples, parts, strict=True):
            value = 0.5 if self.is_level(sample) else float(len(sample.completion))
            part.rewards.update(dict.fromkeys(part.rewards, value))
        return parts


class AllLevelScorer(LevelScorer):
    """Nothing has spread."""

    def is_level(self, sample: RewardSample) -> bool:
        return True


# Prompts ask for 3 to 9 words: three of the seven numbers are even.
LEVEL = MIXED | {"data.prompts_per_step": 3, "num_steps": 2, "update.deterministic": True}


def test_groups_without_spread_are_replaced_in_both_schedules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "Scorer", LevelScorer)
    assert main(make_run_args(tmp_path, "kept", **LEVEL)) == 0
    settings = LEVEL | {"rollout.max_replacements": 3}
    for schedule in ("sequential", "interleaved"):
        arguments = make_run_args(tmp_path, schedule, **settings, **{"update.schedule": schedule})
        assert main(arguments) == 0
    assert_same_runs(tmp_path / "sequential", tmp_path / "interleaved")
    kept, replaced = (read_metrics(tmp_path / name) for name in ("kept", "sequential"))
    assert sum(record["rollout/replaced_groups"] for record in replaced) >= 2
    assert sum(r["zero_spread_frac"] for r in replaced) < sum(r["zero_spread_frac"] for r in kept)
    for step in (1, 2):
        rows = samples_of(tmp_path / "sequential", step)
        assert [(row["group"], row["member"]) for row in rows] == [
            (group, member) for group in range(3) for member in range(3)
        ]
        was_level = {
            row["group"]: int(row["prompt"].split()[1]) % 2 == 0
            for row in samples_of(tmp_path / "kept", step)
        }
        old = {row["group"]: row["prompt"] for row in samples_of(tmp_path / "kept", step)}
        for row in rows:
            assert (row["prompt"] == old[row["group"]]) == (not was_level[row["group"]])


def test_replacing_ends_after_so_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "Scorer", AllLevelScorer)
    settings = LEVEL | {"num_steps": 1, "rollout.max_replacements": 2}
    for schedule in ("sequential", "interleaved"):
        name = f"level_{schedule}"
        arguments = make_run_args(tmp_path, name, **settings, **{"update.schedule": schedule})
        assert main(arguments) == 0
        (metrics,) = read_metrics(tmp_path / name)
        assert metrics["rollout/replaced_groups"] == 2 * 3
        assert metrics["zero_spread_frac"] == 1
        rows = samples_of(tmp_path / name, 1)
        assert len({tuple(row["completion_ids"]) for row in rows}) == len(rows) == 9


def test_replacement_index_avoids_the_prompts_of_the_step() -> None:
    taken = {0, 2, 5}
    found = {
        (step, group, attempt): replacement_index(
            7, 3, step=step, group=group, attempt=attempt, taken=taken
        )
        for step in range(6)
        for group in range(3)
        for attempt in (1, 2)
    }
    assert set(found.values()) == {1, 3, 4, 6}
    again = replacement_index(7, 3, step=4, group=1, attempt=2, taken=taken)
    assert again == found[4, 1, 2]
    assert replacement_index(2, 3, step=0, group=0, attempt=1, taken={0, 1}) in (0, 1)


def test_enough_groups_end_the_rollout_and_the_others_are_dropped(tmp_path: Path) -> None:
    settings = MIXED | {"num_steps": 1, "update.deterministic": True}
    assert main(make_run_args(tmp_path, "whole", **settings)) == 0
    settings["rollout.enough_groups_frac"] = 0.5
    for schedule in ("sequential", "interleaved"):
        arguments = make_run_args(tmp_path, schedule, **settings, **{"update.schedule": schedule})
        assert main(arguments) == 0
    assert_same_runs(tmp_path / "sequential", tmp_path / "interleaved")
    whole = {
        (row["group"], row["member"]): row["completion_ids"]
        for row in samples_of(tmp_path / "whole", 1)
    }
    rows = samples_of(tmp_path / "sequential", 1)
    (metrics,) = read_metrics(tmp_path / "sequential")
    assert 2 <= 4 - metrics["rollout/dropped_groups"] < 4
    assert len(rows) == 3 * (4 - metrics["rollout/dropped_groups"])
    for row in rows:
        assert row["completion_ids"] == whole[row["group"], row["member"]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rollout.enough_groups_frac": 0.0}, r"must be in \(0, 1\]"),
        (
            {"rollout.enough_groups_frac": 0.5, "rollout.max_replacements": 1},
            "set one of them",
        ),
        ({"rollout.max_replacements": -1}, "must be at least 0"),
        ({"rewards.overlong.weight": 1}, "buffer_tokens must be at least 1"),
        ({"rewards.pool.workers": -1}, "must be at least 0"),
        ({"rewards.pool.timeout_s": 0}, "must be above 0"),
    ],
)
def test_settings_of_the_rollout_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    capsys.readouterr()
    assert main(make_run_args(tmp_path, **settings)) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)],
)
def test_overlong_reward_is_the_formula(num_tokens: int, expected: float) -> None:
    assert overlong_reward(num_tokens, max_tokens=100, buffer_tokens=20) == pytest.approx(expected)
    assert overlong_reward(num_tokens, max_tokens=100, buffer_tokens=0) == 0


def test_score_samples_penalises_length_where_asked() -> None:
    config = RewardsConfig(overlong=OverlongRewardConfig(weight=0.5, buffer_tokens=20))
    samples = [RewardSample("x", (1, 5), "<answer>a b", True, tokens) for tokens in (10, 95)]
    parts = Scorer(config, "direct", max_completion_tokens=100).score_samples(samples)
    assert [part.rewards["overlong"] for part in parts] == [0.0, -0.75]
    assert parts[0].rewards["length"] == parts[1].rewards["length"]


def test_train_with_the_overlong_penalty_learns_from_it(tmp_path: Path) -> None:
    settings = MIXED | {"num_steps": 1, "rewards.overlong.weight": 1}
    settings["rewards.overlong.buffer_tokens"] = 40
    assert main(make_run_args(tmp_path, **settings)) == 0
    rows = samples_of(tmp_path / "run", 1)
    for row in rows:
        assert row["reward_overlong"] == overlong_reward(
            row["num_completion_tokens"], max_tokens=48, buffer_tokens=40
        )
    assert any(row["weighted_overlong"] < 0 for row in rows)
