"""The loss family against autograd through the reference, in fp64.

The packed batch has what real ones have: an empty sequence, a sequence of one token, one that is
fully masked, masked tokens in the middle (their rows hold NaN and infinity, which must not leak),
advantages that differ within a sequence and are sometimes 0, a token that the sampler could not
score, and log-probs far enough from the old ones that every bound is hit on both sides.
"""

import dataclasses
import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lwz_kernels.linear_policy_loss.config import LossType, PolicyLossConfig
from lwz_kernels.linear_policy_loss.objective import (
    ObjectiveRows,
    entropy_token_weights,
    is_token_level,
    loss_metrics,
    loss_token_weights,
    sequence_log_ratio,
    sequence_objective,
    token_level_rows,
    token_objective,
)
from lwz_kernels.linear_policy_loss.reference import (
    head_logprobs_reference,
    linear_policy_loss_reference,
    policy_loss_reference,
)

LENGTHS = (6, 1, 0, 9, 3, 5)
FULLY_MASKED = 4
NUM_SEQUENCES = 11
NUM_LOSS_TOKENS = 40

VARIANTS: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "ratio_level": "sequence"},
    {"loss_type": "bnpo"},
    {"loss_type": "bnpo", "ratio_level": "sequence"},
    {"loss_type": "dr_grpo", "max_completion_tokens": 16},
    {"loss_type": "dr_grpo", "max_completion_tokens": 16, "ratio_level": "sequence"},
    {"loss_type": "dapo", "clip_ratio_high": 0.28},
    {"loss_type": "dapo", "clip_ratio_high": 0.28, "ratio_level": "sequence"},
    {"loss_type": "cispo", "cispo_ratio_max": 1.5},
    {"loss_type": "cispo", "cispo_ratio_max": 1.1, "ratio_level": "sequence"},
    {"loss_type": "gspo", "clip_ratio_low": 0.05, "clip_ratio_high": 0.05},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "ratio_level": "sequence", "sapo_temperature_pos": 0.7},
    {"loss_type": "luspo", "clip_ratio_low": 0.05, "clip_ratio_high": 0.05},
    {"loss_type": "vespo"},
]
VARIANT_IDS = ["-".join(str(value) for value in variant.values()) for variant in VARIANTS]

KL_SETTINGS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_estimator": "k1", "kl_importance_correction": True},
    {"kl_coef": 0.3, "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_estimator": "k2", "kl_importance_correction": True},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"kl_coef": 0.3, "kl_estimator": "k3", "kl_importance_correction": True},
]
SAMPLER_SETTINGS: list[dict[str, Any]] = [
    {},
    {"sampler_correction": "truncate", "sampler_ratio_max": 1.3},
    {"sampler_correction": "mask", "sampler_ratio_max": 1.4, "sampler_ratio_min": 0.7},
    {
        "sampler_correction": "truncate",
        "sampler_ratio_max": 1.3,
        "sampler_correction_level": "sequence",
    },
    {
        "sampler_correction": "mask",
        "sampler_ratio_max": math.inf,
        "sampler_ratio_min": 0.8,
        "sampler_correction_level": "sequence",
    },
]
# (policy mask, clip_ratio_delta, off_policy_kl_max)
NOTHING = (False, None, None)
EVERYTHING = (True, 1.4, 0.05)
ALONE = [(True, None, None), (False, 1.4, None), (False, None, 0.05)]
# Every KL with every correction; each again with all extras on; and each extra alone.
SETTINGS = [
    *itertools.product(KL_SETTINGS, SAMPLER_SETTINGS, [NOTHING]),
    *(
        (kl, sampler, EVERYTHING)
        for kl, sampler in zip(KL_SETTINGS, itertools.cycle(SAMPLER_SETTINGS), strict=False)
    ),
    *((KL_SETTINGS[-1], sampler, EVERYTHING) for sampler in SAMPLER_SETTINGS),
    *(({}, {}, alone) for alone in ALONE),
]


