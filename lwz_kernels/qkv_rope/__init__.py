"""Splits a fused query/key/value projection and rotates queries and keys by their positions."""

from lwz_kernels.qkv_rope.api import qkv_rope

__all__ = ["qkv_rope"]
