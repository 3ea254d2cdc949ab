"""What a phase memory reports: sizes, counts, and what everyone held when a phase began."""

from collections import defaultdict
from dataclasses import dataclass

__all__ = ["LedgerEntry", "MemoryStats", "RegionStats"]


@dataclass(frozen=True)
class RegionStats:
    """One owner. `num_views` counts storages that are alive, not tensors."""

    name: str
    tag: str
    nbytes: int
    mapped_bytes: int
    num_views: int


@dataclass(frozen=True)
class MemoryStats:
    """Sizes now and at their peaks, and operations since the memory was opened.

    `physical_bytes` = `mapped_bytes` + `free_bytes` is what the memory holds of its device;
    `device_free_bytes` is what the driver (on a CPU: the system) could still give to anyone.
    Operations are counted in pages, synchronizations and rollbacks in calls.
    """

    page_bytes: int
    capacity_bytes: int
    physical_bytes: int
    mapped_bytes: int
    free_bytes: int
    peak_physical_bytes: int
    peak_mapped_bytes: int
    device_free_bytes: int
    num_created: int
    num_released: int
    num_mapped: int
    num_unmapped: int
    num_handed_over: int
    num_synchronizations: int
    num_rollbacks: int
    regions: tuple[RegionStats, ...]

    @property
    def mapped_bytes_by_tag(self) -> dict[str, int]:
        """Sum of `mapped_bytes` over the regions of each tag."""
        totals: dict[str, int] = defaultdict(int)
        for region in self.regions:
            totals[region.tag] += region.mapped_bytes
        return dict(totals)


@dataclass(frozen=True)
class LedgerEntry:
    """What everyone held right after a switch.

    `torch_reserved_bytes` is what PyTorch's caching allocator holds of the same device (0 on a
    CPU); together with `stats.physical_bytes` and `stats.device_free_bytes` it shows who has what.
    """

    phase: str
    previous: str | None
    num_handed_over: int
    num_from_pool: int
    num_to_pool: int
    switch_ms: float
    torch_reserved_bytes: int
    stats: MemoryStats
