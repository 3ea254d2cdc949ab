"""Phase memory on a CPU: what it promises to Python code, and what it refuses."""

import ctypes
import doctest
import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lwz_kernels.memory import (
    PhaseMemory,
    PhaseMemoryError,
    Region,
    RegionPool,
    api,
    is_available,
    library,
    plan,
    unavailable_reason,
)
from lwz_kernels.memory.plan import plan_moves
from lwz_kernels.memory.views import _CudaSpan

pytestmark = pytest.mark.skipif(not library.is_available(), reason=library.unavailable_reason())
PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20


def open_memory(num_pages: int = 8) -> PhaseMemory:
    return PhaseMemory("cpu", num_pages * PAGE, page_bytes=PAGE)


# ---- tensors


def test_tensor_is_a_view_at_a_fixed_address() -> None:
    with open_memory() as memory:
        region = memory.reserve("kv", 4 * PAGE)
        region.map()
        x = region.tensor((3, 5), torch.bfloat16, offset=PAGE + 6)
        assert x.data_ptr() == region.address + PAGE + 6
        assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 5), torch.bfloat16, True)
        x.copy_(torch.arange(15).view(3, 5))
        again = region.tensor((15,), torch.bfloat16, offset=PAGE + 6)
        assert torch.equal(again, torch.arange(15, dtype=torch.bfloat16))
        del x, again


