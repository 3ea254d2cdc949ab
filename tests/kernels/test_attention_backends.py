"""Packs: torch's CPU kernel with shared prefixes, what libraries are given, and which one runs."""

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels import dispatch
from lwz_kernels.attention import SegmentTable, attention, backends, library, resolve_impl, sdpa
from tests.kernels.loss_case import assert_as_good_as_eager

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# Offsets with what breaks packing: length 1, length 0, one sequence, a size that is no power of
# two, and enough keys that the CPU kernel works in several blocks.
PACKS: dict[str, tuple[list[int], list[int] | None]] = {
    "one": ([0, 7], None),
    "single_tokens": ([0, 1, 2, 3], None),
    "with_empty": ([0, 3, 3, 8], None),
    "ragged": ([0, 5, 6, 38, 101], None),
    "long": ([0, 600, 777], None),
    "group": ([0, 6, 11, 12, 29], [-1, 0, 0, 0]),
    "prefix_last": ([0, 4, 9, 15], [2, 2, -1]),
    "two_groups": ([0, 3, 7, 12, 17, 18], [-1, 0, 0, -1, 3]),
    "empty_prefix": ([0, 0, 5, 9], [-1, 0, -1]),
    "padded_prefix": ([0, 20, 1044], [-1, 0]),
}


