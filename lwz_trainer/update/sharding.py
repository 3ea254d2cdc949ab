"""Which pack goes to which ranks of a team, and the shard of a pack that one rank computes.

Everything here is a function of its arguments and the same on all ranks of a team. A pack is built
whole, labels included, and then cut: the row that predicts a completion token lies where the token
before it lies, so no label is shifted within a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lwz_kernels.sequence_parallel import SequenceLayout, position_ids, shard_tokens
from lwz_trainer.config.parallel import SequencePlan
from lwz_trainer.update.packing import MicroBatch, TrainSample, pack_samples

__all__ = ["PlacedPack", "document_lengths", "place_packs", "shard_microbatch"]


@dataclass(frozen=True)
class PlacedPack:
    """A whole pack and the number of neighbours in a team that compute it together."""

    num_ranks: int
    batch: MicroBatch


def place_packs(
    samples: Sequence[TrainSample],
    plan: SequencePlan,
    *,
    budget_tokens: int,
    share_prompts: bool,
) -> list[list[PlacedPack]]:
    """The packs of each place in a team, in the order in which it computes them.

    A pack on P ranks has P times the budget. Packs on more ranks come first, everywhere, so that no
    two ranks wait for each other; packs on fewer ranks go to the neighbours with the fewest tokens.
    Prompts are shared only in packs on one rank.
    """
    by_ranks: dict[int, list[TrainSample]] = {}
    for sample in samples:
        num_ranks = plan.num_ranks_for(sample.num_tokens, budget_tokens)
        by_ranks.setdefault(num_ranks, []).append(sample)
    placed: list[list[PlacedPack]] = [[] for _ in range(plan.size)]
    tokens = [0.0] * plan.size
    for num_ranks in sorted(by_ranks, reverse=True):
        batches = pack_samples(
            by_ranks[num_ranks],
            budget_tokens=num_ranks * budget_tokens,
            share_prompts=share_prompts and num_ranks == 1,
        )
        for batch in batches:
            first = min(
                range(0, plan.size, num_ranks),
                key=lambda first: (max(tokens[first : first + num_ranks]), first),
            )
            for place in range(first, first + num_ranks):
                placed[place].append(PlacedPack(num_ranks, batch))
                tokens[place] += batch.num_tokens / num_ranks
    return placed


def document_lengths(batch: MicroBatch) -> list[int]:
    """Tokens of each sequence of a whole pack."""
    return [stop - start for start, stop in pairwise(batch.cu_seqlens)]


def shard_microbatch(batch: MicroBatch, layout: SequenceLayout, rank: int) -> MicroBatch:
    """The tokens of `rank`, and the rows of the loss that they predict.

    Args:
        batch: a whole pack without shared prompts, so that a token predicts at most one row.
        layout: of the pack.
        rank: among the ranks of the pack.
    """
    assert batch.prefix_of is None, "a shared prompt's last token predicts several rows"
    row_T = torch.full((layout.num_tokens,), -1)
    row_T[batch.row_index_R] = torch.arange(len(batch.row_index_R))
    row_n = shard_tokens(row_T, layout, rank, pad_value=-1)
    held_n = torch.nonzero(row_n >= 0).squeeze(1)
    rows = row_n[held_n]  # ascending: a shard keeps the order of the pack
    num_sequences = len(batch.completion_cu_seqlens) - 1
    sequence_of_row = torch.bucketize(rows, batch.completion_cu_seqlens[1:], right=True)
    held_N = torch.bincount(sequence_of_row, minlength=num_sequences)
    return replace(
        batch,
        input_ids_T=shard_tokens(batch.input_ids_T, layout, rank, pad_value=0),
        position_ids_T=position_ids(layout, rank, "cpu"),
        row_index_R=held_n,
        labels_R=batch.labels_R[rows],
        advantages_R=batch.advantages_R[rows],
        sampling_logprobs_R=batch.sampling_logprobs_R[rows],
        loss_mask_R=batch.loss_mask_R[rows],
        completion_cu_seqlens=torch.nn.functional.pad(held_N.cumsum(0), (1, 0)),
        layout=layout,
        sequence_loss_tokens_N=_loss_tokens(batch),
    )


def _loss_tokens(batch: MicroBatch) -> Tensor:
    """[N] tokens of each sequence that count in the loss."""
    counted = torch.nn.functional.pad(batch.loss_mask_R.long().cumsum(0), (1, 0))
    return counted[batch.completion_cu_seqlens].diff()
