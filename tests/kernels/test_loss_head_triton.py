"""The Triton kernels of the loss head: interpreted without a GPU, compiled on one.

Errors are judged against fp64 by the rule of `loss_case`; the torch row passes are the eager twin.
The interpreter takes milliseconds for each program, so cases have few rows; tl.dot of bf16 is wrong
in it, so products are fp32 and fp64. What it cannot show (races, spills, limits of a grid) is in
`test_triton_compile.py`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels.linear_logprobs import kernels as product_kernels
from lwz_kernels.linear_logprobs.kernels import linear_logprobs_fwd, linear_statistics
from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
from lwz_kernels.linear_policy_loss.kernels import policy_loss_rows
from lwz_kernels.linear_policy_loss.objective import ObjectiveRows, token_objective
from lwz_kernels.loss_head import torch_rows
from lwz_kernels.loss_head.rows import finish_statistics
from lwz_kernels.loss_head.triton_rows import BLOCK_V, row_statistics, write_dlogits_
from tests.kernels.loss_case import assert_as_good_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="no GPU, and TRITON_INTERPRET is not 1",
    ),
    # NumPy warns where the kernels subtract −inf from −inf, and discard the NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PLAIN: dict[str, Any] = {"logit_scale": 1.0, "softcap": None}
# Plain; scaled; capped so hard that most logits are squashed.
TRANSFORMS: list[dict[str, Any]] = [
    PLAIN,
    {"logit_scale": 0.3, "softcap": None},
    {"logit_scale": 1.5, "softcap": 4.0},
]
# One column, around one block of columns, and sizes of real vocabularies: odd, no multiple of a
# block, and (the last) a multiple of it.
VOCAB_SIZES = [1, 127, BLOCK_V - 1, BLOCK_V, BLOCK_V + 1]
VOCAB_SIZES += [50_257, 151_936, 152_064, 248_320, 262_144]


def make_rows(
    num_rows: int, vocab_size: int, dtype: torch.dtype = FP64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a few units, labels inside the vocabulary, and a temperature for each row."""
    logits = 3 * torch.randn(num_rows, vocab_size, dtype=FP64)
    labels = torch.randint(vocab_size, (num_rows,))
    temperature = 0.5 + torch.rand(num_rows, dtype=FP64)
    return logits.to(DEVICE, dtype), labels.to(DEVICE), temperature.to(DEVICE, dtype)


def truth_of(rows: tuple[Tensor, Tensor, Tensor], transform: dict[str, Any]) -> tuple[Tensor, ...]:
    """logprobs, entropy and lse by torch's own functions in fp64, differentiable."""
    logits, labels, temperature = rows
    z = transform["logit_scale"] * logits.double()
    if transform["softcap"] is not None:
        z = transform["softcap"] * torch.tanh(z / transform["softcap"])
    z = z / temperature.double()[:, None]
    log_p = torch.log_softmax(z, -1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), entropy, torch.logsumexp(z, -1)


# Row statistics


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_row_statistics_are_as_good_as_eager(vocab_size: int) -> None:
    rows = make_rows(2, vocab_size, FP32)
    ours = finish_statistics(row_statistics(*rows, **PLAIN))
    eager = finish_statistics(torch_rows.row_statistics(*rows, **PLAIN))
    for mine, theirs, truth in zip(ours, eager, truth_of(rows, PLAIN), strict=True):
        assert_as_good_as_eager(mine, theirs, truth)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 33, BLOCK_V + 5])
