"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-rotation convention.

Dimension i of a head turns together with dimension i + K/2. Angles are computed in fp32, whatever
the type of the model, with the operations of transformers in the same order, so that both agree to
the last bit: at position 30,000 a rounded frequency is a different angle.
"""

import math

import torch
from torch import Tensor

from lwz_trainer.model.architecture import Llama3Scaling, ModelConfig, YarnScaling

__all__ = ["inverse_frequencies", "rotary_tables", "rotate"]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The angle per position of each rotated pair.

    Returns:
        [K/2] fp32 on the CPU.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wavelength_over_2pi = config.rope_theta**exponents
    match config.rope_scaling:
        case None:
            return 1.0 / wavelength_over_2pi
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(1.0 / wavelength_over_2pi, scaling)
        case YarnScaling() as scaling:
            return _yarn_frequencies(wavelength_over_2pi, config, scaling)


def _llama3_frequencies(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow pairs are divided by the factor, fast ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    slow = wavelength > original / low
    fast = wavelength < original / high
    return torch.where(slow, inv_freq / scaling.factor, torch.where(fast, inv_freq, between))


def _yarn_frequencies(
    wavelength_over_2pi: Tensor, config: ModelConfig, scaling: YarnScaling
) -> Tensor:
    """A ramp over the pairs from the original frequencies to the interpolated ones."""

    def pair_with_turns(num_turns: float) -> float:
        turns_limit = scaling.original_max_positions / (num_turns * 2 * math.pi)
        return config.head_dim * math.log(turns_limit) / (2 * math.log(config.rope_theta))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step without a division by zero
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32)
    keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    interpolated = 1.0 / (scaling.factor * wavelength_over_2pi)
    return interpolated * (1 - keep) + 1.0 / wavelength_over_2pi * keep


def rotary_tables(
    position_ids: Tensor, inv_freq: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`, computed once per forward pass for all layers.

    Args:
        position_ids: [T] int.
        inv_freq: [K/2] fp32.
        attention_factor: multiplies both tables (YaRN), else 1.
        dtype: of the result.

    Returns:
        Two [T, 1, K] tables; the first half of the second carries rotation's minus sign.
    """
    angles = position_ids[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    cos_T1K = torch.cat((cos, cos), dim=-1).mul_(attention_factor).to(dtype).unsqueeze(1)
    sin_T1K = torch.cat((-sin, sin), dim=-1).mul_(attention_factor).to(dtype).unsqueeze(1)
    return cos_T1K, sin_T1K


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + swap(x)·sin, where swap exchanges the two halves of each head.

    Args:
        x: [T, heads, K], any strides; not changed.
        cos: [T, 1, K] from `rotary_tables`.
        sin: [T, 1, K] from `rotary_tables`, sign included.

    Returns:
        [T, heads, K] contiguous.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
