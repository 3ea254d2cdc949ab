"""Paged attention: every implementation and instruction set against the oracle; cache writes."""

import doctest
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels import dispatch, native
from lwz_kernels.paged_attention import api, paged_attention, store_kv
from lwz_kernels.paged_attention.op import paged_attention_op, store_kv_op
from tests.kernels.paged_case import assert_as_good_as_reference, exact, make_problem

needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
LEVELS = native.levels() if native.is_available() else ()
HEAD_SIZES = (8, 32, 40, 64, 80, 96, 112, 128, 256, 512)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_is_as_good_as_reference(level: str, dtype: torch.dtype, head_size: int) -> None:
    # Contexts around a vector (8), a block (64) and a chunk (256) of keys, and zero.
    problem = make_problem([0, 1, 7, 64, 65, 255, 256, 257, 530], 6, 2, head_size, 16, dtype)
    out = native.paged_attention(**problem, softmax_scale=head_size**-0.5, level=level)
    assert_as_good_as_reference(out, problem)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
@pytest.mark.parametrize("level", LEVELS)
def test_native_handles_any_group(level: str, group: int) -> None:
    problem = make_problem([3, 100], 2 * group, 2, 64, 16, torch.bfloat16)
    out = native.paged_attention(**problem, softmax_scale=0.125, level=level)
    assert_as_good_as_reference(out, problem)


@pytest.mark.parametrize("page_size", [1, 3, 16, 100, 256])
@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch"])
def test_paged_attention_handles_any_page_size(impl: str, page_size: int) -> None:
    problem = make_problem([1, 99, 300], 9, 3, 64, page_size, torch.float32)
    assert_as_good_as_reference(paged_attention(**problem, impl=impl), problem)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch"])