def test_address_and_tensor_survive_losing_and_regaining_pages() -> None:
    with open_memory() as memory:
        region = memory.reserve("kv", 2 * PAGE, keeps_views=True)
        region.map()
        x = region.tensor((PAGE // 4,), torch.float32)
        before = (region.address, x.data_ptr())
        for value in range(3):
            region.unmap()
            region.map()
            x.fill_(value)
            assert region.tensor((1,), torch.float32, offset=PAGE - 4).item() == value
        assert (region.address, x.data_ptr()) == before
        del x


def test_tensor_of_unmapped_bytes_is_refused() -> None:
    with open_memory() as memory:
        region = memory.reserve("kv", 3 * PAGE)
        with pytest.raises(PhaseMemoryError, match=r"'kv': bytes \[0, 4\) are not mapped"):
            region.tensor((1,), torch.float32)
        region.map(0, 2 * PAGE)
        region.tensor((2 * PAGE,), torch.uint8)
        with pytest.raises(PhaseMemoryError, match="not mapped"):
            region.tensor((2 * PAGE + 1,), torch.uint8)
        with pytest.raises(ValueError, match="outside its"):
            region.tensor((3 * PAGE + 1,), torch.uint8)
        with pytest.raises(ValueError, match="outside its"):
            region.tensor((1,), torch.uint8, offset=-1)
        with pytest.raises(ValueError, match="multiple of 4 bytes"):
            region.tensor((1,), torch.float32, offset=2)
        with pytest.raises(ValueError, match="at least one element"):
            region.tensor((0, 4), torch.float32)


@pytest.mark.parametrize("keep", ["slice", "parameter", "graph"])
def test_bytes_that_a_tensor_uses_keep_their_pages(keep: str) -> None:
    """Not only the tensor itself counts: whatever shares its storage does."""
    with open_memory() as memory:
        region, other = memory.reserve("kv", 2 * PAGE), memory.reserve("other", 2 * PAGE)
        memory.define_phase("update", {"other": 2 * PAGE, "kv": 0})
        region.map()
        x = region.tensor((8, 4), torch.float32, offset=PAGE)
        x.fill_(2.0)
        held: object
        if keep == "slice":
            held = x[3:5, 1]
        elif keep == "parameter":
            held = torch.nn.Parameter(x)
        else:
            held = torch.ones(4, requires_grad=True) * x  # saved for backward
        del x
        assert region.num_views == 1
        for action in (
            lambda: region.unmap(),
            lambda: region.unmap(PAGE, PAGE),
            lambda: memory.handover(region, other, 2 * PAGE),
            lambda: memory.switch("update"),
            lambda: memory.unreserve(region) if not memory.phase else None,
        ):
            with pytest.raises((PhaseMemoryError, ValueError), match=r"alive|part of the phases"):
                action()
        assert memory.phase is None
        region.unmap(0, PAGE)  # no tensor there
        del held
        gc.collect()
        assert region.num_views == 0
        region.unmap(PAGE, PAGE)


def test_close_waits_for_tensors_unless_forced() -> None:
    memory = open_memory()
    region = memory.reserve("kv", PAGE)
    region.map()
    x = region.tensor((4,), torch.float32)
    with pytest.raises(PhaseMemoryError, match="1 storages over it are alive"):
        memory.close()
    memory.close(force=True)
    # Its addresses still belong to nobody else: the reservation is in the process's map.
    assert any(begin <= x.data_ptr() < end for begin, end in address_map("---p"))
    memory.close()
    with pytest.raises(PhaseMemoryError, match="the memory is closed"):
        region.map()
    with pytest.raises(PhaseMemoryError, match="the memory is closed"):
        memory.stats()
    del x


def test_error_inside_with_is_not_hidden_by_tensors_alive() -> None:
    def fail() -> None:
        with open_memory() as memory:
            region = memory.reserve("kv", PAGE)
            region.map()
            x = region.tensor((4,), torch.float32)
            raise ZeroDivisionError(len(x))

    with pytest.raises(ZeroDivisionError):
        fail()


def test_tensors_keep_a_forgotten_memory_open() -> None:
    memory = open_memory()
    region = memory.reserve("kv", PAGE)
    region.map()
    x = region.tensor((4,), torch.float32)
    alive = weakref.ref(memory)
    del memory, region
    gc.collect()
    x.fill_(1.0)
    assert alive() is not None
    del x
    gc.collect()
    assert alive() is None
    assert "lwz_phase_memory" not in Path("/proc/self/maps").read_text()


def test_cuda_span_speaks_the_cuda_array_interface() -> None:
    assert _CudaSpan(1 << 40, 12).__cuda_array_interface__ == {
        "shape": (12,),
        "typestr": "|u1",
        "data": (1 << 40, False),
        "version": 3,
    }


# ---- physical memory


def address_map(permissions: str) -> list[tuple[int, int]]:
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, mode, *_ = line.split()
        if mode == permissions:
            begin, end = addresses.split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


def resident_shared_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel reports no RssShmem")


def file_bytes() -> int:
    """What the kernel has allocated for the memfd behind the only open memory."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "lwz_phase_memory" in os.readlink(link):
                total += os.stat(link).st_blocks * 512
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return total


def test_memory_is_really_shared_and_really_released() -> None:
    size = 32 * MIB
    gc.collect()
    resident_before, files_before = resident_shared_bytes(), file_bytes()

    def resident() -> int:
        return resident_shared_bytes() - resident_before

    with PhaseMemory("cpu", size) as memory:
        kv, scratch = memory.reserve("kv", size), memory.reserve("scratch", size)
        assert (file_bytes() - files_before, resident()) == (0, 0)
        kv.map()
        assert file_bytes() - files_before == size
        kv.tensor((size,), torch.uint8).fill_(7)
        assert resident() == pytest.approx(size, abs=MIB)
        memory.handover(kv, scratch, size)
        assert (scratch.tensor((size,), torch.uint8) == 7).all()
        # Two regions of 32 MiB, one copy.
        assert resident() == pytest.approx(size, abs=MIB)
        assert file_bytes() - files_before == size
        scratch.unmap()
        assert resident() == pytest.approx(0, abs=MIB)
        assert file_bytes() - files_before == size  # free, but still ours
        assert memory.release_free(size // 2) == size // 2
        assert file_bytes() - files_before == size // 2
        assert memory.stats().physical_bytes == size // 2
        memory.release_free()
        assert file_bytes() - files_before == 0
    assert file_bytes() == files_before


def test_reserving_more_than_there_is_costs_nothing() -> None:
    with PhaseMemory("cpu", 1 << 40) as memory:
        region = memory.reserve("huge", 1 << 42)
        assert memory.page_bytes == (1 << 40) // 2048
        assert memory.stats().physical_bytes == 0
        assert not region.is_mapped(0, 1)


def test_addresses_beyond_the_processor_are_a_memory_error() -> None:
    with PhaseMemory("cpu", 1 << 55) as memory:
        with pytest.raises(MemoryError, match="mmap of addresses: Cannot allocate memory"):
            memory.reserve("huge", 1 << 55)
        assert memory.regions == ()


def test_refused_page_undoes_the_ones_before_it() -> None:
    """The kernel refuses a file (our physical memory) beyond the process's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_memory(8) as memory:
        region = memory.reserve("a", 8 * PAGE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, hard))
        try:
            with pytest.raises(PhaseMemoryError, match="fallocate: File too large"):
                region.map(0, 5 * PAGE)
            assert (region.mapped_bytes, file_bytes()) == (0, 0)
            region.map(4 * PAGE, 4 * PAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert memory.stats().num_rollbacks == 1
        region.tensor((4 * PAGE,), torch.uint8, offset=4 * PAGE).fill_(1)


# ---- moving pages


def test_handover_moves_bytes_and_leaves_nothing_behind() -> None:
    with open_memory(4) as memory:
        a, b = memory.reserve("a", 4 * PAGE), memory.reserve("b", 4 * PAGE)
        a.map()
        for slot in range(4):
            a.tensor((PAGE,), torch.uint8, offset=slot * PAGE).fill_(slot)
        memory.handover(a, b, 2 * PAGE, src_offset=PAGE, dst_offset=0)
        assert [a.is_mapped(slot * PAGE, PAGE) for slot in range(4)] == [True, False, False, True]
        assert b.tensor((2, PAGE), torch.uint8).float().mean(1).tolist() == [1.0, 2.0]
        memory.handover(b, b, PAGE, src_offset=0, dst_offset=3 * PAGE)  # within a region
        assert b.tensor((PAGE,), torch.uint8, offset=3 * PAGE).unique().tolist() == [1]
        stats = memory.stats()
        assert (stats.num_handed_over, stats.num_created, stats.num_unmapped) == (3, 4, 0)
        assert stats.physical_bytes == stats.mapped_bytes == 4 * PAGE


def test_statistics_by_region_and_tag() -> None:
    with open_memory(8) as memory:
        kv = memory.reserve("kv", 5 * PAGE - 1, tag="rollout")
        graphs = memory.reserve("graphs", PAGE, tag="rollout")
        grads = memory.reserve("grads", 4 * PAGE, tag="update")
        assert kv.nbytes == 5 * PAGE
        kv.map(0, 3 * PAGE)
        graphs.map()
        grads.map(0, 2 * PAGE)
        kv.unmap(PAGE, PAGE)
        x = kv.tensor((2,), torch.float32)
        stats = memory.stats()
        assert stats.mapped_bytes_by_tag == {"rollout": 3 * PAGE, "update": 2 * PAGE}
        assert [(r.name, r.mapped_bytes, r.num_views) for r in stats.regions] == [
            ("kv", 2 * PAGE, 1),
            ("graphs", PAGE, 0),
            ("grads", 2 * PAGE, 0),
        ]
        assert (stats.mapped_bytes, stats.free_bytes) == (5 * PAGE, PAGE)
        assert (stats.peak_mapped_bytes, stats.peak_physical_bytes) == (6 * PAGE, 6 * PAGE)
        assert (stats.num_mapped, stats.num_unmapped, stats.num_synchronizations) == (6, 1, 1)
        assert stats.device_free_bytes > 0
        del x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a, b: a.map(), "page 0 of region 0 is already mapped"),
        (lambda m, a, b: a.map(PAGE, 2 * PAGE), "page 1 of region 0 is already mapped"),
        (lambda m, a, b: b.unmap(), "page 0 of region 1 is not mapped"),
        (lambda m, a, b: a.unmap(PAGE, 2 * PAGE), "page 2 of region 0 is not mapped"),
        (lambda m, a, b: a.map(3 * PAGE, 2 * PAGE), "within its"),
        (lambda m, a, b: a.map(-PAGE, PAGE), "within its"),
        (lambda m, a, b: a.map(2 * PAGE, 0), "at least one page"),
        (lambda m, a, b: a.map(4 * PAGE), "at least one page"),
        (lambda m, a, b: a.map(2 * PAGE + 1, PAGE), f"multiples of the page size {PAGE}"),
        (lambda m, a, b: a.unmap(0, PAGE - 1), f"multiples of the page size {PAGE}"),
        (lambda m, a, b: m.handover(b, a, PAGE, dst_offset=3 * PAGE), "region 1 is not mapped"),
        (lambda m, a, b: m.handover(a, b, 3 * PAGE), "page 2 of region 0 is not mapped"),
        (lambda m, a, b: m.handover(a, a, PAGE, dst_offset=PAGE), "is already mapped"),
        (lambda m, a, b: m.handover(a, b, PAGE, dst_offset=9 * PAGE), "within its"),
        (lambda m, a, b: m.reserve("a", PAGE), "already is a region 'a'"),
        (lambda m, a, b: m.reserve("c", 0), "at least one byte"),
        (lambda m, a, b: m.unreserve(a), "page 0 of region 0 is still mapped"),
        (lambda m, a, b: m.release_free(-1), "expected 0 bytes or more"),
        (lambda m, a, b: m.switch("no"), r"there is no phase 'no', only \[\]"),
        (lambda m, a, b: m.define_phase("p", {"c": PAGE}), "there is no region 'c'"),
        (lambda m, a, b: m.define_phase("p", {"a": -1}), "expected 0 to"),
        (lambda m, a, b: m.define_phase("p", {"a": 5 * PAGE}), "expected 0 to"),
        (lambda m, a, b: m.define_phase("p", {"a": 4 * PAGE, "b": 1}), "the capacity is"),
        (lambda m, a, b: m.define_phase("p", {}, keep_free_bytes=-1), "cannot be negative"),
        (lambda m, a, b: RegionPool(a), "region of a CUDA device"),
    ],
)
def test_bad_calls_change_nothing(call, message: str) -> None:
    with open_memory(4) as memory:
        a, b = memory.reserve("a", 4 * PAGE), memory.reserve("b", 8 * PAGE)
        a.map(0, 2 * PAGE)
        before = ([memory.page_table(r) for r in (a, b)], memory.stats().num_mapped)
        with pytest.raises(ValueError, match=message):
            call(memory, a, b)
        assert ([memory.page_table(r) for r in (a, b)], memory.stats().num_mapped) == before


