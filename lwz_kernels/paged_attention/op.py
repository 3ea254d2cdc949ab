"""torch.library operators of paged attention: schema, dispatch, fake kernels.

Inference only: neither operator has a backward.
Defined by schema rather than by `torch.library.custom_op`, whose wrapper costs more per call than
the kernel does for a short context (measured for `store_kv`: 50 against 12 microseconds).
"""

import torch

from lwz_kernels import native
from lwz_kernels.paged_attention import gathered
from lwz_kernels.paged_attention.choice import choose
from lwz_kernels.paged_attention.ranges import check_pages, check_slots

__all__ = ["paged_attention_op", "store_kv_op"]

torch.library.define(
    "lwz::paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor context_lens, "
    "float softmax_scale, str impl) -> Tensor",
)
torch.library.define(
    "lwz::store_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, str impl) "
    "-> ()",
)
paged_attention_op = torch.ops.lwz.paged_attention.default
store_kv_op = torch.ops.lwz.store_kv.default


@torch.library.impl("lwz::paged_attention", "default")
def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> torch.Tensor:
    tables = (page_table.contiguous(), context_lens.contiguous())
    chosen = choose("paged_attention", impl, q, q.shape[1] // k_cache.shape[2])
    if chosen == "triton":
        from lwz_kernels.paged_attention.kernels import paged_attention_triton

        return paged_attention_triton(q, k_cache, v_cache, *tables, softmax_scale=softmax_scale)
    q = q.contiguous()
    if chosen == "native":
        return native.paged_attention(q, k_cache, v_cache, *tables, softmax_scale=softmax_scale)
    check_pages(k_cache, *tables)
    return gathered.paged_attention(q, k_cache, v_cache, *tables, softmax_scale=softmax_scale)


@torch.library.impl("lwz::store_kv", "default")
def _store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    impl: str,
) -> None:
    slot_mapping = slot_mapping.contiguous()
    chosen = choose("store_kv", impl, k)
    if chosen == "triton":
        from lwz_kernels.paged_attention.kernels import store_kv_triton

        store_kv_triton(k, v, k_cache, v_cache, slot_mapping)
    elif chosen == "native":
        native.store_kv(k.contiguous(), v.contiguous(), k_cache, v_cache, slot_mapping)
    else:
        check_slots(k_cache, slot_mapping)
        gathered.store_kv(k, v, k_cache, v_cache, slot_mapping)


@torch.library.register_fake("lwz::paged_attention")
def _paged_attention_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> torch.Tensor:
    del k_cache, v_cache, page_table, context_lens, softmax_scale, impl
    return q.new_empty(q.shape)


@torch.library.register_fake("lwz::store_kv")
def _store_kv_fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    impl: str,
) -> None:
    del k, v, k_cache, v_cache, slot_mapping, impl