@dataclasses.dataclass
class Pack:
    logprobs: Tensor
    entropy: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    rows: dict[str, Tensor]
    policy_mask: Tensor

    def objective_rows(
        self, config: PolicyLossConfig, *, is_on_policy: bool, has_policy_mask: bool
    ) -> ObjectiveRows:
        weights = loss_token_weights(
            self.loss_mask,
            self.cu_seqlens,
            config,
            num_loss_tokens=NUM_LOSS_TOKENS,
            num_sequences=NUM_SEQUENCES,
            dtype=self.logprobs.dtype,
        )
        return ObjectiveRows(
            advantages=self.rows["advantages"],
            weights=weights,
            policy_mask=self.policy_mask if has_policy_mask else None,
            old_logprobs=None if is_on_policy else self.rows["old_logprobs"],
            ref_logprobs=self.rows["ref_logprobs"],
            sampling_logprobs=self.rows["sampling_logprobs"],
        )

    def reference(
        self, config: PolicyLossConfig, *, is_on_policy: bool, has_policy_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """loss, dloss/dlogprobs, dloss/dentropy and metrics."""
        logprobs = self.logprobs.clone().requires_grad_()
        entropy = self.entropy.clone().requires_grad_()
        loss, metrics = policy_loss_reference(
            logprobs,
            entropy,
            self.rows["advantages"],
            self.loss_mask,
            cu_seqlens=self.cu_seqlens,
            num_loss_tokens=NUM_LOSS_TOKENS,
            num_sequences=NUM_SEQUENCES,
            old_logprobs=None if is_on_policy else self.rows["old_logprobs"],
            ref_logprobs=self.rows["ref_logprobs"],
            sampling_logprobs=self.rows["sampling_logprobs"],
            policy_mask=self.policy_mask if has_policy_mask else None,
            config=config,
        )
        dlogprobs, dentropy = torch.autograd.grad(
            loss, (logprobs, entropy), allow_unused=True, materialize_grads=True
        )
        return loss.detach(), dlogprobs, dentropy, metrics


def make_pack(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> Pack:
    total = sum(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    loss_mask = torch.rand(total) > 0.2
    if len(lengths) > FULLY_MASKED:
        loss_mask[starts[FULLY_MASKED] : starts[FULLY_MASKED + 1]] = False
        loss_mask[starts[1]] = True
    logprobs = -0.1 - 2 * torch.rand(total, dtype=dtype)
    rows = {
        name: logprobs + scale * torch.randn(total, dtype=dtype)
        for name, scale in (
            ("old_logprobs", 0.4),
            ("ref_logprobs", 0.5),
            ("sampling_logprobs", 0.3),
        )
    }
    rows["advantages"] = torch.randn(total, dtype=dtype)
    if total > 4:
        rows["advantages"][::4] = 0
        rows["sampling_logprobs"][torch.nonzero(loss_mask)[1]] = math.nan
    entropy = 3 * torch.rand(total, dtype=dtype)
    for value in (logprobs, *rows.values()):
        value[~loss_mask] = math.nan if value is not rows["advantages"] else math.inf
    policy_mask = torch.rand(total) > 0.3
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    return Pack(logprobs, entropy, loss_mask, cu_seqlens, rows, policy_mask)


def make_configs(variant: dict[str, Any]) -> list[tuple[PolicyLossConfig, bool]]:
    """Every meaningful config of a variant, with whether a policy mask goes with it."""
    has_clip = variant["loss_type"] not in ("cispo", "sapo", "vespo")
    configs = []
    for kl, sampler, (mask, delta, kl_max) in SETTINGS:
        if variant["loss_type"] == "vespo" and "sampler_correction_level" in sampler:
            continue
        if not has_clip and (mask, delta, kl_max) == (False, 1.4, None):
            continue
        config = PolicyLossConfig(
            **variant,
            **kl,
            **sampler,
            clip_ratio_delta=delta if has_clip else None,
            off_policy_kl_max=kl_max,
        )
        configs.append((config, mask))
    return configs


@pytest.mark.parametrize("is_on_policy", [False, True], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_objectives_equal_autograd_of_the_reference(
    variant: dict[str, Any], is_on_policy: bool
) -> None:
    pack = make_pack()
    mask = pack.loss_mask
    for config, has_policy_mask in make_configs(variant):
        case = {"is_on_policy": is_on_policy, "has_policy_mask": has_policy_mask}
        rows = pack.objective_rows(config, **case)
        expected_loss, expected_grad, _, _ = pack.reference(config, **case)
        loss, dlogprobs = sequence_objective(pack.logprobs, rows, mask, pack.cu_seqlens, config)
        assert (loss[~mask] == 0).all()
        assert (dlogprobs[~mask] == 0).all()
        torch.testing.assert_close(
            loss.sum(), expected_loss, rtol=1e-12, atol=1e-13, msg=str(config)
        )
        torch.testing.assert_close(
            dlogprobs, expected_grad, rtol=1e-11, atol=1e-13, msg=str(config)
        )

        if is_token_level(config, **case):
            rows = token_level_rows(rows, mask, pack.cu_seqlens, config)
            loss, dlogprobs = token_objective(pack.logprobs[mask], rows.select(mask), config)
            torch.testing.assert_close(loss.sum(), expected_loss, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(dlogprobs, expected_grad[mask], rtol=1e-11, atol=1e-13)
        else:
            with pytest.raises(ValueError, match="needs whole sequences: use sequence_objective"):
                token_objective(pack.logprobs, rows, config)


def test_make_pack_hits_every_bound() -> None:
    # The grid above proves little if its data never leaves the trust region.
    pack = make_pack((40, 40))
    config = PolicyLossConfig(loss_type="dapo")
    rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=False)
    metrics = loss_metrics(pack.logprobs, pack.entropy, rows, config)
    assert metrics["clip_low_sum"] > 3
    assert metrics["clip_high_sum"] > 3
    assert metrics["ratio_max"] > 1.4
    importance = (rows.old_logprobs - rows.sampling_logprobs)[pack.loss_mask].exp()  # type: ignore[operator]
    assert (importance > 1.4).any()
    assert (importance < 0.7).any()


@pytest.mark.parametrize(
    ("config", "is_on_policy", "expected"),
    [
        (PolicyLossConfig(), False, True),
        (PolicyLossConfig(), True, True),
        (PolicyLossConfig(sampler_correction="truncate"), True, True),
        (
            PolicyLossConfig(sampler_correction="mask", sampler_correction_level="sequence"),
            True,
            False,
        ),
        (PolicyLossConfig(off_policy_kl_max=0.1), True, False),
        (PolicyLossConfig(loss_type="gspo"), False, False),
        (PolicyLossConfig(loss_type="gspo"), True, True),
        (PolicyLossConfig(loss_type="gspo", kl_coef=0.1), True, True),
        (
            PolicyLossConfig(loss_type="gspo", kl_coef=0.1, kl_importance_correction=True),
            True,
            False,
        ),
        (PolicyLossConfig(loss_type="gspo", sampler_correction="truncate"), True, False),
        (PolicyLossConfig(loss_type="cispo", ratio_level="sequence"), True, True),
        (PolicyLossConfig(loss_type="cispo", ratio_level="sequence"), False, False),
        (PolicyLossConfig(loss_type="vespo"), True, True),
        (PolicyLossConfig(loss_type="vespo"), False, False),
        (PolicyLossConfig(loss_type="vespo", sampler_correction="truncate"), True, False),
    ],
)
def test_is_token_level_holds_where_a_row_is_enough(
    config: PolicyLossConfig, is_on_policy: bool, expected: bool
) -> None:
    assert is_token_level(config, is_on_policy=is_on_policy) == expected


def test_is_token_level_fails_for_a_masked_sequence_ratio() -> None:
    config = PolicyLossConfig(loss_type="gspo")
    assert not is_token_level(config, is_on_policy=True, has_policy_mask=True)
    assert is_token_level(PolicyLossConfig(), is_on_policy=True, has_policy_mask=True)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo", "gspo"])
def test_on_policy_is_the_policy_gradient(loss_type: Any) -> None:
    # At ratio 1 every member of the family is −w·A·∇logprob.
    pack = make_pack((8, 5))
    pack.rows["advantages"] = torch.tensor([0.7] * 8 + [-1.2] * 5, dtype=torch.float64)
    config = PolicyLossConfig(loss_type=loss_type)
    rows = pack.objective_rows(config, is_on_policy=True, has_policy_mask=False)
    _, dlogprobs = token_objective(
        pack.logprobs, token_level_rows(rows, pack.loss_mask, pack.cu_seqlens, config), config
    )
    torch.testing.assert_close(dlogprobs, -rows.weights * rows.advantages)


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_loss_is_invariant_to_splitting_the_batch(variant: dict[str, Any]) -> None:
    # Global counts make the sum over micro-batches the loss of the whole batch.
    pack = make_pack()
    config = PolicyLossConfig(**variant, kl_coef=0.1)
    whole_rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=True)
    whole_loss, whole_grad = sequence_objective(
        pack.logprobs, whole_rows, pack.loss_mask, pack.cu_seqlens, config
    )
    for split in (1, 3, 5):
        bounds = [0, split, len(LENGTHS)]
        losses, grads = [], []
        for first, last in itertools.pairwise(bounds):
            part = slice(int(pack.cu_seqlens[first]), int(pack.cu_seqlens[last]))
            cu_seqlens = pack.cu_seqlens[first : last + 1] - pack.cu_seqlens[first]
            weights = loss_token_weights(
                pack.loss_mask[part],
                cu_seqlens,
                config,
                num_loss_tokens=torch.tensor(NUM_LOSS_TOKENS),
                num_sequences=torch.tensor(NUM_SEQUENCES),
                dtype=torch.float64,
            )
            rows = dataclasses.replace(whole_rows.select(part), weights=weights)
            loss, grad = sequence_objective(
                pack.logprobs[part], rows, pack.loss_mask[part], cu_seqlens, config
            )
            losses.append(loss)
            grads.append(grad)
        assert torch.equal(torch.cat(losses), whole_loss)
        assert torch.equal(torch.cat(grads), whole_grad)


@pytest.mark.parametrize("loss_type", ["gspo", "vespo"])
def test_sequence_objective_of_shards_equals_the_whole(loss_type: Any) -> None:
    # Two sequence-parallel ranks hold the even and the odd halves of every sequence; threads that
    # meet at a barrier stand for the all-reduce.
    pack = make_pack()
    config = PolicyLossConfig(
        loss_type=loss_type, kl_coef=0.1, kl_importance_correction=True, off_policy_kl_max=0.05
    )
    rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=False)
    expected = sequence_objective(pack.logprobs, rows, pack.loss_mask, pack.cu_seqlens, config)
    counts = torch.segment_reduce(
        pack.loss_mask.double(), "sum", offsets=pack.cu_seqlens, initial=0
    )
    barrier = threading.Barrier(2)
    slots: list[Tensor | None] = [None, None]
    results: list[tuple[Tensor, Tensor, Tensor] | None] = [None, None]

    def run_rank(rank: int) -> None:
        def sum_over_shards(sums_N: Tensor) -> Tensor:
            slots[rank] = sums_N
            barrier.wait(timeout=30)
            assert slots[0] is not None
            assert slots[1] is not None
            total = slots[0] + slots[1]
            barrier.wait(timeout=30)
            return total

        tokens: list[int] = []
        cu_seqlens = [0]
        for start, end in itertools.pairwise(pack.cu_seqlens.tolist()):
            middle = (start + end) // 2
            tokens += range(start, middle) if rank == 0 else range(middle, end)
            cu_seqlens.append(len(tokens))
        index = torch.tensor(tokens)
        weights = loss_token_weights(
            pack.loss_mask[index],
            torch.tensor(cu_seqlens, dtype=torch.int32),
            config,
            num_loss_tokens=NUM_LOSS_TOKENS,
            num_sequences=NUM_SEQUENCES,
            sequence_loss_tokens=counts,
            dtype=torch.float64,
        )
        loss, grad = sequence_objective(
            pack.logprobs[index],
            dataclasses.replace(rows.select(index), weights=weights),
            pack.loss_mask[index],
            torch.tensor(cu_seqlens, dtype=torch.int32),
            config,
            counts,
            sum_over_shards=sum_over_shards,
        )
        results[rank] = (index, loss, grad)

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        assert result is not None
        index, loss, grad = result
        torch.testing.assert_close(loss, expected[0][index], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, expected[1][index], rtol=1e-12, atol=1e-14)


def test_sequence_objective_refuses_shards_that_nobody_sums() -> None:
    pack = make_pack((4, 3))
    config = PolicyLossConfig(loss_type="gspo")
    rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=False)
    counts = torch.tensor([9, 9])
    with pytest.raises(NotImplementedError, match="sum_over_shards must complete the sums"):
        sequence_objective(pack.logprobs, rows, pack.loss_mask, pack.cu_seqlens, config, counts)
    with pytest.raises(NotImplementedError, match="sum_over_shards must complete the sums"):
        token_level_rows(rows, pack.loss_mask, pack.cu_seqlens, config, counts)
    with pytest.raises(NotImplementedError, match="sum_over_shards must complete the sums"):
        sequence_log_ratio(pack.logprobs, pack.logprobs, pack.loss_mask, pack.cu_seqlens, counts)


def test_token_level_rows_leaves_other_configs_alone() -> None:
    pack = make_pack()
    for config in (PolicyLossConfig(), PolicyLossConfig(loss_type="cispo")):
        rows = pack.objective_rows(config, is_on_policy=True, has_policy_mask=True)
        assert token_level_rows(rows, pack.loss_mask, pack.cu_seqlens, config) is rows


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "sapo"])
def test_loss_token_weights_averages_each_sequence(loss_type: Any) -> None:
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    weights = loss_token_weights(
        mask,
        cu_seqlens,
        PolicyLossConfig(loss_type=loss_type),
        num_loss_tokens=7,
        num_sequences=4,
    )
    expected = torch.tensor([1 / 12, 1 / 12, 0, 1 / 12, 0, 1 / 16, 1 / 16, 1 / 16, 1 / 16])
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("config", "divisor"),
    [
        (PolicyLossConfig(loss_type="bnpo"), 7),
        (PolicyLossConfig(loss_type="dapo"), 7),
        (PolicyLossConfig(loss_type="cispo"), 7),
        (PolicyLossConfig(loss_type="vespo"), 7),
        (PolicyLossConfig(loss_type="dr_grpo", max_completion_tokens=50), 3 * 50),
        (PolicyLossConfig(loss_type="luspo"), 3),
    ],
)
def test_loss_token_weights_divides_by_a_global_count(
    config: PolicyLossConfig, divisor: float
) -> None:
    mask = torch.tensor([1, 0, 1], dtype=torch.bool)
    weights = loss_token_weights(
        mask, torch.tensor([0, 3]), config, num_loss_tokens=7, num_sequences=3
    )
    torch.testing.assert_close(weights, mask.float() / divisor)