def test_over_capacity_maps_nothing() -> None:
    with open_memory(4) as memory:
        a, b = memory.reserve("a", 4 * PAGE), memory.reserve("b", 4 * PAGE)
        a.map(0, 3 * PAGE)
        a.unmap(0, PAGE)
        with pytest.raises(MemoryError, match="3 pages are asked for, 1 are free and 1 may still"):
            b.map(0, 3 * PAGE)
        assert (b.mapped_bytes, memory.stats().physical_bytes) == (0, 3 * PAGE)
        b.map(0, 2 * PAGE)


def test_region_of_another_or_former_memory_is_refused() -> None:
    with open_memory() as memory, open_memory() as other:
        region = memory.reserve("a", PAGE)
        with pytest.raises(ValueError, match="part of this memory"):
            other.handover(region, other.reserve("b", PAGE), PAGE)
        memory.unreserve(region)
        with pytest.raises(ValueError, match="no longer"):
            region.map()
        assert memory.reserve("a", PAGE).name == "a"  # the name is free again


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"capacity_bytes": 0}, "capacity must hold one page"),
        ({"capacity_bytes": -1}, "capacity must hold one page"),
        ({"capacity_bytes": 8 * PAGE, "page_bytes": PAGE + 1}, "page size must be a multiple"),
        ({"capacity_bytes": 8 * PAGE, "page_bytes": 0}, "page size of at least 1, got 0"),
        ({"capacity_bytes": 8 * PAGE, "page_bytes": 16 * PAGE}, "at most the capacity"),
        ({"capacity_bytes": PAGE, "device": "meta"}, "expected a cpu or cuda device"),
    ],
)
def test_sizes_and_devices_that_make_no_memory(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhaseMemory(**{"device": "cpu", **kwargs})


def test_native_interface_checks_what_python_already_checked() -> None:
    """Other callers of the C functions get errors too, not a corrupted table."""
    with open_memory(4) as memory:
        region = memory.reserve("a", 4 * PAGE)
        region.map(0, PAGE)
        for moves, message in [
            ([(-1, 0, -1, 0, 1)], "from the pool to the pool"),
            ([(-1, 0, 0, 1, 0)], "at least one page"),
            ([(-1, 0, 0, 2, 3)], "outside region 0"),
            ([(-1, 0, 0, 1, 1 << 62)], "outside region 0"),
            ([(-1, 0, 0, -1, 1)], "outside region 0"),
            ([(-1, 0, 7, 0, 1)], "there is no region 7"),
            ([(-2, 0, 0, 1, 1)], "there is no region -2"),
            ([(-1, 0, 0, 1, 1), (-1, 0, 0, 1, 1)], "is named twice"),
            ([(0, 0, -1, 0, 1), (0, 0, 0, 1, 1)], "is named twice"),
        ]:
            with pytest.raises(ValueError, match=message):
                library.call(
                    "apply",
                    memory.native_handle(),
                    (library.Move * len(moves))(*moves),
                    len(moves),
                )
            assert memory.page_table(region) == [0, -1, -1, -1]
        with pytest.raises(ValueError, match="fewer bytes than"):
            library.call(
                "reserve",
                memory.native_handle(),
                1 << 60,
                ctypes.byref(ctypes.c_int64()),
                ctypes.byref(ctypes.c_uint64()),
            )


# ---- phases


def two_phases(memory: PhaseMemory) -> tuple[Region, Region]:
    kv, grads = memory.reserve("kv", 6 * PAGE), memory.reserve("grads", 6 * PAGE)
    memory.define_phase("rollout", {"kv": 6 * PAGE})
    memory.define_phase("update", {"grads": 5 * PAGE - 1, "kv": PAGE})
    return kv, grads


def test_switch_arranges_what_was_defined_and_keeps_a_ledger() -> None:
    with open_memory(8) as memory:
        kv, grads = two_phases(memory)
        other = memory.reserve("other", PAGE)
        other.map()
        assert (memory.phase, memory.ledger) == (None, {})
        first = memory.switch("rollout")
        assert (first.previous, first.num_from_pool, first.num_handed_over) == (None, 6, 0)
        kv.tensor((6, PAGE), torch.uint8).copy_(torch.arange(6)[:, None].expand(6, PAGE))
        entry = memory.switch("update")
        assert (memory.phase, entry.previous) == ("update", "rollout")
        assert (entry.num_handed_over, entry.num_from_pool, entry.num_to_pool) == (5, 0, 0)
        assert [kv.mapped_bytes, grads.mapped_bytes, other.mapped_bytes] == [PAGE, 5 * PAGE, PAGE]
        # The page that stayed kept its bytes; the others took theirs along.
        assert kv.tensor((PAGE,), torch.uint8).unique().tolist() == [0]
        values = grads.tensor((5, PAGE), torch.uint8)
        assert values.float().mean(1).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert entry.stats.mapped_bytes == 7 * PAGE
        assert entry.torch_reserved_bytes == 0
        assert memory.ledger == {"rollout": first, "update": entry}
        with pytest.raises(PhaseMemoryError, match=r"not mapped in phase 'update'.*\['rollout'"):
            kv.tensor((2 * PAGE,), torch.uint8)
        del values
        back = memory.switch("rollout")
        assert memory.stats().physical_bytes == 7 * PAGE  # nothing was created on the way
        assert (back.num_handed_over, memory.ledger["rollout"]) == (5, back)


def test_phase_gives_what_it_does_not_need_back_to_the_device() -> None:
    with open_memory(8) as memory:
        kv, _ = two_phases(memory)
        memory.define_phase("update", {"grads": 2 * PAGE}, keep_free_bytes=PAGE)
        memory.switch("rollout")
        stats = memory.switch("update").stats
        assert (stats.mapped_bytes, stats.free_bytes, stats.physical_bytes) == (
            2 * PAGE,
            PAGE,
            3 * PAGE,
        )
        assert kv.mapped_bytes == 0
        assert memory.switch("rollout").num_from_pool == 4


def test_failed_switch_stays_in_its_phase() -> None:
    with open_memory(8) as memory:
        kv, grads = two_phases(memory)
        other = memory.reserve("other", 2 * PAGE)
        memory.define_phase("big", {"kv": 6 * PAGE, "grads": 2 * PAGE})
        entry = memory.switch("rollout")
        other.map(0, PAGE)
        with pytest.raises(MemoryError, match="over capacity"):
            memory.switch("big")
        x = kv.tensor((6 * PAGE,), torch.uint8)
        with pytest.raises(PhaseMemoryError, match="a tensor over bytes"):
            memory.switch("update")
        assert memory.phase == "rollout"
        assert memory.ledger == {"rollout": entry}
        assert [kv.mapped_bytes, grads.mapped_bytes] == [6 * PAGE, 0]
        del x


def test_phases_govern_their_regions() -> None:
    with open_memory(8) as memory:
        kv, grads = two_phases(memory)
        kv.map(0, PAGE)  # before the first phase everything is allowed
        with pytest.raises(PhaseMemoryError, match=r"needs the phase 'rollout'.* in None"):
            memory.require_phase("rollout")
        memory.switch("rollout")
        memory.require_phase("rollout")
        with pytest.raises(PhaseMemoryError, match=r"needs the phase 'update'.* in 'rollout'"):
            memory.require_phase("update")
        for call in (grads.map, kv.unmap):
            with pytest.raises(ValueError, match="is part of the phases"):
                call()
        with pytest.raises(ValueError, match=r"part of the phases \['rollout', 'update'\]"):
            memory.unreserve(kv)
        # Pages of finished sequences may become gradient memory while others still decode.
        memory.handover(kv, grads, 2 * PAGE, src_offset=4 * PAGE)
        assert grads.mapped_bytes == 2 * PAGE
        assert memory.switch("rollout").num_handed_over == 2
        assert [kv.mapped_bytes, grads.mapped_bytes] == [6 * PAGE, 0]


TABLES = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4)


