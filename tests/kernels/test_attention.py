"""Segment attention against its oracle: values, gradients, external softmax, operators, errors."""

import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels.attention import (
    SegmentTable,
    api,
    attention,
    attention_bwd,
    attention_fwd,
    torch_blocks,
)
from tests.kernels.attention_case import segment_tables
from tests.kernels.loss_case import assert_as_good_as_eager

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
Segments = list[tuple[int, int, int, int]]
EXACT = {"rtol": 1e-12, "atol": 1e-12}

# What breaks packing: single tokens, an empty sequence, queries and keys that nobody names, more
# queries than keys, overlapping and empty ranges of keys, segments out of order, no tokens.
TABLES = {
    "pack": SegmentTable.from_cu_seqlens([0, 5, 6, 6, 7, 20]),
    "single_tokens": SegmentTable.from_cu_seqlens([0, 1, 2, 3]),
    "more_keys": SegmentTable([(0, 4, 0, 11), (4, 3, 2, 9)], 7, 11),
    "more_queries": SegmentTable([(0, 9, 0, 4), (9, 3, 4, 1)], 12, 5),
    "uncovered": SegmentTable([(7, 2, 5, 3), (1, 3, 0, 3)], 12, 10),
    "no_keys": SegmentTable([(0, 3, 2, 0), (3, 2, 0, 2)], 5, 2),
    "prefixes": SegmentTable.from_cu_seqlens([0, 4, 9, 9, 15, 17], [-1, 0, 0, 0, -1]),
    "loose_prefixes": SegmentTable([(0, 3, 4, 2, 1, 3), (3, 5, 6, 1, 0, 2)], 8, 7),
    "no_segments": SegmentTable([], 3, 4),
    "no_tokens": SegmentTable([], 0, 0),
}
HEADS = [(4, 4), (6, 2), (3, 1)]


