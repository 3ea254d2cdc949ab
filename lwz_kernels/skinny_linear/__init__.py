"""A linear layer for few rows (decoding): limited by reading the weight."""

from lwz_kernels.skinny_linear.api import AUTO_MAX_ROWS, skinny_linear

__all__ = ["AUTO_MAX_ROWS", "skinny_linear"]
