"""A circuit breaker: after some failures in a row nobody waits for a dead server any more."""

from collections.abc import Callable

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Closed, open for a while, then open but for one probe.

    Args:
        max_failures: failures without a success in between that open it.
        rest_s: how long after opening, or after a failed probe, the next probe is let through.
        clock: seconds, monotonic.
    """

    def __init__(self, max_failures: int, rest_s: float, clock: Callable[[], float]) -> None:
        self._max_failures = max_failures
        self._rest_s = rest_s
        self._clock = clock
        self._num_failures = 0
        self._next_probe: float | None = None
        self.reason = ""
        """Why it is open; empty while it is closed."""

    def admits(self) -> bool:
        """Whether a request may be sent; while it is open, True once per rest."""
        if self._next_probe is None:
            return True
        if self._clock() < self._next_probe:
            return False
        self._next_probe = self._clock() + self._rest_s
        return True

    def record_success(self) -> None:
        self._num_failures = 0
        self._next_probe = None
        self.reason = ""

    def record_failure(self, reason: str) -> None:
        self._num_failures += 1
        if self._num_failures >= self._max_failures:
            self.open(reason)

    def open(self, reason: str) -> None:
        self._next_probe = self._clock() + self._rest_s
        self.reason = reason
