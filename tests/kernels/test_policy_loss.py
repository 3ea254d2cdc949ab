"""The loss head against an fp64 autograd oracle, and the properties that its callers rely on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels.policy_loss import (
    PolicyLossConfig,
    linear_logprobs,
    linear_policy_loss,
    loss_token_weights,
)
from lwz_kernels.policy_loss.reference import linear_logprobs_reference, policy_loss_reference

ROWS, DIM, VOCAB = 13, 8, 37


def make_case(dtype: torch.dtype = torch.float64, *, off_policy: float = 0.3) -> dict:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = randn(ROWS, DIM), randn(VOCAB, DIM)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    logprobs = linear_logprobs_reference(hidden, weight, labels, 0.7)[0]
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    weights[3] = 0
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": labels,
        "advantages": randn(ROWS).to(dtype),
        "loss_weights": weights.to(dtype),
        "old_logprobs": (logprobs + off_policy * randn(ROWS)).to(dtype),
        "ref_logprobs": (logprobs + off_policy * randn(ROWS)).to(dtype),
        "sampling_logprobs": (logprobs + off_policy * randn(ROWS)).to(dtype),
    }


def reference_loss(case: dict, config: PolicyLossConfig, *, on_policy: bool) -> torch.Tensor:
    logprobs, entropy, _ = linear_logprobs_reference(
        case["hidden"], case["weight"], case["labels"], 0.7
    )
    return policy_loss_reference(
        logprobs,
        entropy,
        case["advantages"],
        case["loss_weights"],
        old_logprobs=None if on_policy else case["old_logprobs"],
        ref_logprobs=case["ref_logprobs"] if config.kl_coef else None,
        sampling_logprobs=case["sampling_logprobs"],
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
        tis_cap=config.tis_cap,
    )


def kernel_loss(case: dict, config: PolicyLossConfig, *, on_policy: bool, chunk_rows: int) -> tuple:
    return linear_policy_loss(
        case["hidden"],
        case["weight"],
        case["labels"],
        case["advantages"],
        case["loss_weights"],
        old_logprobs=None if on_policy else case["old_logprobs"],
        ref_logprobs=case["ref_logprobs"] if config.kl_coef else None,
        sampling_logprobs=case["sampling_logprobs"],
        temperature=0.7,
        config=config,
        chunk_bytes=4 * VOCAB * chunk_rows,
    )


CONFIGS = [
    PolicyLossConfig(),
    PolicyLossConfig(clip_ratio_low=0.1, clip_ratio_high=0.28),
    *(PolicyLossConfig(kl_coef=0.3, kl_estimator=k) for k in ("k1", "k2", "k3")),
    PolicyLossConfig(entropy_coef=0.2),
    PolicyLossConfig(tis_cap=1.1),
    PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1, tis_cap=2.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_linear_policy_loss_matches_autograd_in_fp64(
    config: PolicyLossConfig, on_policy: bool, chunk_rows: int
) -> None:
    ours, truth = make_case(), make_case()
    loss, _ = kernel_loss(ours, config, on_policy=on_policy, chunk_rows=chunk_rows)
    expected = reference_loss(truth, config, on_policy=on_policy)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(ours[name].grad, truth[name].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_policy_loss_loses_no_more_than_eager_of_the_same_dtype(dtype: torch.dtype) -> None:
    config = PolicyLossConfig(entropy_coef=0.1)
    truth, eager, ours = make_case(), make_case(dtype), make_case(dtype)
    reference_loss(truth, config, on_policy=True).backward()
    reference_loss(eager, config, on_policy=True).backward()
    kernel_loss(ours, config, on_policy=True, chunk_rows=4)[0].backward()
    for name in ("hidden", "weight"):
        exact = truth[name].grad
        error = (ours[name].grad.double() - exact).norm()
        eager_error = (eager[name].grad.double() - exact).norm()
        assert error <= 2 * eager_error + 1e-7 * exact.norm(), (name, error, eager_error)


def test_linear_policy_loss_is_on_policy_without_old_logprobs() -> None:
    _, metrics = kernel_loss(make_case(), PolicyLossConfig(), on_policy=True, chunk_rows=4)
    assert metrics["ratio_sum"] == metrics["num_tokens_sum"] == ROWS - 1
    assert metrics["ratio_max"] == 1
    assert metrics["clip_low_sum"] == metrics["clip_high_sum"] == 0


def test_linear_policy_loss_counts_clipped_tokens_by_side() -> None:
    case = make_case(off_policy=1.0)
    config = PolicyLossConfig(clip_ratio_low=0.2, clip_ratio_high=0.2)
    _, metrics = kernel_loss(case, config, on_policy=False, chunk_rows=4)
    logprobs = linear_logprobs_reference(case["hidden"], case["weight"], case["labels"], 0.7)[0]
    ratio = (logprobs - case["old_logprobs"]).exp()
    counted = case["loss_weights"] > 0
    low = (ratio < 0.8) & (case["advantages"] < 0) & counted
    high = (ratio > 1.2) & (case["advantages"] > 0) & counted
    assert low.any()
    assert high.any()
    assert metrics["clip_low_sum"] == low.sum()
    assert metrics["clip_high_sum"] == high.sum()


def test_linear_policy_loss_takes_no_gradient_for_a_frozen_head() -> None:
    case = make_case()
    case["weight"] = case["weight"].detach()
    kernel_loss(case, PolicyLossConfig(), on_policy=True, chunk_rows=4)[0].backward()
    assert case["weight"].grad is None
    assert case["hidden"].grad is not None


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_linear_logprobs_matches_reference_with_gradients(temperature: float) -> None:
    ours, truth = make_case(), make_case()
    results = linear_logprobs(
        ours["hidden"], ours["weight"], ours["labels"], temperature=temperature, chunk_bytes=600
    )
    expected = linear_logprobs_reference(
        truth["hidden"], truth["weight"], truth["labels"], temperature
    )
    mix = torch.linspace(-1, 2, 3 * ROWS, dtype=torch.float64).view(3, ROWS)
    sum((m * r).sum() for m, r in zip(mix, results, strict=True)).backward()
    sum((m * r).sum() for m, r in zip(mix, expected, strict=True)).backward()
    for value, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(ours[name].grad, truth[name].grad, rtol=1e-11, atol=1e-12)


def test_linear_logprobs_takes_a_temperature_per_token() -> None:
    case = make_case()
    temperature = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    result = linear_logprobs(
        case["hidden"], case["weight"], case["labels"], temperature=temperature
    )
    expected = linear_logprobs_reference(
        case["hidden"], case["weight"], case["labels"], temperature
    )
    torch.testing.assert_close(result[0], expected[0])


@given(offset=st.floats(-1e3, 1e3), vocab=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_linear_logprobs_is_a_distribution(offset: float, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 6, generator=generator)
    hidden[:, 0] = offset
    weight = torch.randn(vocab, 6, generator=generator)
    weight[:, 0] = 1  # a common offset of all logits, which softmax does not see
    labels = torch.randint(0, vocab, (4,), generator=generator)
    logprobs, entropy, _ = linear_logprobs(hidden, weight, labels)
    assert (logprobs <= 0).all()
    assert (entropy >= -1e-4).all()
    assert (entropy <= math.log(vocab) + 1e-4).all()
    hidden[:, 0] = 0
    plain, _, _ = linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(logprobs, plain, rtol=0, atol=1e-3)


def test_linear_policy_loss_gives_its_gradients_once() -> None:
    loss, _ = kernel_loss(make_case(), PolicyLossConfig(), on_policy=True, chunk_rows=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_linear_policy_loss_of_no_rows_is_zero() -> None:
    case = {
        name: value[:0].detach().requires_grad_(value.requires_grad) if name != "weight" else value
        for name, value in make_case().items()
    }
    loss, _ = kernel_loss(case, PolicyLossConfig(), on_policy=True, chunk_rows=4)
    loss.backward()
    assert loss == 0
    assert case["weight"].grad.abs().sum() == 0


def test_linear_policy_loss_never_holds_all_logits() -> None:
    """The largest tensor allocated in forward and backward is a chunk or a gradient."""
    rows, vocab, dim = 512, 1000, 16
    seen: list[int] = []

    class Tracker(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.untyped_storage().nbytes())
            return result

    hidden = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    ones = torch.ones(rows)
    with Tracker():
        loss, _ = linear_policy_loss(
            hidden, weight, torch.zeros(rows, dtype=torch.int64), ones, ones, chunk_bytes=64 * 4000
        )
        loss.backward()
    assert max(seen) <= 64 * 4000 < rows * vocab


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("grpo", [1 / 4, 1 / 4, 1 / 2, 0]),
        ("dapo", [1 / 3, 1 / 3, 1 / 3, 0]),
        ("dr_grpo", [1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_loss_token_weights_by_hand(normalizer: str, expected: list[float]) -> None:
    weights = loss_token_weights(
        torch.tensor([True, True, True, False]),
        torch.tensor([0, 2, 4]),
        normalizer=normalizer,
        num_loss_tokens=3,
        num_sequences=2,
        max_completion_tokens=10,
    )
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.zeros(ROWS)}, "labels must be int64"),
        ({"advantages": torch.zeros(2)}, "advantages must have shape"),
        ({"hidden": torch.zeros(ROWS, 3)}, "expected hidden"),
        ({"hidden": torch.zeros(ROWS, DIM, dtype=torch.bfloat16)}, "cast one"),
    ],
)
def test_linear_policy_loss_refuses_tensors_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_loss(make_case() | change, PolicyLossConfig(), on_policy=True, chunk_rows=4)


def test_linear_policy_loss_names_what_the_config_needs() -> None:
    case = make_case()
    rows = [case[name] for name in ("hidden", "weight", "labels", "advantages", "loss_weights")]
    with pytest.raises(ValueError, match="kl_coef > 0 needs ref_logprobs"):
        linear_policy_loss(*rows, config=PolicyLossConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="tis_cap > 0 needs sampling_logprobs"):
        linear_policy_loss(*rows, config=PolicyLossConfig(tis_cap=2.0))
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_policy_loss(*rows, temperature=0.0)
    with pytest.raises(ValueError, match="clip_ratio_low"):
        PolicyLossConfig(clip_ratio_low=1.0)
