"""The torch.library operator of the linear layer for few rows: schema, implementation, fake.

Inference only: there is no backward. `impl` is already decided here.
"""

import torch
import torch.nn.functional as F

from lwz_kernels import native

__all__ = ["skinny_linear_op"]

torch.library.define(
    "lwz::skinny_linear",
    "(Tensor x, Tensor weight, Tensor? bias, ScalarType out_dtype, str impl) -> Tensor",
)
skinny_linear_op = torch.ops.lwz.skinny_linear.default


@torch.library.impl("lwz::skinny_linear", "default")
def _skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    if impl == "native":
        return native.linear(x, weight, bias, out_dtype=out_dtype)
    if x.dtype == weight.dtype == out_dtype:
        return F.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(out_dtype)
    return F.linear(x.to(out_dtype), weight.to(out_dtype), wide_bias)


@torch.library.register_fake("lwz::skinny_linear")
def _skinny_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    del bias, impl
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