@given(TABLES, st.data())
def test_plan_moves_reaches_the_plan_with_the_fewest_pages(
    occupied: list[list[bool]], data: st.DataObject
) -> None:
    tables = {
        region: [10 * region + slot if has else -1 for slot, has in enumerate(slots)]
        for region, slots in enumerate(occupied)
    }
    wanted = {
        region: data.draw(st.integers(0, len(table)))
        for region, table in tables.items()
        if data.draw(st.booleans())
    }
    surplus = sum(p >= 0 for r, n in wanted.items() for p in tables[r][n:])
    missing = sum(p < 0 for r, n in wanted.items() for p in tables[r][:n])
    moves = plan_moves(tables, wanted)
    result = {region: list(table) for region, table in tables.items()}
    for src, src_page, dst, dst_page, num_pages in moves:
        for i in range(num_pages):
            page = -2
            if src >= 0:
                page, result[src][src_page + i] = result[src][src_page + i], -1
                assert page >= 0
            if dst >= 0:
                assert result[dst][dst_page + i] == -1
                result[dst][dst_page + i] = page
    for region, table in result.items():
        if region in wanted:
            assert [page != -1 for page in table] == [
                slot < wanted[region] for slot in range(len(table))
            ]
        else:
            assert table == tables[region]
    assert sum(move[4] for move in moves) == max(surplus, missing)