def test_row_statistics_in_fp64_are_exact(vocab_size: int, transform: dict[str, Any]) -> None:
    rows = make_rows(3, vocab_size)
    ours = finish_statistics(row_statistics(*rows, **transform))
    for mine, truth in zip(ours, truth_of(rows, transform), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


def test_row_statistics_are_the_contract_s_four_numbers() -> None:
    rows = make_rows(3, 50)
    ours = row_statistics(*rows, **TRANSFORMS[1])
    torch.testing.assert_close(ours, torch_rows.row_statistics(*rows, **TRANSFORMS[1]))


@pytest.mark.parametrize("softcap", [None, 100.0])
def test_row_statistics_find_no_mass_past_the_vocabulary(softcap: float | None) -> None:
    """All logits far below 0: a phantom column at 0, or a maximum begun at 0, would take it all."""
    logits, labels, temperature = make_rows(1, 152_064, FP32)
    rows = (logits - 80, labels, temperature)
    transform: dict[str, Any] = {"logit_scale": 1.0, "softcap": softcap}
    ours = finish_statistics(row_statistics(*rows, **transform))
    for mine, truth in zip(ours, truth_of(rows, transform), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_row_statistics_survive_a_constant_offset(offset: float) -> None:
    logits, labels, _ = make_rows(2, 1000, FP32)
    rows = (logits + offset, labels, torch.ones(2, device=DEVICE))
    ours = finish_statistics(row_statistics(*rows, **PLAIN))
    eager = finish_statistics(torch_rows.row_statistics(*rows, **PLAIN))
    for mine, theirs, truth in zip(ours, eager, truth_of(rows, PLAIN), strict=True):
        assert_as_good_as_eager(mine, theirs, truth)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from([-1e30, -90.0, -3.5, -0.0, 0.5, 3.5, 88.0]), min_size=1),
    label=st.integers(min_value=0),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 30.0]),
)
def test_logprobs_and_entropy_keep_their_bounds(
    values: list[float], label: int, temperature: float
) -> None:
    logits = torch.tensor([values], device=DEVICE)
    labels = torch.tensor([label % len(values)], device=DEVICE)
    temperatures = torch.tensor([temperature], device=DEVICE)
    partials = row_statistics(logits, labels, temperatures, **PLAIN)
    logprobs, entropy, lse = finish_statistics(partials)
    assert logprobs <= 0
    assert 0 <= entropy <= torch.log(torch.tensor(float(len(values)))) * (1 + 1e-6) + 1e-6
    assert lse >= logits.amax() / temperature * (1 - 1e-6 * logits.amax().sign())
    assert not partials.isnan().any()


def test_row_statistics_ignore_logits_of_minus_infinity() -> None:
    """Masked vocabulary: before, between and after finite logits, and all but one."""
    rows = make_rows(2, BLOCK_V + 9)
    logits = rows[0]
    logits[0, : BLOCK_V - 3] = -torch.inf
    logits[0, -2:] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 7] = 1.25
    rows[1].copy_(torch.tensor([BLOCK_V + 1, 7]))
    ours = finish_statistics(row_statistics(*rows, **PLAIN))
    for mine, truth in zip(ours, truth_of(rows, PLAIN), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11)


def test_row_statistics_keep_nan() -> None:
    rows = make_rows(2, 40, FP32)
    rows[0][0, 3] = torch.nan
    logprobs, entropy, lse = finish_statistics(row_statistics(*rows, **PLAIN))
    for value in (logprobs, entropy, lse):
        assert value.isnan().tolist() == [True, False]


def test_row_statistics_of_another_shard_s_label_have_no_label_logit() -> None:
    logits, _, temperature = make_rows(4, 40)
    labels = torch.tensor([-1, -(2**40), 40, 2**40], device=DEVICE)
    partials = row_statistics(logits, labels, temperature, **PLAIN)
    assert partials[3].tolist() == [0.0] * 4
    assert (partials[0] > 0).all()


def test_row_statistics_of_a_row_do_not_depend_on_its_neighbours() -> None:
    rows = make_rows(5, 300, FP32)
    whole = row_statistics(*rows, **TRANSFORMS[2])
    part = row_statistics(*(value[2:4].clone() for value in rows), **TRANSFORMS[2])
    assert torch.equal(whole[:, 2:4], part)


def test_row_passes_of_no_rows_are_empty() -> None:
    rows = make_rows(0, 20, FP32)
    vector = rows[2]
    assert row_statistics(*rows, **PLAIN).shape == (4, 0)
    dlogits = write_dlogits_(*rows, *(vector,) * 3, None, None, **PLAIN, out_dtype=BF16)
    assert dlogits.shape == (0, 20)
    assert dlogits.dtype == BF16


# dlogits


def dlogits_by_autograd(
    rows: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, ...], transform: dict[str, Any]
) -> Tensor:
    """What `write_dlogits_` is the closed form of, in fp64."""
    leaf = rows[0].double().requires_grad_()
    outputs = truth_of((leaf, *rows[1:]), transform)
    return torch.autograd.grad(outputs, leaf, [value.double() for value in gradients])[0]


