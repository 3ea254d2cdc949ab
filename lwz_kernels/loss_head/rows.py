"""Which implementation passes over a chunk of logits, and what its sums mean.

z = cap · tanh(logit_scale · x / cap) / temperature  (without cap: logit_scale · x / temperature)

One pass reduces a row to four numbers, from which the log-prob, the entropy and the log-sum-exp
follow; shards of a vocabulary are merged through the same four numbers. The other turns the logits
into their gradient in place. Natural log; a row's result does not depend on its neighbours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.dispatch import log_choice_once
from lwz_kernels.loss_head import torch_rows

__all__ = ["RowImpl", "RowPass", "choose_rows", "finish_statistics", "merge_partials"]

RowImpl = Literal["triton", "native", "torch"]


@dataclass(frozen=True)
class RowPass:
    """Both passes of one implementation with one transform of the logits."""

    impl: RowImpl
    logit_scale: float = 1.0
    softcap: float | None = None

    def statistics(self, logits_CV: Tensor, labels_C: Tensor, temperature_C: Tensor) -> Tensor:
        """max, Σ exp(z − max), Σ exp(z − max)·(z − max), z[label] (0 if it is not here): [4, C]."""
        return _module(self.impl).row_statistics(
            logits_CV, labels_C, temperature_C, logit_scale=self.logit_scale, softcap=self.softcap
        )

    def write_dlogits_(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        temperature_C: Tensor,
        lse_C: Tensor,
        entropy_C: Tensor,
        dlogprobs_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        *,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Overwrites x with dL/dx, as `out_dtype` in the storage of the logits: [C, V].

        dL/dz = dlogprob · (onehot − p) − dentropy · p · (log p + entropy) + dlse · p
        """
        return _module(self.impl).write_dlogits_(
            logits_CV,
            labels_C,
            temperature_C,
            lse_C,
            entropy_C,
            dlogprobs_C,
            dentropy_C,
            dlse_C,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            out_dtype=out_dtype,
        )


def choose_rows(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> RowImpl:
    """The row passes for an `impl` that a caller asked for.

    Raises:
        ValueError: `impl` cannot run on this device or dtype, or is unknown.
    """
    if impl == "triton":
        if device.type != "cuda":
            raise ValueError(f'{op}: impl="triton" needs CUDA tensors, got {device.type}')
        if dtype == torch.float64:
            raise ValueError(f'{op}: impl="triton" takes fp32, bf16 or fp16, use impl="torch"')
        return "triton"
    if impl == "native":
        if device.type != "cpu" or dtype == torch.float64:
            raise ValueError(
                f'{op}: impl="native" takes fp32, bf16 or fp16 CPU tensors, '
                f"got {dtype} on {device.type}"
            )
        if not native.is_available():
            raise ValueError(f'{op}: impl="native": {native.unavailable_reason()}')
        return "native"
    if impl == "torch":
        return "torch"
    if impl != "auto":
        raise ValueError(
            f'{op}: impl must be "auto", "triton", "native", "torch" or "reference", got "{impl}"'
        )
    chosen: RowImpl = "torch"
    if dtype != torch.float64:
        if device.type == "cuda":
            chosen = "triton"
        elif device.type == "cpu" and native.is_available():
            chosen = "native"
    log_choice_once(op, chosen, f"{dtype} on {device.type}")
    return chosen


def merge_partials(partials_S4C: Tensor) -> Tensor:
    """One [4, C] from those of S vocabulary shards, in their order."""
    highest_SC = partials_S4C[:, 0]
    highest_C = highest_SC.amax(0)
    shift_SC = highest_SC - highest_C.masked_fill(highest_C == -torch.inf, 0.0)
    scale_SC = shift_SC.exp()
    sums_SC = partials_S4C[:, 1] * scale_SC
    # A shard without any finite logit has scale 0 and must not contribute 0 · −inf.
    moments_SC = partials_S4C[:, 2] * scale_SC + sums_SC * shift_SC.clamp(min=-1e4)
    return torch.stack([highest_C, sums_SC.sum(0), moments_SC.sum(0), partials_S4C[:, 3].sum(0)])


def finish_statistics(partials_4C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and lse [C] from the four sums of each row."""
    highest_C, sums_C, moments_C, label_z_C = partials_4C
    log_sum_C = sums_C.log()
    entropy_C = (log_sum_C - moments_C / sums_C).clamp(min=0.0)
    logprobs_C = ((label_z_C - highest_C) - log_sum_C).clamp(max=0.0)
    return logprobs_C, entropy_C, highest_C + log_sum_C


def _module(impl: RowImpl):
    if impl == "triton":
        from lwz_kernels.loss_head import triton_rows

        return triton_rows
    if impl == "native":
        from lwz_kernels.loss_head import native_rows

        return native_rows
    return torch_rows