def make_qkv(
    table: SegmentTable,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = FP64,
    head_size: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves of a table's sizes."""
    shapes = [(table.num_q, heads[0]), (table.num_k, heads[1]), (table.num_k, heads[1])]
    q, k, v = (
        torch.randn(*shape, head_size, dtype=FP64).to(dtype).requires_grad_() for shape in shapes
    )
    return q, k, v


def make_gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse; of the lse −inf they are NaN, which must not reach any result."""
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    return dout, dlse.masked_fill(lse == -torch.inf, torch.nan)


def values_and_gradients(
    qkv: tuple[Tensor, Tensor, Tensor],
    table: SegmentTable,
    gradients: tuple[Tensor, Tensor],
    **options: Any,
) -> list[Tensor]:
    """out, lse, dq, dk, dv by autograd."""
    results = attention(*qkv, segments=table, **options)
    grads = torch.autograd.grad(results, qkv, gradients)
    return [*(x.detach() for x in results), *grads]


def assert_matches_reference(
    table: SegmentTable, heads: tuple[int, int], window_size: int | None, impl: str = "torch"
) -> None:
    """By autograd and by the functions without it."""
    qkv = make_qkv(table, heads)
    options = {"softmax_scale": 0.4, "window_size": window_size}
    out, lse = attention_fwd(*qkv, table, **options, impl="reference")
    gradients = make_gradients(out, lse)
    expected = values_and_gradients(qkv, table, gradients, **options, impl="reference")
    actual = values_and_gradients(qkv, table, gradients, **options, impl=impl)
    for which in (impl, "reference"):
        grads = attention_bwd(
            gradients[0], *qkv, out, lse, table, dlse=gradients[1], **options, impl=which
        )
        for got, want in zip((out, lse, *grads), expected, strict=True):
            torch.testing.assert_close(got, want, **EXACT)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# Values and gradients


def test_reference_is_softmax_over_the_visible_keys() -> None:
    """The oracle against sums written out by hand."""
    table = SegmentTable([(1, 3, 4, 2, 0, 2)], 5, 7)
    q, k, v = make_qkv(table, (2, 1))
    out, lse = attention(
        q, k, v, segments=table, softmax_scale=0.3, window_size=3, impl="reference"
    )
    for i, keys in ((1, [0, 1]), (2, [0, 1, 4]), (3, [1, 4, 5])):
        for h in range(2):
            scores = torch.stack([0.3 * torch.dot(q[i, h], k[j, 0]) for j in keys])
            total = scores.exp().sum()
            expected = sum(s.exp() / total * v[j, 0] for s, j in zip(scores, keys, strict=True))
            torch.testing.assert_close(out[i, h], expected, **EXACT)
            torch.testing.assert_close(lse[h, i], total.log(), **EXACT)
    for i in (0, 4):
        assert (out[i] == 0).all()
        assert (lse[:, i] == -torch.inf).all()


@pytest.mark.parametrize("window_size", [None, 1, 4])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_torch_equals_reference_in_fp64(
    name: str, heads: tuple[int, int], window_size: int | None
) -> None:
    assert_matches_reference(TABLES[name], heads, window_size)


@settings(max_examples=60, deadline=None)
@given(
    segment_tables(max_keys=24, max_queries=9, max_segments=5),
    st.sampled_from(HEADS),
    st.none() | st.integers(1, 10),
    st.sampled_from([1, 40, torch_blocks.MAX_BLOCK_SCORES]),
)
def test_torch_equals_reference_for_any_table(
    table: SegmentTable, heads: tuple[int, int], window_size: int | None, max_scores: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_blocks, "MAX_BLOCK_SCORES", max_scores)
        assert_matches_reference(table, heads, window_size)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.none() | st.integers(1, 40))
def test_torch_equals_reference_for_any_pack(lengths: list[int], window_size: int | None) -> None:
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert_matches_reference(SegmentTable.from_cu_seqlens(offsets), (4, 2), window_size)


@pytest.mark.parametrize("window_size", [None, 100])
def test_torch_equals_reference_over_several_blocks(window_size: int | None) -> None:
    num_tokens = torch_blocks.MAX_BLOCK_Q + 90
    table = SegmentTable([(0, num_tokens, 5, num_tokens + 7)], num_tokens, num_tokens + 12)
    assert_matches_reference(table, (2, 1), window_size)


def num_keys(block: torch_blocks.Block) -> int:
    return block.prefix.stop - block.prefix.start + block.keys.stop - block.keys.start


def test_torch_holds_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of scores stays below the limit, and the blocks cover each query once."""
    monkeypatch.setattr(torch_blocks, "MAX_BLOCK_SCORES", 2**16)
    table = SegmentTable([(0, 3000, 500, 2500, 0, 500), (3000, 40, 0, 10)], 3040, 3000)
    blocks = list(torch_blocks._blocks(table.segments, 4, None))
    sizes = [4 * (b.queries.stop - b.queries.start) * num_keys(b) for b in blocks]
    assert max(sizes) <= 2**16
    queries = [i for b in blocks for i in range(b.queries.start, b.queries.stop)]
    assert queries == [*range(3000), *range(3030, 3040)]


def test_torch_looks_at_the_keys_of_a_window_only() -> None:
    table = SegmentTable([(0, 10_000, 2000, 8000, 0, 2000)], 10_000, 10_000)
    blocks = list(torch_blocks._blocks(table.segments, 2, 16))
    assert max(map(num_keys, blocks)) <= 16 + torch_blocks.MAX_BLOCK_Q


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
def test_torch_is_as_good_as_eager(dtype: torch.dtype) -> None:
    """In narrow types no worse than one matrix in fp32, rounded at the end."""
    table = TABLES["pack"]
    qkv = make_qkv(table, (6, 2), dtype, head_size=32)
    wide: Any = tuple(x.detach().double().requires_grad_() for x in qkv)
    truth_out, truth_lse = attention_fwd(*wide, table, impl="reference")
    gradients = make_gradients(truth_out, truth_lse)
    truths = values_and_gradients(wide, table, gradients, impl="reference")
    narrow = (gradients[0].to(dtype), gradients[1].float())
    ours = values_and_gradients(qkv, table, narrow, impl="torch")
    eager = values_and_gradients(qkv, table, narrow, impl="reference")
    assert [x.dtype for x in ours] == [dtype, FP32, dtype, dtype, dtype]
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert_as_good_as_eager(mine, theirs, truth)


def test_default_scale_is_one_over_the_root_of_the_head_size() -> None:
    qkv = make_qkv(TABLES["pack"])
    for impl in ("torch", "reference"):
        default = attention(*qkv, segments=TABLES["pack"], impl=impl)
        given_scale = attention(*qkv, segments=TABLES["pack"], softmax_scale=8**-0.5, impl=impl)
        torch.testing.assert_close(default, given_scale, **EXACT)


def test_attention_reads_strided_inputs() -> None:
    table = TABLES["pack"]
    fused = torch.randn(table.num_q, 8, 8, dtype=FP64)
    views = fused.split([4, 2, 2], dim=1)
    expected = attention(*(x.contiguous() for x in views), segments=table)
    torch.testing.assert_close(attention(*views, segments=table), expected, rtol=0, atol=0)


def test_attention_reads_no_memory_before_writing_it() -> None:
    """Uninitialised memory is NaN in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_matches_reference(TABLES["uncovered"], (4, 2), None)
    finally:
        torch.use_deterministic_algorithms(before)


def test_attention_ignores_autocast() -> None:
    qkv = make_qkv(TABLES["pack"], dtype=FP32)
    for impl in ("torch", "reference"):
        expected = attention(*qkv, segments=TABLES["pack"], impl=impl)
        with torch.autocast("cpu", BF16):
            actual = attention(*qkv, segments=TABLES["pack"], impl=impl)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_attention_takes_large_scores() -> None:
    """exp of the scores themselves would overflow."""
    table = TABLES["pack"]
    q, k, v = (x.detach() for x in make_qkv(table, dtype=FP32))
    out, lse = attention(1e3 * q, k, v, segments=table, impl="torch")
    expected = attention(1e3 * q.double(), k.double(), v.double(), segments=table, impl="reference")
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-3)


def test_attention_is_differentiable_by_gradcheck() -> None:
    table = SegmentTable([(0, 3, 0, 4), (3, 2, 2, 3)], 5, 5)
    qkv = make_qkv(table, (2, 1), head_size=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, segments=table, window_size=3, impl="torch"), qkv
    )


# A softmax over more keys than one call sees


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bwd_over_halves_of_the_keys_sums_to_the_whole(impl: str) -> None:
    """As a ring does: merge out and lse, then backward each half with the merged ones."""
    whole = SegmentTable([(0, 4, 0, 12), (4, 3, 12, 8)], 7, 20)
    halves = [
        SegmentTable([(0, 4, 0, 7), (4, 3, 12, 5)], 7, 20),
        SegmentTable([(0, 4, 7, 5), (4, 3, 17, 3)], 7, 20),
    ]
    # Every query sees all of the first half, as if the half ended before it.
    q, k, v = make_qkv(whole, (4, 2))
    first = [
        SegmentTable([(i, 1, *halves[0].segments[s][2:])], 7, 20)
        for s, rows in enumerate((range(4), range(4, 7)))
        for i in rows
    ]
    out, lse = attention_fwd(q, k, v, whole, impl=impl)
    gradients = make_gradients(out, lse)
    expected = values_and_gradients((q, k, v), whole, gradients, impl="reference")

    parts = [attention_fwd(q, k, v, table, impl=impl) for table in (*first, halves[1])]
    merged_lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    merged_out = sum(part[0] * torch.exp(part[1] - merged_lse).t()[..., None] for part in parts)
    torch.testing.assert_close(merged_lse, expected[1], **EXACT)
    torch.testing.assert_close(merged_out, expected[0], **EXACT)
    totals = [torch.zeros_like(x) for x in (q, k, v)]
    for table in (*first, halves[1]):
        grads = attention_bwd(gradients[0], q, k, v, out, lse, table, dlse=gradients[1], impl=impl)
        for total, grad in zip(totals, grads, strict=True):
            total += grad
    for total, want in zip(totals, expected[2:], strict=True):
        torch.testing.assert_close(total, want, **EXACT)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bwd_of_an_infinite_lse_is_zero(impl: str) -> None:
    """A query that the larger softmax masks out altogether, though this table shows it keys."""
    table = TABLES["single_tokens"]
    qkv = make_qkv(table)
    out, lse = attention_fwd(*qkv, table)
    lse[:, 1] = -torch.inf
    dq, dk, dv = attention_bwd(torch.ones_like(out), *qkv, out, lse, table, impl=impl)
    for gradient in (dq, dk, dv):
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()
    assert (dv[0] != 0).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bwd_returns_grad_dtype(impl: str) -> None:
    table = TABLES["pack"]
    qkv = make_qkv(table, dtype=BF16)
    out, lse = attention_fwd(*qkv, table, impl=impl)
    dout = torch.randn_like(out)
    narrow = attention_bwd(dout, *qkv, out, lse, table, impl=impl)
    wide = attention_bwd(dout, *qkv, out, lse, table, impl=impl, grad_dtype=FP32)
    for small, large in zip(narrow, wide, strict=True):
        assert (small.dtype, large.dtype) == (BF16, FP32)
        assert torch.equal(large.to(BF16), small)
        assert not torch.equal(large.to(BF16).float(), large)


def test_fwd_and_bwd_record_no_graph() -> None:
    table = TABLES["pack"]
    qkv = make_qkv(table)
    for impl in ("torch", "reference"):
        results = attention_fwd(*qkv, table, impl=impl)
        grads = attention_bwd(results[0], *qkv, *results, table, impl=impl)
        assert not any(x.requires_grad for x in (*results, *grads))


# The operator


@pytest.mark.parametrize("name", ["pack", "uncovered", "no_tokens"])
def test_op_passes_opcheck(name: str) -> None:
    table = TABLES[name]
    torch.library.opcheck(
        torch.ops.lwz.attention.default,
        (*make_qkv(table, dtype=FP32), table.rows, 0.3, None, "torch"),
    )


def test_backward_op_passes_opcheck() -> None:
    table = TABLES["pack"]
    q, k, v = (x.detach() for x in make_qkv(table, dtype=FP32))
    out, lse = attention_fwd(q, k, v, table)
    torch.library.opcheck(
        torch.ops.lwz.attention_backward.default,
        (out, lse, q, k, v, out, lse, table.rows, 0.3, 4, "torch"),
    )


def test_attention_compiles_once_for_tables_of_one_size() -> None:
    """Segments are an input of the graph, not a part of it."""
    tables = [SegmentTable.from_cu_seqlens(offsets) for offsets in ([0, 3, 9], [0, 5, 9])]
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    for table in tables:
        qkv = make_qkv(table)
        expected = attention(*qkv, segments=table, impl="torch")
        torch.testing.assert_close(compiled(*qkv, segments=table, impl="torch"), expected, **EXACT)
    assert count.frame_count == 1


def test_import_needs_torch_alone() -> None:
    code = "import sys, lwz_kernels.attention; print('triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "False"


# Errors


@pytest.mark.parametrize(
    ("segments", "match"),
    [
        ([(0, 1, 0)], r"segments\[0\]: expected q_start, q_len, k_start, k_len"),
        ([(0, 1, 0, 1, 1)], r"segments\[0\]: expected q_start, q_len, k_start, k_len"),
        ([(0, 1, 0, 1, 3, 2)], "expected a prefix range within 4 tokens, got start 3"),
        ([(0, 1, 0, 2, 1, 3)], r"segments\[0\]: key 1 is in the prefix and in the own range"),
        ([(0, 1, 0, 1), (3, 3, 0, 1)], r"segments\[1\]: expected a query range within 5 tokens"),
        ([(-1, 1, 0, 1)], "query range"),
        ([(0, -1, 0, 1)], "query range"),
        ([(0, 1, 3, 2)], "expected a key range within 4 tokens, got start 3 and length 2"),
        ([(0, 1, 0, -2)], "key range"),
        (
            [(2, 2, 0, 1), (1, 0, 0, 1), (0, 3, 0, 1)],
            r"segments\[2\] and segments\[0\] share query 2",
        ),
    ],
)
def test_segment_table_refuses(segments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SegmentTable(segments, 5, 4)


def test_segment_table_refuses_fractions_and_negative_sizes() -> None:
    with pytest.raises(TypeError, match="integer"):
        SegmentTable([(0, 1.5, 0, 1)], 5, 4)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_q and num_k >= 0, got -1 and 4"):
        SegmentTable([], -1, 4)


@pytest.mark.parametrize(
    ("offsets", "match"), [([], "start with 0"), ([1, 2], "start with 0"), ([0, 3, 2], "ascending")]
)
def test_from_cu_seqlens_refuses(offsets: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SegmentTable.from_cu_seqlens(offsets)


def test_segment_table_holds_its_segments_as_a_tensor() -> None:
    table = SegmentTable.from_cu_seqlens([0, 2, 5])
    assert (table.num_q, table.num_k) == (5, 5)
    assert table.segments == ((0, 2, 0, 2, 0, 0), (2, 3, 2, 3, 0, 0))
    assert table.rows.tolist() == [[0, 2, 0, 2, 0, 0], [2, 3, 2, 3, 0, 0]]
    assert table == SegmentTable([(0, 2, 0, 2), (2, 3, 2, 3)], 5, 5)
    assert table != SegmentTable([(0, 2, 0, 2), (2, 3, 2, 3)], 5, 6)
    assert len({table, SegmentTable.from_cu_seqlens((0, 2, 5), [-1, -1])}) == 1
    assert repr(table) == "SegmentTable([(0, 2, 0, 2), (2, 3, 2, 3)], num_q=5, num_k=5)"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": torch.zeros(3, 4)}, ValueError, r"expected q \[Tq, H, K\]"),
        ({"v": torch.zeros(3, 2, 4)}, ValueError, r"k, v \[Tk, J, K\]"),
        ({"q": torch.zeros(3, 4, 9)}, ValueError, r"expected q \[Tq, H, K\]"),
        ({"q": torch.zeros(3, 3, 8)}, ValueError, "multiples of KV heads"),
        ({"q": torch.zeros(3, 0, 8)}, ValueError, "multiples of KV heads"),
        ({"k": torch.zeros(3, 2, 8, dtype=FP64)}, TypeError, "one floating point dtype"),
        ({"v": torch.zeros(3, 2, 8, dtype=BF16)}, TypeError, "cast them to one"),
        ({"v": torch.zeros(3, 2, 8, device="meta")}, ValueError, "v on meta"),
        ({"segments": [(0, 3, 0, 3)]}, TypeError, "expected a SegmentTable, got list"),
        ({"segments": SegmentTable([], 3, 4)}, ValueError, "for 3 queries and 4 keys"),
        ({"window_size": 0}, ValueError, "expected window_size >= 1"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast', expected one of auto"),
        ({"impl": "triton"}, NotImplementedError, "impl='triton' needs CUDA tensors, got cpu"),
    ],
)
def test_attention_refuses(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(3, 4, 8),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "segments": SegmentTable([], 3, 3),
    } | changes
    with pytest.raises(error, match=match):
        attention(**arguments)
    with pytest.raises(error, match=match):
        attention_fwd(**arguments)
    if arguments["q"].ndim == 3:
        out, lse = torch.zeros_like(arguments["q"]), torch.zeros(arguments["q"].shape[1], 3)
        with pytest.raises(error, match=match):
            attention_bwd(dout=out, out=out, lse=lse, **arguments)


def test_attention_refuses_integers() -> None:
    qkv = [torch.zeros(3, 2, 8, dtype=torch.int64) for _ in range(3)]
    with pytest.raises(TypeError, match="one floating point dtype"):
        attention(*qkv, segments=SegmentTable([], 3, 3))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dout": torch.zeros(3, 2, 8)}, ValueError, r"expected dout \[3, 4, 8\]"),
        ({"out": torch.zeros(4, 4, 8)}, ValueError, r"expected out \[3, 4, 8\]"),
        ({"out": torch.zeros(3, 4, 8, dtype=torch.int32)}, TypeError, "floating point out"),
        ({"lse": torch.zeros(3, 4)}, ValueError, r"expected lse \[4, 3\], got \[3, 4\]"),
        ({"lse": torch.zeros(4, 3, dtype=BF16)}, TypeError, "lse in torch.float32"),
        ({"dlse": torch.zeros(3, 4)}, ValueError, r"expected dlse \[4, 3\]"),
        ({"dlse": torch.zeros(4, 3, dtype=FP64)}, TypeError, "dlse in torch.float32"),
        ({"dout": torch.zeros(3, 4, 8, device="meta")}, ValueError, "one device, got cpu, meta"),
        ({"grad_dtype": torch.int32}, TypeError, "floating point grad_dtype"),
    ],
)
def test_attention_bwd_refuses(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {
        "dout": torch.zeros(3, 4, 8),
        "q": torch.zeros(3, 4, 8),
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "out": torch.zeros(3, 4, 8),
        "lse": torch.zeros(4, 3),
        "segments": SegmentTable([], 3, 3),
    } | changes
    with pytest.raises(error, match=match):
        attention_bwd(**arguments)


def test_example_in_the_docstring_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(attention, "attention", globs={"torch": torch, **vars(api)})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0