def dlogits_of(
    function: Callable[..., Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    transform: dict[str, Any],
    out_dtype: torch.dtype,
) -> Tensor:
    """`write_dlogits_` of one implementation on a copy of the logits."""
    _, entropy, lse = (value.to(rows[0].dtype) for value in truth_of(rows, transform))
    return function(
        rows[0].clone(), *rows[1:], lse, entropy, *gradients, **transform, out_dtype=out_dtype
    )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 33, BLOCK_V + 5])
def test_write_dlogits_matches_autograd(vocab_size: int, transform: dict[str, Any]) -> None:
    rows = make_rows(2, vocab_size)
    gradients = tuple(torch.randn(3, 2, dtype=FP64, device=DEVICE))
    ours = dlogits_of(write_dlogits_, rows, gradients, transform, FP64)
    truth = dlogits_by_autograd(rows, gradients, transform)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("terms", [(True, False), (False, True)])
def test_write_dlogits_takes_entropy_and_lse_gradients_apart(terms: tuple[bool, bool]) -> None:
    rows = make_rows(2, 33)
    gradients = torch.randn(3, 2, dtype=FP64, device=DEVICE)
    given_ = (gradients[0], *(gradients[i + 1] if terms[i] else None for i in range(2)))
    kept = gradients * torch.tensor([True, *terms], device=DEVICE)[:, None]
    ours = dlogits_of(write_dlogits_, rows, given_, PLAIN, FP64)  # type: ignore[arg-type]
    truth = dlogits_by_autograd(rows, tuple(kept), PLAIN)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vocab_size", [127, 50_257])
def test_write_dlogits_is_as_good_as_eager(vocab_size: int) -> None:
    rows = make_rows(2, vocab_size, FP32)
    gradients = tuple(torch.randn(3, 2, device=DEVICE))
    ours = dlogits_of(write_dlogits_, rows, gradients, PLAIN, FP32)
    eager = dlogits_of(torch_rows.write_dlogits_, rows, gradients, PLAIN, FP32)
    assert_as_good_as_eager(ours, eager, dlogits_by_autograd(rows, gradients, PLAIN))


@pytest.mark.parametrize("vocab_size", [127, 3 * BLOCK_V + 1])
def test_write_dlogits_in_bf16_is_the_fp32_result_rounded(vocab_size: int) -> None:
    """A GPU rounds to nearest; the interpreter cuts off."""
    rows = make_rows(2, vocab_size, FP32)
    gradients = tuple(torch.randn(3, 2, device=DEVICE))
    narrow = dlogits_of(write_dlogits_, rows, gradients, PLAIN, BF16)
    wide = dlogits_of(write_dlogits_, rows, gradients, PLAIN, FP32)
    if DEVICE == "cpu":
        wide = (wide.view(torch.int32) >> 16 << 16).view(FP32)
    assert torch.equal(narrow, wide.to(BF16))


def test_write_dlogits_in_bf16_fills_the_front_of_each_row() -> None:
    logits, labels, temperature = make_rows(3, 21, FP32)
    vector = torch.ones(3, device=DEVICE)
    tail = logits.view(BF16)[:, 21:].clone()
    dlogits = write_dlogits_(
        logits, labels, temperature, *(vector,) * 3, None, None, **PLAIN, out_dtype=BF16
    )
    assert dlogits.dtype == BF16
    assert dlogits.shape == (3, 21)
    assert dlogits.stride() == (42, 1)
    assert dlogits.data_ptr() == logits.data_ptr()
    # Columns from the middle of a row on are fp32 logits still: nothing else was written.
    assert torch.equal(logits.view(BF16)[:, 21:].view(torch.int16), tail.view(torch.int16))


def test_write_dlogits_stays_inside_rows_of_a_wider_buffer() -> None:
    buffer = torch.full((2, 64), 7.0, dtype=FP64, device=DEVICE)
    rows = make_rows(2, 37)
    logits = buffer[:, 5:42]
    logits.copy_(rows[0])
    gradients = tuple(torch.randn(3, 2, dtype=FP64, device=DEVICE))
    truth = dlogits_by_autograd(rows, gradients, PLAIN)
    _, entropy, lse = truth_of(rows, PLAIN)
    write_dlogits_(logits, *rows[1:], lse, entropy, *gradients, **PLAIN, out_dtype=FP64)
    torch.testing.assert_close(logits, truth, rtol=1e-10, atol=1e-12)
    assert (buffer[:, :5] == 7).all()
    assert (buffer[:, 42:] == 7).all()


