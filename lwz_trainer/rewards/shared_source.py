"""A reward's source that several threads ask, one at a time."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lwz_trainer.rewards.answer import Answer, SourceScores

__all__ = ["Asker", "GivenUpError", "RewardSource", "SharedSource"]


class RewardSource(Protocol):
    """Scores answers; asked by one thread at a time, unless that one was given up."""

    def score(self, answers: Sequence[Answer]) -> SourceScores: ...

    def renewed(self) -> "RewardSource":
        """What is asked instead while this one hangs; itself where it holds no connection."""
        ...

    def close(self) -> None: ...


class GivenUpError(Exception):
    """Nobody waits for these scores any more."""


class Asker:
    """Scores one group; knows for how long, but for the waits for its turn at a source."""

    def __init__(self) -> None:
        self.is_given_up = False
        # Spent before, and since when again: one attribute, as another thread reads it.
        self._clock: tuple[float, float | None] = (0.0, None)

    @property
    def seconds(self) -> float:
        """Spent so far."""
        spent_s, since_s = self._clock
        return spent_s + (0.0 if since_s is None else time.perf_counter() - since_s)

    def start(self) -> None:
        """From now on its time counts."""
        self._clock = (self.seconds, time.perf_counter())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The clock stands still within this block."""
        self._clock = (self.seconds, None)
        try:
            yield
        finally:
            self.start()


class SharedSource:
    """Lets those who ask take turns, and can take a turn away.

    Args:
        source: what is asked.
    """

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        self._holder: Asker | None = None
        self._changed = threading.Condition()

    def score(self, answers: Sequence[Answer], asker: Asker) -> SourceScores:
        """Scores in the caller's turn.

        Raises:
            GivenUpError: the asker was given up before its turn came.
        """
        with asker.waiting(), self._changed:
            self._changed.wait_for(lambda: self._holder is None or asker.is_given_up)
            if asker.is_given_up:
                raise GivenUpError("too late to ask")
            self._holder, source = asker, self.source
        try:
            return source.score(answers)
        finally:
            with self._changed:
                has_turn = self._holder is asker
                if has_turn:
                    self._holder = None
                    self._changed.notify_all()
            if not has_turn:
                source.close()

    def give_up(self, asker: Asker) -> None:
        """Others wait no longer for an asker that is given up; it closes what it still holds."""
        with self._changed:
            if self._holder is asker:
                self.source = self.source.renewed()
                self._holder = None
                self._changed.notify_all()

    def close(self) -> None:
        """Ends connections to servers; called when nobody asks."""
        self.source.close()
