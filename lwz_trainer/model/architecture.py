"""What the decoder must know about a model, read from a transformers configuration.

Every setting of a Llama, Qwen2 or Qwen3 configuration that changes the arithmetic is either carried
in `ModelConfig` or refused by name: a model never loads with a part of its definition ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lwz_trainer.errors import UserError

__all__ = ["Family", "Llama3Scaling", "ModelConfig", "YarnScaling"]

Family = Literal["llama", "qwen2", "qwen3"]

_SUPPORTED = ", ".join(get_args(Family))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the low rotary frequencies; the fields carry the published names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): rotary frequencies interpolated by band, cos and sin scaled.

    `attention_factor` multiplies cos and sin; `truncate` rounds the band's limits to whole
    dimensions, as the published code does.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder. Letters as in the shape suffixes.

    Attributes:
        family: which of the supported architectures.
        vocab_size: V, the rows of the embedding.
        hidden: D, the width of the residual stream.
        ff: F, the width of the gated feed-forward layer.
        layers: number of decoder layers.
        heads: H, query heads.
        kv_heads: J, key and value heads; H is a multiple of J.
        head_dim: K, even; H·K may differ from D.
        rms_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or how the rotary frequencies are stretched.
        tie_embeddings: the output head is the embedding.
        qkv_bias: the query, key and value projections have a bias (Qwen2).
        qk_norm: queries and keys are RMS-normalised per head before RoPE (Qwen3).
        max_positions: positions that the model was made for.
    """

    family: Family
    vocab_size: int
    hidden: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | YarnScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"the model has {self.heads} query heads, expected a multiple of its "
                f"{self.kv_heads} key/value heads; check num_attention_heads and "
                "num_key_value_heads in config.json"
            )
        if self.head_dim % 2:
            raise UserError(
                f"the model's head size is {self.head_dim}, expected an even number for rotary "
                "embeddings; check head_dim in config.json"
            )

    @classmethod
    def from_hf(cls, config: Any) -> "ModelConfig":
        """Reads a transformers configuration.

        Args:
            config: a `LlamaConfig`, `Qwen2Config` or `Qwen3Config` of transformers 4 or 5.

        Raises:
            UserError: another architecture, or a setting that this decoder does not compute.
        """
        family: Any = getattr(config, "model_type", None)
        if family not in get_args(Family):
            raise UserError(
                f"unsupported model architecture {family!r}, expected one of {_SUPPORTED}; "
                "choose a model of one of these families"
            )
        _refuse_unsupported(config)
        heads = int(config.num_attention_heads)
        max_positions = int(config.max_position_embeddings)
        rope = _rope_parameters(config)
        return cls(
            family=family,
            vocab_size=int(config.vocab_size),
            hidden=int(config.hidden_size),
            ff=int(config.intermediate_size),
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(config.num_key_value_heads or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            rms_eps=float(config.rms_norm_eps),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope, max_positions),
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=max_positions,
        )


def _refuse(setting: str, got: object, expected: str) -> UserError:
    return UserError(
        f"the model's config.json has {setting} = {got!r}, expected {expected}: this decoder does "
        "not compute it; choose another model"
    )


def _refuse_unsupported(config: Any) -> None:
    if config.hidden_act != "silu":
        raise _refuse("hidden_act", config.hidden_act, "'silu'")
    for setting in ("attention_bias", "mlp_bias", "attention_dropout"):
        # transformers ignores attention_bias for Qwen2, whose q, k and v always have a bias.
        if setting == "attention_bias" and config.model_type == "qwen2":
            continue
        if value := getattr(config, setting, None):
            raise _refuse(setting, value, "false or absent")
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, Mapping)
            else type(quantization).__name__
        )
        raise _refuse("quantization_config", method, "unquantised weights")
    _refuse_sliding_window(config)


def _refuse_sliding_window(config: Any) -> None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        if other := sorted(set(layer_types) - {"full_attention"}):
            raise _refuse("layer_types", other, "'full_attention' in every layer")
        return
    window = getattr(config, "sliding_window", None)
    # Older Qwen configurations carry a window that only layers from max_window_layers on use.
    in_use = getattr(config, "use_sliding_window", True) and (
        getattr(config, "max_window_layers", 0) < config.num_hidden_layers
    )
    if window is not None and in_use:
        raise _refuse("sliding_window", window, "no sliding window in use")


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The flat rope settings: transformers 5 keeps one dict, 4 kept a base and a scaling dict."""
    rope = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise _refuse("rope_parameters", sorted(rope), "one set for all layers")
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = getattr(config, "rope_theta", None) or 10_000.0
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1.0):
        raise _refuse("partial_rotary_factor", partial, "1.0")
    if rope.get("mrope_section") is not None:
        raise _refuse("mrope_section", rope["mrope_section"], "absent")
    return rope


def _rope_scaling(
    rope: Mapping[str, Any], max_positions: int
) -> Llama3Scaling | YarnScaling | None:
    kind = rope["rope_type"]
    if kind == "default":
        return None
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    if kind == "llama3":
        return Llama3Scaling(
            factor=_required(rope, "factor"),
            low_freq_factor=_required(rope, "low_freq_factor"),
            high_freq_factor=_required(rope, "high_freq_factor"),
            original_max_positions=original,
        )
    if kind == "yarn":
        factor = float(rope.get("factor") or max_positions / original)
        return YarnScaling(
            factor=factor,
            original_max_positions=original,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=bool(rope.get("truncate", True)),
        )
    raise _refuse("rope_type", kind, "one of default, llama3, yarn")


def _required(rope: Mapping[str, Any], name: str) -> float:
    if rope.get(name) is None:
        raise UserError(
            f"the model's rope settings of type {rope['rope_type']!r} have no {name}, expected a "
            "number; add it to config.json"
        )
    return float(rope[name])


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """0.1·ln(factor) + 1 (the paper's), or the ratio of two such terms where both scales are set"""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    growth = 0.1 * math.log(max(factor, 1.0))
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (growth * mscale + 1.0) / (growth * mscale_all_dim + 1.0)
    return growth + 1.0
