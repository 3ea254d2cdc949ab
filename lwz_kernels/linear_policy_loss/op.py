"""torch.library operator of linear_policy_loss: the loss and its gradients, both taken in forward.

A token-level objective knows a token's coefficient dL/dlogprob as soon as it has the row: logits,
dhidden and dweight are three matrix products. An objective over whole sequences gets its log-probs
from one more pass. Rows whose coefficient cannot be other than 0 never meet the head.
Backward scales what forward took; the upstream gradient is applied on the device.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.linear_policy_loss.config import PolicyLossConfig
from lwz_kernels.linear_policy_loss.objective import (
    ObjectiveRows,
    entropy_token_weights,
    is_token_level,
    loss_metrics,
    loss_token_weights,
    sequence_log_ratio,
    sequence_objective,
    token_level_rows,
    token_objective,
)
from lwz_kernels.loss_head.checks import check_labels, without_autocast
from lwz_kernels.loss_head.head import HeadGradients, LossHead
from lwz_kernels.loss_head.rows import RowPass, choose_rows

__all__ = [
    "METRIC_NAMES",
    "InPlacePolicyLoss",
    "LossInputs",
    "Placement",
    "linear_policy_loss_op",
]

METRIC_NAMES = (
    "clip_high_sum",
    "clip_low_sum",
    "entropy_sum",
    "importance_sq_sum",
    "importance_sum",
    "kl_sum",
    "logprob_diff_max",
    "logprob_diff_sum",
    "num_tokens_sum",
    "prob_diff_sum",
    "ratio_max",
    "ratio_sum",
)


class LossInputs(NamedTuple):
    """Everything but hidden and weight, in the order of the operator's schema."""

    bias: Tensor | None
    labels: Tensor
    advantages: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    num_loss_tokens: Tensor
    num_sequences: Tensor | None
    sequence_loss_tokens: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    policy_mask: Tensor | None
    temperature: Tensor
    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_bytes: int
    impl: str
    config: str
    needs: list[bool]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where results go and who else works on them: nothing that a functional operator carries."""

    weight_grad: Tensor | None = None
    """[V, D] buffer that dW is added to."""
    tp_group: dist.ProcessGroup | None = None
    """Ranks that share the vocabulary."""
    sequence_group: dist.ProcessGroup | None = None
    """Ranks that share the tokens of each sequence."""

    @property
    def sum_over_shards(self) -> Callable[[Tensor], Tensor] | None:
        """Completes sums over sequences; None where sequences are whole."""
        if self.sequence_group is None:
            return None
        return functools.partial(_all_reduce, group=self.sequence_group)


def _all_reduce(values: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(values, group=group)
    return values


torch.library.define(
    "lwz::linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor advantages, "
    "Tensor loss_mask, Tensor cu_seqlens, Tensor num_loss_tokens, Tensor? num_sequences, "
    "Tensor? sequence_loss_tokens, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? sampling_logprobs, Tensor? policy_mask, Tensor temperature, float logit_scale, "
    "float? softcap, int ignore_index, int chunk_bytes, str impl, str config, bool[] needs) "
    "-> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, Tensor dhidden, "
    "Tensor dweight, Tensor dbias)",
)
linear_policy_loss_op = torch.ops.lwz.linear_policy_loss.default


@functools.lru_cache(maxsize=64)
def _config_from_string(text: str) -> PolicyLossConfig:
    return PolicyLossConfig(**json.loads(text))


@torch.library.impl("lwz::linear_policy_loss", "default")
def _linear_policy_loss(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = LossInputs(*rest)
    with without_autocast(hidden):
        loss, logprobs, entropy, metrics, gradients = _run(hidden, weight, inputs, Placement())
    empty = [hidden.new_empty(0) for _ in range(3)]
    dhidden, dweight, dbias = (
        spare if found is None else found
        for found, spare in zip(vars(gradients).values(), empty, strict=True)
    )
    return loss, logprobs, entropy, metrics, dhidden, dweight, dbias


@torch.library.register_fake("lwz::linear_policy_loss")
def _linear_policy_loss_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = LossInputs(*rest)
    wide = wide_dtype(hidden.dtype)
    needs_dhidden, needs_dweight, needs_dbias = inputs.needs
    bias = inputs.bias
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(len(METRIC_NAMES), dtype=wide),
        torch.empty_like(hidden) if needs_dhidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if needs_dweight else hidden.new_empty(0),
        torch.empty_like(bias, dtype=wide)
        if needs_dbias and bias is not None
        else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)


def _autograd(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dhidden, dweight, dbias = ctx.saved_tensors
    weight_dtype, bias_dtype = ctx.dtypes
    needs_dhidden, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
    return (
        (dhidden * dloss).to(dhidden.dtype) if needs_dhidden else None,
        (dweight * dloss).to(weight_dtype) if needs_dweight else None,
        (dbias * dloss).to(bias_dtype) if needs_dbias else None,
        *(None,) * 19,
    )


torch.library.register_autograd("lwz::linear_policy_loss", _autograd, setup_context=_setup_context)


class InPlacePolicyLoss(torch.autograd.Function):
    """The same for what no functional operator can carry: a process group, a caller's buffer.

    Its gradients are scaled in place and handed over, so they can be taken once only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: LossInputs,
        where: Placement,
    ) -> tuple[Tensor, ...]:
        with without_autocast(hidden):
            loss, logprobs, entropy, metrics, gradients = _run(hidden, weight, inputs, where)
        if where.weight_grad is not None:
            gradients.dweight_VD = None
        ctx.gradients = gradients
        ctx.has_weight_grad = where.weight_grad is not None
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        return loss, logprobs, entropy, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradients can be taken once only")
        if ctx.has_weight_grad:
            _require_unit_gradient(dloss)
        gradients: HeadGradients = ctx.gradients
        ctx.gradients = None
        weight_dtype, bias_dtype = ctx.dtypes
        dhidden, dweight, dbias = gradients.dhidden_TD, gradients.dweight_VD, gradients.dbias_V
        return (
            None if dhidden is None else dhidden.mul_(dloss),
            None if dweight is None else dweight.mul_(dloss).to(weight_dtype),
            None if dbias is None else dbias.mul_(dloss).to(bias_dtype),
            None,
            None,
        )