def make_qkv(
    num_tokens: int, heads: tuple[int, int], head_size: int = 8, dtype: torch.dtype = FP64
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves."""
    shapes = [(num_tokens, num_heads, head_size) for num_heads in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v


def values_and_grads(
    qkv: tuple[Tensor, Tensor, Tensor], table: SegmentTable, impl: str
) -> list[Tensor]:
    """out, lse, and the gradients of a sum of both with fixed weights."""
    results = attention(*qkv, segments=table, impl=impl)
    weights = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape) for x in results]
    weights = [w.to(x.dtype) for w, x in zip(weights, results, strict=True)]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, qkv, weights)]


# The CPU kernel


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_sdpa_equals_reference_in_fp64(pack: str, heads: tuple[int, int]) -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS[pack])
    qkv = make_qkv(table.num_q, heads)
    expected = values_and_grads(qkv, table, "reference")
    for got, want in zip(values_and_grads(qkv, table, "sdpa"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix_len", [1, 30])
def test_padded_prefix_equals_masked_prefix(
    prefix_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SegmentTable.from_cu_seqlens([0, prefix_len, prefix_len + 100], [-1, 0])
    qkv = make_qkv(table.num_q, (3, 1))
    results = []
    for is_padding_better in (True, False):
        monkeypatch.setattr(sdpa, "_is_padding_better", lambda *_, answer=is_padding_better: answer)
        results.append(values_and_grads(qkv, table, "sdpa"))
    for padded, masked in zip(*results, strict=True):
        torch.testing.assert_close(padded, masked, rtol=1e-12, atol=1e-12)


def test_padding_is_used_for_long_completions_only() -> None:
    assert sdpa._is_padding_better(1000, 100)
    assert not sdpa._is_padding_better(300, 200)
    assert not sdpa._is_padding_better(90, 30)
    assert sdpa._is_padding_better(6000, 5000)  # the mask would have 66 M elements
    assert not sdpa._is_padding_better(4000, 5000)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sdpa_equals_reference_for_any_pack(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
    roots = [data.draw(st.booleans()) for _ in lengths]
    candidates = [i for i, is_root in enumerate(roots) if is_root]
    prefix_of = [
        -1 if is_root or not candidates else data.draw(st.sampled_from([-1, *candidates]))
        for is_root in roots
    ]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    table = SegmentTable.from_cu_seqlens(offsets, prefix_of)
    qkv = make_qkv(table.num_q, (4, 2))
    expected = attention(*qkv, segments=table, impl="reference")
    actual = attention(*qkv, segments=table, impl="sdpa")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pack", ["ragged", "two_groups"])
@pytest.mark.parametrize(
    ("dtype", "max_wide_keys"), [(FP32, 0), (BF16, 0), (BF16, sdpa.MAX_WIDE_KEYS)], ids=str
)
def test_sdpa_is_as_good_as_eager(
    monkeypatch: pytest.MonkeyPatch, pack: str, dtype: torch.dtype, max_wide_keys: int
) -> None:
    """In bf16 with the kernel for long sequences, and with fp32 copies."""
    monkeypatch.setattr(sdpa, "MAX_WIDE_KEYS", max_wide_keys)
    table = SegmentTable.from_cu_seqlens(*PACKS[pack])
    qkv = make_qkv(table.num_q, (4, 2), 16, dtype)
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    truths = values_and_grads((q, k, v), table, "reference")
    eager = values_and_grads(qkv, table, "reference")
    ours = values_and_grads(qkv, table, "sdpa")
    assert [x.dtype for x in ours] == [dtype, FP32, dtype, dtype, dtype]
    if dtype == BF16:
        # torch's kernel takes an approximate exponential where the result is bf16.
        torch.testing.assert_close(ours.pop(1), truths.pop(1).float(), rtol=0, atol=1e-4)
        del eager[1]
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert_as_good_as_eager(mine, theirs, truth)


@pytest.mark.parametrize("pack", ["with_empty", "group"])
def test_sdpa_gradcheck(pack: str) -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS[pack])
    qkv = make_qkv(table.num_q, (2, 1), 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, segments=table, impl="sdpa"), qkv
    )


def test_sdpa_ignores_autocast() -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS["group"])
    qkv = make_qkv(table.num_q, (4, 2), dtype=FP32)
    expected = attention(*qkv, segments=table, impl="sdpa")
    with torch.autocast("cpu", BF16):
        actual = attention(*qkv, segments=table, impl="sdpa")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_what_inference_mode_has_cached_serves_training() -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS["group"])
    qkv = make_qkv(table.num_q, (4, 2))
    with torch.inference_mode():
        attention(*qkv, segments=table, impl="sdpa")
    fresh = SegmentTable.from_cu_seqlens(*PACKS["group"])
    found, expected = (values_and_grads(qkv, t, "sdpa") for t in (table, fresh))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_masks_do_not_depend_on_the_default_device() -> None:
    tables = [SegmentTable.from_cu_seqlens(*PACKS["group"]) for _ in range(2)]
    qkv = make_qkv(tables[0].num_q, (4, 2))
    expected = attention(*qkv, segments=tables[0], impl="sdpa")
    with torch.device("meta"):
        found = attention(*qkv, segments=tables[1], impl="sdpa")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attention_has_no_second_derivative() -> None:
    table = SegmentTable.from_cu_seqlens(*PACKS["ragged"])
    qkv = make_qkv(table.num_q, (2, 1))
    out, _ = attention(*qkv, segments=table, impl="torch")
    (gradient,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention: differentiable once"):
        gradient.square().sum().backward()


def test_shared_prefix_equals_the_prompt_repeated_per_completion() -> None:
    """The packing that sharing replaces: prompt + completion as one sequence each."""
    prompt_len, completion_lens = 5, [3, 7, 1]
    shared_offsets, repeated_offsets, index = [0, prompt_len], [0], []
    for length in completion_lens:
        start = shared_offsets[-1]
        shared_offsets.append(start + length)
        repeated_offsets.append(repeated_offsets[-1] + prompt_len + length)
        index += [*range(prompt_len), *range(start, start + length)]
    shared_table = SegmentTable.from_cu_seqlens(shared_offsets, [-1, 0, 0, 0])
    q, k, v = make_qkv(shared_table.num_q, (6, 2))
    for impl in ("sdpa", "torch", "reference"):
        out, _ = attention(q, k, v, segments=shared_table, window_size=None, impl=impl)
        repeated, _ = attention(q[index], k[index], v[index], repeated_offsets, impl=impl)
        torch.testing.assert_close(repeated, out[index], rtol=1e-12, atol=1e-12)

        weights = torch.randn_like(repeated)
        summed_weights = torch.zeros_like(out).index_add_(0, torch.tensor(index), weights)
        shared_grads = torch.autograd.grad((out * summed_weights).sum(), (q, k, v))
        repeated_grads = torch.autograd.grad((repeated * weights).sum(), (q, k, v))
        for shared, summed in zip(shared_grads, repeated_grads, strict=True):
            torch.testing.assert_close(shared, summed, rtol=1e-12, atol=1e-12)


def test_list_tensor_and_table_give_the_same() -> None:
    offsets = PACKS["ragged"][0]
    qkv = make_qkv(offsets[-1], (2, 1))
    by_list = attention(*qkv, offsets)
    by_tensor = attention(*qkv, torch.tensor(offsets, dtype=torch.int32))
    by_table = attention(*qkv, segments=SegmentTable.from_cu_seqlens(offsets))
    for other in (by_tensor, by_table):
        assert all(torch.equal(a, b) for a, b in zip(by_list, other, strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "expected cu_seqlens or segments, got neither"),
        (
            {"cu_seqlens": [0, 3], "segments": SegmentTable.from_cu_seqlens([0, 3])},
            "cu_seqlens or segments, got both",
        ),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"one-dimensional int32 tensor, got \[2\] torch"),
    ],
)
def test_attention_refuses_unclear_segments(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        attention(*make_qkv(3, (2, 1)), **changes)


@pytest.mark.parametrize(
    ("prefix_of", "match"),
    [
        ([-1], r"one entry per sequence \(3\), got 1"),
        ([-1, 3, -1], "expected -1 or another sequence below 3"),
        ([-1, 1, -1], "expected -1 or another sequence below 3"),
        ([-2, 0, -1], "expected -1 or another sequence below 3"),
        ([-1, 0, 1], "has a prefix itself"),
    ],
)
def test_from_cu_seqlens_refuses_prefixes(prefix_of: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SegmentTable.from_cu_seqlens([0, 1, 2, 4], prefix_of)


@pytest.mark.parametrize(
    ("segments", "num_k"),
    [
        ([(0, 2, 0, 2), (2, 3, 1, 3)], 5),  # keys of another sequence
        ([(0, 2, 0, 2), (3, 2, 3, 2)], 5),  # a gap
        ([(0, 2, 0, 2)], 3),  # keys that nobody sees
        ([(0, 2, 0, 2), (2, 3, 2, 3, 0, 1)], 5),  # a prefix that is half of a sequence
    ],
)
def test_other_tables_are_no_packs(segments: list[tuple[int, ...]], num_k: int) -> None:
    assert SegmentTable(segments, 5, num_k).pack is None


# The choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A tensor that says that it is on a Hopper GPU, where there is none."""
    q = SimpleNamespace(
        is_cuda=True,
        device=SimpleNamespace(type="cuda"),
        dtype=BF16,
        shape=(3, 2, 64),
        capability=(9, 0),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: q.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return q


PACK = SegmentTable.from_cu_seqlens([0, 3])
PREFIXED = SegmentTable.from_cu_seqlens([0, 1, 3], [-1, 0])
LOOSE = SegmentTable([(0, 3, 0, 2)], 3, 3)


@pytest.mark.parametrize(
    ("installed", "changes", "table", "expected"),
    [
        (["flash_attn_4", "flash_attn_3", "flash_attn_2"], {}, PACK, "flash_attn_3"),
        (
            ["flash_attn_4", "flash_attn_3", "flash_attn_2"],
            {"capability": (10, 0)},
            PACK,
            "flash_attn_4",
        ),
        (["flash_attn_4", "flash_attn_2"], {"capability": (8, 0)}, PACK, "flash_attn_2"),
        ([], {}, PACK, "varlen"),
        (["flash_attn_2"], {}, PREFIXED, "triton"),
        (["flash_attn_2"], {}, LOOSE, "triton"),
        ([], {"shape": (3, 2, 20)}, PACK, "triton"),
        ([], {"dtype": FP32}, PACK, "torch"),
        ([], {"capability": (7, 5)}, PACK, "torch"),
        ([], {"shape": (3, 2, 160)}, PREFIXED, "torch"),
    ],
)
def test_auto_takes_the_first_that_applies(
    installed: list[str],
    changes: dict[str, Any],
    table: SegmentTable,
    expected: str,
    gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "is_installed", lambda impl: impl in [*installed, "varlen"])
    vars(gpu).update(changes)
    assert resolve_impl(gpu, table) == expected
    assert resolve_impl(gpu, table, impl=expected) == expected


@pytest.mark.parametrize(
    ("impl", "changes", "table", "match"),
    [
        ("flash_attn_2", {}, PACK, "flash_attn_2' is not installed"),
        ("varlen", {"dtype": FP32}, PACK, "needs bfloat16 or float16, got torch.float32"),
        ("varlen", {}, PREFIXED, "knows no prefixes"),
        ("varlen", {}, LOOSE, "needs a pack of whole sequences"),
        ("varlen", {"shape": (3, 2, 20)}, PACK, "a head size in eights up to 256, got 20"),
        ("triton", {"capability": (7, 5)}, PACK, "does not run on a GPU"),
        ("triton", {"shape": (3, 2, 129)}, PACK, "a head size up to 128, got 129"),
        ("sdpa", {}, PACK, "needs CPU tensors, got cuda"),
        ("triton", {"is_cuda": False}, PACK, "needs CUDA tensors, got cuda"),
    ],
)
def test_an_impl_that_is_named_runs_or_says_what_it_needs(
    impl: str, changes: dict[str, Any], table: SegmentTable, match: str, gpu: Any
) -> None:
    vars(gpu).update(changes)
    with pytest.raises(NotImplementedError, match=match):
        resolve_impl(gpu, table, impl=impl)


@pytest.mark.parametrize(
    ("table", "window_size", "match"),
    [
        (PACK, 2, "knows no windows"),
        (PREFIXED, 2, "knows no windows"),  # no sequence is longer, but one with its prefix is
        (LOOSE, None, "needs a pack of whole sequences"),
    ],
)
def test_auto_is_sdpa_on_a_cpu_and_torch_where_that_cannot(
    table: SegmentTable, window_size: int | None, match: str
) -> None:
    qkv = make_qkv(3, (2, 1))
    with pytest.raises(NotImplementedError, match=match):
        attention(*qkv, segments=table, window_size=window_size, impl="sdpa")
    auto = attention(*qkv, segments=table, window_size=window_size)
    by_name = attention(*qkv, segments=table, window_size=window_size, impl="torch")
    assert all(torch.equal(a, b) for a, b in zip(auto, by_name, strict=True))
    assert resolve_impl(qkv[0], PACK, window_size=3) == "sdpa"


def test_choices_are_logged_once_and_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch._log.cache_clear()
    monkeypatch.setattr(dispatch, "_choices", {})
    qkv = make_qkv(3, (2, 1))
    with caplog.at_level(logging.INFO, logger="lwz_kernels"):
        for table in (PACK, PACK, LOOSE, LOOSE):
            attention(*qkv, segments=table)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" (")[0] for message in messages] == [
        "attention: impl=sdpa",
        "attention: impl=torch",
    ]
    assert "varlen, triton needs CUDA tensors, got cpu" in messages[0]
    assert dispatch.impl_choices() == {"attention": ("sdpa", "torch")}


