"""Which rank holds which token, and what its queries see: host integers, once per micro-batch.

The *stream* is the pack's documents one after another, followed by the padding as a document of
its own. Every scheme cuts the stream into chunks of equal length and gives each rank the same
number of them; nothing here imports torch, so a layout is a pure function of lengths and ranks,
and all layers of a model share one.

- `ulysses`: one contiguous shard per rank; attention sees whole documents and a part of the heads.
- `gather_kv`: 8 chunks per rank, weighed by their (query, key) pairs, heaviest first to the least
  loaded rank that has room.
- `ring`: striped, rank r holds the tokens r, r + P, r + 2P, ... Every (rank, source) step is then
  causal and nearly equal for any packing (Striped Attention, arXiv:2311.09431). Zigzag is not
  offered: it balances one document only, and its steps are rectangles, which segments are not.
- `two_d`: `gather_kv` across groups of `ulysses_ranks` ranks, whose shards are cut contiguously.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

__all__ = ["CHUNKS_PER_RANK", "Scheme", "Segment", "SequenceLayout", "make_layout"]

Scheme = Literal["ulysses", "gather_kv", "ring", "two_d"]
Segment = tuple[int, int, int, int]  # q_start, q_len, k_start, k_len

CHUNKS_PER_RANK = 8


@dataclass(frozen=True)
class SequenceLayout:
    """Who holds which token of a pack; made by `make_layout`.

    Ranks are numbered with the Ulysses rank inside the KV rank: rank = kv_rank · ulysses_ranks +
    ulysses_rank. KV ranks exchange keys and values, Ulysses ranks exchange heads.

    Args:
        scheme: how attention runs over the shards.
        num_ranks: P, ranks that share the pack.
        ulysses_ranks: ranks that exchange heads: P under `ulysses`, 1 under `gather_kv`, `ring`.
        num_tokens: tokens of the real documents.
        cu_seqlens: starts of all documents, padding included, and the padded total.
        chunk_tokens: tokens of one chunk.
        chunks: by KV rank, the chunks that it holds, ascending.
    """

    scheme: Scheme
    num_ranks: int
    ulysses_ranks: int
    num_tokens: int
    cu_seqlens: tuple[int, ...]
    chunk_tokens: int
    chunks: tuple[Sequence[int], ...]

    @property
    def padded_tokens(self) -> int:
        """Tokens of the stream: the real ones and the padding."""
        return self.cu_seqlens[-1]

    @property
    def local_tokens(self) -> int:
        """Tokens that each rank holds."""
        return self.padded_tokens // self.num_ranks

    @property
    def kv_ranks(self) -> int:
        """Ranks that exchange keys and values."""
        return self.num_ranks // self.ulysses_ranks

    def shard_index(self, rank: int) -> list[int]:
        """Positions in the stream of the tokens of `rank`, in the order in which it holds them."""
        kv_rank, ulysses_rank = divmod(rank, self.ulysses_ranks)
        first = ulysses_rank * self.local_tokens
        chunks, size = self.chunks[kv_rank], self.chunk_tokens
        return [
            chunks[i // size] * size + i % size for i in range(first, first + self.local_tokens)
        ]

    def position_ids(self, rank: int) -> list[int]:
        """Position within its document of each token of `rank`."""
        starts = self.cu_seqlens
        return [t - starts[bisect_right(starts, t) - 1] for t in self.shard_index(rank)]

    def segments(self, kv_rank: int) -> list[Segment]:
        """What the queries of a KV rank, in shard order, see of the whole stream."""
        segments: list[Segment] = []
        q_start = 0
        for start, stop in self._runs(kv_rank):
            for document, first, last in _documents_within(self.cu_seqlens, start, stop):
                segments.append((q_start, last - first, document, last - document))
                q_start += last - first
        return segments

    def ring_segments(self, rank: int, source: int) -> list[Segment]:
        """What the striped queries of `rank` see of the striped keys of `source`.

        Query i is token i·P + rank, key j is token j·P + source, so j <= i where source <= rank
        and j <= i - 1 elsewhere: causal, aligned at the bottom right, in every document.
        """
        behind = self.ring_offset(rank, source)
        segments: list[Segment] = []
        for start, stop in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True):
            q_start, q_stop = (_stripe_index(t, rank, self.num_ranks) for t in (start, stop))
            k_start = _stripe_index(start, source, self.num_ranks)
            k_len = q_stop - behind - k_start
            if q_stop > q_start and k_len > 0:
                segments.append((q_start, q_stop - q_start, k_start, k_len))
        return segments

    @staticmethod
    def ring_offset(rank: int, source: int) -> int:
        """By how many stripe entries the last visible key lies behind the query: 0 or 1."""
        return int(source > rank)

    def ring_window(self, rank: int, source: int, window_size: int) -> int:
        """The window, in keys of `source`, that leaves the last `window_size` tokens visible.

        Token distance (i - j)·P + rank - source < window; 0 or less: nothing is visible.
        """
        whole = -((rank - source - window_size) // self.num_ranks)  # ceil
        return whole - self.ring_offset(rank, source)

    def pairs(self, kv_rank: int, window_size: int | None = None) -> int:
        """Visible (query, key) pairs of the queries of a KV rank: its attention work per head."""
        size = self.chunk_tokens
        return sum(
            _pairs_between(self.cu_seqlens, chunk * size, (chunk + 1) * size, window_size)
            for chunk in self.chunks[kv_rank]
        )

    def imbalance(self, window_size: int | None = None) -> float:
        """Attention work of the busiest rank over the mean; Ulysses ranks share theirs equally."""
        work = [self.pairs(kv_rank, window_size) for kv_rank in range(self.kv_ranks)]
        return max(work) * len(work) / sum(work)

    def _runs(self, kv_rank: int) -> Iterator[tuple[int, int]]:
        """Chunks of a KV rank as [start, stop) of the stream, neighbours joined."""
        size = self.chunk_tokens
        start = stop = -1
        for chunk in self.chunks[kv_rank]:
            if chunk * size != stop:
                if stop >= 0:
                    yield start, stop
                start = chunk * size
            stop = (chunk + 1) * size
        yield start, stop


def make_layout(
    document_lengths: Sequence[int],
    num_ranks: int,
    scheme: Scheme = "ulysses",
    *,
    ulysses_ranks: int | None = None,
    window_size: int | None = None,
) -> SequenceLayout:
    """Cuts the stream of a pack for `num_ranks` ranks; the same on every rank.

    Args:
        document_lengths: tokens of each document, in the order of the pack, at least 1 each.
        num_ranks: P, at least 1.
        scheme: see the top of this file.
        ulysses_ranks: only under `two_d`, where it divides P: ranks that exchange heads.
        window_size: the window that weighs the chunks of `gather_kv` and `two_d`; None: none.

    Returns:
        A layout whose padded total divides evenly; at most 8·P - 1 padding tokens.

    Raises:
        ValueError: an argument outside what is written above.

    Example:
        >>> make_layout([5, 2], 2).shard_index(1)
        [4, 5, 6, 7]
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {get_args(Scheme)}, got {scheme!r}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if not document_lengths or min(document_lengths) < 1:
        raise ValueError(
            f"document_lengths must be one or more positive integers, got {list(document_lengths)}"
        )
    if window_size is not None and (window_size < 1 or scheme in ("ulysses", "ring")):
        raise ValueError(
            f"window_size weighs the chunks of 'gather_kv' and 'two_d' and must be positive, "
            f"got {window_size} with scheme {scheme!r}"
        )
    inner = _ulysses_ranks(scheme, num_ranks, ulysses_ranks)
    kv_ranks = num_ranks // inner
    num_tokens = sum(document_lengths)
    balanced = scheme in ("gather_kv", "two_d")
    # A KV rank's shard is cut among its Ulysses ranks, so chunks are multiples of their number.
    padded = _round_up(num_tokens, num_ranks * CHUNKS_PER_RANK if balanced else num_ranks)
    lengths = [*document_lengths] + ([padded - num_tokens] if padded > num_tokens else [])
    cu_seqlens = (0, *accumulate(lengths))
    chunks: tuple[Sequence[int], ...]
    if balanced:
        chunk_tokens = padded // (kv_ranks * CHUNKS_PER_RANK)
        weights = [
            _pairs_between(cu_seqlens, start, start + chunk_tokens, window_size)
            for start in range(0, padded, chunk_tokens)
        ]
        chunks = _assign_heaviest_first(weights, kv_ranks)
    elif scheme == "ring":
        chunk_tokens = 1
        chunks = tuple(range(rank, padded, num_ranks) for rank in range(num_ranks))
    else:
        chunk_tokens = padded
        chunks = (range(1),)
    return SequenceLayout(scheme, num_ranks, inner, num_tokens, cu_seqlens, chunk_tokens, chunks)