@pytest.mark.parametrize("out_dtype", [FP32, BF16])
def test_write_dlogits_of_a_row_without_gradient_is_zero_whatever_it_held(
    out_dtype: torch.dtype,
) -> None:
    logits, labels, temperature = make_rows(2, BLOCK_V + 3, FP32)
    logits[0] = torch.nan
    zero = torch.zeros(2, device=DEVICE)
    lse = torch.full((2,), -200.0, device=DEVICE)  # exp(z − lse) overflows
    dlogits = write_dlogits_(
        logits, labels, temperature, lse, zero, zero, zero, zero, **PLAIN, out_dtype=out_dtype
    )
    assert (dlogits == 0).all()


def test_write_dlogits_of_a_masked_logit_is_zero() -> None:
    """p · log p is 0 · −inf there."""
    rows = make_rows(1, 9)
    rows[0][0, 4] = -torch.inf
    rows[1][0] = 2
    one = torch.ones(1, dtype=FP64, device=DEVICE)
    dlogits = dlogits_of(write_dlogits_, rows, (one, one, one), PLAIN, FP64)
    assert dlogits[0, 4] == 0
    assert dlogits.isfinite().all()


def test_write_dlogits_of_another_shard_s_label_has_no_one() -> None:
    logits, _, temperature = make_rows(1, 30)
    one = torch.ones(1, dtype=FP64, device=DEVICE)
    rows = (logits, torch.tensor([3], device=DEVICE), temperature)
    lse = truth_of(rows, PLAIN)[2]
    p = (logits / temperature - lse).exp()
    for label in (-1, 30):
        labels = torch.tensor([label], device=DEVICE)
        dlogits = write_dlogits_(
            logits.clone(), labels, temperature, lse, one, one, None, None, **PLAIN, out_dtype=FP64
        )
        torch.testing.assert_close(dlogits, -p / temperature)


def test_row_passes_reach_rows_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """Three rows 2³⁰ elements apart in a file of holes: row 2 starts at 2³¹."""
    if DEVICE == "cuda":
        pytest.skip("a mapped file is CPU memory")
    stride = 2**30
    path = tmp_path / "logits"
    path.touch()
    os.truncate(path, (2 * stride + 64) * 4)
    flat = torch.from_file(str(path), shared=True, size=2 * stride + 64, dtype=FP32)
    logits = flat.as_strided((3, 50), (stride, 1))
    rows = make_rows(3, 50, FP32)
    logits.copy_(rows[0])
    partials = row_statistics(logits, *rows[1:], **PLAIN)
    assert torch.equal(partials, row_statistics(*rows, **PLAIN))
    vector = rows[2]
    ours = write_dlogits_(logits, *rows[1:], *(vector,) * 3, None, None, **PLAIN, out_dtype=BF16)
    near = write_dlogits_(*rows, *(vector,) * 3, None, None, **PLAIN, out_dtype=BF16)
    assert torch.equal(ours, near)
    path.unlink()


def test_row_passes_refuse_logits_that_they_cannot_overwrite() -> None:
    logits, labels, temperature = make_rows(2, 8, FP32)
    with pytest.raises(TypeError, match="logits must be fp32"):
        row_statistics(logits.to(BF16), labels, temperature, **PLAIN)
    with pytest.raises(ValueError, match="unit stride along V"):
        row_statistics(logits.t(), labels, temperature, **PLAIN)
    with pytest.raises(ValueError, match="V > 0"):
        row_statistics(logits[:, :0], labels, temperature, **PLAIN)
    with pytest.raises(ValueError, match="do not fit in place"):
        write_dlogits_(
            logits, labels, *(temperature,) * 4, None, None, **PLAIN, out_dtype=torch.float64
        )


# The fused row kernel of the policy loss