def _require_unit_gradient(dloss: Tensor) -> None:
    """dW is already in the caller's buffer: nothing can scale it any more."""
    if dloss.is_cuda:
        torch._assert_async(dloss == 1)
    elif float(dloss) != 1:
        raise RuntimeError(
            f"weight_grad was filled for an upstream gradient of 1, got {float(dloss)}: "
            "scale through num_loss_tokens or the advantages, or leave weight_grad out"
        )


def _run(
    hidden: Tensor, weight: Tensor, inputs: LossInputs, where: Placement
) -> tuple[Tensor, Tensor, Tensor, Tensor, HeadGradients]:
    """loss, logprobs [T], entropy [T], metrics [M] and the gradients of the loss."""
    config = _config_from_string(inputs.config)
    impl = choose_rows("linear_policy_loss", inputs.impl, weight.device, weight.dtype)
    row_pass = RowPass(impl, inputs.logit_scale, inputs.softcap)
    head = LossHead(
        weight, inputs.bias, row_pass, chunk_bytes=inputs.chunk_bytes, tp_group=where.tp_group
    )
    mask_T = inputs.loss_mask & (inputs.labels != inputs.ignore_index)
    check_labels(inputs.labels, mask_T, head.vocab_size)
    rows_T = _objective_rows(inputs, mask_T, config, head.wide)
    entropy_weights_T = None
    if config.entropy_coef > 0:
        entropy_weights_T = entropy_token_weights(
            mask_T,
            inputs.policy_mask,
            config,
            num_loss_tokens=inputs.num_loss_tokens,
            dtype=head.wide,
        )
    work = _Work(hidden, inputs, head, entropy_weights_T)
    is_token = is_token_level(
        config,
        is_on_policy=inputs.old_logprobs is None,
        has_policy_mask=inputs.policy_mask is not None,
    )
    run = _run_tokens if is_token else _run_sequences
    loss, active, gradients = run(work, inputs, rows_T, mask_T, config, where)
    if entropy_weights_T is not None:
        loss = loss - (entropy_weights_T * work.entropy_T).sum()
    log_ratio_T = None
    if config.ratio_level == "sequence" and inputs.old_logprobs is not None:
        log_ratio_T = sequence_log_ratio(
            work.logprobs_T,
            inputs.old_logprobs.to(head.wide),
            mask_T,
            inputs.cu_seqlens,
            inputs.sequence_loss_tokens,
            sum_over_shards=where.sum_over_shards,
        )
    found = loss_metrics(
        work.logprobs_T[active],
        work.entropy_T[active],
        rows_T.select(active),
        config,
        log_ratio_R=None if log_ratio_T is None else log_ratio_T[active],
    )
    zero = loss.new_zeros(())
    metrics = torch.stack([found.get(name, zero).to(head.wide) for name in METRIC_NAMES])
    return loss, work.logprobs_T, work.entropy_T, metrics, gradients


