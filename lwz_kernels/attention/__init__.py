"""Causal attention over packed sequences, with prompts shared by the completions of a group."""

from lwz_kernels.attention.api import attention
from lwz_kernels.attention.plan import AttentionPlan

__all__ = ["AttentionPlan", "attention"]
