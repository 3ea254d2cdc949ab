"""logprobs_from_logits: values and gradients against fp64, as an operator, and its errors."""

import pytest
import torch

from lwz_kernels import native
from lwz_kernels.logprobs_from_logits import logprobs_from_logits
from lwz_kernels.logprobs_from_logits.op import logprobs_from_logits_op
from lwz_kernels.logprobs_from_logits.reference import logprobs_from_logits_reference
from tests.kernels.loss_case import assert_as_good_as_eager

IMPLS = ["torch", *(["native"] if native.is_available() else [])]
TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}]


def make_logits(dtype: torch.dtype, vocab: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(2, 5, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (2, 5), generator=generator)
    labels[1, 3] = -100
    return logits.requires_grad_(), labels


def results_and_gradient(function, logits, labels, **options) -> list[torch.Tensor]:
    results = function(logits, labels, **options)
    mix = torch.linspace(-1, 2, 3 * labels.numel()).view(3, *labels.shape)
    sum((m * r).sum() for m, r in zip(mix, results, strict=True)).backward()
    return [*results, logits.grad]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_from_logits_loses_no_more_than_eager(
    impl: str, options: dict, dtype: torch.dtype
) -> None:
    if dtype == torch.float64 and impl == "native":
        pytest.skip("the native kernel has no fp64")
    logits, labels = make_logits(dtype)
    exact_logits = logits.detach().double().requires_grad_()
    truth = results_and_gradient(logprobs_from_logits_reference, exact_logits, labels, **options)
    eager = results_and_gradient(
        logprobs_from_logits_reference, logits.detach().requires_grad_(), labels, **options
    )
    ours = results_and_gradient(logprobs_from_logits, logits, labels, impl=impl, **options)
    for value, plain, exact in zip(ours, eager, truth, strict=True):
        assert value.dtype == plain.dtype
        assert value.shape == plain.shape
        assert_as_good_as_eager(value, plain, exact)
    assert all(value[1, 3] == 0 for value in ours[:3])
    assert (ours[3][1, 3] == 0).all()


def test_logprobs_from_logits_takes_views_that_are_not_contiguous() -> None:
    logits, labels = make_logits(torch.float32)
    mirrored = logits.detach().transpose(0, 1)
    ours = logprobs_from_logits(mirrored, labels.t(), temperature=0.8)
    plain = logprobs_from_logits(logits.detach(), labels, temperature=0.8)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.t(), b)


@pytest.mark.parametrize("per_row", [False, True])
def test_logprobs_from_logits_does_not_copy_a_large_slice(
    monkeypatch: pytest.MonkeyPatch, per_row: bool
) -> None:
    monkeypatch.setattr("lwz_kernels.logprobs_from_logits.api.default_chunk_bytes", lambda _: 1)
    logits, labels = make_logits(torch.float32)
    temperature = torch.linspace(0.5, 1.5, 8).view(2, 4) if per_row else 0.8
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = logprobs_from_logits(logits[:, :-1], labels[:, :-1], temperature=temperature)
    assert saved.count(logits.untyped_storage().data_ptr()) == 2
    copied = logits.detach()[:, :-1].contiguous().requires_grad_()
    plain = logprobs_from_logits(copied, labels[:, :-1], temperature=temperature)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    sum(value.sum() for value in ours).backward()
    sum(value.sum() for value in plain).backward()
    assert torch.equal(logits.grad[:, :-1], copied.grad)
    assert (logits.grad[:, -1] == 0).all()


def test_logprobs_from_logits_has_no_second_derivative() -> None:
    logits, labels = make_logits(torch.float32)
    logprobs, _, _ = logprobs_from_logits(logits, labels)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logprobs_from_logits: differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_logprobs_from_logits_passes_opcheck(impl: str) -> None:
    logits, labels = make_logits(torch.float32)
    flat = logits.detach().view(-1, 41).requires_grad_()
    temperature = torch.full((10,), 0.7)
    torch.library.opcheck(
        logprobs_from_logits_op, (flat, labels.view(-1), temperature, 1.2, 5.0, -100, impl)
    )


def test_logprobs_from_logits_compiles_without_a_graph_break() -> None:
    def total(logits, labels):
        logprobs, entropy, _ = logprobs_from_logits(logits * 2, labels, temperature=0.7)
        return (logprobs + 0.1 * entropy).sum()

    eager, labels = make_logits(torch.float32)
    compiled, _ = make_logits(torch.float32)
    total(eager, labels).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(compiled, labels).backward()
    torch.testing.assert_close(eager.grad, compiled.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_logprobs_from_logits_of_masked_vocabulary_is_finite(impl: str) -> None:
    """Entries of −inf (forbidden tokens) have probability 0 and no gradient."""
    logits, labels = make_logits(torch.float32)
    forbidden = torch.zeros(41, dtype=torch.bool)
    forbidden[[0, 8, 40]] = True
    labels = torch.where((labels == 0) | (labels == 8) | (labels == 40), 5, labels)
    masked = logits.detach().masked_fill(forbidden, -torch.inf).requires_grad_()
    logprobs, entropy, _ = logprobs_from_logits(masked, labels, impl=impl)
    (logprobs + entropy).sum().backward()
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert masked.grad.isfinite().all()
    assert (masked.grad[..., forbidden] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "expected logits"),
        ({"labels": torch.zeros(2, 5)}, "expected logits"),
        ({"labels": torch.full((2, 5), 41)}, r"labels must lie in \[0, 41\)"),
        ({"logits": torch.zeros(2, 5, 0)}, "V > 0"),
        ({"logits": torch.zeros(2, 5, 3, dtype=torch.int64)}, "must be floating point"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, "temperature must be a scalar"),
        ({"temperature": torch.tensor(-1.0)}, "temperature must be positive, got -1.0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"impl": "triton"}, "needs CUDA tensors"),
        ({"impl": "best"}, "impl must be"),
    ],
)
def test_logprobs_from_logits_refuses_what_does_not_fit(change: dict, message: str) -> None:
    logits, labels = make_logits(torch.float32)
    arguments = {"logits": logits, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(**arguments)
