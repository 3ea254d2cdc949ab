"""How the Triton kernels cut a table into programs: host integers, made once per table.

Queries and keys within a tile are counted from its start. The longest tiles come first, so that the
short ones fill the multiprocessors that end early. Nothing here needs triton.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lwz_kernels.attention.segments import Segment

__all__ = ["KeyTile", "QueryRange", "QueryTile", "key_tiles", "query_tiles"]


class QueryTile(NamedTuple):
    """Queries of one segment, each of which sees a key.

    Keys are counted over the prefix and then the own range: key j is row k_start + j, and before
    prefix_len it is prefix_jump rows further.
    """

    q_start: int
    num_q: int
    k_start: int
    last_key: int
    """The last key that the first query sees; one more for each further."""
    prefix_len: int
    prefix_jump: int


class KeyTile(NamedTuple):
    """Keys of any segments, and which query ranges see any of them."""

    k_start: int
    first_range: int
    end_range: int


class QueryRange(NamedTuple):
    """Queries of one segment that see a key of one tile, worked on in blocks from q_start on.

    Between full_start and full_end, whole blocks, every query sees every key of the tile. Elsewhere
    query i sees the columns c of the tile with first_column <= c <= i + last_column_offset and
    c < end_column.
    """

    q_start: int
    full_start: int
    full_end: int
    q_end: int
    last_column_offset: int
    first_column: int
    end_column: int


class KeyRange(NamedTuple):
    """Consecutive keys of a segment: query i of it sees the keys j <= i + shift of the range."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    shift: int


def query_tiles(
    segments: Sequence[Segment], block_q: int, window_size: int | None
) -> list[QueryTile]:
    """Tiles of up to `block_q` queries; those that see nothing are in none."""
    tiles = []
    for segment in segments:
        k_start = segment.k_start - segment.prefix_len
        prefix_jump = segment.prefix_start - k_start if segment.prefix_len else 0
        for i in range(max(0, -segment.shift), segment.q_len, block_q):
            tiles.append(
                QueryTile(
                    q_start=segment.q_start + i,
                    num_q=min(block_q, segment.q_len - i),
                    k_start=k_start,
                    last_key=i + segment.shift,
                    prefix_len=segment.prefix_len,
                    prefix_jump=prefix_jump,
                )
            )

    def num_keys(tile: QueryTile) -> int:
        seen = tile.last_key + tile.num_q
        return seen if window_size is None else min(seen, window_size + tile.num_q)

    return sorted(tiles, key=num_keys, reverse=True)


def key_tiles(
    segments: Sequence[Segment], num_k: int, block_k: int, block_q: int, window_size: int | None
) -> tuple[list[KeyTile], list[QueryRange]]:
    """Tiles that cover every key once, with their query ranges, in the order of the segments."""
    ranges_of: list[list[QueryRange]] = [[] for _ in range(0, num_k, block_k)]
    for keys in _key_ranges(segments):
        for i_tile in range(keys.k_start // block_k, -(-(keys.k_start + keys.k_len) // block_k)):
            queries = _query_range(keys, i_tile * block_k, block_k, block_q, window_size)
            if queries.q_start < queries.q_end:
                ranges_of[i_tile].append(queries)

    def num_queries(i_tile: int) -> int:
        return sum(queries.q_end - queries.q_start for queries in ranges_of[i_tile])

    tiles: list[KeyTile] = []
    ranges: list[QueryRange] = []
    for i_tile in sorted(range(len(ranges_of)), key=num_queries, reverse=True):
        first = len(ranges)
        ranges += ranges_of[i_tile]
        tiles.append(KeyTile(i_tile * block_k, first, len(ranges)))
    return tiles, ranges


def _key_ranges(segments: Sequence[Segment]) -> Iterator[KeyRange]:
    """The prefix of each segment, if it has one, and its own keys."""
    for row in segments:
        if row.prefix_len:
            yield KeyRange(row.q_start, row.q_len, row.prefix_start, row.prefix_len, row.shift)
        yield KeyRange(row.q_start, row.q_len, row.k_start, row.k_len, row.k_len - row.q_len)


def _query_range(
    keys: KeyRange, tile_start: int, block_k: int, block_q: int, window_size: int | None
) -> QueryRange:
    """The queries that see keys of the tile; empty if none does."""
    q_start, q_len, k_start, k_len, shift = keys
    # First and last key of the range in the tile, counted from the range's start.
    first = max(0, tile_start - k_start)
    last = min(k_len, tile_start + block_k - k_start) - 1
    start = max(0, first - shift)
    end = q_len if window_size is None else min(q_len, last - shift + window_size)
    full_start = full_end = start
    if last - first == block_k - 1:
        blocks_before = max(0, -(-(last - shift - start) // block_q))
        all_end = q_len if window_size is None else min(q_len, first - shift + window_size)
        num_full = (all_end - start) // block_q - blocks_before
        if num_full > 0:
            full_start = start + blocks_before * block_q
            full_end = full_start + num_full * block_q
    return QueryRange(
        q_start=q_start + start,
        full_start=q_start + full_start,
        full_end=q_start + full_end,
        q_end=q_start + end,
        last_column_offset=k_start + shift - q_start - tile_start,
        first_column=max(0, k_start - tile_start),
        end_column=min(block_k, k_start + k_len - tile_start),
    )
