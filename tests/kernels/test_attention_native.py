"""The native kernel for packs of bf16, on processors that multiply pairs of them."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.attention import SegmentTable, attention, resolve_impl
from tests.kernels.loss_case import assert_as_good_as_eager
from tests.kernels.test_attention_backends import PACKS, make_qkv, values_and_grads

BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(
    not native.is_available() or not native.supports_attention(64),
    reason="needs the native library and AVX512-BF16",
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable) -> Tensor:
    """out as transformers' eager attention has it: scores, probabilities and products in bf16."""
    sees_QK = torch.zeros(table.num_q, table.num_k, dtype=torch.bool)
    for row in table.segments:
        prefix = slice(row.prefix_start, row.prefix_start + row.prefix_len)
        own = slice(row.q_start, row.q_start + row.q_len)
        sees_QK[own, prefix] = True
        sees_QK[own, own] = torch.ones(row.q_len, row.q_len, dtype=torch.bool).tril()
    group = q.shape[1] // k.shape[1]
    q_HTK, k_HTK, v_HTK = (
        x.transpose(0, 1) for x in (q, *(y.repeat_interleave(group, 1) for y in (k, v)))
    )
    scores_HQK = q_HTK @ k_HTK.transpose(1, 2) * q.shape[2] ** -0.5
    p_HQK = scores_HQK.masked_fill(~sees_QK, float("-inf")).softmax(-1, dtype=torch.float32)
    return (p_HQK.to(q.dtype) @ v_HTK).transpose(0, 1)


@pytest.mark.parametrize(("heads", "head_size"), [((4, 4), 64), ((9, 3), 64), ((2, 1), 128)])
@pytest.mark.parametrize("pack", PACKS)
def test_native_is_as_good_as_eager(pack: str, heads: tuple[int, int], head_size: int) -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS[pack])
    qkv = make_qkv(table.num_q, heads, head_size, BF16)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    dout = torch.randn_like(qkv[0])
    truth, lse = attention(*wide, segments=table, impl="reference")
    eager = eager_attention(*qkv, table)
    ours, our_lse = attention(*qkv, segments=table, impl="native")
    torch.testing.assert_close(our_lse, lse.float(), rtol=1e-6, atol=2e-6)
    results = [
        (out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype)))
        for out, leaves in ((ours, qkv), (eager, qkv), (truth, wide))
    ]
    # ds of a token that sees itself alone is a difference of two equal sums.
    magnitude = float(dout.float().norm() * wide[2].detach().norm())
    for mine, theirs, exact in zip(*results, strict=True):
        assert mine.dtype == BF16
        assert_as_good_as_eager(mine, theirs, exact, magnitude=magnitude)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_native_equals_reference_for_any_pack(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=5).filter(any))
    roots = [data.draw(st.booleans()) for _ in lengths]
    candidates = [i for i, is_root in enumerate(roots) if is_root]
    prefix_of = [
        -1 if is_root or not candidates else data.draw(st.sampled_from([-1, *candidates]))
        for is_root in roots
    ]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    table = SegmentTable.from_cu_seqlens(offsets, prefix_of)
    qkv = make_qkv(table.num_q, (2, 1), 64, BF16)
    wide = tuple(x.detach().double().requires_grad_() for x in qkv)
    expected = values_and_grads(wide, table, "reference")
    actual = values_and_grads(qkv, table, "native")
    for got, want in zip(actual, expected, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * scale)


def test_bits_depend_on_neither_threads_nor_other_groups() -> None:
    """A group alone, and the same one behind another."""
    alone = SegmentTable.from_cu_seqlens([0, 9, 80, 151], [-1, 0, 0])
    behind = SegmentTable.from_cu_seqlens([0, 70, 79, 150, 221], [-1, -1, 1, 1])
    q, k, v = make_qkv(221, (6, 2), 64, BF16)
    dout = torch.randn_like(q)
    found = []
    for table, first, num_threads in ((alone, 70, 1), (alone, 70, 2), (behind, 0, 2)):
        torch.set_num_threads(num_threads)
        qkv = [x[first:].detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*qkv, segments=table, impl="native")
        results = [out, lse.t(), *torch.autograd.grad(out, qkv, dout[first:])]
        found.append([x[-151:] for x in results])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_native_reads_views_and_copies_what_it_cannot_read() -> None:
    table = SegmentTable.from_cu_seqlens([0, 30, 75])
    fused = torch.randn(75, 10, 64, dtype=BF16)
    views = (fused[:, :6], fused[:, 6:8], fused[:, 8:])
    odd = tuple(torch.randn(75, x.shape[1], 65, dtype=BF16)[..., 1:] for x in views)
    for got, want in zip(odd, views, strict=True):
        got.copy_(want)
    turned = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in views)
    results = []
    for qkv in ([x.contiguous() for x in views], views, odd, turned):
        leaves = tuple(x.detach().requires_grad_() for x in qkv)
        results.append(values_and_grads(leaves, table, "native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_native_does_not_depend_on_the_default_device() -> None:
    tables = [SegmentTable.from_cu_seqlens(*PACKS["group"]) for _ in range(2)]
    qkv = make_qkv(tables[0].num_q, (4, 2), 64, BF16)
    expected = attention(*qkv, segments=tables[0], impl="native")
    with torch.device("meta"):
        found = attention(*qkv, segments=tables[1], impl="native")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_number_that_is_none_stays_in_its_sequence() -> None:
    table = SegmentTable.from_cu_seqlens([0, 70, 140])
    q, k, v = make_qkv(140, (2, 1), 64, BF16)
    with torch.no_grad():
        v[5] = float("nan")
    out, _ = attention(q, k, v, segments=table, impl="native")
    assert out[70:].isfinite().all()
    assert out[5:70].isnan().all()


def test_native_is_the_choice_for_bf16_and_says_what_it_needs() -> None:
    table = SegmentTable.from_cu_seqlens([0, 3])
    qkv = make_qkv(3, (2, 1), 64, BF16)
    assert resolve_impl(qkv[0], table) == "native"
    assert resolve_impl(qkv[0].float(), table) == "sdpa"
    assert resolve_impl(qkv[0][..., :32], table) == "sdpa"
    for q, window_size, match in (
        (qkv[0].float(), None, "needs bfloat16, got torch.float32"),
        (qkv[0][..., :32], None, "a head size in 64s up to 256, got 32"),
        (qkv[0], 2, "knows no windows"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            resolve_impl(q, table, window_size=window_size, impl="native")
