"""Pages of keys and values: how many, their storage, and reference-counted ownership.

Page layout [num_pages, page_size, J, K] for each layer, as flash-attn and `paged_attention` expect.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import ModelConfig

__all__ = [
    "CachePlan",
    "PageAllocator",
    "PagedKVCache",
    "free_memory",
    "kv_memory_limit",
    "num_pages_for",
    "plan_pages",
]


def free_memory(device: torch.device) -> int:
    """Bytes that the device, on a CPU the system, could give to anyone now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def kv_memory_limit(device: torch.device) -> int:
    """Bytes of a KV cache that comes and goes with each rollout: a third of what is free now."""
    return free_memory(device) // 3


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-num_tokens // page_size)


@dataclass(frozen=True)
class CachePlan:
    """Sizes of a cache, and of the batch that it serves."""

    max_num_seqs: int
    """Rows decoded together."""
    pages_each: int
    """Pages of one row at full length."""
    shape: torch.Size
    """[2, layers, num_pages, page_size, J, K]: keys, then values."""
    dtype: torch.dtype

    @property
    def num_pages(self) -> int:
        return self.shape[2]

    @property
    def max_tokens_each(self) -> int:
        return (self.pages_each - 1) * self.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def plan_pages(
    config: RolloutConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    longest_prompt: int,
    num_samples: int,
    memory_limit_bytes: int,
) -> CachePlan:
    """Pages for all rows at full length, or what the limit or the config leaves.

    Raises:
        UserError: that is no room for one sequence.
    """
    full_length = longest_prompt + config.max_completion_tokens
    pages_each = num_pages_for(full_length, config.page_size) + 1
    max_num_seqs = min(config.max_num_seqs, num_samples)
    page = (config.page_size, model.kv_heads, model.head_dim)
    page_bytes = torch.Size((2, model.layers, *page)).numel() * dtype.itemsize
    num_pages = min(pages_each * (max_num_seqs + 1), memory_limit_bytes // page_bytes)
    if config.kv_cache_tokens:
        num_pages = num_pages_for(config.kv_cache_tokens, config.page_size)
    if num_pages < pages_each:
        raise UserError(
            f"the KV cache has room for {num_pages * config.page_size} tokens, one sequence "
            f"may need {pages_each * config.page_size}: lower rollout.max_completion_tokens or "
            "raise rollout.kv_cache_tokens"
        )
    shape = torch.Size((2, model.layers, num_pages, *page))
    return CachePlan(max_num_seqs, pages_each, shape, dtype)


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
    """Keys and values of all layers.

    Args:
        memory: [2, layers, num_pages, page_size, J, K], of any content.
    """

    def __init__(self, memory: Tensor) -> None:
        self.page_size = memory.shape[3]
        self.keys, self.values = memory

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * self.keys[:, 0, 0].nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_pages, page_size, J, K]."""
        return self.keys[index], self.values[index]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copies whole pages in every layer."""
        if sources:
            self.keys[:, targets] = self.keys[:, sources]
            self.values[:, targets] = self.values[:, sources]
