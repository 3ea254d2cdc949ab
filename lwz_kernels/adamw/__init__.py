"""One step of AdamW on fp32 masters that may be split into bf16 weights and what they lack."""

from lwz_kernels.adamw.api import adamw_
from lwz_kernels.adamw.halves import join_halves, split_halves

__all__ = ["adamw_", "join_halves", "split_halves"]
