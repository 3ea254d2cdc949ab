"""Causal attention over segments of packed tokens, differentiable in its log-sum-exp."""

from lwz_kernels.segment_attention.api import (
    segment_attention,
    segment_attention_bwd,
    segment_attention_fwd,
)
from lwz_kernels.segment_attention.segments import SegmentTable

__all__ = [
    "SegmentTable",
    "segment_attention",
    "segment_attention_bwd",
    "segment_attention_fwd",
]
