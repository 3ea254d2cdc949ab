"""Public contract of linear_logprobs: validation and dispatch."""

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.linear_logprobs.op import HeadOptions, ShardedLinearLogprobs, linear_logprobs_op
from lwz_kernels.linear_logprobs.reference import linear_logprobs_reference
from lwz_kernels.loss_head.checks import (
    check_head,
    check_softcap,
    expand_temperature,
    whole_weight,
)
from lwz_kernels.loss_head.chunks import default_chunk_bytes

__all__ = ["linear_logprobs"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each label, entropy and log-sum-exp of softmax(hidden @ weight.T / temperature).

        z = softcap · tanh(logit_scale · (hidden @ weight.T + bias) / softcap) / temperature
        logprobs = z[label] − lse,  lse = log Σ exp z,  entropy = −Σ p log p,  p = exp(z − lse)

    Args:
        hidden: [T, D] floating point.
        weight: [V, D] head, same dtype and device; a sharded DTensor is gathered once.
        labels: [T] int64 in [0, V), or ignore_index: such rows cost nothing and give 0.
        bias: [V].
        temperature: scalar or [T], positive; divides the logits before the log-softmax.
        softcap: positive; logits become softcap · tanh(logits / softcap).
        logit_scale: multiplies the logits first.
        tp_group: ranks that hold consecutive parts of the vocabulary, in rank order.
        chunk_bytes: size of one fp32 chunk of logits (1.25 GB on CUDA, 64 MiB on a CPU).
        impl: "auto", "triton" (CUDA), "native" (CPU), "torch" (any), "reference" (all logits), or
            "fused" (CUDA, no gradients): one kernel that never writes a logit. It rounds
            differently from the others, so a ratio of its log-probs to theirs is not exactly 1.

    Returns:
        logprobs, entropy, lse: [T] fp32 (fp64 for fp64 input), all differentiable in hidden, weight
        and bias.

    Numerics: fp32 logits and row statistics, natural log, fp32 dW over all chunks, dH rounded once;
    deterministic on one device and thread count. Four matrix products with gradients, one without.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label out of range, a temperature
            that is not positive, an `impl` that cannot run here.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> logprobs, entropy, lse = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
        >>> bool(torch.allclose(logprobs, -torch.log(torch.tensor(3.0))))
        True
    """
    weight = whole_weight(weight)
    check_head(hidden, weight, labels, bias, chunk_bytes)
    check_softcap(softcap)
    temperature_T = expand_temperature(temperature, hidden)
    if impl == "reference":
        if tp_group is not None:
            raise ValueError('impl="reference" takes no tp_group: use impl="torch"')
        return linear_logprobs_reference(
            hidden,
            weight,
            labels,
            bias=bias,
            temperature=temperature_T,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
        )
    if impl == "fused":
        _check_fused(hidden, weight, bias, tp_group)
    options = HeadOptions(
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        chunk_bytes or default_chunk_bytes(hidden.device),
        impl,
    )
    if tp_group is not None:
        return ShardedLinearLogprobs.apply(
            hidden, weight, labels, bias, temperature_T, options, tp_group
        )
    return linear_logprobs_op(hidden, weight, labels, bias, temperature_T, *options)


def _check_fused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tp_group: dist.ProcessGroup | None
) -> None:
    if not hidden.is_cuda or hidden.dtype == torch.float64:
        raise ValueError(
            f'linear_logprobs: impl="fused" needs fp32, bf16 or fp16 CUDA tensors, '
            f"got {hidden.dtype} on {hidden.device.type}"
        )
    if tp_group is not None:
        raise ValueError('linear_logprobs: impl="fused" takes no tp_group: use impl="triton"')
    needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if torch.is_grad_enabled() and needs_grad:
        raise ValueError(
            'linear_logprobs: impl="fused" has no backward: use torch.no_grad() or impl="auto"'
        )