# What libraries are given, without a GPU: their functions are recorded


def test_varlen_is_given_causal_attention_of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as torch_varlen

    calls = []

    def record(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, return_aux, enable_gqa):
        assert return_aux.lse
        calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, scale, window_size, enable_gqa))
        return q, torch.zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(torch_varlen, "varlen_attn", record)
    qkv = make_qkv(9, (6, 2), dtype=BF16)
    table = SegmentTable.from_cu_seqlens([0, 2, 9])
    library.library_attention(*qkv, table, 0.3, None, "varlen")
    library.library_attention(*qkv, table, 0.3, 4, "varlen")
    assert calls == [
        ([0, 2, 9], [0, 2, 9], 7, 7, 0.3, (-1, 0), True),
        ([0, 2, 9], [0, 2, 9], 7, 7, 0.3, (3, 0), True),
    ]


@pytest.mark.parametrize(
    ("impl", "module", "lse_option", "all_keys"),
    [
        ("flash_attn_4", "flash_attn.cute", "return_lse", None),
        ("flash_attn_3", "flash_attn_interface", "return_attn_probs", -1),
        ("flash_attn_2", "flash_attn", "return_attn_probs", -1),
    ],
)
def test_flash_attn_is_given_causal_attention_of_the_pack(
    impl: str, module: str, lse_option: str, all_keys: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, None]:
        calls.append({n: x.tolist() if isinstance(x, Tensor) else x for n, x in options.items()})
        return q, torch.zeros(q.shape[1], q.shape[0], requires_grad=True), None

    for name in {module.split(".")[0], module}:
        fake: Any = ModuleType(name)
        fake.flash_attn_varlen_func = record
        monkeypatch.setitem(sys.modules, name, fake)
    qkv = make_qkv(9, (6, 2), dtype=BF16)
    table = SegmentTable.from_cu_seqlens([0, 2, 9])
    for window_size in (None, 4):
        _, lse = library.library_attention(*qkv, table, 0.3, window_size, impl)
        assert not lse.requires_grad
    expected = {
        "cu_seqlens_q": [0, 2, 9],
        "cu_seqlens_k": [0, 2, 9],
        "max_seqlen_q": 7,
        "max_seqlen_k": 7,
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (all_keys, all_keys),
        "deterministic": False,
        lse_option: True,
    }
    assert calls == [expected, expected | {"window_size": (3, 0)}]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "triton", "flash_attn_2", "flash_attn_3"])
@pytest.mark.parametrize("heads", [(8, 8), (9, 3)], ids=str)
def test_impls_on_a_gpu_are_as_good_as_eager(heads: tuple[int, int], impl: str) -> None:
    """With the gradient of lse, which their own backward may not know."""
    if not library.is_installed(impl) and impl != "triton":
        pytest.skip(f"{impl} is not installed")
    table = SegmentTable.from_cu_seqlens([0, 5, 6, 38, 300])
    qkv = make_qkv(300, heads, 64, BF16)
    q, k, v = (x.detach().cuda().requires_grad_() for x in qkv)
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    truths = values_and_grads(wide, table, "reference")
    eager = values_and_grads((q, k, v), table, "reference")
    ours = values_and_grads((q, k, v), table, impl)
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert_as_good_as_eager(mine, theirs, truth)
