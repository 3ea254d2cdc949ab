"""Phase memory on a real GPU: tensors, a switch, and a CUDA graph that outlives one."""

import pytest
import torch

from lwz_kernels.memory import PhaseMemory, RegionPool, is_available

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def open_memory(capacity_bytes: int) -> PhaseMemory:
    if not is_available("cuda"):
        pytest.skip("this driver has no virtual memory management")
    return PhaseMemory("cuda", capacity_bytes)


def test_gpu_switch_moves_memory_and_keeps_addresses() -> None:
    with open_memory(64 * MIB) as memory:
        kv = memory.reserve("kv", 64 * MIB, keeps_views=True)
        grads = memory.reserve("grads", 64 * MIB)
        memory.define_phase("rollout", {"kv": 64 * MIB})
        memory.define_phase("update", {"grads": 48 * MIB, "kv": 16 * MIB})
        memory.switch("rollout")
        cache = kv.tensor((4, 4 * MIB), torch.float32)
        assert (cache.device, cache.data_ptr()) == (memory.device, kv.address)
        cache.copy_(torch.arange(4.0, device=cache.device)[:, None].expand_as(cache))
        free_before = memory.stats().device_free_bytes
        entry = memory.switch("update")
        assert entry.num_handed_over * memory.page_bytes == 48 * MIB
        assert entry.stats.device_free_bytes == free_before
        # The bytes moved along, and the cache kept its first quarter.
        moved = grads.tensor((3, 4 * MIB), torch.float32)
        assert moved.mean(1).tolist() == [1.0, 2.0, 3.0]
        assert cache[0].eq(0.0).all()
        moved.zero_()
        del moved
        memory.switch("rollout")
        cache.fill_(5.0)
        assert cache.sum().item() == 5.0 * 16 * MIB
        del cache


def test_gpu_release_gives_memory_back_to_the_driver() -> None:
    with open_memory(256 * MIB) as memory:
        region = memory.reserve("kv", 256 * MIB)
        free_before = torch.cuda.mem_get_info()[0]
        region.map()
        assert free_before - torch.cuda.mem_get_info()[0] >= 256 * MIB
        region.unmap()
        assert free_before - torch.cuda.mem_get_info()[0] >= 256 * MIB
        assert memory.release_free() == 256 * MIB
        assert free_before - torch.cuda.mem_get_info()[0] < 16 * MIB


def test_gpu_graph_replays_after_its_scratch_was_lent() -> None:
    with open_memory(128 * MIB) as memory:
        scratch = memory.reserve("scratch", 64 * MIB, keeps_views=True)
        other = memory.reserve("other", 128 * MIB)
        memory.define_phase("rollout", {"scratch": 64 * MIB})
        memory.define_phase("update", {"other": 128 * MIB})
        memory.switch("rollout")
        pool = RegionPool(scratch)
        x = torch.randn(1024, 1024, device="cuda")
        torch.mm(x, x)  # cuBLAS takes its workspace before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.mem_pool().id):
            y = torch.mm(x, x).relu() + 1.0
        assert scratch.address <= y.data_ptr() < scratch.address + scratch.nbytes
        assert 0 < pool.end_bytes <= scratch.nbytes
        for step in range(3):
            x.normal_()
            graph.replay()
            torch.testing.assert_close(y, torch.mm(x, x).relu() + 1.0)
            memory.switch("update")
            other.tensor((32 * MIB,), torch.float32).fill_(float(step))
            memory.switch("rollout")
        del graph, y
        pool.close()
