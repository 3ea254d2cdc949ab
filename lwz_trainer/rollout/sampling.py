"""Random tokens that depend on (seed, step, sample, position) and on nothing else.

One uniform a token, from a counter-based hash, is turned into a token by the inverse of the
cumulative distribution: no generator state, so a sample is the same in any batch and after any
restart. The hash is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), in int64 arithmetic
that wraps the same way on every device.
"""

import torch
from torch import Tensor

__all__ = ["keyed_uniforms", "sample_keys", "sample_tokens", "uniforms_at"]

BLOCK = 256
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def keyed_uniforms(seed: int, step: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Uniforms in (0, 1), fp64 [B], one for each (sample, position), both int64 [B]."""
    return uniforms_at(sample_keys(seed, step, samples), positions)


def sample_keys(seed: int, step: int, samples: Tensor) -> Tensor:
    """Int64 [B]: what (seed, step, sample) make of the key, for all positions of a sample."""
    key = _mix(torch.full_like(samples, seed))
    for part in (torch.full_like(samples, step), samples):
        key = _mix(key + (part + 1) * GOLDEN)
    return key


def uniforms_at(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniforms in (0, 1), fp64 [B], of `sample_keys` at these positions, int64 [B]."""
    key = _mix(keys + (positions + 1) * GOLDEN)
    return (_shift_right(key, 11).double() + 0.5) * 2.0**-53


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draws one token a row and its log-prob under the distribution that it was drawn from.

    Args:
        logits: [B, V] fp32; overwritten.
        uniforms: [B] fp64 in (0, 1).
        temperature: above 0, divides the logits.
        top_p, top_k: truncation; the log-probs are of the renormalised distribution.

    Returns:
        tokens [B] int64, logprobs [B] fp32, natural log.
    """
    logits_BV = logits.div_(temperature) if temperature != 1 else logits
    if top_k > 0 or top_p < 1:
        _truncate(logits_BV, top_p=top_p, top_k=top_k)
    mass_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()
    pad = -mass_BV.shape[1] % BLOCK
    if pad:
        mass_BV = torch.nn.functional.pad(mass_BV, (0, pad))
    blocks_BCS = mass_BV.view(len(mass_BV), -1, BLOCK)

    # Two levels, so that no [B, V] cumulative sum is needed: first the block, then the token in it.
    cumulative_BC = blocks_BCS.sum(-1).double().cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    target_B1 = uniforms[:, None] * total_B1
    block_B1 = torch.searchsorted(cumulative_BC, target_B1, right=True)
    block_B1.clamp_(max=cumulative_BC.shape[1] - 1)
    before_B1 = torch.where(block_B1 > 0, cumulative_BC.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    mass_BS = blocks_BCS.gather(1, block_B1[:, :, None].expand(-1, 1, BLOCK)).squeeze(1)
    offset_B1 = torch.searchsorted(mass_BS.double().cumsum(-1), target_B1 - before_B1, right=True)
    # Rounding may push the target past the block's mass: the last token that can be drawn is meant.
    columns = torch.arange(BLOCK, device=mass_BS.device)
    last_B1 = torch.where(mass_BS > 0, columns, 0).amax(-1, keepdim=True)
    offset_B1 = torch.minimum(offset_B1, last_B1)
    logprobs_B = (mass_BS.gather(1, offset_B1) / total_B1).log().float().squeeze(1)
    return (block_B1 * BLOCK + offset_B1).squeeze(1), logprobs_B


def _truncate(logits_BV: Tensor, *, top_p: float, top_k: int) -> None:
    """Sets logits outside the top k, then outside the nucleus, to −inf; the best one stays."""
    vocab_size = logits_BV.shape[1]
    if 0 < top_k < vocab_size:
        threshold_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV.masked_fill_(logits_BV < threshold_B1, float("-inf"))
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(-1)
        outside_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
        logits_BV.masked_fill_(
            torch.zeros_like(outside_BV).scatter_(1, order_BV, outside_BV), float("-inf")
        )


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * MIX_1
    value = (value ^ _shift_right(value, 27)) * MIX_2
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical, not arithmetic, right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
