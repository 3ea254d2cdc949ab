"""Our loss family against TRL's own code, called and not rewritten.

A `GRPOTrainer` without a model: its attributes are set by hand, generation and rewards return fixed
values, and the log-probs come from a leaf tensor. TRL then computes masks, the sampler's importance
ratios (`_generate_and_score_completions`) and the loss (`_compute_loss`) on its padded [B, L], and
autograd gives its gradient. We compute the same on packed rows. Values and gradients in fp64.
"""

import collections
import functools
import itertools
import re
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
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

trl: Any = pytest.importorskip("trl")

LENGTHS = (7, 1, 10, 4, 6, 8)
PADDED = max(LENGTHS)
MAX_COMPLETION_TOKENS = 12
CLIP_LOW, CLIP_HIGH, DELTA, CISPO_MAX = 0.2, 0.25, 1.4, 1.5
# TRL picks between its settings in fp32, so these have to be exact there.
SAPO = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25}
VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 1.5, "vespo_lambda_neg": 2.0}
SAMPLER_MIN, SAMPLER_MAX = 0.75, 1.3
KL_MAX = 0.02

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
# vespo has its own sequence weight; TRL warns about "sequence" there, we refuse it.
COMBINATIONS = [
    (loss_type, level)
    for loss_type in LOSS_TYPES
    for level in ("token", "sequence")
    if (loss_type, level) != ("vespo", "sequence")
]
SAMPLER_MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# beta, use_bias_correction_kl
KL_SETTINGS = ((0.0, False), (0.3, False), (0.3, True))
# delta, off_policy_mask_threshold, top_entropy_quantile, entropy_coef: each alone, and all at once.
EXTRAS: tuple[tuple[float | None, float | None, float, float], ...] = (
    (None, None, 1.0, 0.0),
    (DELTA, None, 1.0, 0.0),
    (None, KL_MAX, 1.0, 0.0),
    (None, None, 0.6, 0.0),
    (None, None, 1.0, 0.1),
    (DELTA, KL_MAX, 0.6, 0.1),
)


