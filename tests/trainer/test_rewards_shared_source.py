"""Turns at a source, and those that are taken away."""

import threading
import time
from collections.abc import Sequence

import pytest

from lwz_trainer.rewards.answer import Answer, SourceScores
from lwz_trainer.rewards.shared_source import Asker, GivenUpError, SharedSource


class StuckSource:
    """Scores once it is released; what is asked instead scores at once."""

    def __init__(self) -> None:
        self.is_asked, self.released = threading.Event(), threading.Event()
        self.num_closed = 0

    def score(self, answers: Sequence[Answer]) -> SourceScores:
        self.is_asked.set()
        assert self.released.wait(10)
        return SourceScores([1.0], [], [True], [False])

    def renewed(self) -> "StuckSource":
        other = StuckSource()
        other.released.set()
        return other

    def close(self) -> None:
        self.num_closed += 1


def test_give_up_frees_the_source_and_leaves_the_old_one_to_its_asker() -> None:
    stuck = StuckSource()
    shared = SharedSource(stuck)
    late, next_one = Asker(), Asker()
    found: list[float] = []

    def ask(asker: Asker) -> None:
        asker.start()
        found.extend(shared.score([Answer("Write.", "Calm.")], asker).scores)

    first = threading.Thread(target=ask, args=(late,))
    first.start()
    assert stuck.is_asked.wait(10)
    second = threading.Thread(target=ask, args=(next_one,))
    second.start()
    time.sleep(0.2)
    assert late.seconds > 0.15 > next_one.seconds
    late.is_given_up = True
    shared.give_up(late)
    second.join(10)
    assert found == [1.0]
    assert first.is_alive()
    assert stuck.num_closed == 0
    stuck.released.set()
    first.join(10)
    renewed = shared.source
    assert isinstance(renewed, StuckSource)
    assert (stuck.num_closed, renewed.num_closed) == (1, 0)
    with pytest.raises(GivenUpError):
        shared.score([Answer("Write.", "Calm.")], late)
