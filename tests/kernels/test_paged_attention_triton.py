"""The Triton kernels of paged attention: interpreted without a GPU, compiled on one.

tl.dot of bf16 is wrong in the interpreter, so its cases are fp32 and fp64. Interpreted splits are
32 keys in blocks of 16, merged two at a time: sizes here are around multiples of these. Caches hold
NaN wherever no key counts, and page tables -1. Spills and sizes are in `test_triton_compile.py`.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels.paged_attention import choice, paged_attention, reference, store_kv
from lwz_kernels.paged_attention.kernels import paged_attention_triton, store_kv_triton
from lwz_kernels.paged_attention.op import paged_attention_op, store_kv_op
from tests.kernels.paged_case import assert_as_good_as_reference, exact, make_problem

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
IS_INTERPRETED = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not IS_INTERPRETED, reason="fp64 and CPU tensors are for the interpreter"),
]
SCALE = 0.3


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory() -> Iterator[None]:
    """Partial results of splits that nobody computed must not be read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_exact(context_lens: list[int], heads: tuple[int, int], head_size: int, page: int):
    """In fp64, against the oracle."""
    problem = make_problem(context_lens, *heads, head_size, page, FP64)
    out = paged_attention_triton(**problem, softmax_scale=SCALE)
    truth = reference.paged_attention(**problem, softmax_scale=SCALE)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


