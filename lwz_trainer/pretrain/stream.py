"""An endless mixture of sources that starts again anywhere from a few numbers.

A source is read block by block: `shuffle_windows` windows are read in file order and given out in
an order that depends on the seed and the block's place alone. So memory is bounded, and where a
source stands is six integers: epoch, file and row at which the block starts, windows of it given
out, tokens so far, and rows without a window before the block. The next window always comes from
the source that is furthest behind its share of tokens: no randomness, and shares are exact to one
window.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lwz_trainer.errors import UserError
from lwz_trainer.pretrain.windows import Window

__all__ = ["Batch", "BatchReader", "MixedStream", "ReadRows", "SourceStream"]

ReadRows: TypeAlias = Callable[[int, Path, int], Iterator[tuple[int, list[Window]]]]
"""(source, file, rows to start behind) -> (rows passed, windows of the row), row by row."""

_Place: TypeAlias = tuple[int, int, int]
"""Epoch, file in the epoch's order, rows passed in that file."""


class SourceStream:
    """Windows of one source, in a new order each epoch, for ever."""

    def __init__(
        self,
        index: int,
        name: str,
        files: list[Path],
        read: ReadRows,
        *,
        shuffle_windows: int,
        seed: int,
    ) -> None:
        self.name = name
        self.num_tokens = 0
        """Tokens given out."""
        self._index = index
        self._files = files
        self._read = read
        self._shuffle_windows = shuffle_windows
        self._seed = seed
        self._start: _Place = (0, 0, 0)
        self._taken = 0
        self._num_skipped_before = 0
        self._num_skipped_in_block = 0
        self._block: list[Window] = []
        self._next: _Place = (0, 0, 0)

    @property
    def epoch(self) -> int:
        """Complete passes over the source."""
        return self._start[0]

    @property
    def num_skipped(self) -> int:
        """Rows without a window, as far as blocks were read; each epoch counts them again."""
        return self._num_skipped_before + self._num_skipped_in_block

    def peek(self) -> Window:
        """The next window."""
        if self._taken == len(self._block):
            self._start, self._taken = self._next, 0
            self._num_skipped_before = self.num_skipped
            self._fill()
        return self._block[self._taken]

    def advance(self) -> None:
        """The window that `peek` showed is given out."""
        self.num_tokens += self._block[self._taken].num_tokens
        self._taken += 1

    def state(self) -> list[int]:
        """Where the source stands, for `restore`."""
        return [*self._start, self._taken, self.num_tokens, self._num_skipped_before]

    def restore(self, state: list[int]) -> None:
        """Goes on where `state` was taken."""
        epoch, file, row, taken, self.num_tokens, self._num_skipped_before = state
        self._num_skipped_in_block = 0
        self._start = self._next = (epoch, file, row)
        self._taken, self._block = 0, []
        if taken:
            self._fill()
            self._taken = taken

    def _fill(self) -> None:
        """The block that starts at `_start`; at the end of an epoch it may be a short one."""
        while True:
            windows, self._next, num_skipped = self._read_block(self._start)
            if windows:
                break
            if self._start[1:] == (0, 0):
                raise UserError(f"data source '{self.name}' holds no text; check its files")
            self._start = self._next
            self._num_skipped_before += num_skipped
        self._num_skipped_in_block = num_skipped
        order = self._random(*self._start).permutation(len(windows))
        self._block = [windows[index] for index in order]

    def _read_block(self, start: _Place) -> tuple[list[Window], _Place, int]:
        """Its windows, where the next one starts, and the rows of it without a window."""
        epoch, file, row = start
        files = self._random(epoch).permutation(len(self._files))
        windows: list[Window] = []
        num_skipped = 0
        while file < len(files):
            for num_passed, found in self._read(self._index, self._files[files[file]], row):
                windows += found
                num_skipped += not found
                if len(windows) >= self._shuffle_windows:
                    return windows, (epoch, file, num_passed), num_skipped
            file, row = file + 1, 0
        return windows, (epoch + 1, 0, 0), num_skipped

    def _random(self, *place: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._index, *place))
        return np.random.default_rng(sequence)


class MixedStream:
    """Batches of windows from several sources by weight.

    Args:
        sources: at least one.
        weights: share of the tokens of each, above 0; any scale.
    """

    def __init__(self, sources: list[SourceStream], weights: list[float]) -> None:
        assert len(sources) == len(weights) > 0, "each source has its weight"
        self.sources = sources
        self._weights = weights

    def next_batch(self, max_tokens: int) -> list[Window]:
        """As many windows as fit `max_tokens`, at least one; the next batch starts with the next.

        Every window has at most `max_tokens` tokens where the context has.
        """
        batch: list[Window] = []
        total = 0
        while True:
            source = min(
                range(len(self.sources)),
                key=lambda index: (self.sources[index].num_tokens / self._weights[index], index),
            )
            window = self.sources[source].peek()
            if batch and total + window.num_tokens > max_tokens:
                return batch
            self.sources[source].advance()
            batch.append(window)
            total += window.num_tokens

    def state(self) -> dict[str, Any]:
        """{name: numbers}, for `restore`."""
        return {source.name: source.state() for source in self.sources}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        for source in self.sources:
            source.restore(state[source.name])


@dataclass(frozen=True)
class Batch:
    """Windows of one step, and how far the stream has come with them."""

    windows: list[Window]
    state: dict[str, Any]
    """For `MixedStream.restore`: the next batch is the one after this."""
    tokens: dict[str, int]
    """Tokens of each source so far."""
    epochs: dict[str, int]
    """Complete passes over each source."""
    skipped: dict[str, int]
    """Rows of each source so far that were passed over."""


class BatchReader:
    """Reads the next batch in a thread while the current one is learned.

    Args:
        stream: nobody else uses it from the first `next` on.
        max_tokens: of a batch.
    """

    def __init__(self, stream: MixedStream, max_tokens: int) -> None:
        self._stream = stream
        self._max_tokens = max_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._coming: Future[Batch] | None = None

    def next(self) -> Batch:
        """The next batch; waits for it where it is not there yet.

        Raises:
            UserError: a file that cannot be read, where its batch comes up.
        """
        batch = self._thread.submit(self._read) if self._coming is None else self._coming
        found = batch.result()
        self._coming = self._thread.submit(self._read)
        return found

    def close(self) -> None:
        """Gives up what was read ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self) -> Batch:
        windows = self._stream.next_batch(self._max_tokens)
        sources = self._stream.sources
        return Batch(
            windows,
            self._stream.state(),
            {source.name: source.num_tokens for source in sources},
            {source.name: source.epoch for source in sources},
            {source.name: source.num_skipped for source in sources},
        )