def test_loss_token_weights_takes_lengths_of_sharded_sequences() -> None:
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool)
    weights = loss_token_weights(
        mask,
        torch.tensor([0, 2, 4], dtype=torch.int32),
        PolicyLossConfig(),
        num_loss_tokens=30,
        num_sequences=2,
        sequence_loss_tokens=torch.tensor([10, 20]),
    )
    torch.testing.assert_close(weights, torch.tensor([1 / 20, 0, 1 / 40, 1 / 40]))


def test_loss_token_weights_of_an_all_masked_batch_are_zero() -> None:
    for config in (PolicyLossConfig(), PolicyLossConfig(loss_type="dapo")):
        weights = loss_token_weights(
            torch.zeros(3, dtype=torch.bool),
            torch.tensor([0, 3]),
            config,
            num_loss_tokens=0,
            num_sequences=torch.tensor(0),
        )
        assert torch.equal(weights, torch.zeros(3))


def test_loss_token_weights_needs_counts() -> None:
    mask, cu_seqlens = torch.ones(2, dtype=torch.bool), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="num_sequences must be the global count, got None"):
        loss_token_weights(mask, cu_seqlens, PolicyLossConfig(), num_loss_tokens=2)
    with pytest.raises(ValueError, match="a constant length: set max_completion_tokens"):
        loss_token_weights(
            mask,
            cu_seqlens,
            PolicyLossConfig(loss_type="dr_grpo"),
            num_loss_tokens=2,
            num_sequences=1,
        )
    with pytest.raises(ValueError, match="num_loss_tokens must be at least 0, got -1"):
        loss_token_weights(mask, cu_seqlens, PolicyLossConfig(loss_type="dapo"), num_loss_tokens=-1)


