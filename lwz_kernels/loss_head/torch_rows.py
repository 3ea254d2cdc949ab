"""The two passes over a chunk of logits in plain torch: any device, any floating-point type.

A chunk is worked through in blocks of rows, so that temporaries stay small beside it.
"""

import torch
from torch import Tensor

__all__ = ["narrow_view", "row_statistics", "write_dlogits_"]

_BLOCK_BYTES = {"cpu": 1 << 20}
_DEFAULT_BLOCK_BYTES = 256 << 20


def row_statistics(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """max, Σ exp(z − max), Σ exp(z − max)·(z − max) and z[label] of each row, [4, C]."""
    partials_4C = logits_CV.new_empty(4, logits_CV.shape[0])
    for block in _row_blocks(logits_CV):
        z_CV, _ = _transform(logits_CV[block], temperature_C[block], logit_scale, softcap)
        partials_4C[3, block] = _pick(z_CV, labels_C[block])
        highest_C = z_CV.amax(-1)
        # A row without any finite logit keeps NaN out of the subtraction, and sums to 0.
        shift_C = highest_C.masked_fill(highest_C == -torch.inf, 0.0)
        z_CV.sub_(shift_C[:, None])
        exp_CV = z_CV.exp()
        partials_4C[0, block] = highest_C
        partials_4C[1, block] = exp_CV.sum(-1)
        partials_4C[2, block] = exp_CV.mul_(z_CV.clamp_(min=-1e4)).sum(-1)
    return partials_4C


def write_dlogits_(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    dlogprobs_C: Tensor,
    dentropy_C: Tensor | None,
    dlse_C: Tensor | None,
    *,
    logit_scale: float,
    softcap: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Overwrites the logits with dL/dlogits; see `rows.write_dlogits_`."""
    out_CV = narrow_view(logits_CV, out_dtype)
    for block in _row_blocks(logits_CV):
        z_CV, dtransform_CV = _transform(
            logits_CV[block], temperature_C[block], logit_scale, softcap
        )
        log_p_CV = z_CV.sub_(lse_C[block, None])
        p_CV = log_p_CV.exp()
        factor_C1 = -dlogprobs_C[block, None]
        if dlse_C is not None:
            factor_C1 = factor_C1 + dlse_C[block, None]
        if dentropy_C is not None:
            inner_CV = log_p_CV.clamp_(min=-1e4).add_(entropy_C[block, None])
            dz_CV = p_CV.mul_(inner_CV.mul_(-dentropy_C[block, None]).add_(factor_C1))
        else:
            dz_CV = p_CV.mul_(factor_C1)
        column_C1, is_here_C1 = _columns(labels_C[block], dz_CV.shape[1])
        dz_CV.scatter_add_(1, column_C1, dlogprobs_C[block, None] * is_here_C1)
        dz_CV.mul_((logit_scale / temperature_C[block])[:, None])
        if dtransform_CV is not None:
            dz_CV.mul_(dtransform_CV)
        out_CV[block] = dz_CV
    return out_CV


def narrow_view(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """The storage of the logits as [C, V] of a type at most as wide, each row where it was."""
    if dtype.itemsize > logits_CV.dtype.itemsize:
        raise ValueError(f"dlogits of {dtype} do not fit in place of {logits_CV.dtype} logits")
    return logits_CV.view(dtype)[:, : logits_CV.shape[1]]


def _transform(
    logits_CV: Tensor, temperature_C: Tensor, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """A copy of z, and d(capped)/d(scaled) where there is a cap."""
    if softcap is None:
        return logits_CV * (logit_scale / temperature_C)[:, None], None
    tanh_CV = torch.tanh(logits_CV * (logit_scale / softcap))
    z_CV = tanh_CV * (softcap / temperature_C)[:, None]
    return z_CV, 1 - tanh_CV.square()


def _columns(labels_C: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    is_here_C1 = ((labels_C >= 0) & (labels_C < vocab_size))[:, None]
    return labels_C.clamp(0, vocab_size - 1)[:, None], is_here_C1


def _pick(z_CV: Tensor, labels_C: Tensor) -> Tensor:
    column_C1, is_here_C1 = _columns(labels_C, z_CV.shape[1])
    picked_C1 = z_CV.gather(1, column_C1)
    return torch.where(is_here_C1, picked_C1, 0.0).squeeze(1)


def _row_blocks(logits_CV: Tensor) -> list[slice]:
    block_bytes = _BLOCK_BYTES.get(logits_CV.device.type, _DEFAULT_BLOCK_BYTES)
    rows = max(1, block_bytes // (logits_CV.shape[1] * logits_CV.element_size()))
    return [slice(start, start + rows) for start in range(0, logits_CV.shape[0], rows)]
