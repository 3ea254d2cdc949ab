"""When what happened in a step, as a trace that Perfetto and chrome://tracing open.

Spans are real begin and end times on the host's monotonic clock. A track's seconds are always
summed; the spans themselves are kept for the steps that are asked for.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically

__all__ = ["Timeline"]

TRACKS = ("decode", "update", "optimizer", "checkpoint", "reward")
"""Their order on the screen; tracks such as "reward 0" of single workers follow."""


class Timeline:
    """Spans of one rank; may be used from several threads.

    Args:
        rank: shown as the process.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self.keeps_spans = False

    def start_step(self, *, keeps_spans: bool) -> None:
        """Forgets the step before."""
        with self._lock:
            self._events, self._seconds = [], defaultdict(float)
            self.keeps_spans = keeps_spans

    @contextmanager
    def span(self, track: str, name: str, **details: Any) -> Iterator[None]:
        """Around something that takes time."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(track, name, begin_s, time.perf_counter(), **details)

    def add(self, track: str, name: str, begin_s: float, end_s: float, **details: Any) -> None:
        """Something that took from `begin_s` to `end_s` on the clock of `time.perf_counter`."""
        with self._lock:
            self._seconds[track] += end_s - begin_s
            if self.keeps_spans:
                event = {"name": name, "ph": "X", "ts": begin_s * 1e6, "pid": self._rank}
                event |= {"dur": (end_s - begin_s) * 1e6, "tid": track, "args": details}
                self._events.append(event)

    def seconds(self, track: str) -> float:
        """Time in spans of a track since `start_step`."""
        with self._lock:
            return self._seconds[track]

    def write(self, path: Path) -> None:
        """The kept spans as one JSON file."""
        with self._lock:
            events = list(self._events)
        tracks = [*TRACKS, *sorted({event["tid"] for event in events} - set(TRACKS))]
        names: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": self._rank, "args": {"name": "rank"}}
        ]
        for number, track in enumerate(tracks):
            where = {"ph": "M", "pid": self._rank, "tid": number}
            names.append({"name": "thread_name", **where, "args": {"name": track}})
            names.append({"name": "thread_sort_index", **where, "args": {"sort_index": number}})
        spans = [event | {"tid": tracks.index(event["tid"])} for event in events]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"traceEvents": names + spans, "displayTimeUnit": "ms"})
        write_text_atomically(path, text)
