"""Two owners take turns in the same memory: a key/value cache while sampling, gradients after it.

Both hold ordinary tensors whose addresses never change; only the physical pages behind them move.
Each would fill the memory alone. The cache keeps its first quarter (think of a prompt that all
sequences share), so that part of it is there again after the update, byte for byte.
"""

import torch

from lwz_kernels.memory import PhaseMemory

__all__ = ["train"]

MIB = 1 << 20
CAPACITY = 8 * MIB


def train(num_steps: int, device: str = "cpu") -> list[dict[str, dict[str, int]]]:
    """Per step and phase, the bytes that each tag held when the phase began."""
    history = []
    with PhaseMemory(device, CAPACITY) as memory:
        # The cache's tensor is made once, as a captured CUDA graph needs it: `keeps_views`. Nothing
        # may touch it outside its phase. Gradients are made anew in each update, and the memory
        # checks that they are gone before it takes their pages.
        kv = memory.reserve("kv", CAPACITY, tag="rollout", keeps_views=True)
        gradients = memory.reserve("gradients", CAPACITY, tag="update")
        memory.define_phase("rollout", {"kv": CAPACITY})
        memory.define_phase("update", {"kv": CAPACITY // 4, "gradients": CAPACITY // 4 * 3})

        memory.switch("rollout")
        cache = kv.tensor((4, CAPACITY // 16), torch.float32)
        prompt = torch.arange(CAPACITY // 16, dtype=torch.float32, device=device)
        cache[0] = prompt
        address = cache.data_ptr()
        for step in range(num_steps):
            cache[1:] = step  # the rollout writes all of it

            memory.switch("update")
            gradient = gradients.tensor((CAPACITY // 16 * 3,), torch.float32)
            gradient.zero_()
            del gradient

            memory.switch("rollout")
            assert cache.data_ptr() == address
            assert torch.equal(cache[0], prompt)
            history.append(
                {name: entry.stats.mapped_bytes_by_tag for name, entry in memory.ledger.items()}
            )
        assert memory.stats().peak_physical_bytes == CAPACITY
        del cache
    return history


def main() -> None:
    """Run three steps and print who had how much."""
    for step, phases in enumerate(train(3)):
        for phase, held in phases.items():
            sizes = ", ".join(f"{tag} {nbytes // MIB} MiB" for tag, nbytes in held.items())
            print(f"step {step}  in {phase:8s} {sizes}")


if __name__ == "__main__":
    main()
