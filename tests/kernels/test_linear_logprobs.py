"""linear_logprobs: values and gradients against fp64, as an operator, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels import native
from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.linear_logprobs.op import linear_logprobs_op
from lwz_kernels.linear_logprobs.reference import linear_logprobs_reference
from lwz_kernels.loss_head.matmul import HeadProducts
from tests.kernels.loss_case import (
    ROWS,
    VOCAB,
    assert_as_good_as_eager,
    logprob_arguments,
    make_case,
)

IMPLS = ["torch", *(["native"] if native.is_available() else [])]
TRANSFORMS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.6},
    {"softcap": 2.0, "logit_scale": 1.7, "temperature": torch.linspace(0.5, 2, ROWS)},
]


def results_and_gradients(function, case: dict, **options) -> list[torch.Tensor]:
    arguments = logprob_arguments(case) | options
    results = function(**arguments)
    mix = torch.linspace(-1, 2, 3 * ROWS).view(3, ROWS)
    sum((m * r).sum() for m, r in zip(mix, results, strict=True)).backward()
    return [*results, *(case[name].grad for name in ("hidden", "weight", "bias"))]


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_linear_logprobs_matches_autograd_in_fp64(options: dict, chunk_rows: int) -> None:
    options = dict(options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].double()
    ours = results_and_gradients(
        linear_logprobs, make_case(), chunk_bytes=8 * VOCAB * chunk_rows, **options
    )
    truth = results_and_gradients(linear_logprobs_reference, make_case(), **options)
    for value, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_linear_logprobs_loses_no_more_than_eager(
    impl: str, dtype: torch.dtype, options: dict
) -> None:
    truth_case = make_case(dtype)
    for name in ("hidden", "weight", "bias"):
        truth_case[name] = truth_case[name].detach().double().requires_grad_()
    truth = results_and_gradients(linear_logprobs_reference, truth_case, **options)
    eager = results_and_gradients(linear_logprobs_reference, make_case(dtype), **options)
    ours = results_and_gradients(linear_logprobs, make_case(dtype), impl=impl, **options)
    for value, plain, exact in zip(ours, eager, truth, strict=True):
        assert value.dtype == plain.dtype
        assert_as_good_as_eager(value, plain, exact)


def test_linear_logprobs_gives_zero_and_no_gradient_where_ignored() -> None:
    case = make_case()
    results = linear_logprobs(**logprob_arguments(case))
    assert all(value[8] == 0 for value in results)
    sum(value.sum() for value in results).backward()
    assert (case["hidden"].grad[8] == 0).all()
    assert (case["hidden"].grad[7] != 0).any()


def test_linear_logprobs_of_no_rows_and_of_ignored_rows_is_empty_or_zero() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    for rows in (0, 4):
        hidden = torch.randn(rows, 3, requires_grad=True)
        labels = torch.full((rows,), -100)
        logprobs, entropy, lse = linear_logprobs(hidden, weight, labels)
        assert logprobs.shape == entropy.shape == lse.shape == (rows,)
        (logprobs.sum() + entropy.sum()).backward()
        assert hidden.grad.shape == (rows, 3)
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_linear_logprobs_computes_no_gradient_for_what_is_frozen(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case()
    case[frozen] = case[frozen].detach()
    products = []
    for name in ("logits", "dhidden", "add_dweight"):
        method = getattr(HeadProducts, name)

        def counted(*args, method=method, name=name, **kwargs):
            products.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(HeadProducts, name, counted)
    linear_logprobs(**logprob_arguments(case))[0].sum().backward()
    assert case[frozen].grad is None
    skipped = {"hidden": "dhidden", "weight": "add_dweight"}.get(frozen)
    assert products == [
        name for name in ("logits", "logits", "dhidden", "add_dweight") if name != skipped
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logprobs_passes_opcheck(impl: str) -> None:
    case = make_case(torch.float32)
    temperature = torch.full((ROWS,), 0.7)
    torch.library.opcheck(
        linear_logprobs_op,
        (
            *(case[name] for name in ("hidden", "weight", "labels", "bias")),
            temperature,
            1.5,
            4.0,
            -100,
            600,
            impl,
        ),
    )


def test_linear_logprobs_compiles_without_a_graph_break() -> None:
    def total(hidden, weight, labels):
        logprobs, entropy, _ = linear_logprobs(hidden * 2, weight, labels, temperature=0.7)
        return (logprobs + 0.1 * entropy).sum()

    eager, compiled = make_case(torch.float32), make_case(torch.float32)
    names = ("hidden", "weight", "labels")
    total(*(eager[name] for name in names)).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(
        *(compiled[name] for name in names)
    ).backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(eager[name].grad, compiled[name].grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logprobs_is_the_same_with_and_without_gradients(impl: str) -> None:
    case = make_case(torch.float32)
    with_grad = linear_logprobs(**logprob_arguments(case), impl=impl)
    with torch.no_grad():
        without = linear_logprobs(**logprob_arguments(case), impl=impl)
    for a, b in zip(with_grad, without, strict=True):
        assert torch.equal(a, b)


def test_linear_logprobs_keeps_fp32_under_autocast() -> None:
    case = make_case(torch.float32)
    plain = results_and_gradients(linear_logprobs, case)
    with torch.autocast("cpu", torch.bfloat16):
        found = results_and_gradients(linear_logprobs, make_case(torch.float32))
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)


@given(
    offset=st.floats(-1e3, 1e3),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 99),
    impl=st.sampled_from(IMPLS),
)
@settings(max_examples=40, deadline=None)
def test_linear_logprobs_is_a_distribution(offset: float, vocab: int, seed: int, impl: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 6, generator=generator)
    hidden[:, 0] = offset
    weight = torch.randn(vocab, 6, generator=generator)
    weight[:, 0] = 1  # a common offset of all logits, which softmax does not see
    labels = torch.randint(0, vocab, (4,), generator=generator)
    logprobs, entropy, _ = linear_logprobs(hidden, weight, labels, impl=impl)
    assert (logprobs <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocab) + 1e-4).all()
    hidden[:, 0] = 0
    plain, _, _ = linear_logprobs(hidden, weight, labels, impl=impl)
    torch.testing.assert_close(logprobs, plain, rtol=0, atol=1e-3)


@given(
    seed=st.integers(0, 99),
    chunk_rows=st.integers(1, 20),
    vocab=st.integers(2, 200),
    impl=st.sampled_from(IMPLS),
)
@settings(max_examples=30, deadline=None)
def test_linear_logprobs_does_not_depend_on_the_order_of_rows_or_on_chunks(
    seed: int, chunk_rows: int, vocab: int, impl: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, 6, generator=generator)
    weight = torch.randn(vocab, 6, generator=generator)
    labels = torch.randint(0, vocab, (ROWS,), generator=generator)
    order = torch.randperm(ROWS, generator=generator)
    whole = linear_logprobs(hidden, weight, labels, impl=impl)
    parts = linear_logprobs(
        hidden[order], weight, labels[order], impl=impl, chunk_bytes=4 * vocab * chunk_rows
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a[order], b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [1, 127, 50_257, 151_936, 152_064, 248_320, 262_144])
@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logprobs_of_real_vocabularies(vocab: int, impl: str) -> None:
    """All logits negative and V often no multiple of a block: phantom columns would show."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(3, 4, generator=generator) + 1
    weight = -torch.rand(vocab, 4, generator=generator) - 5
    labels = torch.tensor([0, vocab - 1, vocab // 2])
    exact = linear_logprobs_reference(hidden.double(), weight.double(), labels, temperature=1.4)
    ours = linear_logprobs(hidden, weight, labels, temperature=1.4, impl=impl)
    eager = linear_logprobs_reference(hidden, weight, labels, temperature=1.4)
    for value, plain, truth in zip(ours, eager, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=2e-5)
        assert_as_good_as_eager(value, plain, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_logprobs_of_more_rows_than_a_grid_dimension(impl: str) -> None:
    rows = 65_536 + 7
    hidden = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(rows) % 5
    ours = linear_logprobs(hidden, weight, labels, impl=impl, chunk_bytes=1 << 30)
    expected = linear_logprobs_reference(hidden, weight, labels)
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_linear_logprobs_of_more_logits_than_int32_counts() -> None:
    """T · V = 2.2e9 in chunks, and the last rows are as right as the first."""
    vocab = 152_064
    rows = 2**31 // vocab + 300
    hidden = torch.zeros(rows, 8)
    hidden[-3:] = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.full((rows,), -100)
    labels[:2], labels[-3:] = 7, vocab - 1
    weight = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    logprobs, _, _ = linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(logprobs[:2], torch.full((2,), -math.log(vocab)))
    exact, _, _ = linear_logprobs_reference(hidden[-3:], weight, labels[-3:])
    torch.testing.assert_close(logprobs[-3:], exact, rtol=1e-5, atol=1e-5)


def test_linear_logprobs_has_no_second_derivative() -> None:
    case = logprob_arguments(make_case())
    logprobs, _, _ = linear_logprobs(**case)
    (gradient,) = torch.autograd.grad(logprobs.sum(), case["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(ROWS)}, "labels must be int64"),
        ({"labels": torch.full((ROWS,), VOCAB)}, r"labels must lie in \[0, 37\)"),
        ({"labels": torch.full((ROWS,), -1)}, "got -1"),
        ({"hidden": torch.zeros(ROWS, 3)}, "expected hidden"),
        ({"hidden": torch.zeros(ROWS, 8, dtype=torch.bfloat16)}, "cast one"),
        ({"bias": torch.zeros(3)}, r"bias must be \[37\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, "temperature must be a scalar or"),
        ({"temperature": torch.zeros(ROWS)}, "temperature must be positive, got 0.0"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
        ({"impl": "fast"}, "impl must be"),
        ({"impl": "triton"}, "needs CUDA tensors"),
        ({"impl": "fused"}, "CUDA tensors"),
        ({"weight": torch.zeros(0, 8, dtype=torch.float64)}, "no rows"),
    ],
)
def test_linear_logprobs_refuses_what_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**(logprob_arguments(make_case()) | change))
