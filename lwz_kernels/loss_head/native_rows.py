"""The two passes over a chunk of logits in the native library: CPU, fp32 logits.

The semantics are those of `rows.py`. Every row is read from memory once in either pass, sums are
fp32 within a block of 2,048 columns and fp64 across blocks, and a row's bits depend on that row
alone: not on its neighbours, its position in the chunk, or the number of threads.
"""

import torch
from torch import Tensor

from lwz_kernels import native

__all__ = ["row_statistics", "write_dlogits_"]

OUT_DTYPES = (torch.float32, torch.bfloat16)


def row_statistics(
    logits_CV: Tensor,
    labels_C: Tensor,
    temperature_C: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """max, Σ exp(z − max), Σ exp(z − max)·(z − max) and z[label] of each row, [4, C].

    Raises:
        TypeError: other dtypes than fp32, or int64 for the labels.
        ValueError: logits that are not contiguous on the CPU, or without columns; row vectors that
            are not [C].
        RuntimeError: the native library is not available.
    """
    _check("row_statistics", logits_CV, labels_C, temperature_C)
    return native.row_statistics(
        logits_CV,
        labels_C.contiguous(),
        temperature_C.contiguous(),
        logit_scale=logit_scale,
        softcap=softcap,
    )


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
    """Overwrites the logits with dL/dlogits, fp32 or bf16 in the first half of each row's bytes.

    Raises:
        NotImplementedError: `out_dtype` is neither fp32 nor bf16.
        TypeError: other dtypes than fp32, or int64 for the labels.
        ValueError: logits that are not contiguous on the CPU, or without columns; row vectors that
            are not [C].
        RuntimeError: the native library is not available.
    """
    if out_dtype not in OUT_DTYPES:
        raise NotImplementedError(
            f'write_dlogits_: the native row pass writes fp32 or bf16, got {out_dtype}: use "torch"'
        )
    optional = [row for row in (dentropy_C, dlse_C) if row is not None]
    _check(
        "write_dlogits_",
        logits_CV,
        labels_C,
        temperature_C,
        lse_C,
        entropy_C,
        dlogprobs_C,
        *optional,
    )
    return native.write_dlogits_(
        logits_CV,
        labels_C.contiguous(),
        temperature_C.contiguous(),
        lse_C.contiguous(),
        entropy_C.contiguous(),
        dlogprobs_C.contiguous(),
        None if dentropy_C is None else dentropy_C.contiguous(),
        None if dlse_C is None else dlse_C.contiguous(),
        logit_scale=logit_scale,
        softcap=softcap,
        out_dtype=out_dtype,
    )


def _check(name: str, logits_CV: Tensor, labels_C: Tensor, *rows: Tensor) -> None:
    """The library takes raw pointers: what is wrong here would read or write foreign memory."""
    dtypes = [logits_CV.dtype, *(row.dtype for row in rows)]
    if any(dtype != torch.float32 for dtype in dtypes) or labels_C.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected fp32 tensors and int64 labels, "
            f"got {', '.join(map(str, dtypes))} and {labels_C.dtype}"
        )
    tensors = [logits_CV, labels_C, *rows]
    if logits_CV.ndim != 2 or not logits_CV.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous logits [C, V], "
            f"got {list(logits_CV.shape)} with strides {list(logits_CV.stride())}"
        )
    if any(tensor.device.type != "cpu" for tensor in tensors):
        devices = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"{name}: expected all tensors on cpu, got {devices}")
    if any(tensor.shape != logits_CV.shape[:1] for tensor in tensors[1:]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[1:])
        raise ValueError(f"{name}: expected [{logits_CV.shape[0]}] for each row, got {shapes}")
