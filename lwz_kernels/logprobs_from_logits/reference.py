"""Oracle of logprobs_from_logits: log_softmax and autograd."""

import torch
from torch import Tensor

__all__ = ["logprobs_from_logits_reference"]


def logprobs_from_logits_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, entropy and lse of logits [..., V], in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    scale = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_probs = torch.log_softmax(wide / scale, dim=-1)
    is_counted = labels != ignore_index
    logprobs = log_probs.gather(-1, labels.where(is_counted, 0)[..., None]).squeeze(-1)
    # p · log p is 0, and has no gradient, where p underflows.
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
    lse = torch.logsumexp(wide / scale, dim=-1)
    zero = torch.zeros_like(lse)
    return (
        torch.where(is_counted, logprobs, zero),
        torch.where(is_counted, entropy, zero),
        torch.where(is_counted, lse, zero),
    )