class ModelFreeTrainer(trl.GRPOTrainer):
    """TRL's trainer with fixed completions, rewards and log-probs in place of a model."""

    def __init__(self, batch: "Batch", **settings: Any) -> None:
        self.batch = batch
        sampler_mode = settings.pop("sampler_mode")
        # What `GRPOTrainer.__init__` sets from its config; names are TRL's.
        self.args = types.SimpleNamespace(
            delta=settings.pop("delta"),
            use_bias_correction_kl=settings.pop("use_bias_correction_kl"),
            steps_per_generation=settings.pop("steps_per_generation", 1),
            gradient_accumulation_steps=1,
            per_device_train_batch_size=len(LENGTHS),
            gradient_checkpointing_kwargs=None,
            report_to=[],
            **SAPO,
            **VESPO,
        )
        logs: dict[str, Any] = collections.defaultdict(list)
        logs["rewards"] = collections.defaultdict(list)
        defaults = {
            "num_iterations": 1 if batch.is_on_policy else 2,
            "current_gradient_accumulation_steps": 1,
            "epsilon_low": CLIP_LOW,
            "epsilon_high": CISPO_MAX if settings["loss_type"] == "cispo" else CLIP_HIGH,
            "max_completion_length": MAX_COMPLETION_TOKENS,
            "use_vllm": sampler_mode is not None,
            "vllm_importance_sampling_correction": sampler_mode is not None,
            "vllm_importance_sampling_mode": sampler_mode,
            "vllm_importance_sampling_clip_max": SAMPLER_MAX,
            "vllm_importance_sampling_clip_min": (
                SAMPLER_MIN if sampler_mode and sampler_mode.endswith("mask") else None
            ),
            "use_adaptive_entropy": False,
            "_entropy_bonus_enabled": settings["entropy_coef"] != 0.0,
            "aux_loss_enabled": False,
            "accelerator": SingleProcess(),
            "model": types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
            "ref_model": "reference",
            "_tokenizer": types.SimpleNamespace(pad_token_id=0),
            "pad_to_multiple_of": None,
            "mask_truncated_completions": False,
            "environment_factories": None,
            "environments": None,
            "tools": [],
            "num_generations": 2,
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "group",
            "reward_funcs": [None],
            "reward_func_names": ["reward"],
            "reward_weights": torch.ones(1),
            "log_multimodal": False,
            "_metrics": {"train": collections.defaultdict(list)},
            "_logs": logs,
            "_pending_extra_logs": {},
            "_pending_metrics": {},
        }
        for name, value in (defaults | settings).items():
            setattr(self, name, value)

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        batch = self.batch
        ids = [[1] * length for length in LENGTHS]
        sampling = [
            [None if value != value else value for value in row[:length].tolist()]
            for row, length in zip(batch.sampling_logprobs, LENGTHS, strict=True)
        ]
        masks = [row[:n].int().tolist() for row, n in zip(batch.loss_mask, LENGTHS, strict=True)]
        return ids, ids, masks, ids, sampling, {}, None, None

    def _calculate_rewards(self, *_: Any) -> Tensor:
        return self.batch.rewards[:, None]

    def _get_per_token_logps_and_entropies(
        self, model: Any, *_: Any, compute_entropy: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        batch = self.batch
        if compute_entropy:
            return batch.logprobs, batch.entropy, None
        return (batch.ref_logprobs if model == "reference" else batch.old_logprobs), None, None

    def score(self) -> dict[str, Tensor]:
        return self._generate_and_score_completions([{"prompt": "p"} for _ in LENGTHS])


class SingleProcess:
    """Accelerate's collectives of one process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = False

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value

    def pad_across_processes(self, value: Tensor, dim: int, pad_index: float) -> Tensor:
        return value


class Batch:
    """Padded [B, L] inputs: a sequence of one token, one fully masked, one unscored token."""

    def __init__(self, *, is_on_policy: bool) -> None:
        shape = (len(LENGTHS), PADDED)
        self.is_on_policy = is_on_policy
        self.logprobs = (-0.1 - 2 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
        self.entropy = (3 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
        self.old_logprobs = self.logprobs.detach().clone()
        if not is_on_policy:
            self.old_logprobs += 0.4 * torch.randn(shape, dtype=torch.float64)
        self.ref_logprobs = self.logprobs.detach() + 0.5 * torch.randn(shape, dtype=torch.float64)
        self.sampling_logprobs = self.old_logprobs + 0.2 * torch.randn(shape, dtype=torch.float64)
        self.sampling_logprobs[2, 3] = torch.nan
        self.is_token = torch.arange(PADDED) < torch.tensor(LENGTHS)[:, None]
        self.loss_mask = (torch.rand(shape) > 0.2) & self.is_token
        self.loss_mask[1, 0] = self.loss_mask[2, 3] = True
        self.loss_mask[3] = False
        self.rewards = torch.tensor([0.0, 1.0, 0.3, 0.1, 0.5, 0.5])  # the last group has no signal

    def pack(self, value_BL: Tensor) -> Tensor:
        return value_BL.detach()[self.is_token]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


def make_config(
    loss_type: str,
    level: str,
    sampler_mode: str | None,
    kl: tuple[float, bool],
    delta: float | None,
    kl_max: float | None,
    entropy_coef: float,
) -> PolicyLossConfig:
    """TRL's settings under our names."""
    settings: dict[str, Any] = {
        "loss_type": loss_type,
        "ratio_level": level,
        "kl_coef": kl[0],
        "kl_importance_correction": kl[1],
        "off_policy_kl_max": kl_max,
        "entropy_coef": entropy_coef,
    }
    if loss_type == "dr_grpo":
        settings["max_completion_tokens"] = MAX_COMPLETION_TOKENS
    if (loss_type, level) == ("luspo", "token"):
        # A plain sum over tokens divided by the number of sequences.
        settings |= {"loss_type": "dr_grpo", "max_completion_tokens": 1}
    if (loss_type, level) == ("grpo", "sequence"):
        settings |= {"loss_type": "gspo"}
    if loss_type in CLIPPED:
        settings |= {
            "clip_ratio_low": CLIP_LOW,
            "clip_ratio_high": CLIP_HIGH,
            "clip_ratio_delta": delta,
        }
    settings |= {"cispo": {"cispo_ratio_max": CISPO_MAX}, "sapo": SAPO, "vespo": VESPO}.get(
        loss_type, {}
    )
    if sampler_mode is not None:
        sampler_level, kind = sampler_mode.split("_")
        settings |= {
            "sampler_correction": kind,
            "sampler_correction_level": sampler_level,
            "sampler_ratio_max": SAMPLER_MAX,
            "sampler_ratio_min": SAMPLER_MIN if kind == "mask" else 0.0,
        }
    return PolicyLossConfig(**settings)


def ours(
    batch: Batch,
    config: PolicyLossConfig,
    advantages_BL: Tensor,
    sampling_BL: Tensor,
    policy_mask_BL: Tensor | None,
    *,
    num_sequences: int = len(LENGTHS),
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """loss, dloss/dlogprobs, dloss/dentropy and metrics of the packed batch."""
    mask = batch.pack(batch.loss_mask)
    policy_mask = None if policy_mask_BL is None else batch.pack(policy_mask_BL)
    logprobs, entropy = batch.pack(batch.logprobs), batch.pack(batch.entropy)
    num_loss_tokens = int(mask.sum())
    weights = loss_token_weights(
        mask,
        batch.cu_seqlens,
        config,
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
        dtype=torch.float64,
    )
    rows = ObjectiveRows(
        advantages=batch.pack(advantages_BL).double(),
        weights=weights,
        policy_mask=policy_mask,
        old_logprobs=None if batch.is_on_policy else batch.pack(batch.old_logprobs),
        ref_logprobs=batch.pack(batch.ref_logprobs),
        sampling_logprobs=batch.pack(sampling_BL).double(),
    )
    if is_token_level(
        config, is_on_policy=batch.is_on_policy, has_policy_mask=policy_mask is not None
    ):
        loss, dlogprobs = token_objective(
            logprobs, token_level_rows(rows, mask, batch.cu_seqlens, config), config
        )
    else:
        loss, dlogprobs = sequence_objective(logprobs, rows, mask, batch.cu_seqlens, config)
    # TRL takes the mean entropy over the tokens that the quantile keeps, we over all loss tokens.
    num_bonus_tokens = num_loss_tokens
    if policy_mask is not None:
        num_bonus_tokens = int((mask & policy_mask).sum())
    entropy_weights = entropy_token_weights(
        mask, policy_mask, config, num_loss_tokens=num_bonus_tokens, dtype=torch.float64
    )
    log_ratio = None
    if rows.old_logprobs is not None and config.ratio_level == "sequence":
        log_ratio = sequence_log_ratio(logprobs, rows.old_logprobs, mask, batch.cu_seqlens)
    metrics = loss_metrics(logprobs, entropy, rows, config, log_ratio_R=log_ratio)
    return loss.sum() - (entropy_weights * entropy).sum(), dlogprobs, -entropy_weights, metrics


def trl_loss(trainer: ModelFreeTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    batch = trainer.batch
    loss = trainer._compute_loss(trainer.model, inputs)
    dlogprobs, dentropy = torch.autograd.grad(
        loss, (batch.logprobs, batch.entropy), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), dlogprobs, dentropy


def check_metrics(
    trl_metrics: dict[str, list[float]],
    metrics: dict[str, Tensor],
    config: PolicyLossConfig,
) -> None:
    count = metrics["num_tokens_sum"]
    names = {"entropy_sum": "entropy"}
    if config.kl_coef > 0 and not config.kl_importance_correction:
        names["kl_sum"] = "kl"
    if config.ratio_level == "token":
        # With one ratio a sequence, TRL averages over sequences and not over tokens.
        names |= {
            "clip_low_sum": "clip_ratio/low_mean",
            "clip_high_sum": (
                "cispo_clip_ratio" if config.loss_type == "cispo" else "clip_ratio/high_mean"
            ),
        }
    for name, trl_name in names.items():
        if trl_name in trl_metrics:
            expected = trl_metrics[trl_name][0]
            assert float(metrics[name] / count) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("is_on_policy", [False, True], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize(("loss_type", "level"), COMBINATIONS)
def test_loss_and_gradient_equal_trl(loss_type: str, level: str, is_on_policy: bool) -> None:
    batch = Batch(is_on_policy=is_on_policy)
    num_compared = 0
    for sampler_mode, kl in itertools.product(SAMPLER_MODES, KL_SETTINGS):
        if loss_type == "vespo" and sampler_mode and sampler_mode.startswith("sequence"):
            continue  # TRL refuses it too
        make_trainer = functools.partial(
            ModelFreeTrainer,
            batch,
            loss_type=loss_type,
            importance_sampling_level=level,
            sampler_mode=sampler_mode,
            beta=kl[0],
            use_bias_correction_kl=kl[1],
        )
        scored = make_trainer(
            delta=None, off_policy_mask_threshold=None, top_entropy_quantile=1.0, entropy_coef=0.0
        ).score()
        assert ("old_per_token_logps" in scored) == (not is_on_policy or sampler_mode is not None)
        for i, (delta, kl_max, quantile, entropy_coef) in enumerate(EXTRAS):
            if delta is not None and loss_type not in CLIPPED:
                delta = None  # TRL does not read it there, we refuse it
            trainer = make_trainer(
                delta=delta,
                off_policy_mask_threshold=kl_max,
                top_entropy_quantile=quantile,
                entropy_coef=entropy_coef,
            )
            inputs = dict(scored)
            if i % 2:  # what TRL calls a subclass with advantages of its own for each token
                inputs["advantages"] = torch.randn(batch.loss_mask.shape, dtype=torch.float64)
            advantages_BL = inputs["advantages"].reshape(len(LENGTHS), -1).expand(-1, PADDED)
            policy_mask_BL = None
            if quantile < 1:
                policy_mask_BL = trainer.get_high_entropy_mask(
                    batch.entropy.detach(), batch.loss_mask, 1 - quantile
                )
            config = make_config(loss_type, level, sampler_mode, kl, delta, kl_max, entropy_coef)
            expected = trl_loss(trainer, inputs)
            loss, dlogprobs, dentropy, metrics = ours(
                batch, config, advantages_BL, scored["sampling_per_token_logps"], policy_mask_BL
            )
            case = f"{config}, quantile {quantile}"
            close = functools.partial(torch.testing.assert_close, msg=case)
            close(loss, expected[0], rtol=1e-11, atol=1e-13)
            close(dlogprobs, batch.pack(expected[1]), rtol=1e-10, atol=1e-13)
            close(dentropy, batch.pack(expected[2]), rtol=1e-10, atol=1e-13)
            check_metrics(trainer._metrics["train"], metrics, config)
            num_compared += 1
    assert num_compared == (9 if loss_type == "vespo" else 15) * len(EXTRAS)


def test_batch_reaches_every_branch_of_the_oracle() -> None:
    # Parity on data that clips, masks and drops nothing would be empty.
    batch = Batch(is_on_policy=False)
    mask = batch.loss_mask
    ratio = (batch.logprobs.detach() - batch.old_logprobs).exp()[mask]
    importance = (batch.old_logprobs - batch.sampling_logprobs).exp()[mask]
    for value, low, high in (
        (ratio, 1 - CLIP_LOW, DELTA),
        (importance, SAMPLER_MIN, SAMPLER_MAX),
    ):
        assert (value < low).any()
        assert (value > high).any()
        assert ((value > low) & (value < high)).any()
    assert importance.isnan().any()
    gap = torch.where(mask, batch.sampling_logprobs - batch.logprobs.detach(), 0).nan_to_num()
    means = gap.sum(1) / mask.sum(1).clamp(min=1)
    assert (means > KL_MAX).any()
    assert (means < KL_MAX).any()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "luspo"])
def test_two_micro_batches_equal_trl_under_accumulation(loss_type: str) -> None:
    # TRL divides by the accumulation steps; we have global counts. Token means agree because TRL's
    # num_items_in_batch is global too (bnpo and the entropy bonus are per micro-batch there).
    level = "sequence" if loss_type == "luspo" else "token"
    batches = [Batch(is_on_policy=False), Batch(is_on_policy=False)]
    config = make_config(loss_type, level, None, (0.3, False), None, None, 0.0)
    num_loss_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
    for batch in batches:
        trainer = ModelFreeTrainer(
            batch,
            loss_type=loss_type,
            importance_sampling_level=level,
            sampler_mode=None,
            beta=0.3,
            use_bias_correction_kl=False,
            delta=None,
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            entropy_coef=0.0,
            steps_per_generation=2,
            current_gradient_accumulation_steps=2,
        )
        inputs = trainer.score()
        inputs["num_items_in_batch"] = torch.tensor(num_loss_tokens)
        expected = trl_loss(trainer, inputs)
        mask = batch.pack(batch.loss_mask)
        weights = loss_token_weights(
            mask,
            batch.cu_seqlens,
            config,
            num_loss_tokens=num_loss_tokens,
            num_sequences=2 * len(LENGTHS),
            dtype=torch.float64,
        )
        rows = ObjectiveRows(
            advantages=batch.pack(inputs["advantages"][:, None].expand(-1, PADDED)).double(),
            weights=weights,
            old_logprobs=batch.pack(batch.old_logprobs),
            ref_logprobs=batch.pack(batch.ref_logprobs),
        )
        loss, dlogprobs = sequence_objective(
            batch.pack(batch.logprobs), rows, mask, batch.cu_seqlens, config
        )
        torch.testing.assert_close(loss.sum(), expected[0], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(dlogprobs, batch.pack(expected[1]), rtol=1e-10, atol=1e-13)


def test_trl_has_no_loss_type_that_we_lack() -> None:
    # A new one there should fail here, and not pass unseen.
    text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    supported = text.split("Supported values are", 1)[1].split(".", 1)[0]
    assert set(re.findall(r"'(\w+)'", supported)) == set(LOSS_TYPES)
