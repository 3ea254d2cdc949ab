"""Phase memory: regions with fixed addresses that take turns in the same physical pages.

Convention: offsets and sizes are bytes. Offsets, and the sizes given to `map`, `unmap` and
`handover`, are multiples of `page_bytes`; `reserve` and `define_phase` round up to it.
All methods may be called from several threads. A forked child can use neither the memory nor views.
"""

import ctypes
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from lwz_kernels.memory import library
from lwz_kernels.memory.library import PhaseMemoryError
from lwz_kernels.memory.opening import CUDA_DRIVER, open_native, resolve_device
from lwz_kernels.memory.plan import POOL, plan_moves
from lwz_kernels.memory.records import LedgerEntry, MemoryStats, RegionStats
from lwz_kernels.memory.region import Region

__all__ = ["PhaseMemory"]

Move = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class _Phase:
    num_pages: dict[str, int]
    keep_free_pages: int | None


class PhaseMemory:
    """At most `capacity_bytes` of one device's memory, shared by regions.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        capacity_bytes: rounded down to whole pages. Nothing is allocated before it is mapped.
        page_bytes: a multiple of the device's granularity (2 MiB on NVIDIA GPUs, 4 KiB on most
            CPUs). Each page costs driver calls in every switch. Default: the smallest that makes at
            most 2,048 pages.
        driver: file name of the CUDA driver library.

    Raises:
        ValueError: sizes that make no pages, or a device of another kind.
        PhaseMemoryError: the library, the driver or virtual memory management is missing.

    Example:
        >>> with PhaseMemory("cpu", 1 << 20) as memory:
        ...     kv = memory.reserve("kv", 1 << 20, tag="rollout")
        ...     scratch = memory.reserve("scratch", 1 << 20, tag="update")
        ...     memory.define_phase("rollout", {"kv": 1 << 20})
        ...     memory.define_phase("update", {"scratch": 3 << 18, "kv": 1 << 18})
        ...     _ = memory.switch("rollout")
        ...     memory.switch("update").stats.mapped_bytes_by_tag
        {'rollout': 262144, 'update': 786432}
    """

    def __init__(
        self,
        device: str | torch.device,
        capacity_bytes: int,
        *,
        page_bytes: int | None = None,
        driver: str = CUDA_DRIVER,
    ) -> None:
        self.device = resolve_device(device)
        self.lock = threading.RLock()
        self._handle: ctypes.c_void_p | None = open_native(
            self.device, capacity_bytes, page_bytes, driver
        )
        self._finalizer = weakref.finalize(self, library.call, "close", self._handle, 0)
        self._finalizer.atexit = False  # other code may still use views; the system cleans up
        self._regions: dict[str, Region] = {}
        self._phases: dict[str, _Phase] = {}
        self._phase: str | None = None
        self._ledger: dict[str, LedgerEntry] = {}
        stats = self._native_stats()
        self.page_bytes: int = stats.page_bytes
        self.capacity_bytes: int = stats.capacity * stats.page_bytes

    def __enter__(self) -> "PhaseMemory":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The traceback of an error keeps tensors alive: they must not hide the error itself.
        self.close(force=error is not None)

    @property
    def is_closed(self) -> bool:
        return self._handle is None

    @property
    def phase(self) -> str | None:
        """The phase of the last switch; None before the first one."""
        return self._phase

    @property
    def ledger(self) -> dict[str, LedgerEntry]:
        """Per phase, what everyone held when it last began."""
        return dict(self._ledger)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, in the order in which they were reserved."""
        return tuple(self._regions.values())

    def reserve(
        self, name: str, nbytes: int, *, tag: str = "", keeps_views: bool = False
    ) -> Region:
        """A new region of at least `nbytes`, nothing mapped. Reserving costs no memory.

        Args:
            name: unique among the regions.
            nbytes: rounded up to whole pages; may exceed the capacity.
            tag: what statistics are summed by.
            keeps_views: tensors may outlive an unmap, because they are used again at the same
                addresses (CUDA graphs). Using them meanwhile is a fault that nothing here catches.
        """
        with self.lock:
            if name in self._regions:
                raise ValueError(f"reserve: there already is a region {name!r}")
            if nbytes < 1:
                raise ValueError(f"reserve: expected at least one byte for {name!r}, got {nbytes}")
            index, address = ctypes.c_int64(), ctypes.c_uint64()
            num_pages = self._pages_for(nbytes)
            self._call("reserve", num_pages, ctypes.byref(index), ctypes.byref(address))
            region = Region(
                self,
                name,
                tag,
                index.value,
                address.value,
                num_pages * self.page_bytes,
                keeps_views,
            )
            self._regions[name] = region
            return region

    def unreserve(self, region: Region) -> None:
        """Gives the addresses of an unmapped region back; no tensor over them may be alive."""
        with self.lock:
            self._check_own(region)
            users = [name for name, phase in self._phases.items() if region.name in phase.num_pages]
            if users:
                raise ValueError(
                    f"unreserve: region {region.name!r} is part of the phases {users}; define "
                    "them without it first"
                )
            region.check_unused()
            self._call("unreserve", region.index)
            del self._regions[region.name]

    def handover(
        self, src: Region, dst: Region, nbytes: int, *, src_offset: int = 0, dst_offset: int = 0
    ) -> None:
        """Moves the pages of [src_offset, src_offset + nbytes) of `src` to `dst_offset` of `dst`.

        Their bytes move along. The device is synchronized first. Allowed in a phase as well: the
        next switch starts from what it finds.

        Raises:
            ValueError: source pages not mapped, destination pages mapped, not aligned, or outside.
            PhaseMemoryError: a tensor still uses the source; or the driver failed, and then
                everything is as it was before.
        """
        self.move(src, dst, nbytes, src_offset=src_offset, dst_offset=dst_offset)

    def release_free(self, keep_bytes: int = 0) -> int:
        """Gives free pages back to the device until `keep_bytes` are left; returns the bytes."""
        if keep_bytes < 0:
            raise ValueError(f"release_free: expected 0 bytes or more, got {keep_bytes}")
        with self.lock:
            released = ctypes.c_int64()
            self._call("release_free", self._pages_for(keep_bytes), ctypes.byref(released))
            return released.value * self.page_bytes

    def define_phase(
        self, name: str, mapped: Mapping[str, int], *, keep_free_bytes: int | None = None
    ) -> None:
        """Says what `switch(name)` arranges; defining a phase again replaces it.

        Args:
            name: of the phase.
            mapped: region name -> how many of its first bytes have memory, rounded up to pages. A
                region that other phases name and this one does not has none. Regions that no phase
                names are left alone.
            keep_free_bytes: what is left unused goes back to the device down to this many bytes,
                for PyTorch's own allocator. Default: nothing is given back.
        """
        with self.lock:
            num_pages = {key: self._pages_for(nbytes) for key, nbytes in mapped.items()}
            for key, pages in num_pages.items():
                if key not in self._regions:
                    raise ValueError(
                        f"phase {name!r}: there is no region {key!r}, only {list(self._regions)}"
                    )
                if mapped[key] < 0 or pages * self.page_bytes > self._regions[key].nbytes:
                    raise ValueError(
                        f"phase {name!r}: expected 0 to {self._regions[key].nbytes} bytes of "
                        f"region {key!r}, got {mapped[key]}"
                    )
            total = sum(num_pages.values()) * self.page_bytes
            if total > self.capacity_bytes:
                raise ValueError(
                    f"phase {name!r}: its regions need {total} bytes together, the capacity is "
                    f"{self.capacity_bytes}"
                )
            if keep_free_bytes is not None and keep_free_bytes < 0:
                raise ValueError(
                    f"phase {name!r}: keep_free_bytes cannot be negative, got {keep_free_bytes}"
                )
            keep = None if keep_free_bytes is None else self._pages_for(keep_free_bytes)
            self._phases[name] = _Phase(num_pages, keep)

    def switch(self, name: str) -> LedgerEntry:
        """Arranges the pages as `define_phase` said, all of them or none.

        Pages go directly from regions that give some up to regions that need some. Must not be
        called while a CUDA graph is captured. If giving pages back to the device fails, the switch
        has been made nevertheless.

        Raises:
            ValueError: no such phase.
            PhaseMemoryError: a tensor uses bytes that would lose their pages; or the driver failed.
                The old phase and arrangement are still there then.
            MemoryError: not enough memory; likewise.
        """
        with self.lock:
            if name not in self._phases:
                raise ValueError(f"switch: there is no phase {name!r}, only {list(self._phases)}")
            begin = time.perf_counter()
            target = self._phases[name]
            planned = [region for region in self.regions if self._is_planned(region)]
            moves = plan_moves(
                {region.index: self.page_table(region) for region in planned},
                {region.index: target.num_pages.get(region.name, 0) for region in planned},
            )
            self._apply(moves)
            previous, self._phase = self._phase, name
            if target.keep_free_pages is not None:
                self.release_free(target.keep_free_pages * self.page_bytes)
            entry = LedgerEntry(
                phase=name,
                previous=previous,
                num_handed_over=sum(m[4] for m in moves if POOL not in (m[0], m[2])),
                num_from_pool=sum(m[4] for m in moves if m[0] == POOL),
                num_to_pool=sum(m[4] for m in moves if m[2] == POOL),
                switch_ms=(time.perf_counter() - begin) * 1e3,
                torch_reserved_bytes=_torch_reserved_bytes(self.device),
                stats=self.stats(),
            )
            self._ledger[name] = entry
            return entry

    def require_phase(self, name: str) -> None:
        """Raises PhaseMemoryError unless `name` is the current phase."""
        if self._phase != name:
            raise PhaseMemoryError(
                f"this needs the phase {name!r}, but the memory is in {self._phase!r}: call "
                f"switch({name!r}) first"
            )

    def stats(self) -> MemoryStats:
        """Sizes and counts, of the whole and of each region."""
        with self.lock:
            native, page_bytes = self._native_stats(), self.page_bytes
            device_free_bytes = ctypes.c_int64()
            self._call("device_free_bytes", ctypes.byref(device_free_bytes))
            return MemoryStats(
                page_bytes=page_bytes,
                capacity_bytes=self.capacity_bytes,
                physical_bytes=native.physical * page_bytes,
                mapped_bytes=native.mapped * page_bytes,
                free_bytes=native.free * page_bytes,
                peak_physical_bytes=native.peak_physical * page_bytes,
                peak_mapped_bytes=native.peak_mapped * page_bytes,
                device_free_bytes=device_free_bytes.value,
                num_created=native.created,
                num_released=native.released,
                num_mapped=native.maps,
                num_unmapped=native.unmaps,
                num_handed_over=native.handovers,
                num_synchronizations=native.synchronizations,
                num_rollbacks=native.rollbacks,
                regions=tuple(
                    RegionStats(r.name, r.tag, r.nbytes, r.mapped_bytes, r.num_views)
                    for r in self.regions
                ),
            )

    def page_table(self, region: Region) -> list[int]:
        """The id of the physical page in each page-sized slot of `region`, -1 where none is."""
        with self.lock:
            self._check_own(region)
            table = (ctypes.c_int64 * (region.nbytes // self.page_bytes))()
            self._call("page_table", region.index, table)
            return list(table)

    def close(self, *, force: bool = False) -> None:
        """Gives everything back to the device. Closing again does nothing.

        Args:
            force: close although tensors or pool blocks are alive. Their addresses stay reserved,
                so that using them is a fault and never someone else's memory.

        Raises:
            PhaseMemoryError: tensors or blocks are alive; or the driver failed, and then as much as
                possible was given back.
        """
        with self.lock:
            if self._handle is None:
                return
            if not force:
                for region in self.regions:
                    region.check_unused()
            is_used = any(region.num_views or region.pool for region in self.regions)
            handle, self._handle = self._handle, None
            self._finalizer.detach()
            library.call("close", handle, int(is_used))

    def move(
        self,
        src: Region | None,
        dst: Region | None,
        nbytes: int,
        *,
        src_offset: int = 0,
        dst_offset: int = 0,
    ) -> None:
        """What `Region.map`, `Region.unmap` and `handover` have in common; None is the pool."""
        with self.lock:
            for region, offset in ((src, src_offset), (dst, dst_offset)):
                if region is not None:
                    self._check_range(region, offset, nbytes)
                    if (src is None or dst is None) and self._phase and self._is_planned(region):
                        raise ValueError(
                            f"region {region.name!r} is part of the phases: in one, its pages "
                            "come and go with switch() and handover() only"
                        )
            self._apply(
                [
                    (
                        POOL if src is None else src.index,
                        src_offset // self.page_bytes,
                        POOL if dst is None else dst.index,
                        dst_offset // self.page_bytes,
                        nbytes // self.page_bytes,
                    )
                ]
            )

    def phase_hint(self, region: Region) -> str:
        """For messages: the current phase, and those in which `region` has memory."""
        if self._phase is None:
            return ""
        owners = [name for name, phase in self._phases.items() if phase.num_pages.get(region.name)]
        return f" in phase {self._phase!r}; it has memory in {owners}"

    def native_handle(self) -> ctypes.c_void_p:
        """The library's object, for its other functions."""
        if self._handle is None:
            raise PhaseMemoryError("the memory is closed: open a new one")
        return self._handle

    def _apply(self, moves: list[Move]) -> None:
        if not moves:
            return
        by_index = {region.index: region for region in self.regions}
        for src, page, _, _, num_pages in moves:
            if src != POOL:
                begin = page * self.page_bytes
                by_index[src].check_no_views(begin, begin + num_pages * self.page_bytes)
        num_from_pool = sum(move[4] for move in moves if move[0] == POOL)
        if self.device.type == "cuda" and num_from_pool > self._native_stats().free:
            torch.cuda.empty_cache()  # what PyTorch's allocator caches is memory we could get
        native = (library.Move * len(moves))(*(library.Move(*move) for move in moves))
        self._call("apply", native, len(moves))

    def _check_range(self, region: Region, offset: int, nbytes: int) -> None:
        self._check_own(region)
        if offset % self.page_bytes != 0 or nbytes % self.page_bytes != 0:
            raise ValueError(
                f"region {region.name!r}: expected multiples of the page size {self.page_bytes}, "
                f"got offset {offset} and {nbytes} bytes"
            )
        if nbytes < 1 or offset < 0 or offset + nbytes > region.nbytes:
            raise ValueError(
                f"region {region.name!r}: expected at least one page within its {region.nbytes} "
                f"bytes, got bytes [{offset}, {offset + nbytes})"
            )

    def _check_own(self, region: Region) -> None:
        if self._regions.get(region.name) is not region:
            raise ValueError(f"region {region.name!r} is not (or no longer) part of this memory")

    def _is_planned(self, region: Region) -> bool:
        return any(region.name in phase.num_pages for phase in self._phases.values())

    def _pages_for(self, nbytes: int) -> int:
        return -(-nbytes // self.page_bytes)

    def _native_stats(self) -> library.NativeStats:
        stats = library.NativeStats()
        self._call("stats", ctypes.byref(stats))
        return stats

    def _call(self, function: str, *args: object) -> None:
        library.call(function, self.native_handle(), *args)


def _torch_reserved_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
