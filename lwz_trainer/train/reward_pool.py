"""Rewards beside the decode: groups are scored by workers while others are being written.

A worker is a thread, or a process of its own with its own copy of the reward models. One that hangs
is given up (a thread is left behind, a process is killed) and another takes its place; one that
dies or answers something that is no score is asked no more for that group. Either way the group's
scores are missing (NaN), never 0, and counted.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer, failed_parts
from lwz_trainer.rewards.shared_source import Asker
from lwz_trainer.timeline import Timeline
from lwz_trainer.train.scorer_process import (
    SampleScorer,
    ScorerError,
    ScorerProcess,
    start_processes,
)

__all__ = ["InlineScoring", "RewardPool", "Scoring", "make_scoring"]

_logger = logging.getLogger(__name__)

Scored = list[tuple[int, list[RewardParts]]]


class Scoring(Protocol):
    """Scores groups, named by their numbers."""

    num_failures: int
    """Completions whose worker failed, so far."""

    def submit(self, number: int, samples: list[RewardSample]) -> None: ...

    def completed(self) -> Scored:
        """What is scored by now; does not wait."""
        ...

    def drain(self) -> Scored:
        """Everything else that was submitted; waits for it, unless the run is asked to stop."""
        ...

    def forget(self) -> None:
        """Drops what was submitted and not handed out."""
        ...

    def close(self) -> None: ...


def make_scoring(
    config: TrainConfig,
    kind: Literal["think", "direct"],
    device: torch.device,
    timeline: Timeline,
    should_stop: Callable[[], bool],
) -> Scoring:
    """What the configuration asks for.

    Args:
        config: of the run.
        kind: which form the template asks for.
        device: of reward models in this process; those of worker processes run on the CPU.
        timeline: notes when.
        should_stop: workers are waited for no longer.

    Raises:
        UserError: a model, function or key is not there, or a worker process does not start.
    """
    pool, limit = config.rewards.pool, config.rollout.max_completion_tokens
    cache_path = Path(config.output_dir) / "reward_answers.sqlite"
    if pool.workers == 0:
        scorer = Scorer(config.rewards, kind, device, limit, cache_path)
        return InlineScoring(scorer, timeline, by_group=config.update.packs_by_group)
    in_process = pool.kind == "process"
    place = "cpu" if in_process else str(device)
    return RewardPool(
        partial(Scorer, config.rewards, kind, place, limit, cache_path),
        partial(failed_parts, config=config.rewards, kind=kind),
        set(config.rewards.weights),
        timeline,
        num_workers=pool.workers,
        in_process=in_process,
        timeout_s=pool.timeout_s,
        start_timeout_s=pool.start_timeout_s,
        should_stop=should_stop,
    )


class InlineScoring:
    """Scores in the caller's thread.

    Args:
        scorer: scores samples.
        timeline: notes when.
        by_group: score each group on its own as soon as `completed` is called; else all that were
            submitted together, in `drain`.
    """

    def __init__(self, scorer: SampleScorer, timeline: Timeline, *, by_group: bool) -> None:
        self.num_failures = 0
        self._scorer = scorer
        self._timeline = timeline
        self._by_group = by_group
        self._waiting: list[tuple[int, list[RewardSample]]] = []

    def submit(self, number: int, samples: list[RewardSample]) -> None:
        """Keeps a group until it is asked for."""
        self._waiting.append((number, samples))

    def completed(self) -> Scored:
        """All groups so far, or none where they are scored together."""
        return self.drain() if self._by_group else []

    def drain(self) -> Scored:
        """Scores everything that waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        parts = (
            [self._score(samples) for _, samples in waiting]
            if self._by_group
            else _split(self._score([s for _, samples in waiting for s in samples]), waiting)
        )
        return [(number, part) for (number, _), part in zip(waiting, parts, strict=True)]

    def forget(self) -> None:
        """Drops what waits."""
        self._waiting.clear()

    def close(self) -> None:
        """Ends the scorer's connections."""
        self._scorer.close()

    def _score(self, samples: list[RewardSample]) -> list[RewardParts]:
        with self._timeline.span("reward", "score", completions=len(samples)):
            return self._scorer.score_samples(samples)


def _split(
    parts: list[RewardParts], waiting: list[tuple[int, list[RewardSample]]]
) -> list[list[RewardParts]]:
    found, start = [], 0
    for _, samples in waiting:
        found.append(parts[start : start + len(samples)])
        start += len(samples)
    return found


@dataclass(eq=False)
class _Task:
    """A group that is being scored, or waits for a worker."""

    number: int
    samples: list[RewardSample]
    asker: Asker = field(default_factory=Asker)
    """Starts when a worker takes it; given up when it takes too long."""
    parts: list[RewardParts] | None = None
    failure: str = ""
    is_forgotten: bool = False
    """Nobody waits for it."""

    @property
    def is_over(self) -> bool:
        return self.parts is not None or self.failure != ""


