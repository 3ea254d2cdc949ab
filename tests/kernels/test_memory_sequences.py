"""Random sequences of operations and faults against a model in plain Python.

Every page that is mapped is stamped with a number of its own. After each operation the model says
which number must be readable where; the library, its statistics and the (fake) driver must agree:
no page is lost, in two places, or behind an address that it left.
"""

import ctypes
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lwz_kernels.memory import PhaseMemory, PhaseMemoryError, Region, library
from tests.kernels import fake_cuda

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.unavailable_reason())
CAPACITY, REGION_PAGES = 7, (4, 3, 6)
SLOTS = st.integers(0, max(REGION_PAGES) - 1)
COUNTS = st.integers(1, max(REGION_PAGES))
REGIONS = st.integers(0, len(REGION_PAGES) - 1)
# How many driver calls succeed before the one that fails; None: no fault.
FAULTS = st.one_of(st.none(), st.integers(0, 14))
Table = list[int | None]


class MemorySequences(RuleBasedStateMachine):
    """Subclasses say which device: `open`, and what it knows of its pages: `check_device`."""

    page = 0
    is_open = True

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.open()
        self.regions: list[Region] = [
            self.memory.reserve(f"r{i}", n * self.page, tag="even" if i % 2 == 0 else "odd")
            for i, n in enumerate(REGION_PAGES)
        ]
        self.addresses = [region.address for region in self.regions]
        self.memory.define_phase("all in the last", {"r2": 6 * self.page})
        self.memory.define_phase("spread", {"r0": 2 * self.page, "r1": 3 * self.page})
        self.memory.define_phase(
            "lean", {"r1": self.page, "r2": 2 * self.page}, keep_free_bytes=self.page
        )
        self.plans = {
            "all in the last": ([0, 0, 6], None),
            "spread": ([2, 3, 0], None),
            "lean": ([0, 1, 2], 1),
        }
        self.tables: list[Table] = [[None] * n for n in REGION_PAGES]
        self.num_free = 0
        self.next_stamp = 1

    def open(self) -> PhaseMemory:
        raise NotImplementedError

    def arm(self, fault: int | None) -> None:
        """Lets a later driver call fail, where the device can."""

    def disarm(self) -> bool:
        """Ends that, and says whether a call did fail."""
        return False

    def check_device(self, physical: int, mapped: int) -> None:
        raise NotImplementedError

    # ---- operations

    @rule(region=REGIONS, slot=SLOTS, count=COUNTS, fault=FAULTS)
    @precondition(lambda self: self.memory.phase is None)
    def map(self, region: int, slot: int, count: int, fault: int | None) -> None:
        table = self.tables[region]
        is_inside = slot + count <= len(table)
        is_valid = is_inside and all(page is None for page in table[slot : slot + count])
        fits = self.num_mapped + count <= CAPACITY
        if self.attempt(
            lambda: self.regions[region].map(slot * self.page, count * self.page),
            fault,
            None if is_valid and fits else (MemoryError if is_valid else ValueError),
        ):
            self.num_free -= min(count, self.num_free)
            self.fill(region, range(slot, slot + count))

    @rule(region=REGIONS, slot=SLOTS, count=COUNTS, fault=FAULTS)
    @precondition(lambda self: self.memory.phase is None)
    def unmap(self, region: int, slot: int, count: int, fault: int | None) -> None:
        table = self.tables[region]
        is_inside = slot + count <= len(table)
        is_valid = is_inside and None not in table[slot : slot + count]
        if self.attempt(
            lambda: self.regions[region].unmap(slot * self.page, count * self.page),
            fault,
            None if is_valid else ValueError,
        ):
            self.num_free += count
            table[slot : slot + count] = [None] * count

    @rule(src=REGIONS, src_slot=SLOTS, dst=REGIONS, dst_slot=SLOTS, count=COUNTS, fault=FAULTS)
    def handover(
        self, src: int, src_slot: int, dst: int, dst_slot: int, count: int, fault: int | None
    ) -> None:
        src_table, dst_table = self.tables[src], self.tables[dst]
        is_inside = src_slot + count <= len(src_table) and dst_slot + count <= len(dst_table)
        pages = src_table[src_slot : src_slot + count]
        is_valid = (
            is_inside
            and None not in pages
            and all(page is None for page in dst_table[dst_slot : dst_slot + count])
        )
        if self.attempt(
            lambda: self.memory.handover(
                self.regions[src],
                self.regions[dst],
                count * self.page,
                src_offset=src_slot * self.page,
                dst_offset=dst_slot * self.page,
            ),
            fault,
            None if is_valid else ValueError,
        ):
            src_table[src_slot : src_slot + count] = [None] * count
            dst_table[dst_slot : dst_slot + count] = pages

    @rule(phase=st.sampled_from(["all in the last", "spread", "lean"]), fault=FAULTS)
    def switch(self, phase: str, fault: int | None) -> None:
        before = self.memory.phase
        is_done = self.attempt(lambda: self.memory.switch(phase), fault, None)
        # A fault in the report, or in giving pages back, comes after the arrangement.
        if not is_done and self.memory.phase == before:
            return
        if not is_done and before == phase:
            # Which of the two it was shows in the tables alone.
            wanted = [self.readable(i) for i in range(len(self.regions))]
            if wanted == [[page is not None for page in table] for table in self.tables]:
                self.num_free = self.memory.stats().free_bytes // self.page
                return
        wanted_pages, keep = self.plans[phase]
        given_up: list[int | None] = []
        for table, wanted in zip(self.tables, wanted_pages, strict=True):
            given_up += [page for page in table[wanted:] if page is not None]
            table[wanted:] = [None] * (len(table) - wanted)
        for region, (table, wanted) in enumerate(zip(self.tables, wanted_pages, strict=True)):
            for slot in range(wanted):
                if table[slot] is not None:
                    continue
                if given_up:
                    table[slot] = given_up.pop(0)
                else:
                    self.num_free -= min(1, self.num_free)
                    self.fill(region, [slot])
        self.num_free += len(given_up)
        if keep is not None:
            if is_done:
                self.num_free = min(self.num_free, keep)
            else:
                self.num_free = self.memory.stats().free_bytes // self.page

    @rule(keep=st.integers(0, 3), fault=FAULTS)
    def release_free(self, keep: int, fault: int | None) -> None:
        if self.attempt(lambda: self.memory.release_free(keep * self.page), fault, None):
            self.num_free = min(self.num_free, keep)
        else:  # some may be gone; none can come back
            left = self.memory.stats().free_bytes // self.page
            assert left <= self.num_free
            self.num_free = left

    @rule()
    @precondition(lambda self: self.memory.phase is None)
    def reserve_and_unreserve(self) -> None:
        region = self.memory.reserve("temporary", 2 * self.page)
        assert region.mapped_bytes == 0
        self.memory.unreserve(region)

    # ---- what must hold after each

    @invariant()
    def everybody_agrees(self) -> None:
        ids: list[int] = []
        for region, address, table in zip(self.regions, self.addresses, self.tables, strict=True):
            assert region.address == address
            page_ids = self.memory.page_table(region)
            assert [page >= 0 for page in page_ids] == [page is not None for page in table]
            ids += [page for page in page_ids if page >= 0]
            for slot, page in enumerate(table):
                if page is not None:
                    assert self.read(address + slot * self.page) == (page, page)
        assert len(set(ids)) == len(ids)
        stats = self.memory.stats()
        assert stats.mapped_bytes == self.num_mapped * self.page
        assert stats.free_bytes == self.num_free * self.page
        assert stats.physical_bytes == stats.mapped_bytes + stats.free_bytes
        assert stats.physical_bytes <= CAPACITY * self.page
        assert sum(stats.mapped_bytes_by_tag.values()) == stats.mapped_bytes
        assert stats.num_created - stats.num_released == stats.physical_bytes // self.page
        self.check_device(self.num_mapped + self.num_free, self.num_mapped)

    def teardown(self) -> None:
        self.memory.close()
        self.is_open = False
        self.check_device(0, 0)

    # ---- the model

    @property
    def num_mapped(self) -> int:
        return sum(page is not None for table in self.tables for page in table)

    def attempt(self, action, fault: int | None, expected: type[Exception] | None) -> bool:
        """Whether `action` was done; it must have failed exactly as expected, or by the fault."""
        self.arm(fault)
        error: Exception | None = None
        try:
            action()
        except (ValueError, MemoryError, PhaseMemoryError) as raised:
            error = raised
        had_fault = self.disarm()
        if had_fault:  # one fault is always undone
            assert "CUDA_ERROR_FAKE" in str(error)
            assert "undoing" not in str(error)
        else:
            assert type(error) is (expected or type(None)), error
        return error is None

    def fill(self, region: int, slots) -> None:
        for slot in slots:
            address = self.addresses[region] + slot * self.page
            for end in (0, self.page - 8):
                ctypes.c_uint64.from_address(address + end).value = self.next_stamp
            self.tables[region][slot] = self.next_stamp
            self.next_stamp += 1

    def read(self, address: int) -> tuple[int, int]:
        """First and last word of a page."""
        ends = (address, address + self.page - 8)
        return tuple(ctypes.c_uint64.from_address(end).value for end in ends)

    def readable(self, region: int) -> list[bool]:
        return [page >= 0 for page in self.memory.page_table(self.regions[region])]