CONFIGS = {
    "grpo": PolicyLossConfig(clip_ratio_low=0.1, clip_ratio_high=0.3),
    "two-sided": PolicyLossConfig(loss_type="bnpo", clip_ratio_delta=1.4),
    "dapo": PolicyLossConfig(loss_type="dapo", clip_ratio_low=0.0, clip_ratio_high=0.0),
    "dr_grpo": PolicyLossConfig(loss_type="dr_grpo", max_completion_tokens=9),
    "cispo": PolicyLossConfig(loss_type="cispo", cispo_ratio_max=1.1),
    "sapo": PolicyLossConfig(loss_type="sapo", sapo_temperature_pos=3.0, sapo_temperature_neg=5.0),
    "k1": PolicyLossConfig(kl_coef=0.1, kl_estimator="k1"),
    "k2": PolicyLossConfig(kl_coef=0.1, kl_estimator="k2"),
    "k3": PolicyLossConfig(kl_coef=0.1),
    "k1 corrected": PolicyLossConfig(kl_coef=0.1, kl_estimator="k1", kl_importance_correction=True),
    "k2 corrected": PolicyLossConfig(kl_coef=0.1, kl_estimator="k2", kl_importance_correction=True),
    "k3 corrected": PolicyLossConfig(kl_coef=0.1, kl_importance_correction=True),
    "truncate": PolicyLossConfig(sampler_correction="truncate", sampler_ratio_max=1.1),
    "mask": PolicyLossConfig(
        loss_type="cispo",
        sampler_correction="mask",
        sampler_ratio_min=0.8,
        sampler_ratio_max=1.3,
        kl_coef=0.05,
    ),
}
ON_POLICY_ONLY = {
    "gspo": PolicyLossConfig(loss_type="gspo"),
    "luspo": PolicyLossConfig(loss_type="luspo"),
    "vespo": PolicyLossConfig(loss_type="vespo"),
}
ON_POLICY = {**CONFIGS, **ON_POLICY_ONLY}


# log(policy / old): below every bound, inside, above the upper one, above the two-sided one.
LOG_RATIOS = (-0.7, 0.05, 0.29, 0.7)
# log(old / sampling): below the lower bound, inside, above the smaller and the larger upper one.
LOG_IMPORTANCES = (-0.5, 0.02, 0.2, 0.4)


