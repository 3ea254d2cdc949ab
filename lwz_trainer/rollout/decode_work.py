"""What decoding had to read, and how fast this device could: both sides of the bandwidth floor."""

import statistics
import time
from dataclasses import dataclass

import torch

from lwz_trainer.model.decoder import Decoder
from lwz_trainer.out_of_memory import release_cached_memory

__all__ = ["DecodeWork", "copy_bandwidth", "weight_bytes_of_a_step"]

_PROBE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_NUM_PROBES = 5


@dataclass
class DecodeWork:
    """Sums over the decode steps of a rollout; NaN for what an engine does not say."""

    num_steps: float = 0
    num_rows: float = 0
    """Over the steps: the sequences that each of them advanced."""
    num_bytes: float = 0
    """That must be read: the weights once a step, each row's own keys and values."""
    seconds: float = 0

    def add(
        self,
        num_steps: int,
        context_lens: list[int],
        *,
        weight_bytes: int,
        token_bytes: int,
        seconds: float,
    ) -> None:
        """A burst.

        Args:
            num_steps: of the burst.
            context_lens: of each row, tokens that stood in the cache before it.
            weight_bytes: that a step reads.
            token_bytes: keys and values of one token in all layers.
            seconds: that the burst took.
        """
        num_rows = len(context_lens)
        self.num_steps += num_steps
        self.num_rows += num_rows * num_steps
        tokens = num_steps * sum(context_lens) + num_rows * num_steps * (num_steps + 1) // 2
        self.num_bytes += num_steps * weight_bytes + tokens * token_bytes
        self.seconds += seconds


def weight_bytes_of_a_step(model: Decoder) -> int:
    """Of all parameters but an embedding of its own, of which a step reads single rows."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return num_bytes if model.lm_head is None else num_bytes - model.embed.nbytes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes: the median of five.

    For a device that holds nothing yet: on a GPU it takes 1 GiB, and gives it back.
    """
    source = torch.zeros(_PROBE_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times: list[float] = []
    for _ in range(_NUM_PROBES):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    num_bytes = 2 * source.nbytes
    del source, target
    release_cached_memory(device)
    return num_bytes / statistics.median(times)
