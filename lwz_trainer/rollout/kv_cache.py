"""Pages of keys and values: storage, and reference-counted ownership.

Page layout [num_pages, page_size, J, K] for each layer, as flash-attn and `paged_attention` expect.
"""

import os

import torch
from torch import Tensor

__all__ = ["PageAllocator", "PagedKVCache", "kv_memory_limit", "num_pages_for"]


def kv_memory_limit(device: torch.device) -> int:
    """Bytes that the KV cache may take: a third of the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 3
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out page numbers; a page returns to the free list when its last owner releases it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` fresh pages with one owner; the caller has checked `num_free`."""
        assert count <= len(self._free), f"asked for {count} pages, {len(self._free)} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """One more owner for each page."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is free and cannot be shared"
            self._num_owners[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """One owner less for each page."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} was released twice"
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free.append(page)


class PagedKVCache:
    """Keys and values of all layers."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.page_size = page_size
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_pages, page_size, J, K]."""
        return self.keys[index], self.values[index]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages in every layer."""
        if sources:
            self.keys[:, targets] = self.keys[:, sources]
            self.values[:, targets] = self.values[:, sources]