def test_entropy_token_weights_equal_autograd_of_the_reference() -> None:
    pack = make_pack()
    for has_policy_mask in (False, True):
        config = PolicyLossConfig(loss_type="dapo", entropy_coef=0.3)
        expected_loss, _, dentropy, _ = pack.reference(
            config, is_on_policy=False, has_policy_mask=has_policy_mask
        )
        weights = entropy_token_weights(
            pack.loss_mask,
            pack.policy_mask if has_policy_mask else None,
            config,
            num_loss_tokens=NUM_LOSS_TOKENS,
            dtype=torch.float64,
        )
        torch.testing.assert_close(-weights, dentropy)
        rows = pack.objective_rows(
            config, is_on_policy=False, has_policy_mask=has_policy_mask
        ).select(pack.loss_mask)
        loss, _ = token_objective(pack.logprobs[pack.loss_mask], rows, config)
        torch.testing.assert_close(loss.sum() - (weights * pack.entropy).sum(), expected_loss)


@pytest.mark.parametrize("is_on_policy", [False, True], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_loss_metrics_equal_the_reference(variant: dict[str, Any], is_on_policy: bool) -> None:
    pack = make_pack()
    for estimator in ("k1", "k2", "k3"):
        config = PolicyLossConfig(**variant, kl_estimator=estimator)
        rows = pack.objective_rows(config, is_on_policy=is_on_policy, has_policy_mask=False)
        *_, expected = pack.reference(config, is_on_policy=is_on_policy, has_policy_mask=False)
        log_ratio = None
        if config.ratio_level == "sequence" and rows.old_logprobs is not None:
            log_ratio = sequence_log_ratio(
                pack.logprobs, rows.old_logprobs, pack.loss_mask, pack.cu_seqlens
            )
        metrics = loss_metrics(pack.logprobs, pack.entropy, rows, config, log_ratio_R=log_ratio)
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13, msg=name)


