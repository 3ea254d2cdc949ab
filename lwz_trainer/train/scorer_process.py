"""A process that scores: it holds its own scorer, and can be killed when it hangs.

Little is imported here, because every such process imports it.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from lwz_trainer.errors import UserError
from lwz_trainer.rewards.score import RewardParts, RewardSample
from lwz_trainer.rewards.shared_source import Asker

__all__ = ["SampleScorer", "ScorerError", "ScorerProcess", "start_processes"]


class SampleScorer(Protocol):
    """What scores samples: `rewards.score.Scorer`."""

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]: ...

    def give_up(self, asker: Asker) -> None: ...

    def close(self) -> None: ...


class ScorerError(Exception):
    """What a scorer raised in its process, as text, or why there is none."""


class ScorerProcess:
    """A process that scores what it is sent; used by one thread."""

    def __init__(self, make_scorer: Callable[[], SampleScorer]) -> None:
        # Not forked: this process has threads, and maybe a GPU.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_scorer), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def is_ready(self, wait_s: float) -> bool:
        """Whether it has its scorer; waits a while for it.

        Raises:
            EOFError: it died.
            ScorerError: the scorer could not be made.
        """
        if not self._is_ready and self._connection.poll(wait_s):
            self._receive()
            self._is_ready = True
        return self._is_ready

    def score(self, samples: list[RewardSample], timeout_s: float) -> Any:
        """Whatever it answers.

        Raises:
            TimeoutError: no answer in time.
            EOFError, OSError: it is dead.
            ScorerError: the scorer raised; the process goes on.
        """
        self._connection.send(samples)
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self._receive()

    def kill(self) -> None:
        """Ends it whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            is_right, answer = self._connection.recv()
        except EOFError as error:
            self._process.join(1)
            raise EOFError(f"the worker died (exit code {self._process.exitcode})") from error
        if not is_right:
            raise ScorerError(answer)
        return answer


def start_processes(
    make_scorer: Callable[[], SampleScorer],
    count: int,
    *,
    timeout_s: float,
    should_stop: Callable[[], bool],
) -> list[ScorerProcess]:
    """Processes that are ready to score.

    Args:
        make_scorer: makes the scorer of each; to be pickled.
        count: how many.
        timeout_s: that loading libraries and models may take.
        should_stop: nobody needs them any more.

    Raises:
        ScorerError: one of them could not start; none is left then.
    """
    processes = [ScorerProcess(make_scorer) for _ in range(count)]
    deadline_s = time.perf_counter() + timeout_s
    try:
        for process in processes:
            while not process.is_ready(wait_s=0.05):
                if should_stop():
                    raise ScorerError("asked to stop")
                if time.perf_counter() > deadline_s:
                    raise ScorerError(f"a reward worker was not ready within {timeout_s:g} s")
    except BaseException as error:
        for process in processes:
            process.kill()
        if isinstance(error, EOFError | OSError):
            raise ScorerError(f"a reward worker could not start: {error}") from error
        raise
    return processes


def _serve(connection: Connection, make_scorer: Callable[[], SampleScorer]) -> None:
    """The process: one answer a message, until the other side is gone; the first says that it is
    ready, or why not."""
    try:
        scorer = make_scorer()
    except Exception as error:  # a reward may raise anything
        connection.send((False, str(error) if isinstance(error, UserError) else _line(error)))
        return
    connection.send((True, None))
    while True:
        try:
            samples = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, scorer.score_samples(samples)))
        except Exception as error:
            connection.send((False, _line(error)))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
