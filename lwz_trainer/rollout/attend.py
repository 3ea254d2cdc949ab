"""The two ways in which the decoder attends while sampling, both writing the paged cache."""

from dataclasses import dataclass

from torch import Tensor

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.paged_attention import paged_attention, store_kv
from lwz_trainer.rollout.kv_cache import PagedKVCache

__all__ = ["DecodeAttend", "PrefillAttend"]


@dataclass(frozen=True)
class PrefillAttend:
    """Packed causal attention over whole prompts; their keys and values go into the cache."""

    cache: PagedKVCache
    plan: SegmentTable
    slots_T: Tensor

    def __call__(self, layer: int, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor) -> Tensor:
        store_kv(k_TJK, v_TJK, *self.cache.layer(layer), self.slots_T)
        return attention(q_THK, k_TJK, v_TJK, segments=self.plan)[0]


@dataclass(frozen=True)
class DecodeAttend:
    """One new token for each running sequence, attending to its pages."""

    cache: PagedKVCache
    page_table_BP: Tensor
    context_lens_B: Tensor
    slots_B: Tensor

    def __call__(self, layer: int, q_BHK: Tensor, k_BJK: Tensor, v_BJK: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer)
        store_kv(k_BJK, v_BJK, keys, values, self.slots_B)
        return paged_attention(q_BHK, keys, values, self.page_table_BP, self.context_lens_B)
