"""Workers that score: what they answer, and that no failure of theirs becomes a reward."""

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer, failed_parts
from lwz_trainer.rewards.shared_source import Asker
from lwz_trainer.timeline import Timeline
from lwz_trainer.train import reward_pool
from lwz_trainer.train.reward_pool import RewardPool
from tests.trainer.moody_scorer import CONFIG, MoodyScorer, SlowToStart, WithoutModel
from tests.trainer.test_interleave import MIXED, spans_of
from tests.trainer.test_train import assert_same_runs
from tests.trainer.train_case import make_run_args, read_metrics


def make_samples(mood: str) -> list[RewardSample]:
    texts = ("one two three</answer>", "one two three four five six</answer>")
    return [RewardSample(mood, (5, 20), "<answer>" + text, True) for text in texts]


def make_pool(make_scorer: Callable[[], Scorer] = MoodyScorer, **settings: Any) -> RewardPool:
    defaults: dict[str, Any] = {
        "num_workers": 1,
        "in_process": False,
        "timeout_s": 20.0,
        "start_timeout_s": 60.0,
        "should_stop": lambda: False,
    }
    return RewardPool(
        make_scorer,
        partial(failed_parts, config=CONFIG, kind="direct"),
        set(CONFIG.weights),
        Timeline(),
        **(defaults | settings),
    )


@pytest.mark.parametrize("in_process", [False, True], ids=["thread", "process"])
def test_pool_gives_the_scores_of_the_scorer(in_process: bool) -> None:
    pool = make_pool(in_process=in_process, num_workers=2)
    for number in range(5):
        pool.submit(number, make_samples("well")[: 1 + number % 2])
    found = dict(pool.drain())
    expected = Scorer(CONFIG, "direct").score_samples(make_samples("well"))
    assert found == {number: expected[: 1 + number % 2] for number in range(5)}
    assert pool.completed() == []
    assert pool.num_failures == 0
    pool.close()


@pytest.mark.parametrize(
    ("mood", "in_process", "reason"),
    [
        ("raise", False, "ValueError: no such endpoint"),
        ("garbage", False, "expected 2 scores, got '0.7'"),
        ("short", False, "expected 2 scores"),
        ("no number", False, "reward 'length' is '0.7', no number"),
        ("other rewards", False, "expected rewards"),
        ("hang", False, "no answer within 0.5 s"),
        ("raise", True, "ValueError: no such endpoint"),
        ("garbage", True, "expected 2 scores, got '0.7'"),
        ("die", True, "EOFError: the worker died (exit code 7)"),
        ("hang", True, "TimeoutError: no answer within 1 s"),
    ],
)
def test_pool_turns_every_failure_into_missing_scores(
    caplog: pytest.LogCaptureFixture, mood: str, in_process: bool, reason: str
) -> None:
    pool = make_pool(in_process=in_process, timeout_s=1.0 if in_process else 0.5)
    for number, name in enumerate(("well", mood, "well")):
        pool.submit(number, make_samples(name))
    found = dict(pool.drain())
    assert pool.num_failures == 2
    assert found[0] == found[2]  # another worker went on
    for failed, scored in zip(found[1], found[0], strict=True):
        assert all(math.isnan(value) for value in failed.rewards.values())
        assert failed.rewards.keys() == scored.rewards.keys()
        assert failed.completion == scored.completion
        assert failed.num_answer_words == scored.num_answer_words
    assert f"no scores for 2 completions of group 1: {reason}" in caplog.text
    pool.close()


def test_pool_does_not_count_the_wait_for_a_turn() -> None:
    pool = make_pool(num_workers=5, timeout_s=0.5)
    for number in range(5):  # the last waits for 0.8 s
        pool.submit(number, make_samples("slow"))
    assert len(pool.drain()) == 5
    assert pool.num_failures == 0
    pool.close()


def test_pool_goes_on_while_a_source_hangs() -> None:
    pool = make_pool(num_workers=2, timeout_s=0.3)
    for number, mood in enumerate(("hang", "well", "hang", "well", "well")):
        pool.submit(number, make_samples(mood))
    found = dict(pool.drain())
    is_missing = {n: math.isnan(parts[0].rewards["writing"]) for n, parts in found.items()}
    assert is_missing == {0: True, 1: False, 2: True, 3: False, 4: False}
    pool.close()


def test_pool_forgets_what_nobody_waits_for() -> None:
    pool = make_pool()
    for number in range(3):
        pool.submit(number, make_samples("well"))
    pool.forget()
    pool.submit(7, make_samples("well"))
    assert [number for number, _ in pool.drain()] == [7]
    pool.close()


