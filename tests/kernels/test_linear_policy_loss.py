"""linear_policy_loss: every loss and flag against fp64, as an operator, its memory and errors."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_kernels import native
from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss
from lwz_kernels.linear_policy_loss.op import (
    InPlacePolicyLoss,
    LossInputs,
    Placement,
    linear_policy_loss_op,
)
from lwz_kernels.linear_policy_loss.reference import linear_policy_loss_reference
from lwz_kernels.loss_head.matmul import HeadProducts
from tests.kernels.loss_case import (
    DIM,
    ROWS,
    VOCAB,
    assert_as_good_as_eager,
    call,
    make_case,
)

IMPLS = ["torch", *(["native"] if native.is_available() else [])]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo")
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric clip": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28},
    "delta": {"clip_ratio_delta": 1.5},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "corrected k3": {"kl_coef": 0.3, "kl_importance_correction": True},
    "entropy": {"entropy_coef": 0.2},
    "token truncate": {"sampler_correction": "truncate", "sampler_ratio_max": 1.1},
    "token mask": {
        "sampler_correction": "mask",
        "sampler_ratio_max": 1.2,
        "sampler_ratio_min": 0.8,
    },
    "sequence truncate": {
        "sampler_correction": "truncate",
        "sampler_correction_level": "sequence",
        "sampler_ratio_max": 1.1,
    },
    "off-policy mask": {"off_policy_kl_max": 0.05},
    "all": {
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "sampler_correction": "truncate",
        "off_policy_kl_max": 0.2,
    },
}


def configs() -> list[Any]:
    found = []
    for loss_type in LOSS_TYPES:
        for name, flags in FLAGS.items():
            fixed = {"max_completion_tokens": 6} if loss_type == "dr_grpo" else {}
            try:
                config = PolicyLossConfig(loss_type=loss_type, **fixed, **flags)
            except ValueError:
                continue  # a combination without meaning; the errors have tests of their own
            found.append(pytest.param(config, id=f"{loss_type} {name}"))
    return found


def test_configs_cover_every_loss_with_most_flags() -> None:
    names = [param.id for param in configs()]
    assert len(names) >= 85, len(names)
    for flag in ("plain", "k1", "k2", "k3", "entropy", "token truncate"):
        assert sum(name.endswith(f" {flag}") for name in names) >= len(LOSS_TYPES) - 1


def gradients(function: Any, case: dict[str, Any], **changes: Any) -> list[torch.Tensor]:
    loss, metrics = call(function, case, **changes)
    (loss * 3).backward()
    return [
        loss.detach(),
        *(case[name].grad for name in ("hidden", "weight", "bias")),
        metrics["ratio_sum"],
    ]


@pytest.mark.parametrize("config", configs())
@pytest.mark.parametrize("is_on_policy", [True, False], ids=["on-policy", "off-policy"])
def test_linear_policy_loss_matches_autograd_in_fp64(
    config: PolicyLossConfig, is_on_policy: bool
) -> None:
    changes: dict[str, Any] = {"config": config}
    if is_on_policy:
        changes["old_logprobs"] = None
    ours = gradients(
        linear_policy_loss, make_case(), chunk_bytes=8 * VOCAB * 5, impl="torch", **changes
    )
    truth = gradients(linear_policy_loss_reference, make_case(), **changes)
    assert truth[1].abs().max() > 0
    for value, exact in zip(ours[:4], truth[:4], strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_linear_policy_loss_loses_no_more_than_eager(
    impl: str, dtype: torch.dtype, loss_type: str
) -> None:
    fixed = {"max_completion_tokens": 6} if loss_type == "dr_grpo" else {}
    changes = {"config": PolicyLossConfig(loss_type=loss_type, entropy_coef=0.1, **fixed)}
    truth_case = make_case(dtype)
    for name in ("hidden", "weight", "bias"):
        truth_case[name] = truth_case[name].detach().double().requires_grad_()
    for name in ("advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs"):
        truth_case[name] = truth_case[name].double()
    truth = gradients(linear_policy_loss_reference, truth_case, **changes)
    eager = gradients(linear_policy_loss_reference, make_case(dtype), **changes)
    ours = gradients(linear_policy_loss, make_case(dtype), impl=impl, **changes)
    # The loss is a sum of ten terms of either sign and magnitude about 1.
    assert_as_good_as_eager(ours[0], eager[0], truth[0], magnitude=1.0)
    for value, plain, exact in zip(ours[1:4], eager[1:4], truth[1:4], strict=True):
        assert_as_good_as_eager(value, plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_linear_policy_loss_takes_a_temperature_per_token_and_transforms(
    impl: str, softcap: float | None
) -> None:
    changes = {
        "temperature": torch.linspace(0.5, 1.6, ROWS),
        "softcap": softcap,
        "logit_scale": 1.3,
        "old_logprobs": None,
        "config": PolicyLossConfig(loss_type="dapo", entropy_coef=0.05),
    }
    case, truth_case = make_case(torch.float32), make_case(torch.float32)
    ours = gradients(linear_policy_loss, case, impl=impl, **changes)
    truth = gradients(linear_policy_loss_reference, truth_case, **changes)
    for value, exact in zip(ours[:4], truth[:4], strict=True):
        torch.testing.assert_close(value, exact, rtol=2e-5, atol=2e-6)


def test_linear_policy_loss_of_a_policy_mask_keeps_the_kl_term() -> None:
    config = PolicyLossConfig(loss_type="dapo", kl_coef=0.2, entropy_coef=0.1)
    policy_mask = torch.arange(ROWS) % 3 > 0
    changes = {"config": config, "policy_mask": policy_mask}
    ours = gradients(linear_policy_loss, make_case(), **changes)
    truth = gradients(linear_policy_loss_reference, make_case(), **changes)
    plain = gradients(linear_policy_loss_reference, make_case(), config=config)
    assert not torch.allclose(plain[0], truth[0])
    for value, exact in zip(ours[:4], truth[:4], strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_linear_policy_loss_sums_over_micro_batches(loss_type: str) -> None:
    """Two calls with global counts give the loss and gradient of one."""
    config = PolicyLossConfig(loss_type=loss_type, kl_coef=0.1, entropy_coef=0.1)
    whole, parts = make_case(), make_case()
    expected, _ = call(linear_policy_loss, whole, config=config)
    expected.backward()
    per_row = (
        *("hidden", "labels", "advantages", "loss_mask"),
        *("old_logprobs", "ref_logprobs", "sampling_logprobs"),
    )
    total = 0.0
    for rows, edges in ((slice(0, 5), [0, 4, 5]), (slice(5, 13), [0, 0, 6, 8])):
        changes = {name: parts[name][rows] for name in per_row}
        loss, _ = call(
            linear_policy_loss, parts, cu_seqlens=torch.tensor(edges), config=config, **changes
        )
        loss.backward()
        total += float(loss.detach())
    torch.testing.assert_close(torch.tensor(total).double(), expected.detach())
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(parts[name].grad, whole[name].grad)


@given(
    seed=st.integers(0, 99),
    extra=st.integers(0, 6),
    loss_type=st.sampled_from(["grpo", "dapo", "gspo", "cispo"]),
    impl=st.sampled_from(IMPLS),
)
@settings(max_examples=30, deadline=None)
def test_linear_policy_loss_of_zero_rows_changes_nothing_and_costs_nothing(
    seed: int, extra: int, loss_type: str, impl: str
) -> None:
    """Masked rows between the others, full of NaN, change neither loss nor gradient."""
    config = PolicyLossConfig(loss_type=loss_type)
    plain, padded = make_case(torch.float32, seed=seed), make_case(torch.float32, seed=seed)
    expected, _ = call(linear_policy_loss, plain, config=config, impl=impl)
    expected.backward()
    at = 4
    changes: dict[str, Any] = {
        "hidden": torch.cat(
            [padded["hidden"][:at], torch.full((extra, DIM), torch.nan), padded["hidden"][at:]]
        ),
        "loss_mask": torch.cat(
            [
                padded["loss_mask"][:at],
                torch.zeros(extra, dtype=torch.bool),
                padded["loss_mask"][at:],
            ]
        ),
        "labels": torch.cat(
            [padded["labels"][:at], torch.zeros(extra).long(), padded["labels"][at:]]
        ),
        "cu_seqlens": torch.cat([padded["cu_seqlens"][:2], padded["cu_seqlens"][1:] + extra]),
    }
    for name in ("advantages", "old_logprobs", "ref_logprobs", "sampling_logprobs"):
        changes[name] = torch.cat(
            [padded[name][:at], torch.full((extra,), torch.nan), padded[name][at:]]
        )
    loss, _ = call(linear_policy_loss, padded, config=config, impl=impl, **changes)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(padded[name].grad, plain[name].grad, rtol=1e-5, atol=1e-6)


def test_linear_policy_loss_sends_only_rows_with_a_gradient_through_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    logits = HeadProducts.logits

    def counted(self: HeadProducts, hidden_CD: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_CD))
        return logits(self, hidden_CD)

    monkeypatch.setattr(HeadProducts, "logits", counted)
    case = make_case()
    has_gradient = case["loss_mask"] & (case["labels"] != -100) & (case["advantages"] != 0)
    call(linear_policy_loss, case, config=PolicyLossConfig(loss_type="dapo"))
    assert sum(seen) == has_gradient.sum() == 8
    seen.clear()
    call(linear_policy_loss, case, config=PolicyLossConfig(loss_type="dapo", entropy_coef=0.1))
    assert sum(seen) == 10


def test_linear_policy_loss_is_on_policy_without_old_logprobs() -> None:
    _, metrics = call(linear_policy_loss, make_case(), old_logprobs=None)
    assert metrics["ratio_sum"] == metrics["num_tokens_sum"] == 8
    assert metrics["ratio_max"] == 1
    assert metrics["clip_low_sum"] == metrics["clip_high_sum"] == 0


def test_linear_policy_loss_metrics_are_those_of_the_oracle() -> None:
    config = PolicyLossConfig(kl_coef=0.1)
    _, ours = call(linear_policy_loss, make_case(), config=config)
    _, truth = call(linear_policy_loss_reference, make_case(), config=config)
    assert {"kl_sum", "logprob_diff_max", "importance_sq_sum", "clip_low_sum"} <= set(ours)
    scored = ours["logprobs"] != 0
    for name, value in ours.items():
        exact = truth[name]
        if name in ("logprobs", "entropy"):
            value, exact = value[scored], exact[scored]
        torch.testing.assert_close(value.double(), exact.double(), rtol=1e-9, atol=1e-9)


def test_linear_policy_loss_names_only_metrics_that_were_measured() -> None:
    _, metrics = call(linear_policy_loss, make_case(), ref_logprobs=None, sampling_logprobs=None)
    assert not {"kl_sum", "logprob_diff_sum", "importance_sum"} & set(metrics)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_linear_policy_loss_adds_into_the_callers_buffer(loss_type: str) -> None:
    config = PolicyLossConfig(loss_type=loss_type)
    plain, own = make_case(), make_case()
    call(linear_policy_loss, plain, config=config)[0].backward()
    buffer = torch.ones(VOCAB, DIM, dtype=torch.float64)
    loss, _ = call(linear_policy_loss, own, config=config, weight_grad=buffer)
    loss.backward()
    assert own["weight"].grad is None
    torch.testing.assert_close(buffer - 1, plain["weight"].grad)
    torch.testing.assert_close(own["hidden"].grad, plain["hidden"].grad)
    loss, _ = call(linear_policy_loss, own, config=config, weight_grad=buffer)
    with pytest.raises(RuntimeError, match="upstream gradient of 1"):
        (loss * 2).backward()


def test_linear_policy_loss_with_a_buffer_gives_its_gradients_once() -> None:
    buffer = torch.zeros(VOCAB, DIM, dtype=torch.float64)
    loss, _ = call(linear_policy_loss, make_case(), weight_grad=buffer)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_linear_policy_loss_of_a_tied_embedding_adds_both_gradients() -> None:
    tied = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True)
    split = [tied.detach().clone().requires_grad_() for _ in range(2)]
    tokens = torch.arange(ROWS)
    for embedding, head in ((tied, tied), split):
        call(linear_policy_loss, make_case(), hidden=embedding[tokens], weight=head)[0].backward()
    torch.testing.assert_close(tied.grad, split[0].grad + split[1].grad)


def test_linear_policy_loss_of_a_composed_lora_head_reaches_its_factors() -> None:
    """W + s·B·A passed as the weight: gradients of A and B are those of autograd."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(2, DIM, generator=generator, dtype=torch.float64, requires_grad=True),
        torch.randn(VOCAB, 2, generator=generator, dtype=torch.float64, requires_grad=True),
    ]
    grads = []
    for function in (linear_policy_loss, linear_policy_loss_reference):
        case = make_case()
        weight = case["weight"].detach() + 0.5 * factors[1] @ factors[0]
        loss, _ = call(function, case, weight=weight)
        grads.append(torch.autograd.grad(loss, factors))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_linear_policy_loss_computes_no_gradient_for_what_is_frozen(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = {"hidden": "dhidden", "weight": "add_dweight"}[frozen]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{product} of a frozen tensor was computed")

    monkeypatch.setattr(HeadProducts, product, never)
    case = make_case()
    case[frozen] = case[frozen].detach()
    call(linear_policy_loss, case)[0].backward()
    assert case[frozen].grad is None


def test_linear_policy_loss_without_grad_computes_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(HeadProducts, "dhidden")
    monkeypatch.delattr(HeadProducts, "add_dweight")
    expected, _ = call(linear_policy_loss_reference, make_case())
    with torch.no_grad():
        loss, _ = call(linear_policy_loss, make_case())
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_linear_policy_loss_passes_opcheck(impl: str, loss_type: str) -> None:
    case = make_case(torch.float32)
    inputs = operator_inputs(case, PolicyLossConfig(loss_type=loss_type), impl)
    torch.library.opcheck(linear_policy_loss_op, (case["hidden"], case["weight"], *inputs))


def operator_inputs(case: dict[str, Any], config: PolicyLossConfig, impl: str) -> LossInputs:
    return LossInputs(
        bias=case["bias"],
        labels=case["labels"],
        advantages=case["advantages"],
        loss_mask=case["loss_mask"],
        cu_seqlens=case["cu_seqlens"],
        num_loss_tokens=torch.tensor(10.0),
        num_sequences=torch.tensor(4.0),
        sequence_loss_tokens=None,
        old_logprobs=case["old_logprobs"],
        ref_logprobs=None,
        sampling_logprobs=case["sampling_logprobs"],
        policy_mask=None,
        temperature=torch.full((ROWS,), 0.7),
        logit_scale=1.0,
        softcap=None,
        ignore_index=-100,
        chunk_bytes=600,
        impl=impl,
        config=config.as_json,
        needs=[True, True, True],
    )


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_linear_policy_loss_compiles_without_a_graph_break(loss_type: str) -> None:
    config = PolicyLossConfig(loss_type=loss_type, entropy_coef=0.1)

    def total(case: dict[str, Any]) -> torch.Tensor:
        return call(linear_policy_loss, case | {"hidden": case["hidden"] * 2}, config=config)[0]

    eager, compiled = make_case(torch.float32), make_case(torch.float32)
    total(eager).backward()
    torch.compile(total, fullgraph=True, backend="aot_eager")(compiled).backward()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(eager[name].grad, compiled[name].grad)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of live storages made inside, their peak, and the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.peak = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or storage.nbytes() == 0:
            return
        self._live[key] = storage.nbytes()
        weakref.finalize(storage, self._live.pop, key, None)
        self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._live.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_linear_policy_loss_never_holds_all_logits(
    dtype: torch.dtype, loss_type: str, impl: str
) -> None:
    """Forward and backward stay within the chunk, the gradients, and vectors of T numbers."""
    rows, vocab, dim, chunk_bytes = 16_384, 1000, 4, 8 << 20
    hidden = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    case = {
        "labels": torch.zeros(rows, dtype=torch.int64),
        "advantages": torch.randn(rows),
        "loss_mask": torch.ones(rows, dtype=torch.bool),
        "bias": None,
        "cu_seqlens": torch.tensor([0, rows // 2, rows]),
        "old_logprobs": torch.full((rows,), -8.0),
        "sampling_logprobs": None,
    }
    config = PolicyLossConfig(loss_type=loss_type, entropy_coef=0.1)
    inputs = operator_inputs(case, config, impl)._replace(
        chunk_bytes=chunk_bytes, temperature=torch.ones(rows), needs=[True, True, False]
    )
    with Allocations() as seen:
        # The same code as the operator's, reached without it: a mode does not see inside operators.
        loss, *_ = InPlacePolicyLoss.apply(hidden, weight, None, inputs, Placement())
        loss.backward()
    gradients_bytes = 2 * (rows + vocab) * dim * 4 + 2 * vocab * dim * 4
    vectors_bytes = 40 * rows * 8
    # The plain row pass works in blocks of 1 MiB and keeps four of them.
    blocks_bytes = 4 << 20 if impl == "torch" else 0
    assert seen.largest <= chunk_bytes
    assert seen.peak <= chunk_bytes + gradients_bytes + vectors_bytes + blocks_bytes
    assert seen.peak < rows * vocab * 4 / 2


def test_linear_policy_loss_halves_its_chunk_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logits = HeadProducts.logits

    def tight(self: HeadProducts, hidden_CD: torch.Tensor) -> torch.Tensor:
        if len(hidden_CD) > 3:
            raise torch.OutOfMemoryError("no room for more than three rows")
        return logits(self, hidden_CD)

    expected = gradients(linear_policy_loss, make_case())
    monkeypatch.setattr(HeadProducts, "logits", tight)
    found = gradients(linear_policy_loss, make_case(), chunk_bytes=16 * 8 * VOCAB)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert caplog.text.count("out of memory, trying chunks") == 3


def test_linear_policy_loss_halving_its_chunk_repeats_no_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other ranks of a sequence do not run out of memory, and would not answer twice."""
    sums = []
    logits = HeadProducts.logits

    def count(values: torch.Tensor, *, group: object) -> torch.Tensor:
        sums.append(group)
        return values

    def tight(self: HeadProducts, hidden_CD: torch.Tensor) -> torch.Tensor:
        if len(hidden_CD) > 3:
            raise torch.OutOfMemoryError("no room for more than three rows")
        return logits(self, hidden_CD)

    monkeypatch.setattr("lwz_kernels.linear_policy_loss.op._all_reduce", count)
    changes: dict[str, Any] = {
        "config": PolicyLossConfig(loss_type="gspo"),
        "sequence_loss_tokens": torch.tensor([3, 1, 0, 4, 2]),
        "sequence_group": "a group",
    }
    for changes["old_logprobs"] in (None, make_case()["old_logprobs"]):
        sums.clear()
        expected, _ = call(linear_policy_loss, make_case(), **changes)
        num_collectives = len(sums)
        sums.clear()
        with monkeypatch.context() as patch:
            patch.setattr(HeadProducts, "logits", tight)
            found, _ = call(linear_policy_loss, make_case(), **changes)
        torch.testing.assert_close(found, expected)
        assert len(sums) == num_collectives > 0


def test_linear_policy_loss_never_tries_again_once_a_gradient_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second attempt would add a part of dW to the caller's buffer twice."""
    calls = []
    logits = HeadProducts.logits

    def late(self: HeadProducts, hidden_CD: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden_CD))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("later")
        return logits(self, hidden_CD)

    monkeypatch.setattr(HeadProducts, "logits", late)
    with pytest.raises(torch.OutOfMemoryError, match="later"):
        call(linear_policy_loss, make_case(), chunk_bytes=5 * 8 * VOCAB)
    assert len(calls) == 2


@pytest.mark.parametrize("has_buffer", [False, True])
def test_linear_policy_loss_keeps_fp32_under_autocast(has_buffer: bool) -> None:
    losses = []
    for enabled in (False, True):
        case = make_case(torch.float32)
        buffer = torch.zeros(VOCAB, DIM) if has_buffer else None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = call(linear_policy_loss, case, weight_grad=buffer)
        loss.backward()
        losses.append((loss.detach(), case["hidden"].grad))
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)


def test_linear_policy_loss_of_no_rows_is_zero() -> None:
    case = make_case(torch.float32)
    for name in ("hidden", "labels", "advantages", "loss_mask", "old_logprobs", "ref_logprobs"):
        case[name] = case[name][:0]
    case |= {"sampling_logprobs": None, "cu_seqlens": torch.tensor([0])}
    loss, metrics = call(linear_policy_loss, case)
    loss.backward()
    assert loss == 0
    assert metrics["num_tokens_sum"] == 0
    assert (case["weight"].grad == 0).all()


def test_linear_policy_loss_of_only_masked_rows_is_zero() -> None:
    for loss_type in ("dapo", "gspo"):
        case = make_case(torch.float32)
        loss, _ = call(
            linear_policy_loss,
            case,
            loss_mask=torch.zeros(ROWS, dtype=torch.bool),
            config=PolicyLossConfig(loss_type=loss_type, entropy_coef=0.1),
        )
        loss.backward()
        assert loss == 0
        assert (case["hidden"].grad == 0).all()


def test_linear_policy_loss_shows_a_nan_advantage() -> None:
    case = make_case(torch.float32)
    case["advantages"][0] = torch.nan
    loss, _ = call(linear_policy_loss, case, config=PolicyLossConfig(loss_type="dapo"))
    assert loss.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.full((ROWS,), VOCAB)}, "labels must lie in"),
        ({"advantages": torch.zeros(2)}, "advantages must have shape"),
        ({"loss_mask": torch.ones(ROWS)}, "loss_mask must be bool"),
        ({"policy_mask": torch.ones(ROWS)}, "policy_mask must be bool"),
        ({"hidden": torch.zeros(ROWS, 3)}, "expected hidden"),
        ({"hidden": torch.zeros(ROWS, DIM, dtype=torch.bfloat16)}, "cast one"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must rise from 0 to 13"),
        ({"cu_seqlens": torch.tensor([0, 9, 4, 13])}, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 13.0])}, "cu_seqlens must be integers"),
        ({"num_sequences": None}, "num_sequences"),
        ({"config": PolicyLossConfig(loss_type="dr_grpo")}, "set max_completion_tokens"),
        ({"num_loss_tokens": -1}, "num_loss_tokens must not be negative"),
        ({"num_loss_tokens": torch.ones(2)}, "0-d tensor"),
        ({"sequence_loss_tokens": torch.ones(2)}, r"sequence_loss_tokens must be \[5\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.full((ROWS,), -1.0)}, "temperature must be positive, got -1.0"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"sequence_group": object()}, "pass sequence_loss_tokens"),
        (
            {
                "weight": torch.zeros(VOCAB, DIM, dtype=torch.float64),
                "weight_grad": torch.zeros(VOCAB, DIM, dtype=torch.float64),
            },
            "weight does not require grad",
        ),
        ({"weight_grad": torch.zeros(VOCAB, DIM)}, "weight_grad must be torch.float64"),
        ({"impl": "fast"}, "impl must be"),
        (
            {"config": PolicyLossConfig(kl_coef=0.1), "ref_logprobs": None},
            "kl_coef > 0 needs ref_logprobs",
        ),
        (
            {
                "config": PolicyLossConfig(sampler_correction="truncate"),
                "sampling_logprobs": None,
            },
            "sampler_correction needs sampling_logprobs",
        ),
        (
            {"impl": "reference", "weight_grad": torch.zeros(VOCAB, DIM, dtype=torch.float64)},
            "takes no tp_group",
        ),
    ],
)
def test_linear_policy_loss_refuses_what_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(linear_policy_loss, make_case(), **change)


def test_linear_policy_loss_takes_no_gradients_in_float16() -> None:
    case = make_case(torch.float32)
    case |= {name: case[name].detach().half() for name in ("hidden", "weight")} | {"bias": None}
    loss, _ = call(linear_policy_loss, case)
    assert loss.isfinite()
    case["hidden"].requires_grad_()
    with pytest.raises(NotImplementedError, match="use bfloat16, or linear_logprobs"):
        call(linear_policy_loss, case)


def test_linear_policy_loss_refuses_sharded_sequences_that_nobody_completes() -> None:
    config = PolicyLossConfig(loss_type="gspo")
    with pytest.raises(NotImplementedError, match="sharded"):
        call(
            linear_policy_loss,
            make_case(),
            config=config,
            sequence_loss_tokens=torch.tensor([4, 1, 0, 6, 4]),
        )
