"""Packed causal attention in one kernel on a GPU: flash-attn if installed, else torch's varlen.

Both take fp16 and bf16, and neither knows shared prefixes.
"""

import functools
import importlib.util
import inspect
from typing import Any

import torch

from lwz_kernels.attention.plan import AttentionPlan

__all__ = ["DTYPES", "attention", "backend"]

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def backend() -> str:
    """Which library runs: "flash_attn" or "torch"."""
    return "flash_attn" if importlib.util.find_spec("flash_attn") is not None else "torch"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, *, softmax_scale: float
) -> torch.Tensor:
    """Same contract as the public function, after its checks, for plans without prefixes."""
    cu_seqlens = plan.cu_seqlens_on(q.device)
    max_seqlen = plan.max_seqlen
    if backend() == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=softmax_scale,
            causal=True,
        )
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups query heads by itself; later versions refuse unless told to.
    takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if takes_gqa else {}
    out = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=softmax_scale,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(out, torch.Tensor), "varlen_attn returns a pair only where lse is asked for"
    return out
