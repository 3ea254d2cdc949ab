"""Public contract of linear_policy_loss: validation and dispatch."""

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
from lwz_kernels.linear_policy_loss.op import (
    METRIC_NAMES,
    InPlacePolicyLoss,
    LossInputs,
    Placement,
    linear_policy_loss_op,
)
from lwz_kernels.linear_policy_loss.reference import linear_policy_loss_reference
from lwz_kernels.loss_head.checks import (
    check_head,
    check_softcap,
    expand_temperature,
    whole_weight,
)
from lwz_kernels.loss_head.chunks import default_chunk_bytes

__all__ = ["linear_policy_loss"]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None = None,
    sequence_loss_tokens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    policy_mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    weight_grad: Tensor | None = None,
    config: PolicyLossConfig | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss of packed tokens straight from hidden states, without [T, V] logits.

        loss = Σ_t w_t (policy term + kl_coef · KL_t) − entropy_coef · Σ_t H_t / num_loss_tokens

    The policy term and the token weights w_t are those of `config.loss_type`, see
    docs/ops/policy_loss.md. The sum over micro-batches and ranks is the loss of the whole batch,
    because all counts are global inputs.

    Args:
        hidden: [T, D] floating point, the rows that predict the labels.
        weight: [V, D] head, same dtype and device; a sharded DTensor is gathered once.
        labels: [T] int64 in [0, V), or ignore_index.
        advantages: [T] fp32.
        loss_mask: [T] bool, tokens that count.
        cu_seqlens: [N+1] int32 or int64, boundaries of the sequences among the T rows.
        num_loss_tokens: tokens that count in the whole batch: all micro-batches, all ranks.
        num_sequences: sequences in the whole batch; needed where the loss is a mean over sequences.
        sequence_loss_tokens: [N] tokens that count of each sequence, where `hidden` holds only a
            part of it (a sequence-parallel shard); counted from loss_mask by default.
        old_logprobs: [T] fp32; None means on-policy: the ratio is exactly 1, with gradient.
        ref_logprobs: [T] fp32, needed when config.kl_coef > 0.
        sampling_logprobs: [T] fp32 of the rollout engine; needed by config.sampler_correction,
            else for metrics only.
        policy_mask: [T] bool; False takes a token out of the policy term and the entropy bonus, but
            not out of the KL term or the counts.
        bias: [V].
        temperature: scalar or [T]; divides the logits before the log-softmax.
        softcap: positive; logits become softcap · tanh(logits / softcap).
        logit_scale: multiplies the logits first.
        ignore_index: label of rows that do not count.
        tp_group: ranks that hold consecutive parts of the vocabulary, in rank order; hidden is the
            same on all, the loss too, and dhidden is summed over them.
        sequence_group: ranks that hold the other tokens of these sequences, where
            sequence_loss_tokens is given; needed by losses that compare whole sequences.
        weight_grad: [V, D] fp32 buffer that dW is added to in forward; `weight` then gets no
            gradient of its own, and the upstream gradient must be 1.
        config: which loss; GRPO by default.
        chunk_bytes: size of one fp32 chunk of logits (1.25 GB on CUDA, 64 MiB on a CPU).
        impl: "auto", "triton" (CUDA), "native" (CPU), "torch" (any), "reference" (all logits).

    Returns:
        loss: fp32 scalar. Its upstream gradient is applied on the device.
        metrics: detached device scalars, sums (``*_sum``) and maxima (``*_max``) over the tokens
            that were scored, and ``logprobs``, ``entropy`` [T], 0 where a token was not. Tokens
            whose gradient is 0 from the start (masked; advantage 0 without KL or entropy terms)
            are not scored and cost nothing.

    Numerics: fp32 logits and row statistics, natural log, fp32 dW over all chunks, dH rounded once;
    deterministic on one device and thread count. fp64 inputs stay fp64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a missing tensor that `config` needs,
            a label out of range, an `impl` that cannot run here.
        RuntimeError: a second backward, or an upstream gradient other than 1, with weight_grad.

    Example:
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
        >>> loss, metrics = linear_policy_loss(
        ...     hidden, weight, torch.tensor([1, 2, 3, 4, 5]), torch.ones(5),
        ...     torch.ones(5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 2, 5]),
        ...     num_loss_tokens=5, config=PolicyLossConfig(loss_type="dapo"))
        >>> loss.backward()
        >>> int(metrics["num_tokens_sum"])
        5
    """
    config = config or PolicyLossConfig()
    weight = whole_weight(weight)
    check_head(hidden, weight, labels, bias, chunk_bytes)
    rows = {
        "advantages": advantages,
        "loss_mask": loss_mask,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "policy_mask": policy_mask,
    }
    _check_rows(rows, labels)
    _check_counts(cu_seqlens, labels, num_loss_tokens, num_sequences, sequence_loss_tokens, config)
    if sequence_group is not None and sequence_loss_tokens is None:
        raise ValueError(
            "sequence_group says that sequences are sharded: pass sequence_loss_tokens, the tokens "
            "that count of each whole sequence"
        )
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs")
    if config.sampler_correction is not None and sampling_logprobs is None:
        raise ValueError("sampler_correction needs sampling_logprobs")
    if weight_grad is not None:
        _check_weight_grad(weight_grad, weight)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ):
        _check_dtype(hidden)
    check_softcap(softcap)
    temperature_T = expand_temperature(temperature, hidden)
    is_in_place = any(value is not None for value in (tp_group, sequence_group, weight_grad))
    if impl == "reference":
        if is_in_place:
            raise ValueError(
                'impl="reference" takes no tp_group, sequence_group or weight_grad: use "torch"'
            )
        return linear_policy_loss_reference(
            hidden,
            weight,
            labels,
            advantages,
            loss_mask,
            cu_seqlens=cu_seqlens,
            num_loss_tokens=num_loss_tokens,
            num_sequences=num_sequences,
            sequence_loss_tokens=sequence_loss_tokens,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            sampling_logprobs=sampling_logprobs,
            policy_mask=policy_mask,
            bias=bias,
            temperature=temperature_T,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            config=config,
        )
    has_grad = torch.is_grad_enabled()
    inputs = LossInputs(
        bias=bias,
        labels=labels,
        advantages=advantages,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        num_loss_tokens=_as_count(num_loss_tokens, hidden),
        num_sequences=None if num_sequences is None else _as_count(num_sequences, hidden),
        sequence_loss_tokens=sequence_loss_tokens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        policy_mask=policy_mask,
        temperature=temperature_T,
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes or default_chunk_bytes(hidden.device),
        impl=impl,
        config=config.as_json,
        needs=[
            has_grad and tensor is not None and tensor.requires_grad
            for tensor in (hidden, weight, bias)
        ],
    )
    if is_in_place:
        where = Placement(weight_grad, tp_group, sequence_group)
        loss, logprobs, entropy, values = InPlacePolicyLoss.apply(
            hidden, weight, bias, inputs, where
        )
    else:
        loss, logprobs, entropy, values, *_ = linear_policy_loss_op(hidden, weight, *inputs)
    metrics = dict(zip(METRIC_NAMES, values.unbind(), strict=True))
    if ref_logprobs is None:
        del metrics["kl_sum"]
    if sampling_logprobs is None:
        for name in [n for n in metrics if "diff" in n or "importance" in n]:
            del metrics[name]
    return loss, metrics | {"logprobs": logprobs, "entropy": entropy}


def _check_rows(rows: dict[str, Tensor | None], labels: Tensor) -> None:
    for name, value in rows.items():
        if value is None:
            continue
        if value.shape != labels.shape:
            raise ValueError(f"{name} must have shape {[*labels.shape]}, got {[*value.shape]}")
        if name.endswith("mask") and value.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {value.dtype}")
        if value.device != labels.device:
            raise ValueError(f"{name} is on {value.device}, labels on {labels.device}")


def _check_counts(
    cu_seqlens: Tensor,
    labels: Tensor,
    num_loss_tokens: int | Tensor,
    num_sequences: int | Tensor | None,
    sequence_loss_tokens: Tensor | None,
    config: PolicyLossConfig,
) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [N+1], got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
        )
    if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != len(labels) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to {len(labels)} rows, got {first} to {last}"
            )
    for name, count in (("num_loss_tokens", num_loss_tokens), ("num_sequences", num_sequences)):
        if isinstance(count, int) and count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
        if isinstance(count, Tensor) and count.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got {[*count.shape]}")
    if config.loss_type == "dr_grpo" and config.max_completion_tokens is None:
        raise ValueError("loss_type='dr_grpo' divides by a constant: set max_completion_tokens")
    if sequence_loss_tokens is not None and len(sequence_loss_tokens) != len(cu_seqlens) - 1:
        raise ValueError(
            f"sequence_loss_tokens must be [{len(cu_seqlens) - 1}], "
            f"got {[*sequence_loss_tokens.shape]}"
        )


def _check_dtype(hidden: Tensor) -> None:
    """A GradScaler's factor comes with the upstream gradient, after these have been rounded."""
    if hidden.dtype == torch.float16:
        raise NotImplementedError(
            "linear_policy_loss: gradients are taken in forward, where in float16 they underflow "
            "before a GradScaler scales them: use bfloat16, or linear_logprobs and a loss of yours"
        )


def _check_weight_grad(weight_grad: Tensor, weight: Tensor) -> None:
    wide = wide_dtype(weight.dtype)
    if weight_grad.shape != weight.shape or weight_grad.dtype != wide:
        raise ValueError(
            f"weight_grad must be {wide} {[*weight.shape]}, "
            f"got {weight_grad.dtype} {[*weight_grad.shape]}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            "weight_grad was given, but weight does not require grad and nothing would be added: "
            "pass the weight itself, not a detached one, or leave weight_grad out"
        )


def _as_count(count: int | Tensor, like: Tensor) -> Tensor:
    wide = wide_dtype(like.dtype)
    if isinstance(count, Tensor):
        return count.to(device=like.device, dtype=wide)
    return torch.full((), count, dtype=wide, device=like.device)