def _run_tokens(
    work: "_Work",
    inputs: LossInputs,
    rows_T: ObjectiveRows,
    mask_T: Tensor,
    config: PolicyLossConfig,
    where: Placement,
) -> tuple[Tensor, Tensor, HeadGradients]:
    """One pass: a row's coefficient follows from its own log-prob."""
    rows_T = token_level_rows(
        rows_T,
        mask_T,
        inputs.cu_seqlens,
        config,
        inputs.sequence_loss_tokens,
        sum_over_shards=where.sum_over_shards,
    )
    active = _active_rows(rows_T, mask_T, config)
    rows = rows_T.select(active)
    gradients = work.take_gradients(
        active,
        where.weight_grad,
        lambda chunk, logprobs: token_objective(logprobs, rows.select(chunk), config)[1],
        fused=(rows, config),
    )
    return token_objective(work.logprobs_T[active], rows, config)[0].sum(), active, gradients


def _run_sequences(
    work: "_Work",
    inputs: LossInputs,
    rows_T: ObjectiveRows,
    mask_T: Tensor,
    config: PolicyLossConfig,
    where: Placement,
) -> tuple[Tensor, Tensor, HeadGradients]:
    """A pass for the log-probs of whole sequences, then one over the rows that have a gradient."""
    active = torch.nonzero(mask_T).squeeze(1)
    work.take_logprobs(active)
    loss_T, dlogprobs_T = sequence_objective(
        work.logprobs_T,
        rows_T,
        mask_T,
        inputs.cu_seqlens,
        config,
        inputs.sequence_loss_tokens,
        sum_over_shards=where.sum_over_shards,
    )
    is_needed_T = dlogprobs_T != 0
    if config.entropy_coef > 0:
        is_needed_T = is_needed_T | mask_T
    needed = torch.nonzero(is_needed_T).squeeze(1)
    coefficients = dlogprobs_T[needed]
    gradients = work.take_gradients(
        needed, where.weight_grad, lambda chunk, _: coefficients[chunk], fused=None
    )
    return loss_T.sum(), active, gradients


def _objective_rows(
    inputs: LossInputs, mask_T: Tensor, config: PolicyLossConfig, wide: torch.dtype
) -> ObjectiveRows:
    weights_T = loss_token_weights(
        mask_T,
        inputs.cu_seqlens,
        config,
        num_loss_tokens=inputs.num_loss_tokens,
        num_sequences=inputs.num_sequences,
        sequence_loss_tokens=inputs.sequence_loss_tokens,
        dtype=wide,
    )
    return ObjectiveRows(
        advantages=inputs.advantages.to(wide),
        weights=weights_T,
        policy_mask=inputs.policy_mask,
        old_logprobs=_to(inputs.old_logprobs, wide),
        ref_logprobs=_to(inputs.ref_logprobs, wide),
        sampling_logprobs=_to(inputs.sampling_logprobs, wide),
    )


