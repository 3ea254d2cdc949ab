"""A region as the source of a `torch.cuda.MemPool`: scratch of CUDA graphs at fixed addresses.

The caching allocator asks its pool for segments; they are cut from the mapped part of the region.
A graph that was captured into the pool stays valid while the pages are elsewhere, because its
addresses are ours, and can be replayed as soon as they are mapped again.
"""

import ctypes
import os

import torch

from lwz_kernels.memory import library
from lwz_kernels.memory.region import Region

__all__ = ["RegionPool"]

# The library's bindings, seen from here: tensors of a pool do not keep its memory alive, this does.
_open_pools: dict[int, "RegionPool"] = {}


class RegionPool:
    """Serves PyTorch's CUDA allocations from a region that is mapped.

    Allocations fail as out of memory where no gap of mapped pages is large enough: map enough,
    capture, and then let `end_bytes` say how much the phase plan has to keep.

    Args:
        region: with `keeps_views=True`, on a CUDA device that has no other pool.

    Raises:
        ValueError: the region does not keep views, is not on a CUDA device, or the device has a
            pool; or the caching allocator is set to expandable segments.

    Example:
        pool = RegionPool(scratch)
        with torch.cuda.graph(graph, pool=pool.mem_pool().id): ...
    """

    def __init__(self, region: Region) -> None:
        if not region.keeps_views or region.memory.device.type != "cuda":
            raise ValueError(
                f"RegionPool: expected a region of a CUDA device reserved with keeps_views=True, "
                f"got {region!r} on {region.memory.device}"
            )
        settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        if "expandable_segments:true" in (settings or "").replace(" ", "").lower():
            raise ValueError(
                "RegionPool: not every torch release lets expandable segments and a pool with an "
                "allocator of its own go together; remove expandable_segments from the allocator "
                f"settings {settings!r}"
            )
        self.region = region
        self._device_index = region.memory.device.index
        self._mem_pool: torch.cuda.MemPool | None = None
        self._allocator: torch.cuda.memory.CUDAPluggableAllocator | None = None
        with region.memory.lock:
            library.call(
                "bind_allocator", region.memory.native_handle(), region.index, self._device_index
            )
            region.pool = self
            _open_pools[self._device_index] = self

    def mem_pool(self) -> torch.cuda.MemPool:
        """The pool, for `torch.cuda.graph(pool=….id)` and `torch.cuda.use_mem_pool`."""
        if self._mem_pool is None:
            self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
                library.path(), "lwz_memory_torch_malloc", "lwz_memory_torch_free"
            )
            self._mem_pool = torch.cuda.MemPool(self._allocator.allocator())
        return self._mem_pool

    @property
    def num_blocks(self) -> int:
        """Segments that PyTorch holds."""
        return self._stats().blocks

    @property
    def used_bytes(self) -> int:
        """Bytes in these segments."""
        return self._stats().used_bytes

    @property
    def end_bytes(self) -> int:
        """End of the highest segment that there ever was: what a phase has to keep mapped."""
        return self._stats().end_bytes

    def close(self) -> None:
        """Takes the region back. All tensors and graphs of the pool must be gone.

        Raises:
            ValueError: segments are alive; the pool is still open then.
        """
        with self.region.memory.lock:
            if self.region.pool is not self:
                return
            self._mem_pool = None
            if not self.region.memory.is_closed:  # else the library has forgotten it
                library.call("unbind_allocator", self._device_index)
            self._allocator = None
            self.region.pool = None
            del _open_pools[self._device_index]

    def _stats(self) -> library.AllocatorStats:
        stats = library.AllocatorStats()
        library.call("allocator_stats", self._device_index, ctypes.byref(stats))
        return stats
