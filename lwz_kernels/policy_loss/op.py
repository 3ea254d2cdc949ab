"""Autograd functions: chunks of rows go through the head, and only [chunk, V] ever exists.

Numerics: operands keep their dtype, logits and all row statistics are fp32, natural log; dW is
accumulated over chunks in fp32, dH is rounded once. Gradient tensors overwrite, nothing accumulates
into a caller's buffer here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.policy_loss.head import head_operand, matmul_wide
from lwz_kernels.policy_loss.objective import PolicyLossConfig, token_objective

__all__ = ["LinearLogprobs", "LinearPolicyLoss"]


def _rows_per_chunk(vocab_size: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * vocab_size))


def _row_statistics(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-probs [C], entropy [C], lse [C] and probabilities, which take the logits' storage."""
    lse = torch.logsumexp(logits_CV, dim=-1)
    logprobs = logits_CV.gather(-1, labels_C[:, None]).squeeze(-1) - lse
    logits_CV -= lse[:, None]
    probs_CV = logits_CV.exp()
    # p = 0 with log p = −inf must give 0, not NaN.
    entropy = -torch.nan_to_num(probs_CV * logits_CV, nan=0.0).sum(-1)
    return logprobs.clamp(max=0.0), entropy, lse, probs_CV


def _dlogits(
    probs_CV: Tensor,
    labels_C: Tensor,
    dlogprobs_C: Tensor,
    dentropy_C: Tensor | None,
    entropy_C: Tensor,
    scale_C: Tensor,
) -> Tensor:
    """(g_logprob·(onehot − p) − g_entropy·p·(log p + H)) · scale, into the storage of probs."""
    if dentropy_C is None:
        grad_CV = probs_CV.mul_((-dlogprobs_C * scale_C)[:, None])
    else:
        inner = torch.log(probs_CV.clamp_min(torch.finfo(probs_CV.dtype).tiny)) + entropy_C[:, None]
        inner.mul_(dentropy_C[:, None]).add_(dlogprobs_C[:, None])
        grad_CV = probs_CV.mul_(inner).mul_(-scale_C[:, None])
    grad_CV.scatter_add_(1, labels_C[:, None], (dlogprobs_C * scale_C)[:, None])
    return grad_CV


class LinearLogprobs(torch.autograd.Function):
    """log-probs, entropy and lse of chosen tokens; saves O(R), recomputes chunks in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: Tensor,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows_per_chunk(weight.shape[0], chunk_bytes)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        out = torch.empty(3, hidden.shape[0], dtype=wide, device=hidden.device)
        head_VD = head_operand(weight)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits_CV = matmul_wide(hidden[chunk], head_VD.t()).div_(temperature[chunk, None])
            stats = _row_statistics(logits_CV, labels[chunk])
            for row, value in zip(out, stats[:3], strict=True):
                row[chunk] = value
        ctx.save_for_backward(hidden, weight, labels, temperature)
        ctx.rows = rows
        return out[0], out[1], out[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor, dentropy: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        hidden, weight, labels, temperature = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=dlogprobs.dtype)
        head_VD = head_operand(weight)
        for start in range(0, hidden.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits_CV = matmul_wide(hidden[chunk], head_VD.t()).div_(temperature[chunk, None])
            _, entropy, _, probs_CV = _row_statistics(logits_CV, labels[chunk])
            dlse_CV = probs_CV * (dlse[chunk] / temperature[chunk])[:, None]
            grad_CV = _dlogits(
                probs_CV,
                labels[chunk],
                dlogprobs[chunk],
                dentropy[chunk],
                entropy,
                1 / temperature[chunk],
            ).add_(dlse_CV)
            dhidden[chunk] = matmul_wide(grad_CV.to(weight.dtype), head_VD).to(hidden.dtype)
            dweight += matmul_wide(grad_CV.to(hidden.dtype).t(), hidden[chunk])
        return dhidden, dweight.to(weight.dtype), None, None, None


class LinearPolicyLoss(torch.autograd.Function):
    """The policy loss with gradients taken in forward: three matmuls a row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        advantages: Tensor,
        weights: Tensor,
        temperature: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        sampling_logprobs: Tensor | None,
        config: PolicyLossConfig,
        chunk_bytes: int,
    ) -> tuple[Any, ...]:
        rows = _rows_per_chunk(weight.shape[0], chunk_bytes)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head_VD = head_operand(weight)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        logprobs_R = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        metrics: dict[str, Tensor] = {}
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits_CV = matmul_wide(hidden[chunk], head_VD.t()).div_(temperature[chunk, None])
            logprobs, entropy, _, probs_CV = _row_statistics(logits_CV, labels[chunk])
            logprobs_R[chunk] = logprobs
            token_loss, dlogprobs, token_metrics = token_objective(
                logprobs,
                advantages[chunk],
                weights[chunk],
                old_logprobs=None if old_logprobs is None else old_logprobs[chunk],
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[chunk],
                sampling_logprobs=None if sampling_logprobs is None else sampling_logprobs[chunk],
                config=config,
            )
            token_metrics["entropy_sum"] = (entropy * (weights[chunk] > 0)).sum()
            loss += token_loss.sum() - config.entropy_coef * (entropy * weights[chunk]).sum()
            _merge_metrics(metrics, token_metrics)
            if dhidden is None and dweight is None:
                continue
            dentropy = -config.entropy_coef * weights[chunk] if config.entropy_coef > 0 else None
            grad_CV = _dlogits(
                probs_CV, labels[chunk], dlogprobs, dentropy, entropy, 1 / temperature[chunk]
            )
            if dhidden is not None:
                dhidden[chunk] = matmul_wide(grad_CV.to(weight.dtype), head_VD).to(hidden.dtype)
            if dweight is not None:
                if grad_CV.is_cuda:
                    dweight += matmul_wide(grad_CV.to(hidden.dtype).t(), hidden[chunk])
                else:
                    dweight.addmm_(grad_CV.t(), hidden[chunk].to(wide))
        ctx.gradients = (dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        names = sorted(metrics)
        ctx.mark_non_differentiable(logprobs_R, *(metrics[name] for name in names))
        return loss, logprobs_R, tuple(names), *(metrics[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradients can be taken once only")
        # Scaled in place and handed over: a second [V, D] buffer would double the head's memory.
        dhidden, dweight = ctx.gradients
        ctx.gradients = None
        if dhidden is not None:
            dhidden.mul_(dloss)
        if dweight is not None:
            dweight = dweight.mul_(dloss).to(ctx.weight_dtype)
        return dhidden, dweight, *(None,) * 9


def _merge_metrics(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
        if name not in total:
            total[name] = value.clone()
        elif name.endswith("_max"):
            total[name] = torch.maximum(total[name], value)
        else:
            total[name] += value
