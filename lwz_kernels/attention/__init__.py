"""Causal attention over segments of packed tokens, differentiable in its log-sum-exp."""

from lwz_kernels.attention.api import attention, attention_bwd, attention_fwd, resolve_impl
from lwz_kernels.attention.segments import SegmentTable

__all__ = ["SegmentTable", "attention", "attention_bwd", "attention_fwd", "resolve_impl"]
