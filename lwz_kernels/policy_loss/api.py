"""Public contract of the loss head: validation and dispatch.

Conventions: packed one-dimensional rows, one per completion token; natural log; temperature divides
the logits before the log-softmax; gradients are with respect to hidden and weight.
"""

from typing import Literal

import torch
from torch import Tensor

from lwz_kernels.policy_loss.objective import PolicyLossConfig
from lwz_kernels.policy_loss.op import LinearLogprobs, LinearPolicyLoss

__all__ = ["PolicyLossConfig", "linear_logprobs", "linear_policy_loss", "loss_token_weights"]

DEFAULT_CHUNK_BYTES = 128 << 20


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [T, D] floating point.
        weight: [V, D], same dtype and device.
        labels: [T] int64 in [0, V).
        temperature: scalar or [T] fp32, positive.
        chunk_bytes: size of one fp32 logits chunk; [T, V] never exists.

    Returns:
        logprobs, entropy, lse: [T] fp32 (fp64 for fp64 input), all differentiable.

    Numerics: fp32 accumulation and fp32 logits; deterministic on one device and thread count.

    Raises:
        ValueError: a shape, dtype or temperature that does not fit.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> logprobs, entropy, lse = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
        >>> bool(torch.allclose(logprobs, -torch.log(torch.tensor(3.0))))
        True
    """
    _check_head(hidden, weight, labels, chunk_bytes)
    temperature_T = _expand_temperature(temperature, hidden)
    return LinearLogprobs.apply(hidden, weight, labels, temperature_T, chunk_bytes)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: PolicyLossConfig | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of packed completion tokens, straight from hidden states.

        loss = Σ_t w_t [ −ρ_t min(r_t A_t, clip(r_t) A_t) + kl_coef · KL_t − entropy_coef · H_t ]

    Args:
        hidden: [T, D], the rows that predict the labels.
        weight: [V, D] head, same dtype and device.
        labels: [T] int64, the sampled tokens.
        advantages: [T] fp32.
        loss_weights: [T] fp32 at least 0, from ``loss_token_weights``: the normaliser is in it, so
            that the sum over micro-batches and ranks is the loss of the whole batch.
        old_logprobs: [T] fp32; None means on-policy: the ratio is exactly 1, with gradient.
        ref_logprobs: [T] fp32, required when config.kl_coef > 0.
        sampling_logprobs: [T] fp32, required when config.tis_cap > 0.
        temperature: scalar or [T].

    Returns:
        loss: fp32 scalar; its upstream gradient must be a scalar and is applied on the device.
        metrics: device scalars, sums (``*_sum``) and maxima (``*_max``) over tokens of weight > 0,
            and ``logprobs`` [T].

    Numerics: three matmuls, gradients in forward; fp32 logits and fp32 dW over all chunks.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a missing tensor that the config needs.
        RuntimeError: a second backward through the same loss.
    """
    config = config or PolicyLossConfig()
    _check_head(hidden, weight, labels, chunk_bytes)
    rows = {
        "advantages": advantages,
        "loss_weights": loss_weights,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampling_logprobs": sampling_logprobs,
    }
    for name, value in rows.items():
        if value is not None and value.shape != labels.shape:
            raise ValueError(f"{name} must have shape {[*labels.shape]}, got {[*value.shape]}")
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs")
    if config.tis_cap > 0 and sampling_logprobs is None:
        raise ValueError("tis_cap > 0 needs sampling_logprobs")
    loss, logprobs, names, *values = LinearPolicyLoss.apply(
        hidden,
        weight,
        labels,
        advantages,
        loss_weights,
        _expand_temperature(temperature, hidden),
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        config,
        chunk_bytes,
    )
    return loss, dict(zip(names, values, strict=True)) | {"logprobs": logprobs}


def loss_token_weights(
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    normalizer: Literal["grpo", "dapo", "dr_grpo"],
    num_loss_tokens: int,
    num_sequences: int,
    max_completion_tokens: int,
) -> Tensor:
    """The weight of each token so that a plain sum over all tokens is the normalised loss.

    grpo: 1 / (num_sequences · length of its sequence); dapo: 1 / num_loss_tokens;
    dr_grpo: 1 / (num_sequences · max_completion_tokens). All counts are global, over every
    micro-batch and rank, so that splitting the batch changes nothing.

    Args:
        loss_mask: [T] bool.
        cu_seqlens: [N+1] int, boundaries of the completions in T.
        num_loss_tokens, num_sequences: global counts, positive.

    Returns:
        [T] fp32, 0 where the mask is False.
    """
    mask = loss_mask.float()
    if normalizer == "dapo":
        return mask / num_loss_tokens
    if normalizer == "dr_grpo":
        return mask / (num_sequences * max_completion_tokens)
    lengths_N = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence_T = torch.repeat_interleave(
        torch.arange(len(lengths_N), device=mask.device), lengths_N.to(mask.device)
    )
    counts_N = mask.new_zeros(len(lengths_N)).index_add_(0, sequence_T, mask)
    return mask / (num_sequences * counts_N.clamp_min(1)[sequence_T])


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {[*hidden.shape]} and {[*weight.shape]}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{hidden.shape[0]}], got {labels.dtype} {[*labels.shape]}"
        )
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")


def _expand_temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if temperature.shape not in (torch.Size([]), hidden.shape[:1]):
            raise ValueError(
                f"temperature must be a scalar or [{hidden.shape[0]}], got {[*temperature.shape]}"
            )
        value = temperature
    else:
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        value = torch.tensor(temperature, dtype=wide)
    return value.to(device=hidden.device, dtype=wide).expand(hidden.shape[0])
