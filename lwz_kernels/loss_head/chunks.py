"""How many rows of logits exist at a time: chunks are sized by bytes, and balanced.

A row of logits takes 4·V bytes. 1.25 GB hold 2,048 rows at V = 152,064: 72 full waves of 128 x 256
output tiles on the 132 multiprocessors of an H100 or H200. On a CPU smaller chunks cost nothing.
"""

import itertools

import torch

__all__ = ["balanced_slices", "default_chunk_bytes"]

CUDA_CHUNK_BYTES = 1_250_000_000
CPU_CHUNK_BYTES = 64 << 20


def default_chunk_bytes(device: torch.device) -> int:
    """Size of one chunk of logits where the caller names none."""
    return CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES


def balanced_slices(num_rows: int, bytes_per_row: int, chunk_bytes: int) -> list[slice]:
    """The fewest slices of at most `chunk_bytes` (at least one row each), equal to one row."""
    rows_per_chunk = max(1, chunk_bytes // bytes_per_row)
    num_chunks = max(1, -(-num_rows // rows_per_chunk))
    edges = [num_rows * index // num_chunks for index in range(num_chunks + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges) if num_rows]
