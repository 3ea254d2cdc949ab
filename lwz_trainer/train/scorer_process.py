"""A process that scores: it holds its own scorer, and can be killed when it hangs.

Little is imported here, because every such process imports it.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from lwz_trainer.rewards.score import RewardParts, RewardSample
from lwz_trainer.rewards.shared_source import Asker

__all__ = ["SampleScorer", "ScorerError", "ScorerProcess"]


class SampleScorer(Protocol):
    """What scores samples: `rewards.score.Scorer`."""

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]: ...

    def give_up(self, asker: Asker) -> None: ...

    def close(self) -> None: ...


class ScorerError(Exception):
    """What a scorer raised in its process, as text."""


class ScorerProcess:
    """A process that scores what it is sent; used by one thread."""

    def __init__(self, make_scorer: Callable[[], SampleScorer]) -> None:
        # Not forked: this process has threads, and maybe a GPU.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_scorer), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # its scorer is ready: loading models does not count as hanging

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
        try:
            is_right, answer = self._connection.recv()
        except EOFError as error:
            self._process.join(1)
            raise EOFError(f"the worker died (exit code {self._process.exitcode})") from error
        if not is_right:
            raise ScorerError(answer)
        return answer

    def kill(self) -> None:
        """Ends it whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, make_scorer: Callable[[], SampleScorer]) -> None:
    """The process: one answer a message, until the other side is gone."""
    scorer = make_scorer()
    connection.send(None)
    while True:
        try:
            samples = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, scorer.score_samples(samples)))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
