"""Packed attention against its oracle: values, gradients, shared prefixes, errors."""

import doctest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels.attention import AttentionPlan, api, attention, sdpa, varlen

# Offsets with what breaks packing: length 1, length 0, one sequence, a size that is no power of
# two, and enough keys that the CPU kernel works in several blocks.
PACKS = {
    "one": ([0, 7], None),
    "single_tokens": ([0, 1, 2, 3], None),
    "with_empty": ([0, 3, 3, 8], None),
    "ragged": ([0, 5, 6, 38, 101], None),
    "long": ([0, 600, 777], None),
    "group": ([0, 6, 11, 12, 29], [-1, 0, 0, 0]),
    "prefix_last": ([0, 4, 9, 15], [2, 2, -1]),
    "two_groups": ([0, 3, 7, 12, 17, 18], [-1, 0, 0, -1, 3]),
    "empty_prefix": ([0, 0, 5, 9], [-1, 0, -1]),
}


def _random(num_tokens: int, num_heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, head_size, dtype=dtype, requires_grad=True)


def _qkv(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _random(num_tokens, num_heads, head_size, dtype),
        _random(num_tokens, num_kv_heads, head_size, dtype),
        _random(num_tokens, num_kv_heads, head_size, dtype),
    )


def _to(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **target: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves of their own with the same values on another device or in another dtype."""
    q, k, v = (x.detach().to(**target).requires_grad_() for x in qkv)
    return q, k, v


def _values_and_grads(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    offsets: list[int],
    prefix_of: list[int] | None,
    impl: str,
) -> list[torch.Tensor]:
    out = attention(*qkv, offsets, prefix_of=prefix_of, impl=impl)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)]


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_sdpa_equals_reference_in_fp64(pack: str, heads: tuple[int, int]) -> None:
    offsets, prefix_of = PACKS[pack]
    qkv = _qkv(offsets[-1], *heads, 8, torch.float64)
    expected = _values_and_grads(qkv, offsets, prefix_of, "reference")
    actual = _values_and_grads(qkv, offsets, prefix_of, "sdpa")
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix_len", [1, 30])
def test_padded_prefix_equals_masked_prefix(
    prefix_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets, prefix_of = [0, prefix_len, prefix_len + 100], [-1, 0]
    qkv = _qkv(offsets[-1], 3, 1, 8, torch.float64)
    results = []
    for is_padding_better in (True, False):
        monkeypatch.setattr(sdpa, "_is_padding_better", lambda *_, answer=is_padding_better: answer)
        results.append(_values_and_grads(qkv, offsets, prefix_of, "sdpa"))
    for padded, masked in zip(*results, strict=True):
        torch.testing.assert_close(padded, masked, rtol=1e-12, atol=1e-12)


def test_padding_is_used_for_long_completions_only() -> None:
    cpu = torch.device("cpu")
    assert sdpa._is_padding_better(1000, 100, cpu)
    assert not sdpa._is_padding_better(300, 200, cpu)
    assert not sdpa._is_padding_better(90, 30, cpu)
    assert sdpa._is_padding_better(6000, 5000, cpu)  # the mask would have 66 M elements
    assert not sdpa._is_padding_better(4000, 5000, cpu)
    assert sdpa._is_padding_better(2, 5000, torch.device("cuda"))


def test_padded_prefix_is_taken_by_the_rule_and_equals_reference() -> None:
    offsets, prefix_of = [0, 20, 1044], [-1, 0]
    qkv = _qkv(offsets[-1], 1, 1, 8, torch.float64)
    expected = _values_and_grads(qkv, offsets, prefix_of, "reference")
    actual = _values_and_grads(qkv, offsets, prefix_of, "sdpa")
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sdpa_equals_reference_for_any_pack(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    roots = [data.draw(st.booleans()) for _ in lengths]
    candidates = [i for i, is_root in enumerate(roots) if is_root]
    prefix_of = [
        -1 if is_root or not candidates else data.draw(st.sampled_from([-1, *candidates]))
        for is_root in roots
    ]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    qkv = _qkv(offsets[-1], 4, 2, 8, torch.float64)
    expected = attention(*qkv, offsets, prefix_of=prefix_of, impl="reference")
    actual = attention(*qkv, offsets, prefix_of=prefix_of, impl="sdpa")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pack", ["ragged", "two_groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_loses_no_more_than_the_explicit_computation(pack: str, dtype: torch.dtype) -> None:
    offsets, prefix_of = PACKS[pack]
    qkv = _qkv(offsets[-1], 4, 2, 16, dtype)
    exact = _values_and_grads(_to(qkv, dtype=torch.float64), offsets, prefix_of, "reference")
    plain = _values_and_grads(qkv, offsets, prefix_of, "reference")
    fused = _values_and_grads(qkv, offsets, prefix_of, "sdpa")
    floor = 4 * torch.finfo(dtype).eps
    for truth, eager, got in zip(exact, plain, fused, strict=True):
        assert _relative_error(got, truth) <= 2 * _relative_error(eager, truth) + floor


def _relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("pack", ["with_empty", "group"])
def test_gradcheck(pack: str, impl: str) -> None:
    offsets, prefix_of = PACKS[pack]
    qkv = _qkv(offsets[-1], 2, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, offsets, prefix_of=prefix_of, impl=impl), qkv
    )


def test_shared_prefix_equals_the_prompt_repeated_per_completion() -> None:
    """The packing that sharing replaces: prompt + completion as one sequence each."""
    prompt_len, completion_lens = 5, [3, 7, 1]
    shared_offsets, repeated_offsets, index = [0, prompt_len], [0], []
    for length in completion_lens:
        start = shared_offsets[-1]
        shared_offsets.append(start + length)
        repeated_offsets.append(repeated_offsets[-1] + prompt_len + length)
        index += [*range(prompt_len), *range(start, start + length)]
    qkv = _qkv(shared_offsets[-1], 6, 2, 8, torch.float64)
    out = attention(*qkv, shared_offsets, prefix_of=[-1, 0, 0, 0], impl="sdpa")
    q, k, v = qkv
    repeated = attention(q[index], k[index], v[index], repeated_offsets, impl="sdpa")
    torch.testing.assert_close(repeated, out[index], rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(repeated)
    summed_weights = torch.zeros_like(out).index_add_(0, torch.tensor(index), weights)
    shared_grads = torch.autograd.grad((out * summed_weights).sum(), qkv)
    repeated_grads = torch.autograd.grad((repeated * weights).sum(), qkv)
    for shared, summed in zip(shared_grads, repeated_grads, strict=True):
        torch.testing.assert_close(shared, summed, rtol=1e-12, atol=1e-12)


def test_sequences_do_not_see_each_other() -> None:
    q, k, v = _qkv(12, 2, 2, 8, torch.float32)
    out = attention(q, k, v, [0, 5, 12])
    (dk,) = torch.autograd.grad(out[:5].sum(), k)
    assert dk[:5].abs().sum() > 0
    assert torch.equal(dk[5:], torch.zeros_like(dk[5:]))


def test_plan_tensor_and_list_give_the_same() -> None:
    offsets, prefix_of = PACKS["group"]
    qkv = _qkv(offsets[-1], 2, 1, 8, torch.float32)
    from_list = attention(*qkv, offsets, prefix_of=prefix_of)
    from_tensor = attention(*qkv, torch.tensor(offsets, dtype=torch.int32), prefix_of=prefix_of)
    from_plan = attention(*qkv, AttentionPlan(offsets, prefix_of))
    assert torch.equal(from_list, from_tensor)
    assert torch.equal(from_list, from_plan)


def test_softmax_scale_is_used() -> None:
    qkv = _qkv(9, 2, 2, 16, torch.float64)
    default = attention(*qkv, [0, 9])
    torch.testing.assert_close(default, attention(*qkv, [0, 9], softmax_scale=0.25))
    assert not torch.allclose(default, attention(*qkv, [0, 9], softmax_scale=0.5))


def test_plan_makes_tensors_once() -> None:
    cpu = torch.device("cpu")
    shared = AttentionPlan([0, 2, 5], [-1, 0])
    mask = shared.prefix_mask(3, 2, cpu)
    assert mask.tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]
    assert shared.prefix_mask(3, 2, cpu) is mask
    assert shared.cu_seqlens_on(cpu) is shared.cu_seqlens_on(cpu)
    assert shared.cu_seqlens_on(cpu).tolist() == [0, 2, 5]


def test_plan_without_any_prefix_has_none() -> None:
    assert AttentionPlan([0, 2, 5], [-1, -1]) == AttentionPlan((0, 2, 5))


def test_empty_pack_gives_empty_output() -> None:
    qkv = _qkv(0, 2, 2, 8, torch.float32)
    assert attention(*qkv, [0]).shape == (0, 2, 8)


def test_varlen_passes_the_pack_to_the_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what reaches torch's function describes causal attention on this pack."""
    import torch.nn.attention.varlen as torch_varlen

    calls = []

    def record(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, scale, window_size, enable_gqa))
        return q

    monkeypatch.setattr(torch_varlen, "varlen_attn", record)
    monkeypatch.setattr(varlen, "backend", lambda: "torch")
    q, k, v = _qkv(9, 6, 2, 8, torch.bfloat16)
    varlen.attention(q, k, v, AttentionPlan([0, 2, 9]), softmax_scale=0.3)
    assert calls == [([0, 2, 9], [0, 2, 9], 7, 7, 0.3, (-1, 0), True)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (9, 3)], ids=str)
