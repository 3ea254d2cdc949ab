"""The Triton kernels of attention: interpreted without a GPU, compiled on one.

tl.dot of bf16 is wrong in the interpreter, so its cases are fp32 and fp64. Interpreted tiles are 16
queries by 32 keys (dq: 32 by 16), so the sizes here are around multiples of both. What the
interpreter cannot show (spills, shared memory, matrix instructions) is in test_triton_compile.
"""

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels.attention import (
    SegmentTable,
    attention_bwd,
    attention_fwd,
)
from lwz_kernels.attention.op import run_attention_bwd, run_attention_fwd
from lwz_kernels.attention.segments import Segment
from lwz_kernels.attention.tiles import key_tiles, query_tiles
from tests.kernels.attention_case import segment_tables
from tests.kernels.loss_case import assert_as_good_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
# NumPy warns where rows past a tile's end give −inf − (−inf) or 0 / 0, which is not stored.
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not IS_INTERPRETED, reason="fp32 and fp64 are for the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FP32, FP64 = torch.float32, torch.float64
SCALE = 0.4

# One token; a block less one, a block, one more; several blocks; what breaks packing (empty
# sequences, more queries than keys, uncovered queries, overlapping and empty ranges of keys).
TABLES = {
    "single_tokens": SegmentTable.from_cu_seqlens([0, 1, 2, 3]),
    "block_less_one": SegmentTable.from_cu_seqlens([0, 31]),
    "block": SegmentTable.from_cu_seqlens([0, 32]),
    "block_and_one": SegmentTable.from_cu_seqlens([0, 33, 50]),
    "blocks": SegmentTable.from_cu_seqlens([0, 3, 3, 103]),
    "more_keys": SegmentTable([(0, 20, 0, 80), (20, 37, 13, 70)], 57, 83),
    "more_queries": SegmentTable([(0, 70, 40, 34), (70, 3, 4, 1)], 73, 74),
    "uncovered": SegmentTable([(40, 20, 50, 45), (1, 33, 2, 40)], 64, 130),
    "no_keys": SegmentTable([(0, 3, 2, 0)], 5, 2),
    "prefixes": SegmentTable.from_cu_seqlens([0, 37, 80, 80, 113], [-1, 0, 0, 0]),
    "prefix_behind": SegmentTable([(0, 40, 2, 20, 70, 33), (40, 3, 5, 60)], 43, 110),
    "no_tokens": SegmentTable([], 0, 0),
}


def make_case(
    table: SegmentTable, heads: tuple[int, int], head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(table.num_q, heads[0]), (table.num_k, heads[1]), (table.num_k, heads[1])]
    q, k, v = (torch.randn(*x, head_size, dtype=FP64).to(DEVICE, dtype) for x in shapes)
    return q, k, v


