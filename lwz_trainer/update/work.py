"""One micro-batch of a rank: its tokens, how they attend, and who holds the rest of its pack."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.sequence_parallel import SequenceParallel
from lwz_trainer.config.model import ModelSection
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.parallel import Teams
from lwz_trainer.update.packing import MicroBatch, empty_microbatch
from lwz_trainer.update.sharding import PlacedPack, document_lengths, shard_microbatch

__all__ = [
    "PackedAttend",
    "ShardedAttend",
    "Work",
    "can_share_prompts",
    "make_idle_work",
    "make_work",
]


@dataclass(frozen=True)
class PackedAttend:
    """Packed causal attention of whole sequences."""

    table: SegmentTable
    impl: str

    def __call__(self, layer: int, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor) -> Tensor:
        del layer  # every layer attends alike; the engine's cache is what needs the number
        return attention(q_THK, k_TJK, v_TJK, segments=self.table, impl=self.impl)[0]


@dataclass(frozen=True)
class ShardedAttend:
    """Attention of this rank's shard to the whole sequences, over the ranks of the pack."""

    parallel: SequenceParallel
    impl: str

    def __call__(self, layer: int, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor) -> Tensor:
        del layer
        return self.parallel.attention(q_THK, k_TJK, v_TJK, impl=self.impl)[0]


@dataclass(frozen=True, eq=False)
class Work:
    """What a rank computes of one pack."""

    batch: MicroBatch
    attend: PackedAttend | ShardedAttend
    group: dist.ProcessGroup | None
    """The ranks of the pack; None where it is whole here."""
    device: torch.device

    @property
    def is_idle(self) -> bool:
        """Whether it only keeps step with the other ranks."""
        return not self.batch.samples

    def hidden(
        self, model: Decoder, section: ModelSection, offload: HostOffload | None = None
    ) -> Tensor:
        """Hidden states [R, D] of the positions that predict the rows."""
        hidden_TD = model(
            self.batch.input_ids_T.to(self.device),
            self.batch.position_ids_T.to(self.device),
            self.attend,
            checkpoint_layers=section.checkpoint_layers,
            offload=offload,
            mlp_tile_tokens=section.mlp_tile_tokens,
        )
        self.check_calls(model.config.layers)
        return hidden_TD[self.batch.row_index_R.to(self.device)]

    def check_calls(self, expected: int) -> None:
        """Raises if sharded attention did not run `expected` times since the last check."""
        if isinstance(self.attend, ShardedAttend):
            self.attend.parallel.check_calls(expected)

    def is_any(self, value: bool | Tensor) -> bool:
        """Whether it is so on any rank of the pack; each of them must ask."""
        flag = torch.tensor(float(value), device=self.device)
        if self.group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def can_share_prompts(device: torch.device, impl: str) -> bool:
    """Whether attention under this setting knows prompts that several sequences share."""
    return device.type == "cpu" or impl in ("triton", "torch", "reference")


def make_work(pack: PlacedPack, teams: Teams, device: torch.device, impl: str) -> Work:
    """This rank's part of a pack; segment tables are made here once, for all layers and passes."""
    batch = pack.batch
    if pack.num_ranks == 1:
        table = SegmentTable.from_cu_seqlens(batch.cu_seqlens, batch.prefix_of)
        return Work(batch, PackedAttend(table, impl), None, device)
    layout = teams.layout(pack.num_ranks, document_lengths(batch))
    parallel = teams.attention(layout, device)
    return Work(
        shard_microbatch(batch, layout, parallel.rank),
        ShardedAttend(parallel, impl),
        teams.groups[pack.num_ranks],
        device,
    )


def make_idle_work(device: torch.device, impl: str) -> Work:
    """A pass without samples, where other ranks have one more pack than this one."""
    batch = empty_microbatch()
    table = SegmentTable.from_cu_seqlens(batch.cu_seqlens)
    return Work(batch, PackedAttend(table, impl), None, device)