def _ulysses_ranks(scheme: Scheme, num_ranks: int, ulysses_ranks: int | None) -> int:
    if scheme != "two_d":
        if ulysses_ranks is not None:
            raise ValueError(f"ulysses_ranks belongs to scheme 'two_d', got scheme {scheme!r}")
        return num_ranks if scheme == "ulysses" else 1
    if ulysses_ranks is None or ulysses_ranks < 1 or num_ranks % ulysses_ranks:
        raise ValueError(
            f"scheme 'two_d' needs ulysses_ranks that divides num_ranks={num_ranks}, "
            f"got {ulysses_ranks}"
        )
    return ulysses_ranks


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _stripe_index(token: int, rank: int, num_ranks: int) -> int:
    """Tokens of the stripe of `rank` before `token`."""
    return max(0, -((rank - token) // num_ranks))


def _documents_within(
    cu_seqlens: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """(document start, first, last + 1) of every document's part of [start, stop)."""
    index = bisect_right(cu_seqlens, start) - 1
    while start < stop:
        last = min(stop, cu_seqlens[index + 1])
        yield cu_seqlens[index], start, last
        start = last
        index += 1


def _pairs_between(
    cu_seqlens: Sequence[int], start: int, stop: int, window_size: int | None
) -> int:
    """Keys seen by the queries in [start, stop), summed."""
    return sum(
        _pairs_before(last - document, window_size) - _pairs_before(first - document, window_size)
        for document, first, last in _documents_within(cu_seqlens, start, stop)
    )


def _pairs_before(position: int, window_size: int | None) -> int:
    """Keys seen by the first `position` queries of a document."""
    growing = position if window_size is None else min(position, window_size)
    full = 0 if window_size is None else window_size * (position - growing)
    return growing * (growing + 1) // 2 + full


def _assign_heaviest_first(weights: Sequence[int], num_ranks: int) -> tuple[Sequence[int], ...]:
    """Every rank gets the same number of chunks; the heaviest go first, to the least loaded."""
    room = len(weights) // num_ranks
    chunks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for chunk in sorted(range(len(weights)), key=lambda chunk: (-weights[chunk], chunk)):
        rank = min(
            (rank for rank in range(num_ranks) if len(chunks[rank]) < room),
            key=lambda rank: (load[rank], rank),
        )
        chunks[rank].append(chunk)
        load[rank] += weights[chunk]
    return tuple(tuple(sorted(held)) for held in chunks)
