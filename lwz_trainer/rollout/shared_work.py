"""Samples that wait on all ranks: each is drawn by the rank that claims it first.

A rank claims its own samples in their order, each when it has a place for it, and when it has none
left those of the others from their ends. What a sample is does not depend on where it is drawn: its
tokens are keyed by (seed, step, sample, position).
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from lwz_trainer.rollout.sequence import Request

__all__ = ["SharedWork"]


class SharedWork:
    """What this rank may draw in one rollout.

    Args:
        store: one that all ranks reach; its `add` is atomic.
        name: of the rollout, the same on all ranks and not used before.
        own: this rank's requests.
        others: those of every other rank, the first to be helped in front.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        own: Sequence[Request],
        others: Sequence[Sequence[Request]],
    ) -> None:
        self._store = store
        self._name = name
        self.own = list(own)
        self.all = [*own, *(request for requests in others for request in requests)]
        """What this rank may meet."""
        self._left = deque(_samples_of(own))
        for requests in others:
            self._left.extend(reversed(list(_samples_of(requests))))

    def claim_next(self) -> tuple[Request, int] | None:
        """The next sample that is this rank's from now on, or None when all are claimed."""
        while self._left:
            request, sample = self._left.popleft()
            if self._store.add(f"{self._name}/{sample}", 1) == 1:
                return request, sample
        return None

    def num_left(self, group: int) -> int:
        """Samples of a group that this rank has not tried to claim yet."""
        return sum(request.group == group for request, _ in self._left)


def _samples_of(requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
    return ((request, sample) for request in requests for sample in request.samples)