def test_pool_waits_no_longer_when_the_run_is_to_stop() -> None:
    is_stopped = threading.Event()
    pool = make_pool(num_workers=2, should_stop=is_stopped.is_set)
    pool.submit(0, make_samples("well"))
    pool.submit(1, make_samples("hang"))
    threading.Timer(0.3, is_stopped.set).start()
    assert [number for number, _ in pool.drain()] == [0]
    pool.close()


def test_processes_that_cannot_score_are_found_before_the_run() -> None:
    with pytest.raises(UserError, match=r"^rewards\.writing\.model: there is none$"):
        make_pool(WithoutModel, in_process=True)
    assert multiprocessing.active_children() == []


def test_processes_are_not_waited_for_without_end() -> None:
    with pytest.raises(UserError, match=r"a reward worker was not ready within 0\.2 s"):
        make_pool(SlowToStart, in_process=True, num_workers=2, start_timeout_s=0.2)
    pool = make_pool(SlowToStart, in_process=True, should_stop=lambda: True)
    assert multiprocessing.active_children() == []
    pool.close()


def test_close_ends_the_workers() -> None:
    before = set(threading.enumerate())
    pool = make_pool(num_workers=3)
    pool.submit(0, make_samples("well"))
    pool.drain()
    workers = set(threading.enumerate()) - before
    assert workers
    pool.close()
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("schedule", ["sequential", "interleaved"])
def test_train_with_a_pool_is_the_same_run(tmp_path: Path, schedule: str) -> None:
    settings = MIXED | {"update.deterministic": True, "update.schedule": schedule}
    assert main(make_run_args(tmp_path, "inline", **settings)) == 0
    settings["rewards.pool.workers"] = 2
    assert main(make_run_args(tmp_path, "pool", **settings)) == 0
    assert_same_runs(tmp_path / "inline", tmp_path / "pool")


class SlowScorer(Scorer):
    """As long as a server would take."""

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        time.sleep(0.3)
        return super().score_samples(samples, asker)


def test_trace_shows_rewards_beside_the_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "Scorer", SlowScorer)
    settings = MIXED | {"num_steps": 1, "log.trace_steps": 1, "rewards.pool.workers": 2}
    settings["data.prompts_per_step"] = 12
    assert main(make_run_args(tmp_path, **settings)) == 0
    spans = spans_of(tmp_path / "run", 1)
    rewards = spans["reward 0"] + spans["reward 1"]
    assert len(rewards) == 12
    assert any(
        decode[0] < reward[1] and reward[0] < decode[1]
        for decode in spans["decode"]
        for reward in rewards
    )
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["time/reward_s"] < 12 * 0.3


class HalfFailingScorer(Scorer):
    """Every other group fails."""

    calls = 0

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        type(self).calls += 1
        if type(self).calls % 2:
            raise OSError("the server is gone")
        return super().score_samples(samples, asker)


def test_train_goes_on_with_failures_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reward_pool, "Scorer", HalfFailingScorer)
    settings = MIXED | {"num_steps": 1, "rewards.pool.workers": 1}
    assert main(make_run_args(tmp_path, "half", **settings)) == 0
    (metrics,) = read_metrics(tmp_path / "half")
    assert metrics["reward/worker_failures"] == 6
    assert metrics["reward/length_failed_frac"] == metrics["reward/format_failed_frac"] == 0.5
    assert any("reward workers failed" in text for text in metrics["warnings"])
    assert 0 <= metrics["reward/redundancy"] <= 1
    settings["rewards.max_failed_frac"] = 0.4
    capsys.readouterr()
    assert main(make_run_args(tmp_path, "stopped", **settings)) == 1
    assert "failed for 50% of 12 completions (limit 40%)" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()


class SignallingScorer(Scorer):
    """Is waited for when the run is asked to stop; the second step never ends."""

    calls = 0

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        type(self).calls += 1
        if type(self).calls > 4:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        return super().score_samples(samples, asker)


def test_train_stops_while_it_waits_for_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reward_pool, "Scorer", SignallingScorer)
    settings = MIXED | {"num_steps": 2, "rewards.pool.workers": 1, "rewards.pool.timeout_s": 50}
    began_s = time.monotonic()
    assert main(make_run_args(tmp_path, **settings)) == 0
    assert time.monotonic() - began_s < 30
    assert "stopped by SIGTERM after step 1" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "run")) == 1