def test_varlen_equals_reference_on_gpu(heads: tuple[int, int]) -> None:
    offsets = [0, 5, 6, 38, 300]
    qkv = _to(_qkv(300, *heads, 64, torch.bfloat16), device="cuda")
    exact = _values_and_grads(_to(qkv, dtype=torch.float64), offsets, None, "reference")
    plain = _values_and_grads(qkv, offsets, None, "reference")
    fused = _values_and_grads(qkv, offsets, None, "varlen")
    floor = 4 * torch.finfo(torch.bfloat16).eps
    for truth, eager, got in zip(exact, plain, fused, strict=True):
        assert _relative_error(got, truth) <= 2 * _relative_error(eager, truth) + floor


def _error_case(**changes) -> dict:
    arguments = {
        "q": torch.zeros(4, 4, 8),
        "k": torch.zeros(4, 2, 8),
        "v": torch.zeros(4, 2, 8),
        "cu_seqlens": [0, 2, 4],
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(4, 8)}, ValueError, r"expected q \[T, H, K\]"),
        ({"v": torch.zeros(4, 1, 8)}, ValueError, r"expected q \[T, H, K\]"),
        ({"q": torch.zeros(5, 4, 8)}, ValueError, "differ in tokens or head size"),
        ({"q": torch.zeros(4, 4, 16)}, ValueError, "differ in tokens or head size"),
        ({"q": torch.zeros(4, 3, 8)}, ValueError, "multiple of the number of KV heads"),
        ({"q": torch.zeros(4, 4, 8).double()}, TypeError, "one floating point dtype"),
        ({"v": torch.zeros(4, 2, 8, device="meta")}, ValueError, "expected k and v on cpu"),
        ({"cu_seqlens": [0, 2]}, ValueError, "ends at 2, q has 4 tokens"),
        ({"cu_seqlens": [1, 4]}, ValueError, "expected to start with 0"),
        ({"cu_seqlens": []}, ValueError, "expected to start with 0"),
        ({"cu_seqlens": [0, 3, 2, 4]}, ValueError, "expected ascending offsets"),
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, "one-dimensional int32 tensor"),
        ({"prefix_of": [-1]}, ValueError, r"one entry per sequence \(2\), got 1"),
        ({"prefix_of": [-1, 2]}, ValueError, "expected -1 or another sequence below 2"),
        ({"prefix_of": [-1, 1]}, ValueError, "expected -1 or another sequence below 2"),
        ({"prefix_of": [-2, 0]}, ValueError, "expected -1 or another sequence below 2"),
        ({"cu_seqlens": [0, 1, 2, 4], "prefix_of": [-1, 0, 1]}, ValueError, "has a prefix itself"),
        (
            {"cu_seqlens": AttentionPlan([0, 2, 4]), "prefix_of": [-1, 0]},
            TypeError,
            "belongs into the AttentionPlan",
        ),
        ({"impl": "fast"}, ValueError, "unknown impl 'fast'"),
        ({"impl": "varlen"}, NotImplementedError, "needs CUDA tensors, got cpu"),
    ],
)
def test_attention_refuses(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**_error_case(**changes))


def test_varlen_obstacle_names_prefixes_and_dtypes() -> None:
    q: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert "prefix_of" in api._varlen_obstacle(q, AttentionPlan([0, 2, 4], [-1, 0]))
    assert "got torch.float32" in api._varlen_obstacle(q, AttentionPlan([0, 2, 4]))


def test_attention_example_holds() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 0
    assert result.failed == 0