class TestInterpreted:
    """The kernels' arithmetic and indices."""

    pytestmark = interpreted

    @pytest.mark.parametrize("page_size", [16, 48, 256])
    def test_kernel_takes_any_context(self, page_size: int) -> None:
        """None, one, around a block, a split, a page, and more splits than are merged at once."""
        assert_exact([0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65, 200], (6, 2), 16, page_size)

    @pytest.mark.parametrize("heads", [(1, 1), (4, 4), (3, 1), (28, 4), (17, 1)], ids=str)
    @pytest.mark.parametrize("head_size", [5, 64, 80, 96, 128])
    def test_kernel_takes_any_heads(self, heads: tuple[int, int], head_size: int) -> None:
        assert_exact([0, 40, 7], heads, head_size, 16)

    def test_kernel_takes_the_largest_head(self) -> None:
        assert_exact([40], (4, 2), 256, 16)

    @settings(max_examples=25, deadline=None)
    @given(
        context_lens=st.lists(st.integers(0, 150), min_size=1, max_size=3),
        group=st.integers(1, 5),
        num_kv_heads=st.integers(1, 3),
        head_size=st.integers(1, 40),
        page_size=st.integers(1, 70),
    )
    def test_kernel_equals_reference_anywhere(
        self,
        context_lens: list[int],
        group: int,
        num_kv_heads: int,
        head_size: int,
        page_size: int,
    ) -> None:
        heads = (group * num_kv_heads, num_kv_heads)
        assert_exact(context_lens, heads, head_size, page_size)

    def test_kernel_reads_shared_pages(self) -> None:
        """Two completions of one prompt, and a page that a sequence uses twice."""
        problem = make_problem([40, 64], 4, 2, 16, 16, FP64)
        table = problem["page_table"]
        table[0, :2] = table[1, :2]
        table[1, 3] = table[1, 0]
        out = paged_attention_triton(**problem, softmax_scale=SCALE)
        truth = reference.paged_attention(**problem, softmax_scale=SCALE)
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)

    def test_kernel_in_fp32_is_as_good_as_reference(self) -> None:
        problem = make_problem([1, 33, 150], 6, 2, 64, 16, FP32)
        out = paged_attention_triton(**problem, softmax_scale=0.125)
        assert out.dtype == FP32
        assert_as_good_as_reference(out, problem)

    def test_kernel_survives_large_scores(self) -> None:
        problem = make_problem([100], 2, 1, 64, 16, FP32, spread=300.0)
        out = paged_attention_triton(**problem, softmax_scale=0.125)
        torch.testing.assert_close(out.double(), exact(problem), rtol=1e-3, atol=1e-3)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_kernel_shows_non_finite_keys(self, bad: float) -> None:
        problem = make_problem([70, 70], 2, 2, 16, 16, FP32)
        problem["k_cache"][problem["page_table"][0, 2], 5, 1, 3] = bad
        problem["q"][0, 1, 3] = 1.0
        out = paged_attention_triton(**problem, softmax_scale=SCALE)
        assert out[0, 1].isnan().all()
        assert out[0, 0].isfinite().all()
        assert out[1].isfinite().all()

    def test_row_ignores_batch_and_width_of_the_table(self) -> None:
        """Sampling log-probabilities must not depend on which requests run together."""
        problem = make_problem([90, 33, 1, 150], 6, 2, 16, 16, FP32)
        row = paged_attention_triton(**problem, softmax_scale=SCALE)[:1]
        alone = {name: x if name.endswith("cache") else x[:1] for name, x in problem.items()}
        for num_columns in (6, 10):
            alone["page_table"] = problem["page_table"][:1, :num_columns].contiguous()
            assert torch.equal(paged_attention_triton(**alone, softmax_scale=SCALE), row)

    @pytest.mark.parametrize("layout", ["fused", "transposed"])
    def test_kernel_takes_strided_queries(self, layout: str) -> None:
        problem = make_problem([20, 5], 4, 2, 16, 16, FP64)
        expected = paged_attention_triton(**problem, softmax_scale=SCALE)
        if layout == "fused":
            fused = torch.zeros(2, 8, 16, dtype=FP64)
            fused[:, 2:6] = problem["q"]
            problem["q"] = fused[:, 2:6]
        else:
            problem["q"] = problem["q"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torch.equal(paged_attention_triton(**problem, softmax_scale=SCALE), expected)

    @pytest.mark.parametrize(
        ("batch", "num_columns", "num_heads"), [(0, 2, 2), (2, 0, 2), (2, 3, 0)]
    )
    def test_kernel_takes_nothing(self, batch: int, num_columns: int, num_heads: int) -> None:
        cache = torch.ones(2, 4, 1, 8)
        out = paged_attention_triton(
            torch.ones(batch, num_heads, 8),
            cache,
            cache,
            torch.zeros(batch, num_columns, dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int32),
            softmax_scale=SCALE,
        )
        assert torch.equal(out, torch.zeros(batch, num_heads, 8))

    def test_kernels_address_more_than_2_31_numbers(self) -> None:
        """4 GiB of which a page is touched; the other pages stay unbacked."""
        torch.use_deterministic_algorithms(False)
        num_pages = 2**31 // (16 * 2 * 32) + 3
        cache = torch.empty(num_pages, 16, 2, 32, dtype=FP16)
        k, v = torch.randn(17, 2, 32).half(), torch.randn(17, 2, 32).half()
        slots = torch.arange(16 * num_pages - 17, 16 * num_pages)
        store_kv_triton(k, k, cache, cache, slots)
        assert torch.equal(cache[num_pages - 2, 15], k[0])
        assert torch.equal(cache[num_pages - 1], k[1:])
        store_kv_triton(v, v, cache, cache, slots)
        table = torch.tensor([[num_pages - 1]], dtype=torch.int32)
        arguments = (torch.randn(1, 2, 32).half(), cache, cache, table, torch.tensor([16]).int())
        out = paged_attention_triton(*arguments, softmax_scale=SCALE)
        truth = reference.paged_attention(*arguments, softmax_scale=SCALE)
        torch.testing.assert_close(out, truth)

    @settings(max_examples=20, deadline=None)
    @given(st.data())
    def test_store_kv_writes_the_named_slots_only(self, data: st.DataObject) -> None:
        num_pages, page_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
        num_kv_heads, head_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
        slots = data.draw(st.permutations(range(num_pages * page_size)))
        slots = [slot if data.draw(st.booleans()) else -1 - slot for slot in slots[:6]]
        shape = (len(slots), num_kv_heads, head_size)
        k, v = torch.randn(shape), torch.randn(shape)
        ours = torch.zeros(2, num_pages, page_size, num_kv_heads, head_size)
        expected = ours.clone()
        store_kv_triton(k, v, ours[0], ours[1], torch.tensor(slots))
        reference.store_kv(k, v, expected[0], expected[1], torch.tensor(slots))
        assert torch.equal(ours, expected)

    def test_store_kv_takes_wide_rows_and_strides(self) -> None:
        """More numbers a token than a program copies; views of the fused projection."""
        fused = torch.randn(3, 30, 64)
        scattered = torch.randn(3, 64, 17).transpose(1, 2)
        slots = torch.tensor([3, -1, 0])
        ours, expected = torch.zeros(2, 2, 4, 17, 64), torch.zeros(2, 2, 4, 17, 64)
        store_kv_triton(fused[:, 13:], scattered, ours[0], ours[1], slots)
        reference.store_kv(fused[:, 13:], scattered, expected[0], expected[1], slots)
        assert torch.equal(ours, expected)

    def test_store_kv_takes_no_tokens(self) -> None:
        caches = torch.zeros(2, 1, 4, 1, 8)
        empty = torch.zeros(0, 1, 8)
        store_kv_triton(empty, empty, caches[0], caches[1], torch.zeros(0, dtype=torch.int64))
        assert not caches.any()

    def test_operators_pass_opcheck(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "_triton_obstacle", lambda *_: "")
        problem = make_problem([20, 3], 4, 2, 16, 16, FP32)
        torch.library.opcheck(paged_attention_op, (*problem.values(), SCALE, "triton"))
        k, v, caches = torch.randn(2, 2, 8), torch.randn(2, 2, 8), torch.zeros(2, 4, 16, 2, 8)
        slots = torch.tensor([5, -1])
        torch.library.opcheck(store_kv_op, (k, v, caches[0], caches[1], slots, "triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_triton_refuses_cpu_tensors() -> None:
    problem = make_problem([20], 2, 1, 64, 16, FP32)
    with pytest.raises(NotImplementedError, match=r"'triton' needs CUDA tensors, got cpu; use"):
        paged_attention(**problem, impl="triton")
    k = torch.zeros(1, 1, 64)
    caches = torch.zeros(2, 1, 4, 1, 64)
    with pytest.raises(NotImplementedError, match=r"store_kv: impl='triton' needs CUDA tensors"):
        store_kv(k, k, caches[0], caches[1], torch.tensor([0]), impl="triton")


# On a GPU


def on_gpu(context_lens: list[int], heads: tuple[int, int], size: int, page: int, dtype) -> dict:
    problem = make_problem(context_lens, *heads, size, page, dtype)
    return {name: x.cuda() for name, x in problem.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16, FP32], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (28, 4), (16, 1)], ids=str)
def test_kernel_is_as_good_as_reference_and_deterministic(
    heads: tuple[int, int], head_size: int, dtype: torch.dtype
) -> None:
    problem = on_gpu([0, 1, 63, 64, 511, 512, 513, 1025, 3000], heads, head_size, 16, dtype)
    out = paged_attention(**problem, impl="triton")
    assert_as_good_as_reference(out, problem)
    assert torch.equal(paged_attention(**problem), out)
    alone = {name: x if name.endswith("cache") else x[-1:] for name, x in problem.items()}
    assert torch.equal(paged_attention(**alone), out[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("group", [1, 17, 64])
def test_kernel_takes_pages_and_groups(group: int, page_size: int) -> None:
    problem = on_gpu([700, 5], (2 * group, 2), 128, page_size, torch.bfloat16)
    assert_as_good_as_reference(paged_attention(**problem, impl="triton"), problem)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "head_size", "dtype", "message"),
    [
        ((2, 2), 264, torch.bfloat16, "head size up to 256, got 264"),
        ((65, 1), 64, torch.bfloat16, "up to 64 query heads"),
        ((17, 1), 64, FP32, "up to 16 query heads"),
    ],
)
def test_auto_takes_torch_where_triton_refuses(
    heads: tuple[int, int], head_size: int, dtype: torch.dtype, message: str
) -> None:
    problem = on_gpu([20], heads, head_size, 16, dtype)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(**problem, impl="triton")
    assert torch.equal(paged_attention(**problem), paged_attention(**problem, impl="torch"))


@pytest.mark.gpu
def test_captured_graph_follows_growing_contexts() -> None:
    """A decoding step of store and attention, captured once and replayed with longer contexts."""
    problem = on_gpu([600, 30], (8, 2), 64, 16, torch.bfloat16)
    problem["page_table"] = torch.randperm(200, device="cuda").int().view(2, 100)
    for name in ("k_cache", "v_cache"):
        problem[name] = torch.randn(200, 16, 2, 64, device="cuda").bfloat16()
    k, v = torch.randn(2, 2, 2, 64, device="cuda").bfloat16()
    slots = torch.tensor([5, -1], device="cuda")

    def step() -> torch.Tensor:
        store_kv(k, v, problem["k_cache"], problem["v_cache"], slots, impl="triton")
        return paged_attention(**problem, impl="triton")

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for context_lens in ([601, 31], [1600, 513], [0, 1]):
        problem["context_lens"].copy_(torch.tensor(context_lens))
        slots.copy_(torch.randint(0, 3200, (2,)))
        graph.replay()
        assert_as_good_as_reference(out, problem)


@pytest.mark.gpu
def test_store_kv_is_exact_and_compiles() -> None:
    k, v = torch.randn(2, 3000, 3, 80, device="cuda").bfloat16()
    slots = torch.randperm(3200, device="cuda")[:3000]
    slots[::7] = -1
    caches = torch.zeros(2, 2, 200, 16, 3, 80, device="cuda", dtype=torch.bfloat16)

    def store(caches: torch.Tensor) -> None:
        store_kv(k, v, caches[0], caches[1], slots)

    torch.compile(store, fullgraph=True, backend="aot_eager")(caches[0])
    store_kv(k, v, caches[1, 0], caches[1, 1], slots, impl="torch")
    assert torch.equal(caches[0], caches[1])
