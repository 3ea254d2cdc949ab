"""Who runs: admission by projected length, page ownership, preemption of the youngest.

Admitting by prompt size would fill the pool with sequences that all grow and evict each other, so a
sequence is admitted only if the pages that it and the running ones are expected to need are free.
"""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from lwz_trainer.rollout.kv_cache import PageAllocator, num_pages_for
from lwz_trainer.rollout.sequence import Request, Sequence
from lwz_trainer.rollout.shared_work import SharedWork

__all__ = ["PromptEntry", "Scheduler"]


@dataclass(eq=False)
class PromptEntry:
    """A prompt whose pages are in the cache while members of its group wait to be admitted."""

    prompt_ids: list[int]
    pages: list[int]
    num_waiting: int
    last_hidden: Tensor | None = None
    """[D], final hidden state of the last prompt token: all members sample from it."""


class Scheduler:
    """Waiting and running sequences, and the pages that they own."""

    def __init__(
        self,
        requests: list[Request] | SharedWork,
        *,
        allocator: PageAllocator,
        page_size: int,
        max_num_seqs: int,
        max_completion_tokens: int,
        expected_completion_tokens: float,
    ) -> None:
        self._shared = requests if isinstance(requests, SharedWork) else None
        self.waiting: deque[Sequence] = deque()
        if not isinstance(requests, SharedWork):  # else each is claimed when there is a place
            self.waiting.extend(
                Sequence(group=request.group, sample=sample, prompt_ids=request.prompt_ids)
                for request in requests
                for sample in request.samples
            )
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.allocator = allocator
        self._page_size = page_size
        self._max_completion = max_completion_tokens
        self._finished_tokens = 0
        self._num_finished = 0
        self._prior_tokens = expected_completion_tokens
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._prompts: dict[int, PromptEntry] = {}

    def goes_on(self) -> bool:
        """Whether anything runs or waits, or was found among what all ranks share."""
        if self.running or self.waiting or self._claim():
            return True
        self._drop_prompts()  # their groups were completed elsewhere
        return False

    def admit(self) -> tuple[list[PromptEntry], list[tuple[Sequence, PromptEntry]], list[Sequence]]:
        """Moves sequences from waiting to running while their projected pages are free.

        Returns:
            prompts to prefill; fresh sequences with their prompt, which own copies of nothing yet
            but share its full pages; and resumed sequences, which need a prefill of their own.
        """
        prompts: list[PromptEntry] = []
        fresh: list[tuple[Sequence, PromptEntry]] = []
        resumed: list[Sequence] = []
        if self.waiting and not self.running and not self._fits(self.waiting[0]):
            self._drop_prompts()
        while self._free_rows and (self.waiting or self._claim()) and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.row = self._free_rows.pop()
            if sequence.tokens:
                sequence.num_cached = len(sequence.cached_ids())
                sequence.pages = self.allocator.allocate(self._pages(sequence.num_cached))
                resumed.append(sequence)
            else:
                entry = self._prompts.get(sequence.group)
                if entry is None:
                    pages = self.allocator.allocate(self._pages(len(sequence.prompt_ids)))
                    entry = PromptEntry(sequence.prompt_ids, pages, self._num_fresh(sequence))
                    self._prompts[sequence.group] = entry
                    prompts.append(entry)
                sequence.num_cached = len(sequence.prompt_ids)
                full = sequence.num_cached // self._page_size
                sequence.pages = self.allocator.share(entry.pages[:full])
                sequence.pages += self.allocator.allocate(len(entry.pages) - full)
                fresh.append((sequence, entry))
            self.running.append(sequence)
        return prompts, fresh, resumed

    def release_prompts(self, fresh: list[tuple[Sequence, PromptEntry]]) -> None:
        """After the tail pages were copied: a prompt whose group is complete is dropped."""
        for sequence, entry in fresh:
            entry.num_waiting -= 1
            if entry.num_waiting == 0:
                self.allocator.release(entry.pages)
                del self._prompts[sequence.group]

    def make_room(self, num_steps: int) -> int:
        """Gives every running sequence a place for its next tokens, preempting the youngest.

        Args:
            num_steps: tokens wanted for each; preemption makes room for one.

        Returns:
            for how many tokens there is room, from 1 to `num_steps`.
        """
        for sequence in list(self.running):
            while (
                sequence.row >= 0 and sequence.num_cached == len(sequence.pages) * self._page_size
            ):
                if self.allocator.num_free > 0:
                    sequence.pages += self.allocator.allocate(1)
                else:
                    self._preempt(self.running[-1])
        while num_steps > 1 and sum(map(len, self._missing(num_steps))) > self.allocator.num_free:
            num_steps -= 1
        for sequence, missing in zip(self.running, self._missing(num_steps), strict=True):
            sequence.pages += self.allocator.allocate(len(missing))
        return num_steps

    def _missing(self, num_steps: int) -> list[range]:
        """Places in the page table that each running sequence still needs for its next tokens."""
        return [
            range(
                len(sequence.pages),
                self._pages(
                    sequence.num_cached
                    + min(num_steps, self._max_completion - len(sequence.tokens))
                ),
            )
            for sequence in self.running
        ]

    def finish(self, sequence: Sequence) -> None:
        """Removes a finished sequence and learns from its length."""
        self.running.remove(sequence)
        self._vacate(sequence)
        self._finished_tokens += len(sequence.tokens)
        self._num_finished += 1

    def preempt_youngest(self, count: int) -> None:
        """Takes `count` sequences out of the batch, and lets no more in than are left."""
        for sequence in self.running[-count:][::-1]:
            self._preempt(sequence)
            self._free_rows.pop()

    def abandon(self) -> None:
        """Drops everything that waits or runs; the lengths so far count as those of finished ones.

        The running ones would have become longer, but leaving them out would bias the estimate
        more.
        """
        for sequence in list(self.running):
            self.finish(sequence)
        self.waiting.clear()
        self._drop_prompts()

    @property
    def expected_completion_tokens(self) -> float:
        """Mean length of the finished ones, with the prior as one more of them."""
        return (self._prior_tokens + self._finished_tokens) / (1 + self._num_finished)

    def _num_fresh(self, popped: Sequence) -> int:
        """Members of this group that have yet to start, the one just popped included."""
        unclaimed = 0 if self._shared is None else self._shared.num_left(popped.group)
        waiting = sum(s.group == popped.group and not s.tokens for s in self.waiting)
        return 1 + waiting + unclaimed

    def _claim(self) -> bool:
        """Lets one more sample wait here, if one is left that no rank has claimed."""
        found = None if self._shared is None else self._shared.claim_next()
        if found is None:
            return False
        request, sample = found
        self.waiting.append(
            Sequence(group=request.group, sample=sample, prompt_ids=request.prompt_ids)
        )
        return True

    def _drop_prompts(self) -> None:
        """Gives cached prompts up when they are what keeps the next sequence out."""
        for entry in self._prompts.values():
            self.allocator.release(entry.pages)
        self._prompts.clear()

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        self._free_rows.append(sequence.row)
        sequence.pages, sequence.num_cached, sequence.row = [], 0, -1

    def _fits(self, sequence: Sequence) -> bool:
        entry = self._prompts.get(sequence.group)
        shared = 0
        if entry is not None and not sequence.tokens:
            shared = len(sequence.prompt_ids) // self._page_size
        tail_of_entry = 0 if entry is not None or sequence.tokens else 1
        needed = self._projected_pages(sequence) - shared + tail_of_entry
        reserved = sum(
            max(0, self._projected_pages(other) - len(other.pages)) for other in self.running
        )
        if self.running:
            return needed + reserved <= self.allocator.num_free
        now = self._pages(max(len(sequence.cached_ids()), len(sequence.prompt_ids)) + 1)
        return now - shared + tail_of_entry <= self.allocator.num_free

    def _projected_pages(self, sequence: Sequence) -> int:
        written = len(sequence.tokens) + self._page_size
        expected = max(self.expected_completion_tokens, written)
        return self._pages(len(sequence.prompt_ids) + min(int(expected), self._max_completion))

    def _pages(self, num_tokens: int) -> int:
        return num_pages_for(num_tokens, self._page_size)
