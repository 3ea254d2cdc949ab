"""The data type in which sums of a data type are kept."""

import torch

__all__ = ["wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
