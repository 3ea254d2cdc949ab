"""Phase memory on the CUDA driver: the native code against a driver that fails on demand.

The fake driver keeps its "device memory" in host memory, so contents can be compared.
"""

import ctypes
import gc
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lwz_kernels.memory import (
    PhaseMemory,
    PhaseMemoryError,
    Region,
    RegionPool,
    is_available,
    library,
    unavailable_reason,
)
from tests.kernels import fake_cuda
from tests.kernels.fake_cuda import GRANULARITY as PAGE
from tests.kernels.fake_cuda import OUT_OF_MEMORY, FakeDriver

pytestmark = [
    pytest.mark.skipif(not library.is_available(), reason=library.unavailable_reason()),
    pytest.mark.skipif(fake_cuda.find_compiler() is None, reason="needs a C++ compiler"),
]
NOTHING = {"num_reservations": 0, "num_mappings": 0, "num_physical": 0, "num_retained": 0}


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    driver = fake_cuda.load()
    driver.reset()
    yield driver
    assert driver.holdings == NOTHING


def open_memory(driver: FakeDriver, num_pages: int = 8) -> PhaseMemory:
    return PhaseMemory("cuda:0", num_pages * PAGE, page_bytes=PAGE, driver=driver.path)


def stamp(region: Region, slot: int, value: int) -> None:
    ctypes.memset(region.address + slot * PAGE, value, PAGE)


def stamps(region: Region) -> list[int | None]:
    """The value of each page's bytes, first and last; None where no page is mapped."""
    values: list[int | None] = []
    for slot, page in enumerate(region.memory.page_table(region)):
        begin = region.address + slot * PAGE
        if page < 0:
            values.append(None)
            continue
        first, last = ctypes.string_at(begin, 1)[0], ctypes.string_at(begin + PAGE - 1, 1)[0]
        assert first == last
        values.append(first)
    return values


def arrange(driver: FakeDriver) -> PhaseMemory:
    """`a` has pages 1, 2, 3, -, 4 (by content), `b` -, 5, -, -, and one page is free."""
    memory = open_memory(driver)
    a, b = memory.reserve("a", 5 * PAGE), memory.reserve("b", 4 * PAGE)
    a.map()
    b.map(PAGE, PAGE)
    a.unmap(3 * PAGE, PAGE)
    for slot, value in ((0, 1), (1, 2), (2, 3), (4, 4)):
        stamp(a, slot, value)
    stamp(b, 1, 5)
    memory.define_phase("update", {"b": 3 * PAGE, "a": PAGE})
    return memory


def snapshot(driver: FakeDriver, memory: PhaseMemory) -> dict[str, object]:
    stats = memory.stats()
    return {
        "stamps": [stamps(region) for region in memory.regions],
        "tables": [memory.page_table(region) for region in memory.regions],
        "physical": stats.physical_bytes,
        "mapped": stats.mapped_bytes,
        "operations": (stats.num_mapped, stats.num_unmapped, stats.num_handed_over),
        "phase": memory.phase,
        "driver": driver.holdings,
        "inaccessible": driver.num_inaccessible,
    }


