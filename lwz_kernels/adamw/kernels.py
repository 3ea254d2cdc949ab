"""AdamW in Triton: one pass over weights, gradient and moments, addressed in 64 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwz_kernels.adamw.factors import Factors

__all__ = ["adamw_triton_"]

_BLOCK = 1024


def adamw_triton_(
    weights: Tensor,
    lower: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    by: Factors,
) -> None:
    """In place; arguments as in the public function."""
    size = weights.numel()
    if size == 0:
        return
    with torch.cuda.device_of(weights):
        adamw_kernel[(triton.cdiv(size, _BLOCK),)](
            weights if lower is None else weights.view(torch.int16),
            lower,
            grad,
            exp_avg,
            exp_avg_sq,
            size,
            by.grad_scale,
            1 - by.beta1,
            by.beta2,
            1 - by.beta2,
            by.decay,
            by.step_size,
            by.inverse_correction,
            by.eps,
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["grad_scale", "decay", "step_size", "inverse_correction"])
def adamw_kernel(
    p_weights,
    p_lower,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    size,
    grad_scale,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    decay,
    step_size,
    inverse_correction,
    eps,
    BLOCK: tl.constexpr,
):
    """BLOCK elements; without p_lower, p_weights holds fp32, else upper halves as int16."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < size
    b_g = tl.load(p_grad + o_n, mask=m_n, other=0.0) * grad_scale  # [B]
    b_m = tl.load(p_exp_avg + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_v = tl.load(p_exp_avg_sq + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_m += (b_g - b_m) * one_minus_beta1
    b_v = b_v * beta2 + b_g * b_g * one_minus_beta2
    tl.store(p_exp_avg + o_n, b_m.to(p_exp_avg.dtype.element_ty), mask=m_n)
    tl.store(p_exp_avg_sq + o_n, b_v.to(p_exp_avg_sq.dtype.element_ty), mask=m_n)
    b_change = tl.div_rn(b_m * step_size, tl.sqrt_rn(b_v) * inverse_correction + eps)
    b_weights = tl.load(p_weights + o_n, mask=m_n, other=0)
    if p_lower is None:
        tl.store(p_weights + o_n, b_weights * decay - b_change, mask=m_n)
    else:
        b_lower = tl.load(p_lower + o_n, mask=m_n, other=0).to(tl.int32)
        b_bits = (b_weights.to(tl.int32) << 16) + b_lower
        b_master = b_bits.to(tl.float32, bitcast=True) * decay - b_change
        b_bits = b_master.to(tl.int32, bitcast=True)
        b_upper = (b_bits + 0x8000) >> 16
        tl.store(p_weights + o_n, b_upper.to(tl.int16), mask=m_n)
        tl.store(p_lower + o_n, (b_bits - (b_upper << 16)).to(tl.int16), mask=m_n)
