"""The gradient of one update in the making, and what happens when memory runs out in it.

A backward pass that fails half-way leaves a part of its micro-batch in the gradient. No copy is
kept to go back to: the gradient is set to 0, the micro-batches done so far are computed again, and
the one that failed follows in halves. The result is what it had been with these halves from the
start, bit for bit.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_trainer.errors import TrainingStopped
from lwz_trainer.out_of_memory import is_out_of_memory, release_cached_memory
from lwz_trainer.update.work import Work

__all__ = ["Accumulation", "Done"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A micro-batch whose gradient has been added."""

    work: Work
    mean_sequence_tokens: float
    loss: Tensor
    metrics: dict[str, Tensor]


class Accumulation:
    """Micro-batches of one update, in the order in which they were added.

    Args:
        compute: (micro-batch, mean_sequence_tokens) to loss and metrics; adds the gradient.
        halves: the samples of a micro-batch in two micro-batches, or it alone.
        restart: sets the gradient to 0.
        device: of the tensors.
    """

    def __init__(
        self,
        compute: Callable[[Work, float], tuple[Tensor, dict[str, Tensor]]],
        halves: Callable[[Work], list[Work]],
        restart: Callable[[], None],
        *,
        device: torch.device,
    ) -> None:
        self.done: list[Done] = []
        self._compute = compute
        self._halves = halves
        self._restart = restart
        self._device = device
        self._limit_tokens: int | None = None
        """After a failure: longer micro-batches are split before they are tried."""

    def add(self, work: Work, mean_sequence_tokens: float) -> None:
        """Adds one micro-batch, in halves if it does not fit into memory.

        Raises:
            TrainingStopped: a half does not fit either, or there is only one sample.
        """
        is_long = self._limit_tokens is not None and work.batch.num_tokens > self._limit_tokens
        if not is_long and self._try(work, mean_sequence_tokens):
            return
        parts = self._halves(work)
        if len(parts) == 1:
            raise self._too_large(work)
        if not is_long:
            _logger.warning(
                "out of memory in a micro-batch of %d tokens: it is split and the update starts "
                "over; lower update.microbatch_tokens",
                work.batch.num_tokens,
            )
            self._start_over()
            self._limit_tokens = work.batch.num_tokens - 1
        for part in parts:
            if not self._try(part, mean_sequence_tokens):
                raise self._too_large(part)

    def _too_large(self, work: Work) -> TrainingStopped:
        return TrainingStopped(
            f"out of memory in the update with a micro-batch of {work.batch.num_tokens} tokens; no "
            "weight was changed: lower update.microbatch_tokens or "
            "rollout.max_completion_tokens, or spread sequences with parallel.sequence"
        )

    def _try(self, work: Work, mean_sequence_tokens: float) -> bool:
        """Whether the micro-batch fitted; if not, a part of its gradient may have been added."""
        try:
            loss, metrics = self._compute(work, mean_sequence_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.done.append(Done(work, mean_sequence_tokens, loss, metrics))
            return True
        release_cached_memory(self._device)
        return False

    def _start_over(self) -> None:
        """The gradient of what is done, without what the failed micro-batch left in it."""
        self._restart()
        for item in self.done:
            self._compute(item.work, item.mean_sequence_tokens)
