"""The one module that creates process groups; everything else receives `Ranks`."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lwz_trainer.errors import UserError

__all__ = ["Ranks", "start_ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; `group` is None when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over ranks, in fp64."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        """Elementwise maximum over ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Objects of all ranks, in rank order, on every rank."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group()

    def _all_reduce(self, values: list[float], op: "dist.ReduceOp.RedOpType") -> list[float]:
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()


def start_ranks(*, device: str, num_threads: int, timeout_minutes: float) -> Ranks:
    """Reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), if there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU: use device=cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if use_cuda:
        if local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{local_world_size} processes on this node, but {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(num_threads or max(1, (cores or 1) // local_world_size))
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    group = None
    if world_size > 1:
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes)
        )
        group = dist.group.WORLD
    return Ranks(rank=rank, world_size=world_size, device=target, group=group)
