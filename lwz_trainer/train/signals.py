"""SIGTERM and SIGINT ask a run to stop; it saves its last complete step and leaves."""

import signal
from types import FrameType

__all__ = ["StopSignal"]


class StopSignal:
    """Remembers the first signal; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name = ""

    def install(self) -> None:
        """Replaces the handlers of SIGTERM and SIGINT; only the main thread may."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    @property
    def is_set(self) -> bool:
        return bool(self.name)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