def test_loss_metrics_needs_the_sequence_ratio() -> None:
    pack = make_pack()
    config = PolicyLossConfig(loss_type="gspo")
    rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=False)
    with pytest.raises(ValueError, match="needs log_ratio_R from sequence_log_ratio"):
        loss_metrics(pack.logprobs, pack.entropy, rows, config)


def test_loss_metrics_leaves_out_what_was_not_given() -> None:
    rows = ObjectiveRows(torch.ones(2), torch.ones(2))
    metrics = loss_metrics(torch.zeros(2), torch.ones(2), rows, PolicyLossConfig())
    assert sorted(metrics) == [
        "clip_high_sum",
        "clip_low_sum",
        "entropy_sum",
        "num_tokens_sum",
        "ratio_max",
        "ratio_sum",
    ]


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 0, 0]])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_objectives_of_no_rows_are_empty(variant: dict[str, Any], cu_seqlens: list[int]) -> None:
    config = PolicyLossConfig(**variant, sampler_correction="truncate", kl_coef=0.1)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    mask = torch.zeros(0, dtype=torch.bool)
    empty = torch.zeros(0)
    weights = loss_token_weights(mask, bounds, config, num_loss_tokens=5, num_sequences=2)
    rows = ObjectiveRows(empty, weights, None, empty, empty, empty)
    loss, dlogprobs = sequence_objective(empty, rows, mask, bounds, config)
    assert loss.shape == dlogprobs.shape == (0,)
    metrics = loss_metrics(empty, empty, rows, config, log_ratio_R=empty)
    assert all(value == 0 for value in metrics.values())
    loss, expected = policy_loss_reference(
        empty,
        empty,
        empty,
        mask,
        cu_seqlens=bounds,
        num_loss_tokens=5,
        num_sequences=2,
        old_logprobs=empty,
        ref_logprobs=empty,
        sampling_logprobs=empty,
        config=config,
    )
    assert loss == 0
    assert expected.keys() == metrics.keys()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_of_one_token_has_one_ratio(level: Any) -> None:
    config = PolicyLossConfig(ratio_level=level)
    rows = ObjectiveRows(torch.tensor([1.0, -1.0]), torch.ones(2), None, torch.tensor([-1.1, -0.9]))
    loss, dlogprobs = sequence_objective(
        torch.tensor([-1.0, -1.0]),
        rows,
        torch.ones(2, dtype=torch.bool),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        config,
    )
    ratio = torch.tensor([math.exp(0.1), math.exp(-0.1)])
    torch.testing.assert_close(loss, -ratio * rows.advantages)
    torch.testing.assert_close(dlogprobs, -ratio * rows.advantages)