class _Work:
    """The passes of one call over some of its rows, and what they found, [T]."""

    def __init__(
        self,
        hidden_TD: Tensor,
        inputs: LossInputs,
        head: LossHead,
        entropy_weights_T: Tensor | None,
    ) -> None:
        self._hidden_TD = hidden_TD
        self._labels_T = inputs.labels
        self._temperature_T = inputs.temperature
        self._head = head
        self._entropy_weights_T = entropy_weights_T
        self._needs = (inputs.needs[0], inputs.needs[1], inputs.needs[2])
        self.logprobs_T = torch.zeros(hidden_TD.shape[0], dtype=head.wide, device=hidden_TD.device)
        self.entropy_T = torch.zeros_like(self.logprobs_T)

    def take_logprobs(self, index: Tensor) -> None:
        """Log-probs and entropies of the rows in `index`."""

        def score(chunk: slice) -> None:
            rows = index[chunk]
            self.logprobs_T[rows], self.entropy_T[rows], _ = self._head.score(
                self._hidden_TD[rows], self._labels_T[rows], self._temperature_T[rows]
            )

        self._head.for_each_chunk(len(index), score)

    def take_gradients(
        self,
        index: Tensor,
        weight_grad: Tensor | None,
        coefficients: Callable[[slice, Tensor], Tensor],
        *,
        fused: tuple[ObjectiveRows, PolicyLossConfig] | None,
    ) -> HeadGradients:
        """Log-probs, entropies and gradients of the rows in `index`, chunk by chunk.

        Args:
            coefficients: dL/dlogprob of a chunk of `index` from that chunk's log-probs.
            fused: what the row kernel needs to find the coefficients by itself.
        """
        if not any(self._needs):
            self.take_logprobs(index)
            return HeadGradients(None, None, None)
        head = self._head
        is_whole = len(index) == len(self._hidden_TD)
        hidden_AD = self._hidden_TD if is_whole else self._hidden_TD[index]
        gradients = head.new_gradients(hidden_AD, self._needs, weight_grad)
        can_fuse = head.rows.impl == "triton" and not head.is_sharded

        def add_chunk(chunk: slice) -> None:
            rows, hidden_CD = index[chunk], hidden_AD[chunk]
            if fused is None or not can_fuse:
                self._add_chunk(gradients, chunk, rows, hidden_CD, coefficients)
                return
            objective, config = fused
            dlogits_CV = self._fused_dlogits(rows, hidden_CD, objective.select(chunk), config)
            head.add_products(gradients, chunk, hidden_CD, dlogits_CV)

        head.for_each_chunk(len(index), add_chunk)
        if gradients.dhidden_TD is not None and not is_whole:
            dhidden_TD = torch.zeros_like(self._hidden_TD)
            gradients.dhidden_TD = dhidden_TD.index_copy_(0, index, gradients.dhidden_TD)
        return gradients

    def _add_chunk(
        self,
        gradients: HeadGradients,
        chunk: slice,
        rows: Tensor,
        hidden_CD: Tensor,
        coefficients: Callable[[slice, Tensor], Tensor],
    ) -> None:
        """Statistics, coefficients and gradients of one chunk, in two row passes."""
        stats = self._head.statistics(hidden_CD, self._labels_T[rows], self._temperature_T[rows])
        self.logprobs_T[rows] = stats.logprobs_C
        self.entropy_T[rows] = stats.entropy_C
        dentropy_C = None
        if self._entropy_weights_T is not None:
            dentropy_C = -self._entropy_weights_T[rows]
        self._head.add_gradients(
            gradients, chunk, hidden_CD, stats, coefficients(chunk, stats.logprobs_C), dentropy_C
        )

    def _fused_dlogits(
        self, rows: Tensor, hidden_CD: Tensor, objective: ObjectiveRows, config: PolicyLossConfig
    ) -> Tensor:
        """dlogits of one chunk by the kernel that finds the coefficients by itself."""
        from lwz_kernels.linear_policy_loss.kernels import policy_loss_rows

        head, entropy_weights_T = self._head, self._entropy_weights_T
        dlogits_CV, self.logprobs_T[rows], self.entropy_T[rows], _, _ = policy_loss_rows(
            head.products.logits(hidden_CD),
            self._labels_T[rows],
            self._temperature_T[rows],
            None if entropy_weights_T is None else entropy_weights_T[rows],
            objective,
            config,
            logit_scale=head.rows.logit_scale,
            softcap=head.rows.softcap,
            out_dtype=head.products.dlogits_dtype,
        )
        return dlogits_CV


def _active_rows(rows_T: ObjectiveRows, mask_T: Tensor, config: PolicyLossConfig) -> Tensor:
    """Indices of the rows whose coefficient may differ from 0. One host sync on CUDA."""
    is_active_T = mask_T
    if config.kl_coef == 0 and config.entropy_coef == 0:
        is_active_T = is_active_T & (rows_T.advantages != 0)
        if rows_T.policy_mask is not None:
            is_active_T = is_active_T & rows_T.policy_mask
    return torch.nonzero(is_active_T).squeeze(1)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)
