"""Threads on every rank that know which rank is gone, and end the process when one is.

Each rank writes a beat (a count, its phase, how it is) into the run's store and reads all others.
A rank whose beat stands still was killed, stopped or cut off; one that beats while the others'
collectives failed hangs. Whoever survives prints the rank and its phase, and the stacks of its own
threads if it was stuck, and leaves with exit code 1.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

__all__ = ["Watch", "is_collective_error", "silence_limit"]

MAX_SILENCE_S = 20.0

State = Literal["running", "gave up", "ended", "judged", "done"]


def silence_limit(timeout_s: float) -> float:
    """How long a process may give no sign of life, so that all is over within `timeout_s`."""
    return min(timeout_s / 8, MAX_SILENCE_S)


@dataclass(frozen=True)
class _Peer:
    """What is known of another rank."""

    beat: dict[str, Any]
    changed_at: float
    """Our clock, when its beat last changed."""


class Watch:
    """Beats for this rank and watches the others, from `start` to `close`.

    Args:
        store: a connection that nobody else uses.
        rank: of this process.
        world_size: at least 2.
        timeout_s: within this time of a rank's death or stall every other rank has named it, if
            collectives wait for half of it.
        prefix: of the keys in the store.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout_s: float, prefix: str
    ) -> None:
        self._store = store
        self._rank = rank
        self._keys = [f"{prefix}/{peer}" for peer in range(world_size)]
        self._silence_s = silence_limit(timeout_s)
        self._interval_s = self._silence_s / 8
        self._count = 0
        self._phase = "starting"
        self._state: State = "running"
        self._why = ""
        self._peers: dict[int, _Peer] = {}
        self._seen_at: dict[str, float] = {}
        self._exchanged_at = time.monotonic()
        self._is_store_gone = False
        self._closing = threading.Event()
        self._is_failure_common = threading.Event()
        # Two, because a store that is stopped answers neither with a value nor with an error.
        self._exchange = threading.Thread(target=self._exchange_beats, name="beat", daemon=True)
        self._judge = threading.Thread(target=self._watch_peers, name="watch", daemon=True)
        self._beat()

    def start(self) -> None:
        """Begins to watch; all ranks must have made their Watch."""
        self._exchanged_at = time.monotonic()
        self._exchange.start()
        self._judge.start()

    def enter(self, phase: str) -> None:
        """What this rank does from now on, in words that the others will print."""
        self._phase = phase

    def close(self) -> None:
        """This rank is done, and nobody shall miss it."""
        self._leave("done", "")

    def end(self, why: str) -> None:
        """This rank leaves with an error of its own; the others shall not wait for it."""
        self._leave("ended", why)

    def give_up(self) -> None:
        """After a failed collective: waits for the verdict, which ends the process.

        Returns only if the collective failed on all ranks and all of them live.
        """
        self._state = "gave up"
        self._is_failure_common.wait()
        self._leave("ended", "a collective failed on every rank")

    def _leave(self, state: State, why: str) -> None:
        self._why = " ".join(why.split())
        self._state = state
        self._closing.set()
        self._exchange.join(self._silence_s)

    def _beat(self) -> None:
        self._count += 1
        beat = {"count": self._count, "phase": self._phase, "state": self._state, "why": self._why}
        self._store.set(self._keys[self._rank], json.dumps(beat))

    def _exchange_beats(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(self._interval_s)
            try:
                self._beat()
                beats = [json.loads(text) for text in self._store.multi_get(self._keys)]
            except dist.DistError:
                self._is_store_gone = True
                return
            now = time.monotonic()
            for rank, beat in enumerate(beats):
                known = self._peers.get(rank)
                if known is None or known.beat["count"] != beat["count"]:
                    self._peers[rank] = _Peer(beat, now)
            self._exchanged_at = now

    def _watch_peers(self) -> None:
        while not self._closing.wait(self._interval_s):
            verdict = self._verdict()
            if verdict is not None and not self._closing.is_set():
                self._die(verdict)

    def _verdict(self) -> str | None:
        """Why this process must end; None if all is well, or not known yet."""
        now = time.monotonic()
        waited_s = now - self._exchanged_at
        if self._is_store_gone or waited_s > self._silence_s:
            phase = self._peers[0].beat["phase"] if 0 in self._peers else "starting"
            return f"the store of rank 0 is gone, last seen in phase '{phase}'"
        if waited_s > 3 * self._interval_s:  # nothing new is known of anybody
            return None
        peers = {rank: peer for rank, peer in self._peers.items() if rank != self._rank}
        by_state: dict[str, list[int]] = {}
        for rank, peer in peers.items():
            by_state.setdefault(peer.beat["state"], []).append(rank)
        if judged := by_state.get("judged"):
            return peers[judged[0]].beat["why"]
        gave_up = by_state.get("gave up", [])
        hanging = by_state.get("running", [])
        silent = [r for r in gave_up + hanging if now - peers[r].changed_at > self._silence_s]
        if silent:
            return (
                f"{self._name(silent)} gave no sign of life for {self._silence_s:.0f} s (killed, "
                "stopped, or its machine is gone)"
            )
        if ended := by_state.get("ended"):
            # All may end for the same reason, each with a message of its own.
            if not self._is_older_than(self._silence_s, "ended", now):
                return None
            return f"{self._name(ended)} ended: {peers[ended[0]].beat['why']}"
        is_everyone_known = len(peers) == len(self._keys) - 1
        if self._state == "gave up" and not hanging and is_everyone_known:
            self._is_failure_common.set()
        # Silence is noticed earlier: a rank that died is not taken for one that hangs.
        elif self._state == "gave up" and self._is_older_than(
            self._silence_s + 3 * self._interval_s, "gave up", now
        ):
            return f"{self._name(hanging)} did not take part in a collective, but is alive"
        return None

    def _is_older_than(self, limit_s: float, event: str, now: float) -> bool:
        """Whether an event was first seen longer ago."""
        return now - self._seen_at.setdefault(event, now) > limit_s

    def _name(self, ranks: list[int]) -> str:
        parts = [f"rank {rank} in phase '{self._peers[rank].beat['phase']}'" for rank in ranks]
        return ", ".join(parts)

    def _die(self, verdict: str) -> None:
        is_stuck = self._state == "running"
        self._why = verdict
        self._state = "judged"
        stderr = sys.__stderr__
        if stderr is not None:
            where = f" (rank {self._rank})" if self._rank else ""
            message = f"error{where}: {verdict}; this rank is in phase '{self._phase}'"
            print(message, file=stderr, flush=True)
            if is_stuck:
                faulthandler.dump_traceback(file=stderr, all_threads=True)
        sys.stdout.flush()
        # The others read the verdict, and rank 0 may hold the store that they read it from.
        time.sleep(3 * self._interval_s)
        os._exit(1)


def is_collective_error(error: BaseException | None) -> bool:
    """Whether the error, or what it came from, is a failed collective."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        # gloo's errors have no class of their own; their text starts with its source file.
        if isinstance(error, RuntimeError) and "gloo/" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
