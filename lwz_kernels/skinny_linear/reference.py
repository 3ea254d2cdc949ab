"""The linear layer as a plain matrix product: what correct means.

Computes in fp64 when the inputs are fp64, else in fp32; rounds once, to the output's type.
"""

import torch

__all__ = ["skinny_linear"]


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out_MN = x.to(compute_dtype) @ weight.to(compute_dtype).T
    if bias is not None:
        out_MN = out_MN + bias.to(compute_dtype)
    return out_MN.to(out_dtype)
