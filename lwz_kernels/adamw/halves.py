"""An fp32 master as the nearest bf16, which is a weight of the model, and 16 bits beside it."""

import torch
from torch import Tensor

__all__ = ["join_halves", "split_halves"]


def split_halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] as its nearest bf16 and the int16 that is missing: exact for finite values.

    Ties are rounded away from zero, so that the rest fits 16 bits.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    lower = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), lower


def join_halves(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 [n] that `split_halves` was given."""
    bits = upper.view(torch.int16).to(torch.int32)
    bits <<= 16
    bits += lower
    return bits.view(torch.float32)