def test_paged_attention_survives_large_scores(impl: str) -> None:
    problem = make_problem([400], 2, 1, 64, 16, torch.float32, spread=300.0)
    out = paged_attention(**problem, impl=impl)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), exact(problem), rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_native_shows_non_finite_keys(bad: float) -> None:
    problem = make_problem([70, 70], 2, 2, 64, 16, torch.float32)
    problem["k_cache"][problem["page_table"][0, 2], 5, 1, 3] = bad
    problem["q"][0, 1, 3] = 1.0
    out = paged_attention(**problem, impl="native")
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [63, 256, 257])
@pytest.mark.parametrize("level", LEVELS)
def test_native_infinite_value_stays_infinite(level: str, length: int, dtype: torch.dtype) -> None:
    """Kernels that take keys in pairs must not multiply the last one by the weight of none."""
    problem = make_problem([length], 3, 1, 64, 16, dtype)
    last = length - 1
    problem["v_cache"][problem["page_table"][0, last // 16], last % 16, 0, 5] = float("inf")
    out = native.paged_attention(**problem, softmax_scale=0.125, level=level)
    assert out[0, :, 5].eq(float("inf")).all()
    assert out[0, :, :5].isfinite().all()
    assert out[0, :, 6:].isfinite().all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_result_ignores_batch_and_threads(dtype: torch.dtype) -> None:
    """Sampling log-probabilities must not depend on which requests run together."""
    problem = make_problem([700, 33, 1, 512], 9, 3, 64, 16, dtype)
    alone = {name: x if name.endswith("cache") else x[:1] for name, x in problem.items()}
    first = paged_attention(**alone, impl="native")
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(paged_attention(**problem, impl="native")[:1], first)
        assert torch.equal(paged_attention(**alone, impl="native"), first)


@settings(max_examples=30, deadline=None)
@given(
    context_lens=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    group=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_size=st.sampled_from([8, 24, 64]),
    page_size=st.integers(1, 40),
)
@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch"])
def test_paged_attention_equals_reference_anywhere(
    impl: str,
    context_lens: list[int],
    group: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
) -> None:
    problem = make_problem(
        context_lens, group * num_kv_heads, num_kv_heads, head_size, page_size, torch.float32
    )
    assert_as_good_as_reference(paged_attention(**problem, impl=impl), problem)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
def test_softmax_scale_is_used(impl: str) -> None:
    problem = make_problem([20], 2, 2, 64, 16, torch.float32)
    default = paged_attention(**problem, impl=impl)
    torch.testing.assert_close(
        default, paged_attention(**problem, softmax_scale=0.125, impl=impl), rtol=0, atol=1e-6
    )
    sharper = paged_attention(**problem, softmax_scale=0.5, impl=impl)
    assert not torch.allclose(default, sharper, atol=1e-3)


@needs_native
def test_native_takes_strided_queries() -> None:
    """q comes as a slice of the fused projection."""
    problem = make_problem([20, 5], 4, 2, 64, 16, torch.float32)
    expected = paged_attention(**problem, impl="native")
    fused = torch.zeros(2, 8, 64)
    fused[:, 2:6] = problem["q"]
    problem["q"] = fused[:, 2:6]
    assert torch.equal(paged_attention(**problem, impl="native"), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_vector_exp_is_within_its_stated_error(level: str) -> None:
    x = torch.cat([-torch.rand(2**16) * 87.3, -torch.rand(2**16), torch.zeros(16)])
    exact = x.double().exp()
    error = ((native.vector_exp(x, level).double() - exact) / exact).abs().max().item()
    assert error < 2.5e-7


@pytest.mark.parametrize("level", LEVELS)
def test_vector_exp_keeps_zero_and_nan(level: str) -> None:
    x = torch.tensor([0.0, -87.4, -1e30, -float("inf"), float("nan"), -0.0] + [0.0] * 10)
    out = native.vector_exp(x, level)
    assert out[:4].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert out[4].isnan()
    assert out[5].item() == 1.0


def test_vector_exp_refuses_odd_lengths() -> None:
    with pytest.raises(ValueError, match="multiple of 16 values, got 3"):
        native.vector_exp(torch.zeros(3), "generic")


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_store_kv_writes_the_named_slots_only(impl: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(4, 2, 8).to(dtype), torch.randn(4, 2, 8).to(dtype)
    k_cache, v_cache = torch.zeros(3, 5, 2, 8, dtype=dtype), torch.zeros(3, 5, 2, 8, dtype=dtype)
    store_kv(k, v, k_cache, v_cache, torch.tensor([14, -1, 0, 7]), impl=impl)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        expected = torch.zeros_like(cache)
        expected[2, 4], expected[0, 0], expected[1, 2] = rows[0], rows[2], rows[3]
        assert torch.equal(cache, expected)


@needs_native
def test_store_kv_with_many_tokens_uses_threads_and_is_exact() -> None:
    torch.set_num_threads(2)
    k, v = torch.randn(1500, 3, 64), torch.randn(1500, 3, 64)
    slots = torch.randperm(1600)[:1500]
    caches = {impl: (torch.zeros(100, 16, 3, 64), torch.zeros(100, 16, 3, 64)) for impl in "nt"}
    store_kv(k, v, *caches["n"], slots, impl="native")
    store_kv(k, v, *caches["t"], slots, impl="torch")
    for got, expected in zip(caches["n"], caches["t"], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
def test_stored_keys_are_found_by_attention(impl: str) -> None:
    """Writing through slots and reading through the page table agree on the layout."""
    k, v, q = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(1, 4, 8)
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    page_table = torch.tensor([[2, 0]], dtype=torch.int32)
    store_kv(k, v, k_cache, v_cache, torch.tensor([8, 9, 10, 11, 0, 1]), impl=impl)
    context_lens = torch.tensor([6], dtype=torch.int32)
    out = paged_attention(q, k_cache, v_cache, page_table, context_lens, impl=impl)
    scores = torch.einsum("hk,tjk->jht", q[0], k)[[0, 0, 1, 1], [0, 1, 2, 3]] / 8**0.5
    expected = torch.einsum("ht,thk->hk", scores.softmax(-1), v[:, [0, 0, 1, 1]])
    torch.testing.assert_close(out[0], expected)


def test_auto_takes_torch_for_an_odd_head_size() -> None:
    problem = make_problem([20], 2, 1, 20, 16, torch.float32)
    expected = paged_attention(**problem, impl="torch")
    assert torch.equal(paged_attention(**problem), expected)
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 512, got 20"):
        paged_attention(**problem, impl="native")


def test_auto_takes_torch_for_fp16() -> None:
    problem = make_problem([20], 2, 1, 64, 16, torch.float16)
    out = paged_attention(**problem)
    assert_as_good_as_reference(out, problem)
    with pytest.raises(NotImplementedError, match="needs bfloat16 or float32, got"):
        paged_attention(**problem, impl="native")


def test_missing_library_is_reported_or_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler on this machine"))
    dispatch._log.cache_clear()
    problem = make_problem([20], 2, 1, 64, 16, torch.float32)
    expected = paged_attention(**problem, impl="torch")
    with caplog.at_level(logging.INFO, logger="lwz_kernels"):
        for _ in range(3):
            assert torch.equal(paged_attention(**problem), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "paged_attention: impl=torch (no compiler on this machine)"
    ]
    with pytest.raises(RuntimeError, match="not available: no compiler on this machine"):
        paged_attention(**problem, impl="native")


@needs_native
def test_library_and_torch_share_one_openmp_runtime() -> None:
    torch.set_num_threads(2)
    problem = make_problem([600, 600], 2, 1, 64, 16, torch.float32)
    paged_attention(**problem, impl="native")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch"])
def test_decoding_compiles_to_one_graph(impl: str) -> None:
    """The in-place write is seen by the attention after it."""
    problem = make_problem([20, 3], 4, 2, 64, 16, torch.float32)
    del problem["k_cache"], problem["v_cache"]
    k, v, caches = torch.randn(2, 2, 64), torch.randn(2, 2, 64), torch.randn(2, 5, 16, 2, 64)
    slots = problem["page_table"][:, 0].long() * 16 + 2

    def step(caches: torch.Tensor) -> torch.Tensor:
        store_kv(k, v, caches[0], caches[1], slots, impl=impl)
        return paged_attention(k_cache=caches[0], v_cache=caches[1], **problem, impl=impl)

    before = caches.clone()
    expected = step(caches)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(before), expected)
    assert torch.equal(before, caches)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch"])
def test_operators_pass_opcheck(impl: str) -> None:
    problem = make_problem([20, 3], 4, 2, 64, 16, torch.float32)
    torch.library.opcheck(paged_attention_op, (*problem.values(), 0.125, impl))
    k, v = torch.randn(2, 2, 64), torch.randn(2, 2, 64)
    caches = torch.zeros(2, 4, 16, 2, 64)
    slots = torch.tensor([5, -1])
    torch.library.opcheck(store_kv_op, (k, v, caches[0], caches[1], slots, impl))


def _attention_case(**changes) -> dict:
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k_cache": torch.zeros(3, 4, 2, 8),
        "v_cache": torch.zeros(3, 4, 2, 8),
        "page_table": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
        "context_lens": torch.tensor([5, 3], dtype=torch.int32),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 8)}, ValueError, "expected q of 3 dimensions"),
        ({"v_cache": torch.zeros(3, 4, 1, 8)}, ValueError, "of one shape"),
        (
            {"k_cache": torch.zeros(3, 0, 2, 8), "v_cache": torch.zeros(3, 0, 2, 8)},
            ValueError,
            "a page_size of at least 1",
        ),
        ({"q": torch.zeros(2, 4, 16)}, ValueError, "head size of q is 16, of the caches 8"),
        ({"q": torch.zeros(2, 3, 8)}, ValueError, "got 3 and 2"),
        ({"q": torch.zeros(2, 4, 8).double()}, TypeError, "bfloat16, float16 or float32"),
        ({"q": torch.zeros(2, 4, 8).bfloat16()}, TypeError, "of one dtype"),
        ({"q": torch.zeros(2, 4, 8, device="meta")}, ValueError, "caches on meta as q"),
        ({"page_table": torch.zeros(2, 2).long()}, TypeError, "of dtype int32"),
        ({"page_table": torch.zeros(3, 2).int()}, ValueError, r"expected page_table \[2,"),
        ({"context_lens": torch.zeros(3).int()}, ValueError, r"context_lens \[2\]"),
        ({"context_lens": torch.zeros(2, device="meta").int()}, ValueError, "on cpu"),
        (
            {"k_cache": torch.zeros(3, 4, 8, 2).transpose(2, 3)},
            ValueError,
            "expected contiguous caches",
        ),
        ({"impl": "cuda"}, ValueError, "unknown impl 'cuda'"),
    ],
)
def test_paged_attention_refuses(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**_attention_case(**changes))


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_lens": torch.tensor([9, 3]).int()}, "context_lens is out of range"),
        ({"context_lens": torch.tensor([-1, 3]).int()}, "context_lens is out of range"),
        ({"page_table": torch.tensor([[0, 3], [2, 0]]).int()}, "page that is out of range"),
        ({"page_table": torch.tensor([[0, 1], [-1, 0]]).int()}, "page that is out of range"),
    ],
)
def test_paged_attention_refuses_bad_pages(impl: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**_attention_case(**changes), impl=impl)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": torch.zeros(3, 2, 8)}, ValueError, r"k and v of shape \[T, 2, 8\]"),
        ({"v": torch.zeros(2, 2, 8).bfloat16()}, TypeError, "k and v differ"),
        ({"slot_mapping": torch.zeros(2).int()}, TypeError, r"slot_mapping \[2\] int64"),
        ({"slot_mapping": torch.zeros(3).long()}, TypeError, r"slot_mapping \[2\] int64"),
        ({"slot_mapping": torch.zeros(2, device="meta").long()}, ValueError, "expected cpu"),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
    ],
)
def test_store_kv_refuses(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "k": torch.zeros(2, 2, 8),
        "v": torch.zeros(2, 2, 8),
        "k_cache": torch.zeros(3, 4, 2, 8),
        "v_cache": torch.zeros(3, 4, 2, 8),
        "slot_mapping": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        store_kv(**{**arguments, **changes})


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
def test_store_kv_writes_nothing_if_a_slot_is_out_of_range(impl: str) -> None:
    caches = torch.zeros(2, 3, 4, 2, 8)
    with pytest.raises(ValueError, match="slot_mapping is out of range"):
        store_kv(
            torch.ones(2, 2, 8),
            torch.ones(2, 2, 8),
            caches[0],
            caches[1],
            torch.tensor([0, 12]),
            impl=impl,
        )
    assert torch.equal(caches, torch.zeros_like(caches))


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
def test_operators_refuse_to_record_gradients(impl: str) -> None:
    arguments = _attention_case(q=torch.zeros(2, 4, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="has no backward"):
        paged_attention(**arguments, impl=impl)
    with torch.no_grad():
        assert not paged_attention(**arguments, impl=impl).requires_grad
    k = torch.zeros(1, 2, 8, requires_grad=True)
    caches = torch.zeros(2, 3, 4, 2, 8)
    with pytest.raises(RuntimeError, match="has no backward"):
        store_kv(k, k, caches[0], caches[1], torch.tensor([0]), impl=impl)


def test_paged_attention_example_holds() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 0
    assert result.failed == 0