def test_objectives_stay_finite_where_a_ratio_overflows() -> None:
    # exp(200) is no fp32 number. Advantage 0 must give 0, and a bounded surrogate its bound.
    logprobs = torch.zeros(4)
    rows = ObjectiveRows(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.ones(4), None, logprobs - 200)
    for config in (
        PolicyLossConfig(),
        PolicyLossConfig(loss_type="sapo"),
        PolicyLossConfig(loss_type="cispo"),
    ):
        loss, dlogprobs = token_objective(logprobs, rows, config)
        assert loss.isfinite().all()
        assert dlogprobs.isfinite().all()
        assert (loss[::2] == 0).all()
        assert (dlogprobs[::2] == 0).all()


def test_vespo_bounds_each_log_ratio_at_20() -> None:
    # +30 and −20 are +20 and −20: the sequence weight is 1, and so is its gamma weighting.
    rows = ObjectiveRows(torch.ones(2), torch.ones(2), None, torch.tensor([-31.0, 19.0]))
    loss, dlogprobs = sequence_objective(
        torch.full((2,), -1.0),
        rows,
        torch.ones(2, dtype=torch.bool),
        torch.tensor([0, 2], dtype=torch.int32),
        PolicyLossConfig(loss_type="vespo"),
    )
    torch.testing.assert_close(dlogprobs, -torch.ones(2))
    torch.testing.assert_close(loss, torch.ones(2))


def test_on_policy_ratio_is_one_for_an_impossible_token() -> None:
    # A log-prob of −inf minus itself would be NaN.
    rows = ObjectiveRows(torch.ones(1), torch.ones(1))
    loss, dlogprobs = token_objective(torch.tensor([-math.inf]), rows, PolicyLossConfig())
    assert loss == -1
    assert dlogprobs == -1