def run(
    qkv: tuple[Tensor, Tensor, Tensor],
    table: SegmentTable,
    gradients: tuple[Tensor, Tensor],
    window_size: int | None,
    impl: str,
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by the kernels or by torch, whatever the device."""
    out, lse = run_attention_fwd(*qkv, table, SCALE, window_size, impl)
    dtype = qkv[0].dtype
    grads = run_attention_bwd(*gradients, *qkv, out, lse, table, SCALE, window_size, impl, dtype)
    return out, lse, *grads


def assert_exact(
    table: SegmentTable, heads: tuple[int, int], head_size: int, window_size: int | None
) -> None:
    """In fp64, against the oracle."""
    options: Any = {"softmax_scale": SCALE, "window_size": window_size, "impl": "reference"}
    qkv = make_case(table, heads, head_size, FP64)
    out, lse = attention_fwd(*qkv, table, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dlse = dlse.masked_fill(lse == -torch.inf, torch.nan)
    expected = attention_bwd(dout, *qkv, out, lse, table, dlse=dlse, **options)
    ours = run(qkv, table, (dout, dlse), window_size, "triton")
    for mine, truth in zip(ours, (out, lse, *expected), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


class TestInterpreted:
    """The kernels' arithmetic and indices."""

    pytestmark = interpreted

    @pytest.mark.parametrize("window_size", [None, 1, 20, 64])
    @pytest.mark.parametrize("name", TABLES)
    def test_kernels_in_fp64_are_exact(self, name: str, window_size: int | None) -> None:
        assert_exact(TABLES[name], (2, 1), 16, window_size)

    @pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
    @pytest.mark.parametrize("head_size", [5, 16, 24])
    def test_kernels_take_any_heads(self, heads: tuple[int, int], head_size: int) -> None:
        assert_exact(SegmentTable([(1, 20, 3, 37)], 22, 41), heads, head_size, None)

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_kernels_take_any_table(self, data: st.DataObject) -> None:
        tables = segment_tables(max_keys=70, max_queries=40, max_segments=3)
        window_size = data.draw(st.none() | st.integers(1, 50))
        assert_exact(data.draw(tables), (2, 1), 4, window_size)

    def test_kernels_in_fp32_are_as_good_as_eager(self) -> None:
        table = TABLES["more_keys"]
        qkv = make_case(table, (4, 2), 32, FP32)
        out, _ = run_attention_fwd(*qkv, table, SCALE, None, "torch")
        gradients = torch.randn_like(out), torch.randn(4, table.num_q)
        ours = run(qkv, table, gradients, None, "triton")
        eager = run(qkv, table, gradients, None, "torch")
        q, k, v = (x.double() for x in qkv)
        wide = gradients[0].double(), gradients[1].double()
        truths = run((q, k, v), table, wide, None, "torch")
        for mine, theirs, truth in zip(ours, eager, truths, strict=True):
            assert mine.dtype == FP32
            assert_as_good_as_eager(mine, theirs, truth)

    def test_kernels_read_strides(self) -> None:
        """q, k and v as views of one fused tensor, dout with a stride along K."""
        table = TABLES["block_and_one"]
        fused = torch.randn(table.num_q, 4, 16, dtype=FP64)
        q, k, v = fused.split([2, 1, 1], dim=1)
        dout = torch.randn(16, table.num_q, 2, dtype=FP64).permute(1, 2, 0)
        dlse = torch.randn(2, table.num_q, dtype=FP64)
        ours = run((q, k, v), table, (dout, dlse), None, "triton")
        apart = (q.contiguous(), k.contiguous(), v.contiguous())
        expected = run(apart, table, (dout.contiguous(), dlse), None, "torch")
        for mine, truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)

    def test_heads_may_lie_past_the_range_of_32_bits(self) -> None:
        """Head-major q and dout of a long pack; memory between the heads is never touched."""
        table = SegmentTable.from_cu_seqlens([0, 5])
        q, k, v = make_case(table, (3, 1), 8, torch.float16)
        dout, dlse = torch.randn_like(q), torch.randn(3, 5)
        apart = run((q, k, v), table, (dout, dlse), None, "triton")
        memory = torch.empty(2**31 + 80, dtype=torch.float16, device=DEVICE)
        far = [memory[start:].as_strided(q.shape, (8, 2**30, 1)) for start in (0, 40)]
        for mine, near in zip(far, (q, dout), strict=True):
            mine.copy_(near)
        found = run((far[0], k, v), table, (far[1], dlse), None, "triton")
        assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))

    def test_kernels_take_the_lse_of_a_larger_softmax(self) -> None:
        """Backward of two halves of the keys with the merged lse sums to the whole."""
        whole = SegmentTable([(0, 5, 0, 60)], 5, 60)
        halves = [SegmentTable([(i, 1, 0, 30) for i in range(5)], 5, 60)]
        halves.append(SegmentTable([(0, 5, 30, 30)], 5, 60))
        qkv = make_case(whole, (2, 1), 8, FP64)
        out, lse = run_attention_fwd(*qkv, whole, SCALE, None, "triton")
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        expected = run(qkv, whole, (dout, dlse), None, "torch")[2:]
        parts = [
            run_attention_bwd(dout, dlse, *qkv, out, lse, table, SCALE, None, "triton", FP64)
            for table in halves
        ]
        for first, second, truth in zip(*parts, expected, strict=True):
            torch.testing.assert_close(first + second, truth, rtol=1e-11, atol=1e-11)

    def test_bwd_of_an_infinite_lse_is_zero(self) -> None:
        table = TABLES["single_tokens"]
        qkv = make_case(table, (2, 1), 8, FP64)
        out, lse = run_attention_fwd(*qkv, table, SCALE, None, "triton")
        lse[:, 1] = -torch.inf
        dlse = torch.full_like(lse, torch.nan)
        dlse[:, [0, 2]] = 1.0
        grads = run_attention_bwd(out, dlse, *qkv, out, lse, table, SCALE, None, "triton", FP32)
        for gradient in grads:
            assert gradient.dtype == FP32
            assert gradient.isfinite().all()
            assert (gradient[1] == 0).all()


