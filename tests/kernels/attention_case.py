"""Tables of segments for property tests of attention."""

from hypothesis import strategies as st

from lwz_kernels.attention import SegmentTable

__all__ = ["segment_tables"]


@st.composite
def segment_tables(
    draw: st.DrawFn, *, max_keys: int, max_queries: int, max_segments: int
) -> SegmentTable:
    """Any table: gaps between ranges of queries, keys and prefixes anywhere, rows in any order."""
    num_k = draw(st.integers(0, max_keys))
    segments, num_q = [], 0
    for _ in range(draw(st.integers(0, max_segments))):
        q_start = num_q + draw(st.integers(0, 2))
        q_len = draw(st.integers(0, max_queries))
        bounds = sorted(draw(st.tuples(*(st.integers(0, num_k),) * 4)))
        keys, prefix = draw(st.permutations([bounds[:2], bounds[2:]]))
        row = [q_start, q_len, keys[0], keys[1] - keys[0]]
        if draw(st.booleans()):
            row += [prefix[0], prefix[1] - prefix[0]]
        segments.append(row)
        num_q = q_start + q_len
    segments = draw(st.permutations(segments))
    return SegmentTable(segments, num_q + draw(st.integers(0, 2)), num_k)
