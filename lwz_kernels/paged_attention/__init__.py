"""Attention of one query token per sequence over a paged key/value cache (decoding)."""

from lwz_kernels.paged_attention.api import paged_attention, store_kv

__all__ = ["paged_attention", "store_kv"]
