"""A head whose vocabulary is split over the ranks of a process group, in rank order.

Every rank holds all hidden states and its own rows of the weight. Row statistics are gathered and
merged in rank order, so every rank has the same bits; dhidden is summed over ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.loss_head.rows import merge_partials

__all__ = ["VocabShard", "vocab_shard"]


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: rows [start, start + V_local) of the whole head."""

    group: dist.ProcessGroup
    start: int
    vocab_size: int
    largest: int
    """Rows of the largest shard: chunks are planned by it, so that all ranks have the same."""

    def merge(self, partials_4C: Tensor) -> Tensor:
        """Row statistics over the whole vocabulary, [4, C]."""
        size = dist.get_world_size(self.group)
        partials_S4C = partials_4C.new_empty(size, *partials_4C.shape)
        dist.all_gather_into_tensor(
            partials_S4C.view(-1, partials_4C.shape[1]), partials_4C.contiguous(), group=self.group
        )
        return merge_partials(partials_S4C)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(partial, group=self.group)
        return partial


def vocab_shard(weight: Tensor, group: dist.ProcessGroup) -> VocabShard:
    """Where this rank's rows lie; shards may differ in size. One small exchange."""
    own = torch.tensor([weight.shape[0]], dtype=torch.int64, device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = [int(size) for size in sizes]
    rank = dist.get_rank(group)
    return VocabShard(group, sum(counts[:rank]), vocab_size=sum(counts), largest=max(counts))
