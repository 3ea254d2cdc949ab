"""Public contract of logprobs_from_logits: validation and dispatch."""

import torch
from torch import Tensor

from lwz_kernels.logprobs_from_logits.op import logprobs_from_logits_op
from lwz_kernels.logprobs_from_logits.reference import logprobs_from_logits_reference
from lwz_kernels.loss_head.checks import check_softcap, expand_temperature
from lwz_kernels.loss_head.chunks import default_chunk_bytes

__all__ = ["logprobs_from_logits"]


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label, entropy and log-sum-exp of softmax(logits / temperature).

        z = softcap · tanh(logit_scale · logits / softcap) / temperature
        logprobs = z[label] − lse,  lse = log Σ exp z,  entropy = −Σ p log p,  p = exp(z − lse)

    If the logits come from a linear head, `linear_logprobs` does without them.

    Args:
        logits: [..., V] floating point.
        labels: [...] int64 in [0, V), or ignore_index: such rows give 0.
        temperature: scalar or [...], positive.
        softcap: positive; logits become softcap · tanh(logits / softcap).
        logit_scale: multiplies the logits first.
        impl: "auto", "triton" (CUDA), "native" (CPU), "torch" (any) or "reference" (autograd).

    Returns:
        logprobs, entropy, lse: [...] fp32 (fp64 for fp64 input), all differentiable in the logits.

    Numerics: fp32 row statistics whatever the logits' type, natural log, deterministic. Backward
    writes dlogits in the logits' type and saves nothing of their size.

    Raises:
        ValueError: shapes, dtypes or a temperature that do not fit, a label out of range, an `impl`
            that cannot run here.

    Example:
        >>> logprobs, entropy, lse = logprobs_from_logits(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> bool(torch.allclose(entropy, torch.log(torch.tensor(4.0))))
        True
    """
    if logits.dim() < 1 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            "expected logits [..., V] and int64 labels [...], "
            f"got {[*logits.shape]} and {labels.dtype} {[*labels.shape]}"
        )
    if not logits.is_floating_point() or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be floating point with V > 0, got {logits.dtype} {[*logits.shape]}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}, logits on {logits.device}")
    check_softcap(softcap)
    of_rows: Tensor | None = None
    if isinstance(temperature, Tensor) and temperature.shape == labels.shape:
        of_rows = temperature
    if _would_copy_much(logits):
        parts = [
            logprobs_from_logits(
                part,
                labels[i],
                temperature=temperature if of_rows is None else of_rows[i],
                softcap=softcap,
                logit_scale=logit_scale,
                ignore_index=ignore_index,
                impl=impl,
            )
            for i, part in enumerate(logits.unbind())
        ]
        logprobs, entropy, lse = (torch.stack(values) for values in zip(*parts, strict=True))
        return logprobs, entropy, lse
    logits_TV, labels_T = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    temperature_T = expand_temperature(
        temperature if of_rows is None else of_rows.reshape(-1), logits_TV
    )
    if impl == "reference":
        results = logprobs_from_logits_reference(
            logits_TV,
            labels_T,
            temperature=temperature_T,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
        )
    else:
        results = logprobs_from_logits_op(
            logits_TV,
            labels_T,
            temperature_T,
            float(logit_scale),
            None if softcap is None else float(softcap),
            ignore_index,
            impl,
        )
    logprobs, entropy, lse = (value.view(labels.shape) for value in results)
    return logprobs, entropy, lse


def _would_copy_much(logits: Tensor) -> bool:
    """Whether all rows as one [T, V] take a copy of more than a chunk, as `logits[:, :-1]` does."""
    if logits.dim() < 3 or logits.is_contiguous():
        return False
    return logits.numel() * logits.element_size() > default_chunk_bytes(logits.device)
