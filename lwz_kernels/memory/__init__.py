"""Phase memory: tensors with fixed addresses that take turns in the same physical pages.

`docs/ops/phase_memory.md` is the contract; `PhaseMemory` is where to begin.
"""

from lwz_kernels.memory.api import PhaseMemory
from lwz_kernels.memory.library import PhaseMemoryError
from lwz_kernels.memory.opening import is_available, unavailable_reason
from lwz_kernels.memory.pool import RegionPool
from lwz_kernels.memory.records import LedgerEntry, MemoryStats, RegionStats
from lwz_kernels.memory.region import Region

__all__ = [
    "LedgerEntry",
    "MemoryStats",
    "PhaseMemory",
    "PhaseMemoryError",
    "Region",
    "RegionPool",
    "RegionStats",
    "is_available",
    "unavailable_reason",
]
