"""Settings of the policy loss, and which of them have a meaning together.

A knob that the chosen loss never reads raises when it is set away from its default, so that no
setting is accepted and ignored. `docs/ops/policy_loss.md` has the formula of every loss type and
the names that TRL uses.
"""

import json
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

__all__ = ["KLEstimator", "LossType", "PolicyLossConfig", "RatioLevel", "SamplerCorrection"]

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
SamplerCorrection = Literal["truncate", "mask"]

CLIPPED_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")

# Which loss types read a field; fields that are not here are read by all.
READ_BY: dict[str, tuple[str, ...]] = {
    "clip_ratio_low": CLIPPED_TYPES,
    "clip_ratio_high": CLIPPED_TYPES,
    "clip_ratio_delta": CLIPPED_TYPES,
    "cispo_ratio_max": ("cispo",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "max_completion_tokens": ("dr_grpo",),
}


@dataclass(frozen=True)
class PolicyLossConfig:
    """What is computed for each completion token, and how tokens are averaged.

    Raises:
        ValueError: a value out of its range, or a combination without meaning.
    """

    loss_type: LossType = "grpo"
    """Surrogate and normaliser; the papers are listed in `docs/ops/policy_loss.md`."""
    ratio_level: RatioLevel | None = None
    """One ratio a token, or the geometric mean over the sequence's loss tokens. None: "sequence"
    for gspo and luspo, otherwise "token"."""
    clip_ratio_low: float = 0.2
    """The ratio is kept above 1 - clip_ratio_low where the advantage is negative."""
    clip_ratio_high: float = 0.2
    """The ratio is kept below 1 + clip_ratio_high where the advantage is positive."""
    clip_ratio_delta: float | None = None
    """Two-sided clip: cap of the ratio where the advantage is negative; above 1 + high."""
    cispo_ratio_max: float = 5.0
    """Cap of the detached ratio that weighs a token's log-prob in cispo; at least 1."""
    sapo_temperature_pos: float = 1.0
    """Steepness of sapo's gate for positive advantages."""
    sapo_temperature_neg: float = 1.05
    """Steepness of sapo's gate for advantages at or below 0."""
    vespo_k_pos: float = 2.0
    """Power of the sequence weight in vespo's gamma weighting, advantages at or above 0."""
    vespo_lambda_pos: float = 3.0
    """Decay of vespo's gamma weighting, advantages at or above 0."""
    vespo_k_neg: float = 3.0
    """Power of the sequence weight in vespo's gamma weighting, negative advantages."""
    vespo_lambda_neg: float = 2.0
    """Decay of vespo's gamma weighting, negative advantages."""
    kl_coef: float = 0.0
    """Weight of the KL estimate against the reference policy."""
    kl_estimator: KLEstimator = "k3"
    """Per-token estimate of KL(policy || reference), for the loss and for the metric."""
    kl_importance_correction: bool = False
    """Multiply the KL estimate by the ratio, with gradient through both."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: full-vocabulary entropy in nats, mean over all loss tokens."""
    sampler_correction: SamplerCorrection | None = None
    """Weigh the policy term by exp(old_logprobs - sampling_logprobs): cut off at
    sampler_ratio_max, or 0 outside [sampler_ratio_min, sampler_ratio_max]."""
    sampler_correction_level: RatioLevel = "token"
    """One weight a token, or the product over the sequence's loss tokens."""
    sampler_ratio_max: float = 2.0
    """Upper bound of the sampler's importance weight; may be infinite."""
    sampler_ratio_min: float = 0.0
    """Lower bound of the sampler's importance weight; "mask" only."""
    off_policy_kl_max: float | None = None
    """Drop the policy term of negative advantages in a sequence whose mean of
    sampling_logprobs - logprobs exceeds this; None keeps all."""
    max_completion_tokens: int | None = None
    """The constant length that dr_grpo divides by."""
    as_json: ClassVar[str] = ""
    """All of the above as text."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        if self.ratio_level is None:
            level = "sequence" if self.loss_type in ("gspo", "luspo") else "token"
            object.__setattr__(self, "ratio_level", level)
        self._check_knobs_are_read()
        self._check_ratio_level()
        self._check_sampler_correction()
        if self.kl_importance_correction and self.kl_coef == 0:
            raise ValueError("kl_importance_correction=True needs kl_coef above 0: there is no KL")
        # Made here because torch.compile cannot trace it; operators carry the config as this text.
        values = {item.name: getattr(self, item.name) for item in fields(PolicyLossConfig)}
        object.__setattr__(self, "as_json", json.dumps(values))

    @property
    def has_ratio_gradient(self) -> bool:
        """Whether the policy term's gradient goes through the ratio (not a detached weight)."""
        return self.loss_type not in ("cispo", "vespo")

    @property
    def needs_num_sequences(self) -> bool:
        """Whether the normaliser counts sequences and not tokens."""
        return self.loss_type in ("grpo", "gspo", "sapo", "dr_grpo", "luspo")

    def _check_choices(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "loss_type": get_args(LossType),
            "ratio_level": (*get_args(RatioLevel), None),
            "kl_estimator": get_args(KLEstimator),
            "kl_importance_correction": (True, False),
            "sampler_correction": (*get_args(SamplerCorrection), None),
            "sampler_correction_level": get_args(RatioLevel),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {[*allowed]}, got {value!r}")

    def _check_ranges(self) -> None:
        self._require("clip_ratio_low", 0 <= self.clip_ratio_low < 1, "in [0, 1)")
        for name in ("clip_ratio_high", "vespo_k_pos", "vespo_k_neg", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            self._require(name, 0 <= value < math.inf, "finite and at least 0")
        for name in (
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "vespo_lambda_pos",
            "vespo_lambda_neg",
        ):
            value = getattr(self, name)
            self._require(name, 0 < value < math.inf, "finite and above 0")
        # Below 1 every on-policy token would be clipped, and its gradient scaled down.
        self._require("cispo_ratio_max", 1 <= self.cispo_ratio_max < math.inf, "finite, at least 1")
        self._require("sampler_ratio_max", self.sampler_ratio_max > 0, "above 0 (it may be inf)")
        if self.clip_ratio_delta is not None:
            above = 1 + self.clip_ratio_high < self.clip_ratio_delta < math.inf
            self._require(
                "clip_ratio_delta", above, f"above 1 + clip_ratio_high = {1 + self.clip_ratio_high}"
            )
        if self.off_policy_kl_max is not None:
            positive = 0 < self.off_policy_kl_max < math.inf
            self._require("off_policy_kl_max", positive, "finite and above 0, or None")
        if self.max_completion_tokens is not None:
            self._require("max_completion_tokens", self.max_completion_tokens >= 1, "at least 1")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        # `holds` is written so that NaN is False.
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")

    def _check_knobs_are_read(self) -> None:
        for item in fields(self):
            readers = READ_BY.get(item.name)
            value = getattr(self, item.name)
            if readers and self.loss_type not in readers and value != item.default:
                raise ValueError(
                    f"{item.name}={value} is not read by loss_type={self.loss_type!r}, only by "
                    f"{', '.join(readers)}: remove it"
                )

    def _check_ratio_level(self) -> None:
        if self.loss_type == "gspo" and self.ratio_level == "token":
            raise ValueError(
                "loss_type='gspo' is defined by its sequence-level ratio, got ratio_level='token': "
                "loss_type='grpo' is the same loss with token-level ratios"
            )
        if self.loss_type == "luspo" and self.ratio_level == "token":
            raise ValueError(
                "loss_type='luspo' weighs a sequence-level ratio by the length, got "
                "ratio_level='token': loss_type='dr_grpo' sums token-level ratios over a constant"
            )
        if self.loss_type == "vespo" and self.ratio_level == "sequence":
            raise ValueError(
                "loss_type='vespo' computes its own sequence-level weight, got "
                "ratio_level='sequence', which would change nothing but the KL correction: "
                "leave ratio_level at None"
            )

    def _check_sampler_correction(self) -> None:
        if self.sampler_correction is None:
            for name in ("sampler_correction_level", "sampler_ratio_max", "sampler_ratio_min"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs sampler_correction='truncate' or "
                        "'mask', got None"
                    )
            return
        if self.sampler_correction == "truncate" and self.sampler_ratio_min != 0:
            raise ValueError(
                f"sampler_ratio_min={self.sampler_ratio_min} needs sampler_correction='mask': "
                "'truncate' only bounds the weight from above"
            )
        self._require(
            "sampler_ratio_min",
            0 <= self.sampler_ratio_min < self.sampler_ratio_max,
            f"in [0, sampler_ratio_max = {self.sampler_ratio_max})",
        )
        if self.loss_type == "vespo" and self.sampler_correction_level == "sequence":
            raise ValueError(
                "loss_type='vespo' multiplies token-level sampler weights into its own sequence "
                "weight, got sampler_correction_level='sequence': use 'token'"
            )