def test_objectives_keep_fp32() -> None:
    pack = make_pack(dtype=torch.float32)
    for variant in VARIANTS:
        config = PolicyLossConfig(**variant, kl_coef=0.1, sampler_correction="truncate")
        rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=True)
        loss, dlogprobs = sequence_objective(
            pack.logprobs, rows, pack.loss_mask, pack.cu_seqlens, config
        )
        assert loss.dtype == dlogprobs.dtype == torch.float32
        expected_loss, expected_grad, *_ = pack.reference(
            config, is_on_policy=False, has_policy_mask=True
        )
        torch.testing.assert_close(loss.sum(), expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dlogprobs, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_sequences", [False, True])
def test_objectives_name_a_missing_tensor(use_sequences: bool) -> None:
    rows = ObjectiveRows(torch.ones(2), torch.ones(2), None, torch.zeros(2))
    mask, cu_seqlens = torch.ones(2, dtype=torch.bool), torch.tensor([0, 2])

    def run(config: PolicyLossConfig) -> None:
        if use_sequences:
            sequence_objective(torch.zeros(2), rows, mask, cu_seqlens, config)
        else:
            token_objective(torch.zeros(2), rows, config)

    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs ref_logprobs, got None"):
        run(PolicyLossConfig(kl_coef=0.1))
    with pytest.raises(
        ValueError, match="sampler_correction='mask' needs sampling_logprobs, got None"
    ):
        run(PolicyLossConfig(sampler_correction="mask"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type must be one of \['grpo', .*, got 'ppo'"),
        ({"ratio_level": "word"}, r"ratio_level must be one of \['token', 'sequence', None\]"),
        ({"kl_estimator": "k4"}, r"kl_estimator must be one of \['k1', 'k2', 'k3'\], got 'k4'"),
        ({"kl_importance_correction": "yes"}, "kl_importance_correction must be one of"),
        ({"sampler_correction": "clip"}, "sampler_correction must be one of"),
        ({"sampler_correction_level": None}, "sampler_correction_level must be one of"),
        ({"clip_ratio_low": 1.0}, r"clip_ratio_low must be in \[0, 1\), got 1.0"),
        ({"clip_ratio_low": math.nan}, r"clip_ratio_low must be in \[0, 1\), got nan"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high must be finite and at least 0, got -0.1"),
        ({"clip_ratio_delta": 1.1}, r"clip_ratio_delta must be above 1 \+ clip_ratio_high = 1.2"),
        ({"kl_coef": math.inf}, "kl_coef must be finite and at least 0, got inf"),
        ({"entropy_coef": -1.0}, "entropy_coef must be finite and at least 0, got -1.0"),
        (
            {"loss_type": "cispo", "cispo_ratio_max": 0.2},
            "cispo_ratio_max must be finite, at least 1, got 0.2",
        ),
        (
            {"loss_type": "sapo", "sapo_temperature_neg": 0.0},
            "sapo_temperature_neg must be finite and above 0, got 0.0",
        ),
        (
            {"loss_type": "vespo", "vespo_lambda_pos": 0.0},
            "vespo_lambda_pos must be finite and above 0, got 0.0",
        ),
        (
            {"loss_type": "vespo", "vespo_k_neg": -1.0},
            "vespo_k_neg must be finite and at least 0, got -1.0",
        ),
        (
            {"sampler_correction": "mask", "sampler_ratio_max": 0.0},
            "sampler_ratio_max must be above 0",
        ),
        (
            {"sampler_correction": "mask", "sampler_ratio_min": 2.0},
            r"sampler_ratio_min must be in \[0, sampler_ratio_max = 2.0\), got 2.0",
        ),
        ({"off_policy_kl_max": 0.0}, "off_policy_kl_max must be finite and above 0, or None"),
        (
            {"loss_type": "dr_grpo", "max_completion_tokens": 0},
            "max_completion_tokens must be at least 1, got 0",
        ),
        ({"max_completion_tokens": 9}, "max_completion_tokens=9 is not read by loss_type='grpo'"),
        (
            {"loss_type": "cispo", "clip_ratio_delta": 2.0},
            "clip_ratio_delta=2.0 is not read by loss_type='cispo'",
        ),
        (
            {"loss_type": "sapo", "clip_ratio_high": 0.3},
            "clip_ratio_high=0.3 is not read by loss_type='sapo'",
        ),
        (
            {"loss_type": "dapo", "cispo_ratio_max": 4.0},
            "cispo_ratio_max=4.0 is not read by loss_type='dapo', only by cispo: remove it",
        ),
        ({"vespo_k_pos": 1.0}, "vespo_k_pos=1.0 is not read by loss_type='grpo'"),
        (
            {"loss_type": "gspo", "ratio_level": "token"},
            "'gspo' is defined by its sequence-level ratio, got ratio_level='token'",
        ),
        (
            {"loss_type": "luspo", "ratio_level": "token"},
            "'luspo' weighs a sequence-level ratio by the length, got ratio_level='token'",
        ),
        (
            {"loss_type": "vespo", "ratio_level": "sequence"},
            "'vespo' computes its own sequence-level weight, got ratio_level='sequence'",
        ),
        (
            {
                "loss_type": "vespo",
                "sampler_correction": "mask",
                "sampler_correction_level": "sequence",
            },
            "got sampler_correction_level='sequence': use 'token'",
        ),
        ({"kl_importance_correction": True}, "kl_importance_correction=True needs kl_coef above 0"),
        ({"sampler_ratio_max": 3.0}, "sampler_ratio_max=3.0 needs sampler_correction="),
        ({"sampler_ratio_min": 0.5}, "sampler_ratio_min=0.5 needs sampler_correction="),
        (
            {"sampler_correction_level": "sequence"},
            "sampler_correction_level='sequence' needs sampler_correction=",
        ),
        (
            {"sampler_correction": "truncate", "sampler_ratio_min": 0.5},
            "sampler_ratio_min=0.5 needs sampler_correction='mask'",
        ),
    ],
)
def test_config_refuses_what_has_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**settings)


def test_config_fills_in_the_ratio_level() -> None:
    levels = {
        name: PolicyLossConfig(loss_type=name).ratio_level
        for name in ("grpo", "dr_grpo", "cispo", "sapo", "vespo", "gspo", "luspo")
    }
    assert [name for name, level in levels.items() if level == "sequence"] == ["gspo", "luspo"]


def test_config_survives_its_text() -> None:
    for variant in VARIANTS:
        config = PolicyLossConfig(
            **variant, sampler_correction="mask", sampler_ratio_max=math.inf, kl_coef=0.1
        )
        assert PolicyLossConfig(**json.loads(config.as_json)) == config


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_reference_head_is_the_softmax(softcap: float | None) -> None:
    hidden = torch.randn(5, 4, dtype=torch.float64)
    weight, bias = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    labels = torch.tensor([3, 0, -1, 6, 6])
    temperature = torch.tensor([0.5, 1.0, 1.0, 2.0, 0.7])
    logprobs, entropy = head_logprobs_reference(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=1.7,
        ignore_index=-1,
    )
    for t in range(5):
        if labels[t] == -1:
            assert logprobs[t] == entropy[t] == 0
            continue
        z = [1.7 * float(hidden[t] @ weight[v] + bias[v]) for v in range(7)]
        if softcap is not None:
            z = [softcap * math.tanh(value / softcap) for value in z]
        e = [math.exp(value / float(temperature[t])) for value in z]
        p = [value / sum(e) for value in e]
        assert float(logprobs[t]) == pytest.approx(math.log(p[labels[t]]), rel=1e-12)
        assert float(entropy[t]) == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_objectives_drive_the_gradient_of_the_head(
    variant: dict[str, Any], temperature: float
) -> None:
    # From hidden states to dhidden: our coefficients through the head equal all of autograd.
    pack = make_pack()
    total = sum(LENGTHS)
    config = PolicyLossConfig(**variant, kl_coef=0.2, entropy_coef=0.05)
    hidden = torch.randn(total, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64)
    labels = torch.randint(13, (total,))
    head = {"temperature": temperature, "softcap": 5.0, "logit_scale": 0.8}
    logprobs, entropy = head_logprobs_reference(hidden, weight, labels, **head)  # type: ignore[arg-type]
    pack.logprobs = logprobs.detach()
    noise = 0.4 * torch.randn(total, dtype=torch.float64)
    pack.rows |= {"old_logprobs": pack.logprobs + noise, "ref_logprobs": pack.logprobs - noise}
    rows = pack.objective_rows(config, is_on_policy=False, has_policy_mask=True)
    loss, dlogprobs = sequence_objective(
        pack.logprobs, rows, pack.loss_mask, pack.cu_seqlens, config
    )
    weights = entropy_token_weights(
        pack.loss_mask,
        pack.policy_mask,
        config,
        num_loss_tokens=NUM_LOSS_TOKENS,
        dtype=torch.float64,
    )
    dhidden = torch.autograd.grad((logprobs * dlogprobs - entropy * weights).sum(), hidden)[0]
    expected_loss, metrics = linear_policy_loss_reference(
        hidden,
        weight,
        labels,
        rows.advantages,
        pack.loss_mask,
        cu_seqlens=pack.cu_seqlens,
        num_loss_tokens=NUM_LOSS_TOKENS,
        num_sequences=NUM_SEQUENCES,
        old_logprobs=rows.old_logprobs,
        ref_logprobs=rows.ref_logprobs,
        policy_mask=pack.policy_mask,
        config=config,
        **head,  # type: ignore[arg-type]
    )
    expected_dhidden = torch.autograd.grad(expected_loss, hidden)[0]
    total_loss = loss.sum() - (weights * metrics["entropy"]).sum()
    torch.testing.assert_close(total_loss, expected_loss.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dhidden, expected_dhidden, rtol=1e-10, atol=1e-13)


def test_reference_refuses_sharded_sequence_objectives() -> None:
    value, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="needs whole sequences"):
        policy_loss_reference(
            value,
            value,
            value,
            mask,
            cu_seqlens=torch.tensor([0, 2]),
            num_loss_tokens=2,
            num_sequences=1,
            sequence_loss_tokens=torch.tensor([4]),
            config=PolicyLossConfig(loss_type="gspo"),
        )


@pytest.mark.parametrize(
    ("loss_type", "num_sequences", "message"),
    [
        ("grpo", None, "loss_type='grpo' needs num_sequences, got None"),
        ("dr_grpo", 1, "loss_type='dr_grpo' needs max_completion_tokens, got None"),
    ],
)
def test_reference_needs_counts(loss_type: Any, num_sequences: int | None, message: str) -> None:
    value, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        policy_loss_reference(
            value,
            value,
            value,
            mask,
            cu_seqlens=torch.tensor([0, 2]),
            num_loss_tokens=2,
            num_sequences=num_sequences,
            config=PolicyLossConfig(loss_type=loss_type),
        )


def test_documentation_names_every_setting_and_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "ops" / "policy_loss.md").read_text("utf-8")
    pack = make_pack()
    rows = pack.objective_rows(PolicyLossConfig(), is_on_policy=False, has_policy_mask=False)
    names = [item.name for item in dataclasses.fields(PolicyLossConfig) if item.init]
    names += loss_metrics(pack.logprobs, pack.entropy, rows, PolicyLossConfig())
    names += [f"`{name}` |" for name in get_args(LossType)]
    assert [name for name in names if name not in text] == []
