"""The update beside the rollout: gradients of finished groups while others are being written.

Within a step the weights do not change, so nothing is stale: the samples are those of the
sequential schedule, and so is the gradient up to the order of its terms.

On a CPU the two alternate: a burst of the engine, then one micro-batch. On a GPU the engine runs on
a stream of its own with high priority, and micro-batches on the default stream, launched by a
thread: what makes the host wait for the update (a count of rows, the end of a micro-batch) does not
keep the next decode step waiting. The two streams share no tensor that either of them writes:
weights are read by both, gradients belong to the update, pages to the engine. They wait for each
other where the rollout begins (the optimizer wrote the weights) and where it ends.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from lwz_trainer.train.groups import ScoredGroup
from lwz_trainer.update.policy_update import PolicyUpdate
from lwz_trainer.update.totals import UpdateMetrics
from lwz_trainer.update.work import Work

__all__ = ["Interleaver"]


class Interleaver:
    """Feeds finished groups to the update, one micro-batch at a time.

    Args:
        update: accumulates and steps.
        device: of the weights.
        is_ordered: a finished group waits until all groups with lower numbers were added.
        mask_truncated: as in `UpdateConfig`.
        in_thread: launch micro-batches from a thread, which a GPU needs.
    """

    def __init__(
        self,
        update: PolicyUpdate,
        device: torch.device,
        *,
        is_ordered: bool,
        mask_truncated: bool,
        in_thread: bool,
    ) -> None:
        self._update = update
        self._device = device
        self._is_ordered = is_ordered
        self._mask_truncated = mask_truncated
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="update") if in_thread else None
        self._launched: Future[None] | None = None
        self._decode_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._decode_stream = torch.cuda.Stream(device, priority=-1)
        self._turns: deque[int] = deque()
        self._waiting: dict[int, ScoredGroup] = {}
        self._works: deque[Work] = deque()

    @contextmanager
    def rollout(self, numbers: Sequence[int]) -> Iterator[None]:
        """Around the rollout of the groups with these numbers."""
        self._turns = deque(sorted(numbers) if self._is_ordered else ())
        self._waiting, self._works = {}, deque()
        self._update.begin()
        if self._decode_stream is None:
            yield
            return
        update_stream = torch.cuda.current_stream(self._device)
        self._decode_stream.wait_stream(update_stream)
        with torch.cuda.stream(self._decode_stream):
            yield
        update_stream.wait_stream(self._decode_stream)

    def add(self, group: ScoredGroup) -> None:
        """A finished group; its micro-batches are computed by later calls of `advance`."""
        if not self._is_ordered:
            self._plan(group)
            return
        self._waiting[group.ended.number] = group
        while self._turns and self._turns[0] in self._waiting:
            self._plan(self._waiting.pop(self._turns.popleft()))

    def advance(self) -> None:
        """Computes one micro-batch if there is one; in a thread: launches it if that is idle."""
        if self._launched is not None:
            if not self._launched.done():
                return
            self._launched.result()
            self._launched = None
        if not self._works:
            return
        work = self._works.popleft()
        if self._thread is None:
            self._update.add(work)
        else:
            self._launched = self._thread.submit(self._add_on_device, work)

    def finish(self, *, lr: float) -> UpdateMetrics:
        """After the rollout: what is left, and the optimizer step."""
        for number in sorted(self._waiting):  # behind a group that was dropped
            self._plan(self._waiting.pop(number))
        while self._works or self._launched is not None:
            if self._launched is not None:
                self._launched.result()
            self.advance()
        return self._update.finish(lr=lr)

    def abandon(self) -> None:
        """The rollout leads to no update: waits for the micro-batch under way, forgets the rest."""
        self._works.clear()
        if self._launched is not None:
            self._launched.result()
            self._launched = None

    def _plan(self, group: ScoredGroup) -> None:
        samples = group.train_samples(mask_truncated=self._mask_truncated)
        self._works += self._update.plan(samples)

    def _add_on_device(self, work: Work) -> None:
        """In the thread, whose current stream is the default one and whose device is not ours."""
        if self._device.type != "cuda":
            self._update.add(work)
            return
        with torch.cuda.device(self._device):
            self._update.add(work)
            # One micro-batch's activations exist at a time.
            torch.cuda.current_stream().synchronize()
