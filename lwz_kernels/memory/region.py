"""A region of a phase memory: fixed addresses, some of them backed by physical pages."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lwz_kernels.memory.library import PhaseMemoryError
from lwz_kernels.memory.views import make_view

if TYPE_CHECKING:
    from lwz_kernels.memory.api import PhaseMemory
    from lwz_kernels.memory.pool import RegionPool

__all__ = ["Region"]


class Region:
    """A reserved range of addresses; made by `PhaseMemory.reserve`.

    `address` and `nbytes` never change. What is mapped has physical pages; touching anything else
    is a fault of the hardware, so tensors are only made over mapped bytes, and bytes that a tensor
    uses are not unmapped unless the region `keeps_views`.
    """

    def __init__(
        self,
        memory: "PhaseMemory",
        name: str,
        tag: str,
        index: int,
        address: int,
        nbytes: int,
        keeps_views: bool,
    ) -> None:
        self.memory = memory
        self.name = name
        self.tag = tag
        self.index = index
        self.address = address
        self.nbytes = nbytes
        self.keeps_views = keeps_views
        self.pool: RegionPool | None = None
        self._views: list[tuple[weakref.ref, int, int]] = []

    def __repr__(self) -> str:
        return f"Region({self.name!r}, tag={self.tag!r}, nbytes={self.nbytes})"

    @property
    def mapped_bytes(self) -> int:
        num_pages = sum(page >= 0 for page in self.memory.page_table(self))
        return num_pages * self.memory.page_bytes

    @property
    def num_views(self) -> int:
        """Storages made from this region that are still alive."""
        return len(self._live_views())

    def map(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Gives every page of [offset, offset + nbytes) physical memory of undefined content.

        Raises:
            ValueError: a page is already mapped; not aligned; outside the region; the region is
                governed by the phases.
            MemoryError: over capacity, or the device has no memory left; nothing is mapped then.
        """
        self.memory.move(None, self, self._size(offset, nbytes), dst_offset=offset)

    def unmap(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Takes the pages of [offset, offset + nbytes) into the pool of free pages.

        The device is synchronized first.

        Raises:
            ValueError: a page is not mapped; not aligned; outside the region; the region is
                governed by the phases.
            PhaseMemoryError: a tensor still uses these bytes.
        """
        self.memory.move(self, None, self._size(offset, nbytes), src_offset=offset)

    def is_mapped(self, offset: int = 0, nbytes: int | None = None) -> bool:
        """Whether every byte of [offset, offset + nbytes) has physical memory."""
        size = self._size(offset, nbytes)
        if offset < 0 or size < 0 or offset + size > self.nbytes:
            raise ValueError(
                f"region {self.name!r}: bytes [{offset}, {offset + size}) are outside its "
                f"{self.nbytes} bytes"
            )
        page_bytes = self.memory.page_bytes
        slots = self.memory.page_table(self)[
            offset // page_bytes : (offset + size - 1) // page_bytes + 1
        ]
        return all(page >= 0 for page in slots)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0) -> torch.Tensor:
        """A contiguous tensor over the bytes from `offset` on; nothing is copied or initialised.

        Raises:
            ValueError: empty, misaligned for its dtype, or outside the region.
            PhaseMemoryError: not all of its bytes are mapped.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes < 1 or offset % dtype.itemsize != 0:
            raise ValueError(
                f"region {self.name!r}: expected a tensor of at least one element at a multiple "
                f"of {dtype.itemsize} bytes, got shape {tuple(shape)} at {offset}"
            )
        with self.memory.lock:
            if not self.is_mapped(offset, nbytes):
                raise PhaseMemoryError(
                    f"region {self.name!r}: bytes [{offset}, {offset + nbytes}) are not mapped"
                    f"{self.memory.phase_hint(self)}"
                )
            view, alive = make_view(self.memory, self.address + offset, nbytes, self.memory.device)
            self._views = [*self._live_views(), (alive, offset, offset + nbytes)]
        return view.view(dtype).view(torch.Size(shape))

    def check_no_views(self, begin: int, end: int) -> None:
        """Raises if a tensor that must not outlive its pages uses some of [begin, end)."""
        if self.keeps_views:
            return
        for _, view_begin, view_end in self._live_views():
            if view_begin < end and begin < view_end:
                raise PhaseMemoryError(
                    f"region {self.name!r}: a tensor over bytes [{view_begin}, {view_end}) is "
                    "alive; delete it, or reserve the region with keeps_views=True and leave it "
                    "alone while the pages are elsewhere"
                )

    def check_unused(self) -> None:
        """Raises if a tensor or a pool uses these addresses."""
        if self.num_views:
            raise PhaseMemoryError(
                f"region {self.name!r}: {self.num_views} storages over it are alive; delete their "
                "tensors first"
            )
        if self.pool is not None:
            raise PhaseMemoryError(f"region {self.name!r}: its pool is open; close that first")

    def _live_views(self) -> list[tuple[weakref.ref, int, int]]:
        return [view for view in self._views if view[0]() is not None]

    def _size(self, offset: int, nbytes: int | None) -> int:
        return self.nbytes - offset if nbytes is None else nbytes
