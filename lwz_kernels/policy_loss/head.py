"""The head's matmul with fp32 logits, shared by the losses and by samplers.

On CUDA bf16 operands accumulate and are written in fp32. A CPU has no such matmul, and logits
rounded to bf16 are off by up to 0.06 at magnitude 16, so the operands are widened there.
"""

import torch
from torch import Tensor

__all__ = ["head_operand", "matmul_wide"]


def head_operand(weight: Tensor) -> Tensor:
    """The weight as `matmul_wide` wants it: itself on CUDA, an fp32 copy (or itself) on a CPU."""
    return weight if weight.is_cuda or weight.dtype == torch.float64 else weight.float()


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and fp32 output (fp64 stays fp64)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.mm(a.to(wide), b.to(wide))