# Tiles


def keys_of(row: Segment) -> list[int]:
    prefix = range(row.prefix_start, row.prefix_start + row.prefix_len)
    return [*prefix, *range(row.k_start, row.k_start + row.k_len)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tiles_cover_every_visible_pair_once(data: st.DataObject) -> None:
    """Both cuts against the definition; whole blocks of a query range are seen whole."""
    block_k, block_q = data.draw(st.sampled_from([4, 8])), 4
    table = data.draw(segment_tables(max_keys=40, max_queries=15, max_segments=4))
    window = data.draw(st.none() | st.integers(1, 12))
    pairs = sorted(
        (row.q_start + i, key)
        for row in table.segments
        for i in range(row.q_len)
        for j, key in enumerate(keys_of(row))
        if j <= i + row.shift and (window is None or j > i + row.shift - window)
    )
    by_query = [
        (tile.q_start + i, tile.k_start + j + (tile.prefix_jump if j < tile.prefix_len else 0))
        for tile in query_tiles(table.segments, block_q, window)
        for i in range(tile.num_q)
        for j in range(tile.last_key + i + 1)
        if window is None or j > tile.last_key + i - window
    ]
    assert sorted(by_query) == pairs
    tiles, ranges = key_tiles(table.segments, table.num_k, block_k, block_q, window)
    assert sorted(tile.k_start for tile in tiles) == [*range(0, table.num_k, block_k)]
    by_key = []
    for tile in tiles:
        for r in ranges[tile.first_range : tile.end_range]:
            assert r.q_start <= r.full_start <= r.full_end <= r.q_end
            assert (r.full_start - r.q_start) % block_q == 0
            assert (r.full_end - r.full_start) % block_q == 0
            for i in range(r.q_start, r.q_end):
                last = i + r.last_column_offset
                seen = [
                    c
                    for c in range(r.first_column, min(r.end_column, last + 1))
                    if window is None or c > last - window
                ]
                assert len(seen) == block_k or not r.full_start <= i < r.full_end
                by_key += [(i, tile.k_start + c) for c in seen]
    assert sorted(by_key) == pairs


def test_tiles_with_most_work_come_first() -> None:
    segments = SegmentTable.from_cu_seqlens([0, 10, 60, 90]).segments
    ends = [tile.last_key + tile.num_q for tile in query_tiles(segments, 16, None)]
    assert ends == sorted(ends, reverse=True)
    tiles, ranges = key_tiles(segments, 90, 16, 16, None)
    work = [
        sum(r.q_end - r.q_start for r in ranges[tile.first_range : tile.end_range])
        for tile in tiles
    ]
    assert all(before >= after for before, after in pairwise(work))
    assert work[0] > work[-1] > 0


def test_what_is_derived_from_a_table_is_made_once() -> None:
    table = SegmentTable.from_cu_seqlens([0, 4])
    first = table.cached(("key",), lambda: (torch.zeros(1),))
    assert table.cached(("key",), lambda: (torch.ones(1),)) is first


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", [None, 500])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_kernels_in_bf16_are_as_good_as_eager_and_deterministic(
    head_size: int, window_size: int | None
) -> None:
    segments = [(0, 900, 100, 1500), (900, 1, 7, 1), (1000, 700, 500, 300, 0, 200)]
    table = SegmentTable(segments, 1800, 1700)
    qkv = make_case(table, (8, 2), head_size, torch.bfloat16)
    q, k, v = (x.double() for x in qkv)
    dout = torch.randn(q.shape, device=DEVICE).bfloat16()
    dlse = torch.randn(8, table.num_q, device=DEVICE)
    ours = run(qkv, table, (dout, dlse), window_size, "triton")
    again = run(qkv, table, (dout, dlse), window_size, "triton")
    truths = run((q, k, v), table, (dout.double(), dlse.double()), window_size, "torch")
    for mine, same, truth in zip(ours, again, truths, strict=True):
        assert torch.equal(mine, same)
        finite = truth.isfinite()
        assert torch.equal(mine.isfinite(), finite)
        error = (mine.double() - truth)[finite].norm() / truth[finite].norm()
        assert error < 5e-3
