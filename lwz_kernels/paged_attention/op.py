"""torch.library operators of paged attention: schema, implementations, fake kernels.

Inference only: neither operator has a backward. `impl` is already decided here.
"""

import torch

from lwz_kernels import native
from lwz_kernels.paged_attention import gathered

__all__ = ["paged_attention_op", "store_kv_op"]


@torch.library.custom_op("lwz::paged_attention", mutates_args=())
def paged_attention_op(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> torch.Tensor:
    """`impl` is "native" or "torch"; see `lwz_kernels.paged_attention.paged_attention`."""
    run = native.paged_attention if impl == "native" else gathered.paged_attention
    return run(q, k_cache, v_cache, page_table, context_lens, softmax_scale=softmax_scale)


@paged_attention_op.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> torch.Tensor:
    del k_cache, v_cache, page_table, context_lens, softmax_scale, impl
    return torch.empty_like(q)


@torch.library.custom_op("lwz::store_kv", mutates_args=("k_cache", "v_cache"))
def store_kv_op(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    impl: str,
) -> None:
    """`impl` is "native" or "torch"; see `lwz_kernels.paged_attention.store_kv`."""
    run = native.store_kv if impl == "native" else gathered.store_kv
    run(k, v, k_cache, v_cache, slot_mapping)


@store_kv_op.register_fake
def _(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    impl: str,
) -> None:
    del k, v, k_cache, v_cache, slot_mapping, impl
