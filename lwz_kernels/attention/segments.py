"""Who attends to whom: host integers, checked once and shared by all layers."""

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PackView", "Segment", "SegmentTable"]


class Segment(NamedTuple):
    """Queries, and the keys that they see causally: those of the prefix, then the own ones."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    prefix_start: int = 0
    prefix_len: int = 0

    @property
    def shift(self) -> int:
        """Query i, counted from the segment's start, sees the keys up to i + shift."""
        return self.prefix_len + self.k_len - self.q_len


class PackView(NamedTuple):
    """A table of whole sequences one after another, each of which sees itself."""

    lengths: tuple[int, ...]
    prefix_of: tuple[int, ...]
    """Sequence that a sequence sees as well, -1 for none."""

    @property
    def has_prefixes(self) -> bool:
        return any(prefix >= 0 for prefix in self.prefix_of)


class SegmentTable:
    """Ranges of queries, and for each of them the keys that it may see, causally.

    The keys of a segment are those of its prefix, if it has one, followed by its own range. Query i
    of a segment, counted from its start, sees the keys j <= i + prefix_len + k_len - q_len: the
    last query sees the last key. Where there are fewer keys than queries, the first queries see
    nothing. A prefix is how a prompt is computed once and seen by all its completions. Tables do
    not change; equal segments make equal tables.

    Args:
        segments: rows of (q_start, q_len, k_start, k_len) or (q_start, q_len, k_start, k_len,
            prefix_start, prefix_len). Ranges of queries are disjoint and need not cover all; ranges
            of keys may overlap between segments. Any may be empty.
        num_q: number of query tokens.
        num_k: number of key tokens.

    Attributes:
        rows: [S, 6] int64 on the CPU, the segments as operators take them.
        pack: the sequences, where the table is one of whole sequences one after another.

    Raises:
        ValueError: a row that is not four or six integers, leaves the tokens, shares a query with
            another, or has a key in its prefix and its own range.
    """

    def __init__(self, segments: Sequence[Sequence[int]], num_q: int, num_k: int) -> None:
        self.segments = tuple(_segment(row, i) for i, row in enumerate(segments))
        self.num_q, self.num_k = operator.index(num_q), operator.index(num_k)
        if self.num_q < 0 or self.num_k < 0:
            raise ValueError(f"expected num_q and num_k >= 0, got {self.num_q} and {self.num_k}")
        for i, row in enumerate(self.segments):
            _check_range(i, "query", row.q_start, row.q_len, self.num_q)
            _check_range(i, "key", row.k_start, row.k_len, self.num_k)
            _check_range(i, "prefix", row.prefix_start, row.prefix_len, self.num_k)
            _check_prefix_apart(i, row)
        _check_disjoint(self.segments)
        self.rows = torch.tensor(self.segments, dtype=torch.int64, device="cpu").view(-1, 6)
        self.pack = _pack_of(self.segments, self.num_q, self.num_k)
        self.has_prefixes = any(row.prefix_len for row in self.segments)
        self._tensors: dict[tuple, tuple[Tensor, ...]] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SegmentTable):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        rows = [(*row,) if row.prefix_len else (*row[:4],) for row in self.segments]
        return f"SegmentTable({rows}, num_q={self.num_q}, num_k={self.num_k})"

    def _key(self) -> tuple:
        return self.segments, self.num_q, self.num_k

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Sequence[int], prefix_of: Sequence[int] | None = None
    ) -> "SegmentTable":
        """Each sequence of a pack sees itself, after all keys of the sequence that is its prefix.

        Args:
            cu_seqlens: N + 1 ascending offsets from 0 to T.
            prefix_of: N entries or None; sequence i also sees sequence prefix_of[i], -1 for none.
                A prefix has no prefix itself.

        Raises:
            ValueError: offsets that do not start with 0 or do not ascend; a prefix that does not
                exist, is the sequence itself, or has a prefix.
        """
        offsets = [operator.index(offset) for offset in cu_seqlens]
        if not offsets or offsets[0] != 0:
            raise ValueError(f"cu_seqlens: expected to start with 0, got {offsets[:1]}")
        if any(after < before for before, after in pairwise(offsets)):
            raise ValueError(f"cu_seqlens: expected ascending offsets, got {offsets}")
        ranges = [(start, end - start) for start, end in pairwise(offsets)]
        prefixes = _prefixes(prefix_of, len(ranges))
        rows = [
            (*own, *own, *(ranges[prefix] if prefix >= 0 else ()))
            for own, prefix in zip(ranges, prefixes, strict=True)
        ]
        return cls(rows, offsets[-1], offsets[-1])

    def cached(self, key: tuple, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `build` derives from the table; made once per key, which names the device too."""
        if key not in self._tensors:
            # Autograd must be able to save them later, whoever asks first.
            with torch.inference_mode(False):
                self._tensors[key] = build()
        return self._tensors[key]


def _segment(row: Sequence[int], i: int) -> Segment:
    if len(row) not in (4, 6):
        raise ValueError(
            f"segments[{i}]: expected q_start, q_len, k_start, k_len, and for a prefix "
            f"prefix_start, prefix_len, got {row}"
        )
    segment = Segment(*(operator.index(value) for value in row))
    return segment if segment.prefix_len else segment._replace(prefix_start=0)


def _check_range(i: int, what: str, start: int, length: int, num_tokens: int) -> None:
    if start < 0 or length < 0 or start + length > num_tokens:
        raise ValueError(
            f"segments[{i}]: expected a {what} range within {num_tokens} tokens, "
            f"got start {start} and length {length}"
        )


def _check_prefix_apart(i: int, row: Segment) -> None:
    end = max(row.prefix_start, row.k_start)
    if min(row.prefix_start + row.prefix_len, row.k_start + row.k_len) > end:
        raise ValueError(
            f"segments[{i}]: key {end} is in the prefix and in the own range; expected it in one"
        )


def _check_disjoint(segments: tuple[Segment, ...]) -> None:
    ranges = sorted((row[0], row[0] + row[1], i) for i, row in enumerate(segments) if row[1] > 0)
    for (_, end, i), (start, _, j) in pairwise(ranges):
        if start < end:
            raise ValueError(
                f"segments[{i}] and segments[{j}] share query {start}: expected disjoint ranges "
                "of queries"
            )


def _prefixes(prefix_of: Sequence[int] | None, num_sequences: int) -> list[int]:
    if prefix_of is None:
        return [-1] * num_sequences
    prefixes = [operator.index(prefix) for prefix in prefix_of]
    if len(prefixes) != num_sequences:
        raise ValueError(
            f"prefix_of: expected one entry per sequence ({num_sequences}), got {len(prefixes)}"
        )
    for i, prefix in enumerate(prefixes):
        if prefix < -1 or prefix >= num_sequences or prefix == i:
            raise ValueError(
                f"prefix_of[{i}] is {prefix}: expected -1 or another sequence below {num_sequences}"
            )
        if prefix >= 0 and prefixes[prefix] >= 0:
            raise ValueError(
                f"prefix_of[{i}] is {prefix}, which has a prefix itself: expected one level only"
            )
    return prefixes


def _pack_of(segments: tuple[Segment, ...], num_q: int, num_k: int) -> PackView | None:
    end = 0
    sequences = {}
    for i, row in enumerate(segments):
        if (row.q_start, row.q_len) != (row.k_start, row.k_len) or row.q_start != end:
            return None
        end += row.q_len
        sequences[row.q_start, row.q_len] = i
    prefixes = [
        sequences.get((row.prefix_start, row.prefix_len), len(segments)) if row.prefix_len else -1
        for row in segments
    ]
    if num_q != end or num_k != end or len(segments) in prefixes:
        return None
    return PackView(tuple(row.q_len for row in segments), tuple(prefixes))
