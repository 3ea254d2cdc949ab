"""A run that SIGKILLs itself: `python -m tests.trainer.killed_run MARKER ARGUMENT …`.

MARKER is the start of a phase's name, as in "updating, step 2", or "latest" for the moment between
a complete checkpoint and the file that names it. The third save is never reached.
"""

import os
import signal
import sys

from lwz_trainer.__main__ import main
from lwz_trainer.parallel import Ranks
from lwz_trainer.train import checkpoint

__all__: list[str] = []


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(marker: str) -> None:
    """Kills this process right after the phase was announced."""
    enter = Ranks.enter

    def enter_and_die(self: Ranks, phase: str) -> None:
        enter(self, phase)
        if phase.startswith(marker):
            _die()

    Ranks.enter = enter_and_die  # type: ignore[method-assign]


def _die_before_second_latest() -> None:
    replace, calls = checkpoint._replace_text, iter(range(100))

    def replace_or_die(path: object, text: str) -> None:
        if next(calls) == 1:
            _die()
        replace(path, text)  # type: ignore[arg-type]

    checkpoint._replace_text = replace_or_die  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.argv[1] == "latest":
        _die_before_second_latest()
    else:
        _die_in(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
