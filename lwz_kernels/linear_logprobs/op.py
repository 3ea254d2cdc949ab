"""torch.library operators of linear_logprobs: schema, chunked implementation, fake, autograd.

Saves O(T); backward recomputes one chunk of logits at a time: four matrix products in all.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.loss_head.checks import check_labels, without_autocast
from lwz_kernels.loss_head.head import LossHead
from lwz_kernels.loss_head.rows import RowPass, choose_rows
from lwz_kernels.once_differentiable import register_once_differentiable

__all__ = ["HeadOptions", "ShardedLinearLogprobs", "linear_logprobs_op"]

torch.library.define(
    "lwz::linear_logprobs",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor temperature, "
    "float logit_scale, float? softcap, int ignore_index, int chunk_bytes, str impl) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lwz::linear_logprobs_backward",
    "(Tensor dlogprobs, Tensor dentropy, Tensor dlse, Tensor hidden, Tensor weight, "
    "Tensor labels, Tensor? bias, Tensor temperature, float logit_scale, float? softcap, "
    "int ignore_index, int chunk_bytes, str impl, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
linear_logprobs_op = torch.ops.lwz.linear_logprobs.default
_backward_op = torch.ops.lwz.linear_logprobs_backward.default


class HeadOptions(NamedTuple):
    """What is no tensor, in the order of the operators' schemas."""

    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_bytes: int
    impl: str


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    options: HeadOptions,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = _head(weight, bias, options, tp_group)
    active = _active_rows(labels, options.ignore_index, head.vocab_size)
    out_3T = torch.zeros(3, hidden.shape[0], dtype=head.wide, device=hidden.device)
    if options.impl == "fused":
        from lwz_kernels.linear_logprobs.kernels import linear_logprobs_fwd

        out_3T[:, active] = torch.stack(
            linear_logprobs_fwd(
                hidden[active],
                weight,
                labels[active],
                temperature[active],
                bias,
                logit_scale=options.logit_scale,
                softcap=options.softcap,
            )
        )
        return out_3T[0].clone(), out_3T[1].clone(), out_3T[2].clone()

    def score(chunk: slice) -> None:
        rows = active[chunk]
        out_3T[:, rows] = head.score(hidden[rows], labels[rows], temperature[rows])

    head.for_each_chunk(len(active), score)
    return out_3T[0].clone(), out_3T[1].clone(), out_3T[2].clone()


def _backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    options: HeadOptions,
    needs: tuple[bool, bool, bool],
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None where nobody needs them."""
    head = _head(weight, bias, options, tp_group)
    active = _active_rows(labels, options.ignore_index, head.vocab_size)
    is_whole = len(active) == len(labels)
    hidden_AD = hidden if is_whole else hidden[active]
    gradients = head.new_gradients(hidden_AD, needs)

    def add_chunk(chunk: slice) -> None:
        rows = active[chunk]
        stats = head.statistics(hidden_AD[chunk], labels[rows], temperature[rows])
        head.add_gradients(
            gradients, chunk, hidden_AD[chunk], stats, dlogprobs[rows], dentropy[rows], dlse[rows]
        )

    head.for_each_chunk(len(active), add_chunk)
    dhidden, dweight, dbias = gradients.dhidden_TD, gradients.dweight_VD, gradients.dbias_V
    if dhidden is not None and not is_whole:
        dhidden = torch.zeros_like(hidden).index_copy_(0, active, dhidden)
    return (
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(hidden):
        return _forward(hidden, weight, labels, bias, temperature, HeadOptions(*options))


def _backward_op_impl(*arguments: Any) -> tuple[Tensor, ...]:
    dlogprobs, dentropy, dlse, hidden, weight, labels, bias, temperature, *rest = arguments
    *options, needs = rest
    with without_autocast(hidden):
        found = _backward(
            dlogprobs,
            dentropy,
            dlse,
            hidden,
            weight,
            labels,
            bias,
            temperature,
            HeadOptions(*options),
            tuple(needs),
        )
    return tuple(hidden.new_empty(0) if value is None else value for value in found)


torch.library.impl("lwz::linear_logprobs", "default", _forward_op)
torch.library.impl("lwz::linear_logprobs_backward", "default", _backward_op_impl)


@torch.library.register_fake("lwz::linear_logprobs")
def _linear_logprobs_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(hidden.dtype)
    logprobs, entropy, lse = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
    return logprobs, entropy, lse


@torch.library.register_fake("lwz::linear_logprobs_backward")
def _linear_logprobs_backward_fake(
    dlogprobs: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_bytes: int,
    impl: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    del dlogprobs, dentropy, dlse, labels, temperature, logit_scale, softcap
    del ignore_index, chunk_bytes, impl
    empty = hidden.new_empty(0)
    return (
        torch.empty_like(hidden) if needs[0] else empty,
        torch.empty_like(weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    hidden, weight, labels, bias, temperature, *options = inputs
    ctx.save_for_backward(hidden, weight, labels, bias, temperature)
    ctx.options = options


def _needs(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]


def _autograd(
    ctx: Any, dlogprobs: Tensor, dentropy: Tensor, dlse: Tensor
) -> tuple[Tensor | None, ...]:
    needs = _needs(ctx)
    gradients = _backward_op(dlogprobs, dentropy, dlse, *ctx.saved_tensors, *ctx.options, needs)
    dhidden, dweight, dbias = (
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    )
    return dhidden, dweight, None, dbias, *(None,) * 6


torch.library.register_autograd("lwz::linear_logprobs", _autograd, setup_context=_setup_context)
register_once_differentiable("lwz::linear_logprobs_backward")


class ShardedLinearLogprobs(torch.autograd.Function):
    """The same over a vocabulary split across a process group, which no schema can carry."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        temperature: Tensor,
        options: HeadOptions,
        tp_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, labels, bias, temperature)
        ctx.options, ctx.tp_group = options, tp_group
        with without_autocast(hidden):
            return _forward(hidden, weight, labels, bias, temperature, options, tp_group)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor, dentropy: Tensor, dlse: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, bias, temperature = ctx.saved_tensors
        needs_dhidden, needs_dweight, needs_dbias = _needs(ctx)
        with without_autocast(dlogprobs):
            dhidden, dweight, dbias = _backward(
                dlogprobs,
                dentropy,
                dlse,
                hidden,
                weight,
                labels,
                bias,
                temperature,
                ctx.options,
                (needs_dhidden, needs_dweight, needs_dbias),
                ctx.tp_group,
            )
        return dhidden, dweight, None, dbias, None, None, None


def _head(
    weight: Tensor, bias: Tensor | None, options: HeadOptions, tp_group: dist.ProcessGroup | None
) -> LossHead:
    impl = "triton" if options.impl == "fused" else options.impl
    chosen = choose_rows("linear_logprobs", impl, weight.device, weight.dtype)
    rows = RowPass(chosen, options.logit_scale, options.softcap)
    return LossHead(weight, bias, rows, chunk_bytes=options.chunk_bytes, tp_group=tp_group)


def _active_rows(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """Indices of the rows that count: the others cost nothing. One host sync on CUDA."""
    counts = labels != ignore_index
    check_labels(labels, counts, vocab_size)
    return torch.nonzero(counts).squeeze(1)
