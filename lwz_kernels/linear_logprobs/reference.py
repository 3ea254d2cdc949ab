"""Oracle of linear_logprobs: full logits, autograd, torch alone. Correct by reading, not fast."""

import torch
from torch import Tensor

__all__ = ["linear_logprobs_reference"]


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, entropy and lse [T] from materialised [T, V] logits, fp32 or wider."""
    logits_TV = hidden @ weight.t()
    if bias is not None:
        logits_TV = logits_TV + bias
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    scale = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_probs_TV = torch.log_softmax(logits_TV / scale, dim=-1)
    is_counted_T = labels != ignore_index
    index_T1 = labels.where(is_counted_T, 0)[:, None]
    logprobs_T = log_probs_TV.gather(-1, index_T1).squeeze(-1)
    # p · log p is 0, and has no gradient, where p underflows.
    entropy_T = -(log_probs_TV.exp() * log_probs_TV.clamp(min=-1e4)).sum(-1)
    lse_T = torch.logsumexp(logits_TV / scale, dim=-1)
    zero_T = torch.zeros_like(lse_T)
    return (
        torch.where(is_counted_T, logprobs_T, zero_T),
        torch.where(is_counted_T, entropy_T, zero_T),
        torch.where(is_counted_T, lse_T, zero_T),
    )