class CpuSequences(MemorySequences):
    page = os.sysconf("SC_PAGESIZE")

    def open(self) -> PhaseMemory:
        before = self.files()
        memory = PhaseMemory("cpu", CAPACITY * self.page, page_bytes=self.page)
        (self.file,) = self.files() - before
        return memory

    def files(self) -> set[int]:
        """Descriptors of the open memories."""
        folder = Path("/proc/self/fd")
        return {
            int(link.name)
            for link in folder.iterdir()
            if link.is_symlink() and "lwz_phase_memory" in os.readlink(link)
        }

    def check_device(self, physical: int, mapped: int) -> None:
        if self.is_open:
            assert os.fstat(self.file).st_blocks * 512 == physical * self.page
            return
        assert self.file not in self.files()
        assert "lwz_phase_memory" not in Path("/proc/self/maps").read_text()


class CudaSequences(MemorySequences):
    page = fake_cuda.GRANULARITY

    def open(self) -> PhaseMemory:
        self.driver = fake_cuda.load()
        self.driver.reset()
        return PhaseMemory(
            "cuda:0", CAPACITY * self.page, page_bytes=self.page, driver=self.driver.path
        )

    def arm(self, fault: int | None) -> None:
        self.driver.launch()  # so that unmapping without a synchronization is refused
        if fault is not None:
            self.driver.fail(fault)

    def disarm(self) -> bool:
        return self.driver.stop_failing()

    def check_device(self, physical: int, mapped: int) -> None:
        holdings = self.driver.holdings
        assert (holdings["num_physical"], holdings["num_mappings"]) == (physical, mapped)
        assert self.driver.num_inaccessible == 0
        assert not self.driver.has_current_context

    def teardown(self) -> None:
        super().teardown()
        assert set(self.driver.holdings.values()) == {0}


def run(machine: type[MemorySequences], num_sequences: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_sequences,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_sequences_on_a_cpu() -> None:
    run(CpuSequences, 200)


@pytest.mark.skipif(fake_cuda.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_random_sequences_with_driver_faults() -> None:
    run(CudaSequences, 1000)
