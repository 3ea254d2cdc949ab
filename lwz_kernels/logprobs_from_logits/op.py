"""torch.library operators of logprobs_from_logits: one read of the logits, and one for dlogits.

Rows are worked through in chunks, so that logits of a narrow type are never widened as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.loss_head.checks import check_labels
from lwz_kernels.loss_head.chunks import balanced_slices, default_chunk_bytes
from lwz_kernels.loss_head.rows import RowPass, choose_rows, finish_statistics
from lwz_kernels.once_differentiable import register_once_differentiable

__all__ = ["logprobs_from_logits_op"]

torch.library.define(
    "lwz::logprobs_from_logits",
    "(Tensor logits, Tensor labels, Tensor temperature, float logit_scale, float? softcap, "
    "int ignore_index, str impl) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lwz::logprobs_from_logits_backward",
    "(Tensor dlogprobs, Tensor dentropy, Tensor dlse, Tensor entropy, Tensor lse, Tensor logits, "
    "Tensor labels, Tensor temperature, float logit_scale, float? softcap, int ignore_index, "
    "str impl) -> Tensor",
)
logprobs_from_logits_op = torch.ops.lwz.logprobs_from_logits.default
_backward_op = torch.ops.lwz.logprobs_from_logits_backward.default


@torch.library.impl("lwz::logprobs_from_logits", "default")
def _logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _row_pass(logits, logit_scale, softcap, impl)
    is_counted_T = labels != ignore_index
    check_labels(labels, is_counted_T, logits.shape[1])
    out_3T = logits.new_empty(3, logits.shape[0], dtype=wide_dtype(logits.dtype))
    for chunk in _slices(logits):
        wide_CV = logits[chunk].to(out_3T.dtype).contiguous()
        partials_4C = rows.statistics(wide_CV, labels[chunk], temperature[chunk])
        out_3T[:, chunk] = torch.stack(finish_statistics(partials_4C))
    out_3T.masked_fill_(~is_counted_T, 0.0)
    return out_3T[0].clone(), out_3T[1].clone(), out_3T[2].clone()


@torch.library.impl("lwz::logprobs_from_logits_backward", "default")
def _logprobs_from_logits_backward(
    dlogprobs: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    entropy: Tensor,
    lse: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> Tensor:
    rows = _row_pass(logits, logit_scale, softcap, impl)
    wide = wide_dtype(logits.dtype)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for chunk in _slices(logits):
        dlogits_CV = dlogits[chunk]
        if wide == logits.dtype:
            dlogits_CV.copy_(logits[chunk])
            wide_CV = dlogits_CV
        else:
            wide_CV = logits[chunk].to(wide).contiguous()
        rows.write_dlogits_(
            wide_CV,
            labels[chunk],
            temperature[chunk],
            lse[chunk],
            entropy[chunk],
            dlogprobs[chunk],
            dentropy[chunk],
            dlse[chunk],
            out_dtype=wide,
        )
        if wide != logits.dtype:
            dlogits_CV.copy_(wide_CV)
    return dlogits.masked_fill_((labels == ignore_index)[:, None], 0.0)


def _row_pass(logits: Tensor, logit_scale: float, softcap: float | None, impl: str) -> RowPass:
    chosen = choose_rows("logprobs_from_logits", impl, logits.device, logits.dtype)
    return RowPass(chosen, logit_scale, softcap)


def _slices(logits: Tensor) -> list[slice]:
    row_bytes = logits.shape[1] * wide_dtype(logits.dtype).itemsize
    return balanced_slices(logits.shape[0], row_bytes, default_chunk_bytes(logits.device))


@torch.library.register_fake("lwz::logprobs_from_logits")
def _logprobs_from_logits_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(logits.dtype)
    logprobs, entropy, lse = (logits.new_empty(logits.shape[0], dtype=wide) for _ in range(3))
    return logprobs, entropy, lse


@torch.library.register_fake("lwz::logprobs_from_logits_backward")
def _logprobs_from_logits_backward_fake(
    dlogprobs: Tensor, dentropy: Tensor, dlse: Tensor, entropy: Tensor, lse: Tensor, *rest: Any
) -> Tensor:
    del dlogprobs, dentropy, dlse, entropy, lse
    return torch.empty_like(rest[0], memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperature, *options = inputs
    ctx.save_for_backward(output[1], output[2], logits, labels, temperature)
    ctx.options = options


def _autograd(
    ctx: Any, dlogprobs: Tensor, dentropy: Tensor, dlse: Tensor
) -> tuple[Tensor | None, ...]:
    dlogits = _backward_op(dlogprobs, dentropy, dlse, *ctx.saved_tensors, *ctx.options)
    return dlogits, *(None,) * 6


torch.library.register_autograd(
    "lwz::logprobs_from_logits", _autograd, setup_context=_setup_context
)
register_once_differentiable("lwz::logprobs_from_logits_backward")
