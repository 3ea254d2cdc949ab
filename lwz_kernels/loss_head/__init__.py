"""Machinery that the operators of the loss head share: chunks, products, row passes, shards."""

from lwz_kernels.loss_head.checks import head_parameters
from lwz_kernels.loss_head.chunks import default_chunk_bytes
from lwz_kernels.loss_head.matmul import has_native_bf16, matmul_wide

__all__ = [
    "default_chunk_bytes",
    "has_native_bf16",
    "head_parameters",
    "matmul_wide",
]