class RewardPool:
    """Workers that score one group each at a time.

    Args:
        make_scorer: makes the scorer, once for all threads or in each process; to be pickled there.
        failed_parts: samples to what is known of them without a score, their rewards NaN.
        names: of the rewards that an answer must have.
        timeline: notes when; each worker has a track.
        num_workers: at least 1.
        in_process: processes instead of threads.
        timeout_s: a group without scores after this long has failed.
        start_timeout_s: a process that has not made its scorer after this long has failed.
        should_stop: nobody waits any longer for what is not scored.

    Raises:
        UserError: a process did not start.
    """

    def __init__(
        self,
        make_scorer: Callable[[], SampleScorer],
        failed_parts: Callable[[list[RewardSample]], list[RewardParts]],
        names: set[str],
        timeline: Timeline,
        *,
        num_workers: int,
        in_process: bool,
        timeout_s: float,
        start_timeout_s: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self.num_failures = 0
        self._make_scorer = make_scorer
        self._failed_parts = failed_parts
        self._names = names
        self._timeline = timeline
        self._in_process = in_process
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._should_stop = should_stop
        self._scorer = None if in_process else make_scorer()
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._tasks: list[_Task] = []
        self._changed = threading.Condition()
        self._num_workers = num_workers
        processes: list[ScorerProcess] = []
        if in_process:
            try:
                processes = self._start_processes(num_workers)
            except ScorerError as error:
                if not should_stop():
                    raise UserError(str(error).splitlines()[0]) from error
        for index in range(num_workers):
            self._start_worker(index, processes.pop() if processes else None)

    def submit(self, number: int, samples: list[RewardSample]) -> None:
        """Hands a group to the next free worker."""
        task = _Task(number, samples)
        self._tasks.append(task)
        self._queue.put(task)

    def completed(self) -> Scored:
        """What the workers have done by now."""
        with self._changed:
            self._give_up_late_ones()
            ended = [task for task in self._tasks if task.is_over]
            self._tasks = [task for task in self._tasks if not task.is_over]
        return [(task.number, self._parts_of(task)) for task in ended]

    def drain(self) -> Scored:
        """Waits for everything that was submitted, unless the run is asked to stop."""
        found = self.completed()
        while self._tasks and not self._should_stop():
            with self._changed:
                self._changed.wait(timeout=min(0.05, self._timeout_s))
            found += self.completed()
        return found

    def forget(self) -> None:
        """Drops what was submitted; answers to it are thrown away."""
        with self._changed:
            for task in self._tasks:
                task.is_forgotten = True
            self._tasks = []

    def close(self) -> None:
        """Lets the workers end; those that hang are not waited for."""
        for _ in range(self._num_workers):
            self._queue.put(None)

    def _start_processes(self, count: int) -> list[ScorerProcess]:
        return start_processes(
            self._make_scorer,
            count,
            timeout_s=self._start_timeout_s,
            should_stop=self._should_stop,
        )

    def _start_worker(self, index: int, process: ScorerProcess | None = None) -> None:
        name = f"reward {index}"  # also its track
        arguments = (name, process)
        threading.Thread(target=self._work, args=arguments, name=name, daemon=True).start()

    def _work(self, track: str, process: ScorerProcess | None) -> None:
        """A worker's thread; it holds the process, where there is one, and starts the next."""
        while (task := self._queue.get()) is not None:
            if task.is_forgotten:
                continue
            failure, parts = "", None
            began_s = time.perf_counter()
            try:
                if self._in_process and process is None:
                    (process,) = self._start_processes(1)
                task.asker.start()
                if process is not None:
                    parts = process.score(task.samples, self._timeout_s)
                elif self._scorer is not None:
                    parts = self._scorer.score_samples(task.samples, task.asker)
                failure = self._what_is_wrong(parts, len(task.samples))
            except ScorerError as error:
                failure = str(error).splitlines()[0]
            except Exception as error:  # a reward may raise anything; the run must not end by it
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
                if process is not None:
                    process.kill()
                    process = None
            ended_s = time.perf_counter()
            details = {"group": task.number, "completions": len(task.samples)}
            self._timeline.add(track, "score", began_s, ended_s, **details)
            with self._changed:
                if task.asker.is_given_up:  # another worker has taken this one's place
                    break
                task.parts, task.failure = (None, failure) if failure else (parts, "")
                self._changed.notify_all()
        if process is not None:
            process.kill()

    def _give_up_late_ones(self) -> None:
        """A process is killed by its own thread; a thread that hangs is replaced, and so is the
        source that it holds."""
        limit_s = self._timeout_s if not self._in_process else 2 * self._timeout_s
        for task in self._tasks:
            if not task.is_over and task.asker.seconds > limit_s:
                task.asker.is_given_up = True
                if self._scorer is not None:
                    self._scorer.give_up(task.asker)
                task.failure = f"no answer within {self._timeout_s:g} s"
                self._start_worker(self._num_workers)
                self._num_workers += 1

    def _what_is_wrong(self, parts: Any, count: int) -> str:
        """Empty for one list of scores a sample, all of them numbers."""
        if not isinstance(parts, list) or len(parts) != count:
            return f"expected {count} scores, got {_short(parts)}"
        for part in parts:
            if not isinstance(part, RewardParts) or part.rewards.keys() != self._names:
                return f"expected rewards {sorted(self._names)}, got {_short(part)}"
            for name, value in part.rewards.items():
                if not isinstance(value, int | float):
                    return f"reward '{name}' is {_short(value)}, no number"
        return ""

    def _parts_of(self, task: _Task) -> list[RewardParts]:
        if task.parts is not None:
            return task.parts
        self.num_failures += len(task.samples)
        _logger.warning(
            "no scores for %d completions of group %d: %s",
            len(task.samples),
            task.number,
            task.failure,
        )
        return self._failed_parts(task.samples)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
