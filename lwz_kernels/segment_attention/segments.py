"""Who attends to whom: host integers, checked once and shared by all layers."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Segment", "SegmentTable"]

Segment = tuple[int, int, int, int]
"""q_start, q_len, k_start, k_len."""


@dataclass(frozen=True)
class SegmentTable:
    """Ranges of queries, and for each of them the range of keys that it may see, causally.

    Query i of a segment, counted from its start, sees the keys j <= i + k_len - q_len: the last
    query sees the last key. Where k_len < q_len the first queries see nothing.

    Args:
        segments: rows of (q_start, q_len, k_start, k_len). Ranges of queries are disjoint and need
            not cover all; ranges of keys may overlap. Either may be empty.
        num_q: number of query tokens.
        num_k: number of key tokens.

    Raises:
        ValueError: a row that is not four integers, leaves the tokens, or shares a query with
            another.
    """

    segments: Sequence[Segment]
    num_q: int
    num_k: int
    rows: Tensor = field(init=False, repr=False, compare=False)
    """[S, 4] int64 on the CPU: the segments as operators take them."""
    _tensors: dict[tuple, tuple[Tensor, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        segments = tuple(_segment(row, i) for i, row in enumerate(self.segments))
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "num_q", operator.index(self.num_q))
        object.__setattr__(self, "num_k", operator.index(self.num_k))
        if self.num_q < 0 or self.num_k < 0:
            raise ValueError(f"expected num_q and num_k >= 0, got {self.num_q} and {self.num_k}")
        for i, (q_start, q_len, k_start, k_len) in enumerate(segments):
            _check_range(i, "query", q_start, q_len, self.num_q)
            _check_range(i, "key", k_start, k_len, self.num_k)
        _check_disjoint(segments)
        rows_S4 = torch.tensor(segments, dtype=torch.int64, device="cpu").view(-1, 4)
        object.__setattr__(self, "rows", rows_S4)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int]) -> "SegmentTable":
        """Each sequence of a pack sees itself; `cu_seqlens` are N + 1 offsets from 0 to T.

        Raises:
            ValueError: offsets that do not start with 0 or do not ascend.
        """
        offsets = [operator.index(offset) for offset in cu_seqlens]
        if not offsets or offsets[0] != 0:
            raise ValueError(f"cu_seqlens: expected to start with 0, got {offsets[:1]}")
        if any(after < before for before, after in pairwise(offsets)):
            raise ValueError(f"cu_seqlens: expected ascending offsets, got {offsets}")
        ranges = [(start, end - start) for start, end in pairwise(offsets)]
        return cls([(*own, *own) for own in ranges], offsets[-1], offsets[-1])

    def tensors_on(
        self,
        device: torch.device,
        key: tuple,
        build: Callable[[], Sequence[Sequence[Sequence[int]]]],
    ) -> tuple[Tensor, ...]:
        """Lists of integer rows that `build` derives from the table, as int32 tensors.

        Made once per device and key.
        """
        if (device, key) not in self._tensors:
            self._tensors[device, key] = tuple(
                torch.tensor(rows, dtype=torch.int32, device=device) for rows in build()
            )
        return self._tensors[device, key]


def _segment(row: Sequence[int], i: int) -> Segment:
    if len(row) != 4:
        raise ValueError(f"segments[{i}]: expected q_start, q_len, k_start, k_len, got {row}")
    q_start, q_len, k_start, k_len = (operator.index(value) for value in row)
    return q_start, q_len, k_start, k_len


def _check_range(i: int, what: str, start: int, length: int, num_tokens: int) -> None:
    if start < 0 or length < 0 or start + length > num_tokens:
        raise ValueError(
            f"segments[{i}]: expected a {what} range within {num_tokens} tokens, "
            f"got start {start} and length {length}"
        )


def _check_disjoint(segments: tuple[Segment, ...]) -> None:
    ranges = sorted((row[0], row[0] + row[1], i) for i, row in enumerate(segments) if row[1] > 0)
    for (_, end, i), (start, _, j) in pairwise(ranges):
        if start < end:
            raise ValueError(
                f"segments[{i}] and segments[{j}] share query {start}: expected disjoint ranges "
                "of queries"
            )