# ---- threads and processes


def test_threads_do_not_tear_the_table() -> None:
    with open_memory(16) as memory:
        regions = [memory.reserve(str(i), 8 * PAGE) for i in range(4)]
        failures: list[BaseException] = []

        def work(region: Region, value: int) -> None:
            try:
                for _ in range(60):
                    region.map(0, 4 * PAGE)
                    x = region.tensor((4 * PAGE,), torch.uint8)
                    x.fill_(value)
                    assert (x == value).all()
                    del x
                    memory.handover(region, region, 2 * PAGE, dst_offset=6 * PAGE)
                    region.unmap(2 * PAGE, 2 * PAGE)
                    region.unmap(6 * PAGE, 2 * PAGE)
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(region, i + 1)) for i, region in enumerate(regions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        stats = memory.stats()
        assert (stats.mapped_bytes, stats.num_mapped) == (0, 4 * 60 * 4)
        assert stats.free_bytes == stats.physical_bytes <= 16 * PAGE


def test_native_calls_from_threads_do_not_tear_the_table() -> None:
    """Without Python's lock above it: the library has one of its own."""
    with open_memory(8) as memory:
        handle = memory.native_handle()
        regions = [memory.reserve(str(i), 2 * PAGE) for i in range(4)]
        failures: list[Exception] = []

        def work(index: int) -> None:
            give = (library.Move * 1)(library.Move(-1, 0, index, 0, 2))
            take = (library.Move * 1)(library.Move(index, 0, -1, 0, 2))
            try:
                for _ in range(500):
                    library.call("apply", handle, give, 1)
                    library.call("apply", handle, take, 1)
            except (ValueError, MemoryError, PhaseMemoryError) as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(region.index,)) for region in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        stats = memory.stats()
        assert (stats.num_mapped, stats.num_unmapped) == (4000, 4000)
        assert (stats.mapped_bytes, stats.free_bytes) == (0, stats.num_created * PAGE)
        for region in regions:
            region.map()
        tables = [page for region in regions for page in memory.page_table(region)]
        assert sorted(tables) == list(range(8))


