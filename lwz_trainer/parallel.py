"""The one module that creates process groups; everything else receives `Ranks` and `Teams`.

The ranks are a (data, sequence) mesh: rank = data rank · team size + place in the team. The ranks
of a team are neighbours, and every pack of the update lies on an aligned power of two of them.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lwz_kernels.sequence_parallel import (
    SequenceLayout,
    SequenceParallel,
    make_layout,
    make_sequence_groups,
    make_two_d_groups,
)
from lwz_trainer.config.parallel import ParallelConfig, SequencePlan, plan_sequence
from lwz_trainer.errors import UserError
from lwz_trainer.watch import Watch, is_collective_error, silence_limit

__all__ = [
    "Ranks",
    "Teams",
    "local_world_size",
    "make_teams",
    "start_ranks",
    "start_teams",
    "wait_limit",
]


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; `group` is None when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None
    watch: Watch | None = None
    """Ends this process when another one is gone."""
    store: dist.Store | None = None
    """That all ranks reach; None without a group."""

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

    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension, data and sequence alike."""
        assert self.group is not None, "a process alone has nobody to share with"
        return DeviceMesh.from_group(self.group, self.device.type)

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def enter(self, phase: str) -> None:
        """Says what this rank does from now on."""
        if self.watch is not None:
            self.watch.enter(phase)

    def close(self) -> None:
        """After the run, on every rank."""
        if self.watch is not None:
            self.watch.close()
        if self.group is not None:
            dist.destroy_process_group()

    def abandon(self, error: BaseException) -> None:
        """Before this rank leaves with an error. After a failed collective it does not return while
        another rank may still be found to be the reason."""
        if self.watch is None:
            return
        if is_collective_error(error):
            self.watch.give_up()
        else:
            self.watch.end(f"{type(error).__name__}: {error}")

    def _all_reduce(self, values: list[float], op: "dist.ReduceOp.RedOpType") -> list[float]:
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()


@dataclass(frozen=True)
class Teams:
    """The ranks that may share a pack, and their groups for every P in use."""

    plan: SequencePlan
    place: int = 0
    """Of this rank in its team."""
    groups: dict[int, dist.ProcessGroup] = field(default_factory=dict)
    """P -> this rank and the P - 1 neighbours that it shares packs with."""
    exchanges: dict[int, tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]] = field(
        default_factory=dict
    )
    """P -> ranks that exchange heads, and ranks that exchange keys and values."""

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks of the team, one after another, on every one of them."""
        if self.plan.size == 1:
            return values
        parts: list[Any] = [None] * self.plan.size
        dist.all_gather_object(parts, values, group=self.groups[self.plan.size])
        return [value for part in parts for value in part]

    def layout(self, num_ranks: int, document_lengths: list[int]) -> SequenceLayout:
        """Of a pack on `num_ranks` ranks; the same on each of them."""
        scheme, ulysses_ranks = self.plan.schemes[num_ranks]
        return make_layout(document_lengths, num_ranks, scheme, ulysses_ranks=ulysses_ranks)

    def attention(self, layout: SequenceLayout, device: torch.device) -> SequenceParallel:
        """Attention of this rank's shard of a pack."""
        ulysses_group, kv_group = self.exchanges[layout.num_ranks]
        return SequenceParallel(layout, device, ulysses_group=ulysses_group, kv_group=kv_group)


def make_teams(plan: SequencePlan, ranks: Ranks, *, timeout_s: float) -> Teams:
    """Makes the groups of every P in use; all ranks call it together, once, at the start."""
    if plan.size == 1:
        return Teams(plan)
    timeout = wait_limit(timeout_s)
    groups = make_sequence_groups(plan.size, timeout=timeout)
    exchanges: dict[int, tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]] = {}
    for num_ranks, (scheme, ulysses_ranks) in plan.schemes.items():
        if ulysses_ranks is not None:
            exchanges[num_ranks] = make_two_d_groups(ulysses_ranks, num_ranks, timeout=timeout)
        elif scheme == "ulysses":
            exchanges[num_ranks] = (groups[num_ranks], None)
        else:
            exchanges[num_ranks] = (None, groups[num_ranks])
    return Teams(plan, ranks.rank % plan.size, groups, exchanges)


def start_teams(config: ParallelConfig, ranks: Ranks, *, heads: int, kv_heads: int) -> Teams:
    """Teams for a model's heads; all ranks call it together.

    Raises:
        UserError: what `plan_sequence` refuses.
    """
    plan = plan_sequence(
        config,
        heads=heads,
        kv_heads=kv_heads,
        num_ranks=ranks.world_size,
        ranks_per_node=local_world_size(),
    )
    return make_teams(plan, ranks, timeout_s=config.timeout_s)


def local_world_size() -> int:
    """Processes on this node, from torchrun's LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_ranks(*, device: str, num_threads: int, timeout_s: float) -> Ranks:
    """Reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), if there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU: use device=cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = local_world_size()
    if use_cuda:
        if local_ranks > torch.cuda.device_count():
            raise UserError(
                f"{local_ranks} processes on this node, but {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(num_threads or max(1, (cores or 1) // local_ranks))
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world_size == 1:
        return Ranks(rank=rank, world_size=world_size, device=target, group=None)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=wait_limit(timeout_s))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(
        _connect(timeout_s),
        rank=rank,
        world_size=world_size,
        timeout_s=timeout_s,
        prefix=f"watch/{attempt}",
    )
    store = dist.PrefixStore(f"ranks/{attempt}", _connect(timeout_s))
    dist.barrier()  # every rank has made its Watch
    watch.start()
    return Ranks(rank, world_size, target, dist.group.WORLD, watch, store)


def _connect(timeout_s: float) -> dist.TCPStore:
    """A connection of its own to the run's store: the process group's may be blocked for as long as
    a rank is awaited."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=silence_limit(timeout_s)),
    )


def wait_limit(timeout_s: float) -> timedelta:
    """How long a collective may wait, so that the rank awaited is named within `timeout_s`."""
    return timedelta(seconds=timeout_s / 2)