def make_objective(logprobs: Tensor, *, is_on_policy: bool, has_mask: bool = True) -> ObjectiveRows:
    """Eight rows see every side of every clip, with advantages of both signs; others repeat."""
    index = torch.arange(len(logprobs), device=DEVICE)

    def cycle(values: tuple[float, ...], every: int = 1) -> Tensor:
        return logprobs.new_tensor(values)[index // every % len(values)]

    old = logprobs - cycle(LOG_RATIOS)
    return ObjectiveRows(
        advantages=cycle((1.5, -0.8), every=4),
        weights=0.1 + torch.rand_like(logprobs),
        policy_mask=index != 5 if has_mask else None,
        old_logprobs=None if is_on_policy else old,
        ref_logprobs=logprobs + 0.5 * torch.randn_like(logprobs),
        sampling_logprobs=(logprobs if is_on_policy else old) - cycle(LOG_IMPORTANCES[::-1]),
    )


def assert_policy_rows_match(
    rows: tuple[Tensor, Tensor, Tensor],
    objective: ObjectiveRows,
    config: PolicyLossConfig,
    transform: dict[str, Any] = PLAIN,
    entropy_weights: Tensor | None = None,
) -> Tensor:
    """Compares with the torch twin of the objective and autograd; returns the dlogprobs."""
    truth = truth_of(rows, transform)
    dlogprobs = token_objective(truth[0], objective, config)[1]
    nothing = torch.zeros_like(dlogprobs)
    dentropy = nothing if entropy_weights is None else -entropy_weights
    dlogits = dlogits_by_autograd(rows, (dlogprobs, dentropy, nothing), transform)
    ours, *vectors = policy_loss_rows(
        rows[0].clone(), *rows[1:], entropy_weights, objective, config, **transform, out_dtype=FP64
    )
    for mine, expected in zip(vectors, (*truth, dlogprobs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ours, dlogits, rtol=1e-9, atol=1e-11)
    return dlogprobs


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_loss_rows_match_the_torch_objective(name: str) -> None:
    rows = make_rows(8, 23)
    objective = make_objective(truth_of(rows, PLAIN)[0], is_on_policy=False)
    dlogprobs = assert_policy_rows_match(rows, objective, CONFIGS[name])
    assert (dlogprobs != 0).any()


@pytest.mark.parametrize("name", ON_POLICY)
def test_policy_loss_rows_match_the_torch_objective_on_policy(name: str) -> None:
    rows = make_rows(3, 23)
    objective = make_objective(
        truth_of(rows, PLAIN)[0], is_on_policy=True, has_mask=name not in ON_POLICY_ONLY
    )
    assert_policy_rows_match(rows, objective, ON_POLICY[name])


@pytest.mark.parametrize("transform", TRANSFORMS[1:], ids=str)
def test_policy_loss_rows_take_the_entropy_bonus_and_transforms(transform: dict[str, Any]) -> None:
    rows = make_rows(3, BLOCK_V + 7)
    objective = make_objective(truth_of(rows, transform)[0], is_on_policy=False)
    entropy_weights = torch.tensor([0.2, 0.0, 0.1], dtype=FP64, device=DEVICE)
    assert_policy_rows_match(rows, objective, CONFIGS["grpo"], transform, entropy_weights)


def test_policy_loss_rows_of_tokens_without_weight_have_no_gradient() -> None:
    rows = make_rows(2, 12, FP32)
    objective = make_objective(truth_of(rows, PLAIN)[0].float(), is_on_policy=False)
    objective.weights.zero_()
    objective.ref_logprobs.fill_(torch.nan)  # type: ignore[union-attr]
    dlogits, *_, dlogprobs = policy_loss_rows(
        *rows, None, objective, CONFIGS["k3"], **PLAIN, out_dtype=BF16
    )
    assert (dlogprobs == 0).all()
    assert (dlogits == 0).all()


def test_policy_loss_rows_count_unscored_tokens_as_equal_to_the_sampler_s() -> None:
    rows = make_rows(2, 12)
    objective = make_objective(truth_of(rows, PLAIN)[0], is_on_policy=False, has_mask=False)
    objective.sampling_logprobs[1] = torch.nan  # type: ignore[index]
    for name in ("truncate", "mask"):
        dlogprobs = assert_policy_rows_match(rows, objective, CONFIGS[name])
        assert dlogprobs[1] != 0


def test_policy_loss_rows_saturate_ratios() -> None:
    """A ratio past the range of fp32 times an advantage of 0 is 0, not NaN."""
    rows = make_rows(2, 12, FP32)
    objective = make_objective(truth_of(rows, PLAIN)[0].float(), is_on_policy=False)
    objective.old_logprobs.fill_(-1000.0)  # type: ignore[union-attr]
    objective.advantages.zero_()
    *_, dlogprobs = policy_loss_rows(
        *rows, None, objective, CONFIGS["grpo"], **PLAIN, out_dtype=FP32
    )
    assert (dlogprobs == 0).all()


def test_policy_loss_rows_write_bf16_like_write_dlogits() -> None:
    """The two ways to the same gradient, bit for bit: over three blocks, in the row's storage."""
    rows = make_rows(2, 2 * BLOCK_V + 11, FP32)
    objective = make_objective(truth_of(rows, PLAIN)[0].float(), is_on_policy=False)
    logits = rows[0].clone()
    dlogits, logprobs, entropy, lse, dlogprobs = policy_loss_rows(
        logits, *rows[1:], None, objective, CONFIGS["k3"], **PLAIN, out_dtype=BF16
    )
    apart = write_dlogits_(*rows, lse, entropy, dlogprobs, None, None, **PLAIN, out_dtype=BF16)
    assert dlogits.data_ptr() == logits.data_ptr()
    assert torch.equal(dlogits, apart)
    assert logprobs.dtype == FP32


def test_policy_loss_rows_keep_nan() -> None:
    rows = make_rows(2, 12, FP32)
    rows[0][0, 5] = torch.nan
    objective = make_objective(torch.full((2,), -1.0, device=DEVICE), is_on_policy=False)
    dlogits, logprobs, entropy, lse, _ = policy_loss_rows(
        *rows, None, objective, PolicyLossConfig(loss_type="sapo"), **PLAIN, out_dtype=FP32
    )
    for value in (logprobs, entropy, lse):
        assert value.isnan().tolist() == [True, False]
    assert dlogits[0].isnan().all()


def test_policy_loss_rows_refuse_what_needs_whole_sequences() -> None:
    rows = make_rows(2, 12, FP32)
    objective = make_objective(torch.zeros(2, device=DEVICE), is_on_policy=False)
    for config in (PolicyLossConfig(loss_type="gspo"), PolicyLossConfig(off_policy_kl_max=0.1)):
        with pytest.raises(ValueError, match="needs whole sequences"):
            policy_loss_rows(*rows, None, objective, config, **PLAIN, out_dtype=FP32)


@pytest.mark.parametrize("name", ["k3", "truncate"])
def test_policy_loss_rows_name_a_missing_tensor(name: str) -> None:
    rows = make_rows(2, 12, FP32)
    vector = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"needs (ref|sampling)_logprobs, got None"):
        policy_loss_rows(
            *rows, None, ObjectiveRows(vector, vector), CONFIGS[name], **PLAIN, out_dtype=FP32
        )


# The fused product


def make_head(
    num_rows: int, depth: int, vocab_size: int, dtype: torch.dtype, *, has_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """hidden, weight, labels, temperature and bias; hidden's rows lie among NaN."""
    weight = 3 * torch.randn(vocab_size, depth, dtype=FP64) / depth**0.5
    bias = torch.randn(vocab_size, dtype=FP64).to(DEVICE, dtype) if has_bias else None
    labels = torch.randint(vocab_size, (num_rows,)).to(DEVICE)
    temperature = (0.5 + torch.rand(num_rows, dtype=FP64)).to(DEVICE, dtype)
    buffer = torch.full((num_rows, depth + 8), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, :depth] = torch.randn(num_rows, depth)
    return buffer[:, :depth], weight.to(DEVICE, dtype), labels, temperature, bias


def logits_of(head: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]) -> Tensor:
    hidden, weight, _, _, bias = head
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


# One of everything; a tile short of full on every side; several row tiles, more splits than
# tiles; more tiles than splits. Interpreted tiles are 16 x 32, in steps of 16, 4 splits.
HEAD_SHAPES = [(1, 1, 1), (15, 17, 31), (34, 16, 65), (17, 24, 161)]


@pytest.fixture
def tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path of sm_90 and later, three programs taking turns, with the interpreter's tiles."""
    if DEVICE == "cuda":
        yield
        return
    config = product_kernels._INTERPRETED
    monkeypatch.setattr(product_kernels, "_device", lambda tensor: (90, 3))
    monkeypatch.setattr(product_kernels, "_config", lambda *args, **kwargs: config)
    descriptor = MagicMock(wraps=product_kernels.TensorDescriptor)
    monkeypatch.setattr(product_kernels, "TensorDescriptor", descriptor)
    yield
    assert descriptor.from_tensor.called, "the rows were not aligned"


@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_linear_statistics_in_fp64_are_exact(shape: tuple[int, int, int]) -> None:
    if DEVICE == "cuda":
        pytest.skip("fp64 products are for the interpreter")
    head = make_head(*shape, FP64, has_bias=shape[0] % 2 == 0)
    transform = TRANSFORMS[1 + shape[0] % 2]
    ours = linear_statistics(*head, **transform)
    expected = torch_rows.row_statistics(logits_of(head), *head[2:4], **transform)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("tensor_descriptors")
def test_linear_logprobs_fwd_through_descriptors_is_as_good_as_eager() -> None:
    head = make_head(35, 20, 161, FP32)
    ours = linear_logprobs_fwd(*head, **PLAIN)
    eager = finish_statistics(torch_rows.row_statistics(logits_of(head), *head[2:4], **PLAIN))
    wide = logits_of((head[0].double(), head[1].double(), *head[2:]))
    truths = truth_of((wide, *head[2:4]), PLAIN)
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert_as_good_as_eager(mine, theirs, truth)


@pytest.mark.usefixtures("tensor_descriptors")
def test_linear_statistics_do_not_depend_on_the_number_of_rows() -> None:
    head = make_head(35, 20, 70, FP32)
    whole = linear_statistics(*head, **PLAIN)
    part = linear_statistics(head[0][:17], head[1], head[2][:17], head[3][:17], None, **PLAIN)
    assert torch.equal(whole[:, :17], part)


@pytest.mark.parametrize("softcap", [None, 100.0])
def test_linear_statistics_find_no_mass_past_the_vocabulary(softcap: float | None) -> None:
    """One column more than a tile, all logits far below 0."""
    hidden, weight, labels, temperature, _ = make_head(2, 4, 33, FP32)
    bias = torch.full((33,), -80.0, device=DEVICE)
    head = (hidden, weight, labels, temperature, bias)
    transform: dict[str, Any] = {"logit_scale": 1.0, "softcap": softcap}
    ours = finish_statistics(linear_statistics(*head, **transform))
    truths = truth_of((logits_of(head), labels, temperature), transform)
    for mine, truth in zip(ours, truths, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-4)


def test_linear_statistics_of_a_label_past_the_vocabulary_have_no_label_logit() -> None:
    """Also of one that falls on a phantom column of the last tile, or wraps round in 32 bits."""
    hidden, weight, _, temperature, _ = make_head(4, 4, 33, FP32)
    labels = torch.tensor([33, 40, -1, -(2**32)], device=DEVICE)
    partials = linear_statistics(hidden, weight, labels, temperature, None, **PLAIN)
    assert partials[3].tolist() == [0.0] * 4


def test_linear_statistics_of_masked_columns_are_finite() -> None:
    """A bias of −inf on whole tiles: the first, and all of one split."""
    hidden, weight, _, temperature, _ = make_head(2, 4, 129, FP32)
    bias = torch.zeros(129, device=DEVICE)
    bias[:70] = -torch.inf
    labels = torch.tensor([128, 80], device=DEVICE)
    head = (hidden, weight, labels, temperature, bias)
    ours = finish_statistics(linear_statistics(*head, **PLAIN))
    truths = truth_of((logits_of(head), labels, temperature), PLAIN)
    for mine, truth in zip(ours, truths, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_linear_statistics_of_no_rows_are_empty() -> None:
    head = make_head(0, 4, 33, FP32)
    assert linear_statistics(*head, **PLAIN).shape == (4, 0)
    assert [value.shape for value in linear_logprobs_fwd(*head, **PLAIN)] == [(0,)] * 3


def test_linear_statistics_refuse_mixed_dtypes_and_strides() -> None:
    hidden, weight, labels, temperature, _ = make_head(2, 4, 33, FP32)
    with pytest.raises(ValueError, match="cast one"):
        linear_statistics(hidden, weight.to(BF16), labels, temperature, None, **PLAIN)
    with pytest.raises(ValueError, match="unit stride along D"):
        linear_statistics(hidden, weight.t().contiguous().t(), labels, temperature, None, **PLAIN)


# Compiled, at sizes that only a GPU can take


@pytest.mark.gpu
def test_row_passes_take_more_rows_than_a_grid_s_second_dimension() -> None:
    rows = make_rows(70_000, 3, FP32)
    ours = finish_statistics(row_statistics(*rows, **PLAIN))
    for mine, truth in zip(ours, truth_of(rows, PLAIN), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_policy_loss_rows_in_bf16_are_the_same_from_run_to_run() -> None:
    """The aliased store: a missing barrier would show as bits that change."""
    rows = make_rows(512, 152_064, FP32)
    objective = make_objective(truth_of(rows, PLAIN)[0].float(), is_on_policy=False)
    runs = [
        policy_loss_rows(
            rows[0].clone(), *rows[1:], None, objective, CONFIGS["k3"], **PLAIN, out_dtype=BF16
        )
        for _ in range(3)
    ]
    for later in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], later, strict=True))
    dlogprobs = runs[0][-1]
    nothing = torch.zeros_like(dlogprobs)
    some = slice(0, 32)
    truth = dlogits_by_autograd(
        tuple(value[some] for value in rows),  # type: ignore[arg-type]
        (dlogprobs[some], nothing[some], nothing[some]),
        PLAIN,
    )
    assert_as_good_as_eager(runs[0][0][some], truth.to(BF16), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1536, 3584, 1537])
def test_linear_logprobs_fwd_in_bf16_is_as_good_as_eager(depth: int) -> None:
    head = make_head(300, depth, 152_064, BF16)
    temperature = head[3].float()
    ours = linear_logprobs_fwd(*head[:3], temperature, None, **PLAIN)
    again = linear_logprobs_fwd(*head[:3], temperature, None, **PLAIN)
    logits = torch.mm(head[0], head[1].t(), out_dtype=FP32)
    eager = finish_statistics(torch_rows.row_statistics(logits, head[2], temperature, **PLAIN))
    wide = head[0].double() @ head[1].double().t()
    truths = truth_of((wide, head[2], temperature), PLAIN)
    for mine, same, theirs, truth in zip(ours, again, eager, truths, strict=True):
        assert torch.equal(mine, same)
        assert_as_good_as_eager(mine, theirs, truth)