def _use_in_child(memory: PhaseMemory, region: Region, address: int, results) -> None:
    for action in (region.map, memory.stats):
        try:
            action()
        except PhaseMemoryError as error:
            results.put(str(error))
    memory.close(force=True)
    results.put(any(begin <= address < end for begin, end in address_map("rw-s")))


def test_forked_child_can_neither_use_nor_harm_it() -> None:
    context = multiprocessing.get_context("fork")
    with open_memory() as memory:
        region = memory.reserve("a", 2 * PAGE)
        region.map(0, PAGE)
        x = region.tensor((PAGE,), torch.uint8)
        x.fill_(5)
        results = context.SimpleQueue()
        child = context.Process(
            target=_use_in_child, args=(memory, region, region.address, results)
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert "belongs to the parent process" in results.get()
        assert "belongs to the parent process" in results.get()
        assert results.get() is False  # its mapping was not inherited
        assert (x == 5).all()
        region.map(PAGE, PAGE)
        del x


def test_touching_an_unmapped_address_is_a_fault_of_the_hardware() -> None:
    """What happens behind our back is at least loud: SIGSEGV, not somebody else's bytes."""
    code = """
import torch
from lwz_kernels.memory import PhaseMemory
memory = PhaseMemory("cpu", 1 << 20)
region = memory.reserve("kv", 1 << 20, keeps_views=True)
region.map()
x = region.tensor((4,), torch.float32)
x.fill_(1)
region.unmap()
print("unmapped", flush=True)
x.fill_(2)
print("not reached")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout == "unmapped\n"
    assert result.returncode == -11


# ---- availability and documentation


@pytest.mark.parametrize("module", [api, plan])
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module) == (0, 1)


def test_availability_of_this_machine() -> None:
    assert is_available("cpu")
    assert unavailable_reason("cpu") == ""
    if not torch.cuda.is_available():
        assert not is_available("cuda")
        assert "libcuda.so.1" in unavailable_reason("cuda")


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "it was not built"))
    assert (is_available(), unavailable_reason("cuda")) == (False, "it was not built")
    with pytest.raises(PhaseMemoryError, match="not available: it was not built"):
        PhaseMemory("cpu", MIB)


def test_importing_loads_neither_library_nor_triton() -> None:
    code = (
        "import sys, lwz_kernels.memory as m; "
        "print(m.library._load.cache_info().currsize, 'triton' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == ["0", "False"]