Operation = Callable[[PhaseMemory], object]
OPERATIONS: dict[str, Operation] = {
    "reserve": lambda m: m.reserve("c", 2 * PAGE),
    "map, one free and two new pages": lambda m: m.regions[1].map(2 * PAGE, 2 * PAGE),
    "unmap": lambda m: m.regions[0].unmap(0, 3 * PAGE),
    "handover": lambda m: m.handover(*m.regions, 2 * PAGE, src_offset=0, dst_offset=2 * PAGE),
    "switch": lambda m: m.switch("update"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_fault_at_every_call_changes_nothing(driver: FakeDriver, name: str) -> None:
    operation = OPERATIONS[name]
    with arrange(driver) as memory:
        clean_calls = driver.calls_during(lambda: operation(memory))
        after = snapshot(driver, memory)
    # The last calls of a switch are its report; they come after the arrangement.
    num_calls = len(clean_calls) - (3 if name == "switch" else 0)
    assert num_calls >= 1
    for index in range(num_calls):
        driver.reset()
        with arrange(driver) as memory:
            before = snapshot(driver, memory)
            driver.fail(index)
            with pytest.raises(PhaseMemoryError, match=r"CUDA_ERROR_FAKE \(999\)"):
                operation(memory)
            is_left_current = clean_calls[index] == "cuCtxPopCurrent_v2"
            assert driver.has_current_context == is_left_current
            assert snapshot(driver, memory) == before, clean_calls[index]
            operation(memory)
            assert snapshot(driver, memory) == after, clean_calls[index]


@pytest.mark.parametrize("name", OPERATIONS)
def test_driver_that_never_recovers_leaks_nothing(driver: FakeDriver, name: str) -> None:
    """Undoing fails too: the memory says so, refuses to go on, and still gives all back."""
    with arrange(driver) as memory:
        num_calls = len(driver.calls_during(lambda: OPERATIONS[name](memory)))
    num_broken = 0
    for index in range(num_calls):
        driver.reset()
        memory = arrange(driver)
        driver.fail(index, 1000)
        with pytest.raises(PhaseMemoryError, match="CUDA_ERROR_FAKE") as error:
            OPERATIONS[name](memory)
        driver.stop_failing()
        if "undoing it failed too" in str(error.value):
            num_broken += 1
            with pytest.raises(PhaseMemoryError, match="could not be undone: close the memory"):
                memory.regions[0].map(3 * PAGE, PAGE)
            assert memory.stats().page_bytes == PAGE
        memory.close()
        assert driver.holdings == NOTHING
    assert (num_broken > 0) == (name != "reserve")


def test_failing_close_goes_on_and_says_so(driver: FakeDriver) -> None:
    memory = arrange(driver)
    num_calls = len(driver.calls_during(memory.close))
    for index in range(num_calls - 1):  # the last one gives the context back
        driver.reset()
        memory = arrange(driver)
        driver.fail(index)
        with pytest.raises(PhaseMemoryError, match="CUDA_ERROR_FAKE"):
            memory.close()
        left = driver.holdings
        # Only what the failed call concerned, and what depends on it, may be left.
        assert max(left.values()) <= 1
        assert left["num_retained"] == 0
        memory.close()  # does nothing
    driver.reset()


def test_release_free_stops_at_the_fault_and_can_go_on(driver: FakeDriver) -> None:
    with open_memory(driver) as memory:
        region = memory.reserve("a", 5 * PAGE)
        region.map()
        region.unmap()
        driver.fail(2)
        with pytest.raises(PhaseMemoryError, match="cuMemRelease: CUDA_ERROR_FAKE"):
            memory.release_free()
        assert memory.stats().free_bytes == 3 * PAGE == driver.holdings["num_physical"] * PAGE
        assert memory.release_free(PAGE) == 2 * PAGE
        assert memory.stats().physical_bytes == PAGE


def test_new_page_that_cannot_be_released_stays_ours(driver: FakeDriver) -> None:
    with open_memory(driver) as memory:
        region = memory.reserve("a", PAGE)
        calls = driver.calls_during(region.map)
        region.unmap()
        memory.release_free()
        # Mapping fails, and then releasing the page that was created for it.
        driver.fail(calls.index("cuMemMap"), 2)
        with pytest.raises(PhaseMemoryError, match="cuMemMap: CUDA_ERROR_FAKE"):
            region.map()
        assert memory.stats().free_bytes == PAGE
        region.map()
        assert memory.stats().physical_bytes == PAGE


# ---- the device's memory, and work that still runs


def test_device_without_memory_raises_and_rolls_back(driver: FakeDriver) -> None:
    driver.set_budget(3 * PAGE)
    with open_memory(driver) as memory:
        a, b = memory.reserve("a", 4 * PAGE), memory.reserve("b", 4 * PAGE)
        with pytest.raises(MemoryError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
            a.map()
        stats = memory.stats()
        assert (stats.physical_bytes, stats.device_free_bytes) == (0, 3 * PAGE)
        assert stats.num_rollbacks == 1
        a.map(0, 3 * PAGE)
        # A handover needs no memory at all.
        memory.handover(a, b, 3 * PAGE, dst_offset=PAGE)
        assert memory.stats().device_free_bytes == 0
        assert driver.count("cuMemCreate") == 4 + 3


def test_driver_without_room_for_a_mapping_is_a_memory_error(driver: FakeDriver) -> None:
    with open_memory(driver) as memory:
        region = memory.reserve("a", PAGE)
        calls = driver.calls_during(region.map)
        assert calls == ["cuMemCreate", "cuMemMap", "cuMemSetAccess"]
        region.unmap()
        driver.fail(0, code=OUT_OF_MEMORY)
        with pytest.raises(MemoryError, match="cuMemMap: CUDA_ERROR_OUT_OF_MEMORY"):
            region.map()


@pytest.mark.parametrize("name", ["unmap", "handover", "switch"])
def test_pages_leave_a_region_only_after_a_synchronization(driver: FakeDriver, name: str) -> None:
    with arrange(driver) as memory:
        driver.launch()  # the fake refuses cuMemUnmap until the context was synchronized
        calls = driver.calls_during(lambda: OPERATIONS[name](memory))
        changes = [calls.index(s) for s in ("cuMemMap", "cuMemUnmap") if s in calls]
        assert calls.index("cuCtxSynchronize") < min(changes)
        assert calls.count("cuCtxSynchronize") == 1
        assert not driver.has_current_context


def test_mapping_alone_does_not_synchronize(driver: FakeDriver) -> None:
    with arrange(driver) as memory:
        calls = driver.calls_during(lambda: memory.regions[1].map(2 * PAGE, 2 * PAGE))
        assert "cuCtxSynchronize" not in calls


def test_handover_makes_before_it_breaks_and_moves_the_bytes(driver: FakeDriver) -> None:
    with arrange(driver) as memory:
        a, b = memory.regions
        calls = driver.calls_during(lambda: OPERATIONS["handover"](memory))
        assert calls[calls.index("cuMemMap") :] == [
            *["cuMemMap"] * 2,
            "cuMemSetAccess",  # one for both pages, which are neighbours
            *["cuMemUnmap"] * 2,
        ]
        assert (stamps(a), stamps(b)) == ([None, None, 3, None, 4], [None, 5, 1, 2])


def test_switch_hands_over_first_and_uses_the_pool_for_the_rest(driver: FakeDriver) -> None:
    with arrange(driver) as memory:
        a, b = memory.regions
        entry = memory.switch("update")
        assert (stamps(a), stamps(b)) == ([1, None, None, None, None], [2, 5, 3, None])
        assert (entry.num_handed_over, entry.num_from_pool, entry.num_to_pool) == (2, 0, 1)
        assert driver.count("cuMemRelease") == 0


# ---- opening


def test_fault_at_every_call_of_opening_leaks_nothing(driver: FakeDriver) -> None:
    opened: list[PhaseMemory] = []
    num_calls = len(driver.calls_during(lambda: opened.append(open_memory(driver))))
    opened[0].close()
    for index in range(num_calls):
        driver.reset()
        driver.fail(index)
        with pytest.raises(PhaseMemoryError, match="CUDA_ERROR_FAKE"):
            open_memory(driver)
        assert driver.holdings == NOTHING


def test_unavailable_reason_names_what_is_missing(driver: FakeDriver, tmp_path: Path) -> None:
    assert is_available("cuda:0", driver=driver.path)
    assert "libnone.so" in unavailable_reason("cuda:0", driver="libnone.so")
    assert "cuDeviceGet" in unavailable_reason("cuda:1", driver=driver.path)
    driver.set_virtual_memory(False)
    assert "no virtual memory management" in unavailable_reason("cuda:0", driver=driver.path)
    with pytest.raises(PhaseMemoryError, match="no virtual memory management"):
        open_memory(driver)
    assert "has no cuInit: install a driver" in unavailable_reason("cuda", driver="libc.so.6")


def test_default_page_size_makes_at_most_2048_pages(driver: FakeDriver) -> None:
    with PhaseMemory("cuda:0", 2048 * PAGE, driver=driver.path) as memory:
        assert memory.page_bytes == PAGE
    with PhaseMemory("cuda:0", 2048 * PAGE + 1, driver=driver.path) as memory:
        assert memory.page_bytes == 2 * PAGE
        assert memory.capacity_bytes == 2048 * PAGE
    with pytest.raises(ValueError, match=f"multiple of {PAGE} bytes"):
        PhaseMemory("cuda:0", 8 * PAGE, page_bytes=4096, driver=driver.path)


def test_driver_declarations_equal_cuda_h(tmp_path: Path) -> None:
    """Sizes, offsets, constants and parameters, where a cuda.h is at hand (triton brings one)."""
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").exists():
        pytest.skip("this triton brings no cuda.h")
    source = Path(__file__).parent / "fake_cuda" / "compare_with_cuda_h.cpp"
    result = subprocess.run(
        [
            *(str(fake_cuda.find_compiler()), "-std=c++17", "-fsyntax-only"),
            *(f"-I{include}", f"-I{fake_cuda.CSRC}", str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


# ---- the torch allocator, called as torch calls it


class TorchFunctions:
    """The two functions that CUDAPluggableAllocator would call."""

    def __init__(self) -> None:
        native = ctypes.CDLL(library.path())
        self._malloc = native.lwz_memory_torch_malloc
        self._malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self._malloc.restype = ctypes.c_void_p
        self._free = native.lwz_memory_torch_free
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._free.restype = None

    def malloc(self, nbytes: int, device: int = 0) -> int | None:
        return self._malloc(nbytes, device, None)

    def free(self, address: int, nbytes: int = 0, device: int = 0) -> None:
        self._free(address, nbytes, device, None)


def test_pool_serves_mapped_addresses_first_fit(driver: FakeDriver) -> None:
    torch_functions = TorchFunctions()
    with open_memory(driver) as memory:
        region = memory.reserve("scratch", 4 * PAGE, keeps_views=True)
        pool = RegionPool(region)
        assert torch_functions.malloc(512) is None  # nothing is mapped
        region.map(0, PAGE)
        region.map(2 * PAGE, 2 * PAGE)
        first = torch_functions.malloc(1000)
        second = torch_functions.malloc(512)
        assert (first, second) == (region.address, region.address + 1024)
        # The rest of page 0 is too small, page 1 is not mapped.
        third = torch_functions.malloc(PAGE)
        assert third == region.address + 2 * PAGE
        assert torch_functions.malloc(PAGE + 512) is None
        assert (pool.num_blocks, pool.used_bytes) == (3, 1024 + 512 + PAGE)
        assert pool.end_bytes == 3 * PAGE
        torch_functions.free(first, 1000)
        assert torch_functions.malloc(1025) == region.address + 1536
        assert torch_functions.malloc(1024) == region.address
        assert torch_functions.malloc(0) is None
        assert torch_functions.malloc(1 << 62) is None
        assert torch_functions.malloc(512, device=1) is None
        for offset in (0, 1024, 1536, 2 * PAGE):
            torch_functions.free(region.address + offset)
        assert (pool.num_blocks, pool.used_bytes) == (0, 0)
        pool.close()


def test_pool_blocks_survive_a_phase_switch(driver: FakeDriver) -> None:
    torch_functions = TorchFunctions()
    with open_memory(driver) as memory:
        region = memory.reserve("scratch", 2 * PAGE, keeps_views=True)
        other = memory.reserve("other", 8 * PAGE)
        memory.define_phase("rollout", {"scratch": 2 * PAGE})
        memory.define_phase("update", {"other": 8 * PAGE})
        memory.switch("rollout")
        pool = RegionPool(region)
        block = torch_functions.malloc(PAGE)
        memory.switch("update")
        assert torch_functions.malloc(512) is None
        assert (pool.num_blocks, other.mapped_bytes) == (1, 8 * PAGE)
        memory.switch("rollout")
        assert torch_functions.malloc(PAGE) == region.address + PAGE
        assert block == region.address
        with pytest.raises(ValueError, match="2 blocks of the region are alive"):
            pool.close()
        with pytest.raises(PhaseMemoryError, match="its pool is open"):
            memory.close()
        torch_functions.free(block)
        torch_functions.free(region.address + PAGE)
        pool.close()
        assert torch_functions.malloc(512) is None


def test_pool_refuses_what_it_cannot_serve(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_memory(driver) as memory:
        region = memory.reserve("scratch", PAGE, keeps_views=True)
        with pytest.raises(ValueError, match="keeps_views=True"):
            RegionPool(memory.reserve("other", PAGE))
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        with pytest.raises(ValueError, match="remove expandable_segments from"):
            RegionPool(region)
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        pool = RegionPool(region)
        with pytest.raises(ValueError, match="device 0 already has a bound region"):
            RegionPool(region)
        pool.close()


def test_blocks_may_be_freed_after_a_forced_close(driver: FakeDriver) -> None:
    torch_functions = TorchFunctions()
    memory = open_memory(driver)
    region = memory.reserve("scratch", PAGE, keeps_views=True)
    region.map()
    pool = RegionPool(region)
    block = torch_functions.malloc(512)
    memory.close(force=True)
    # The addresses stay reserved, so that a late write is a fault; the pages are gone.
    assert driver.holdings == {**NOTHING, "num_reservations": 1}
    assert block is not None
    torch_functions.free(block)
    with pytest.raises(ValueError, match="no region is bound to device 0"):
        pool.used_bytes  # noqa: B018
    pool.close()
    pool.close()  # does nothing
    driver.reset()
    with open_memory(driver) as memory:  # the device may have a new pool
        RegionPool(memory.reserve("scratch", PAGE, keeps_views=True)).close()


def test_open_pool_keeps_a_forgotten_memory(driver: FakeDriver) -> None:
    memory = open_memory(driver)
    pool = RegionPool(memory.reserve("scratch", PAGE, keeps_views=True))
    alive = weakref.ref(pool)
    del memory, pool
    gc.collect()
    survivor = alive()
    assert survivor is not None
    assert driver.holdings["num_reservations"] == 1
    survivor.close()
    survivor.region.memory.close()
