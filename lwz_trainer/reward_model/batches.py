"""Pairs to packed micro-batches: both answers of a pair in one, what they begin with once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_trainer.reward_model.pairs import Pair
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.update.packing import (
    MicroBatch,
    TrainSample,
    empty_microbatch,
    first_fit,
    pack_samples,
)

__all__ = ["EncodedPair", "PairBatch", "empty_batch", "encode_pairs", "pack_pairs"]


@dataclass(frozen=True)
class EncodedPair:
    """A pair as the model reads it.

    Args:
        pair: its texts.
        prefix_ids: what both inputs begin with: the prompt, and equal beginnings of the answers.
        chosen_ids, rejected_ids: what follows, at least one token each.
        is_truncated: an answer was too long to be read to its end.
    """

    pair: Pair
    prefix_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    is_truncated: bool

    def num_packed(self, *, share_prompts: bool) -> int:
        """Tokens of both inputs in a pack; the prefix once, where they share it."""
        prefixes = 1 if share_prompts else 2
        return prefixes * len(self.prefix_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class PairBatch:
    """One forward pass: scores 2p and 2p + 1 are those of pair p's chosen and rejected answer."""

    packed: MicroBatch
    last_index_N: Tensor
    pairs: list[int]
    """Which pairs, as indices into what was packed."""


def encode_pairs(pairs: Sequence[Pair], encoder: AnswerEncoder) -> list[EncodedPair]:
    """Tokenises both answers of each pair."""
    encoded = []
    for pair in pairs:
        chosen = encoder.encode(pair.prompt, pair.chosen)
        rejected = encoder.encode(pair.prompt, pair.rejected)
        num_shared = _num_shared(chosen.input_ids, rejected.input_ids)
        encoded.append(
            EncodedPair(
                pair=pair,
                prefix_ids=chosen.input_ids[:num_shared],
                chosen_ids=chosen.input_ids[num_shared:],
                rejected_ids=rejected.input_ids[num_shared:],
                is_truncated=chosen.is_truncated or rejected.is_truncated,
            )
        )
    return encoded


def pack_pairs(
    pairs: Sequence[EncodedPair], *, budget_tokens: int, share_prompts: bool
) -> list[PairBatch]:
    """First-fit decreasing; a pair is never split, one beyond the budget is alone."""
    sizes = [pair.num_packed(share_prompts=share_prompts) for pair in pairs]
    return [
        _pack([pairs[i] for i in indices], indices, share_prompts=share_prompts)
        for indices in first_fit(sizes, budget_tokens)
    ]


def empty_batch() -> PairBatch:
    """One token that no pair holds: a forward and backward pass that adds 0."""
    return PairBatch(empty_microbatch(), torch.zeros(0, dtype=torch.long), [])


def _pack(pairs: list[EncodedPair], indices: list[int], *, share_prompts: bool) -> PairBatch:
    samples = [
        TrainSample(
            group=number,
            sample=2 * number + is_rejected,
            prompt_ids=pair.prefix_ids,
            # The policy's last token is not fed, since nothing follows it. Here the last token is
            # where the score is read, so a token that is not fed stands behind it.
            completion_ids=[*ids, 0],
            sampling_logprobs=[],
            advantage=0.0,
            in_loss=True,
        )
        for number, pair in enumerate(pairs)
        for is_rejected, ids in enumerate((pair.chosen_ids, pair.rejected_ids))
    ]
    everything = sum(sample.num_tokens for sample in samples)
    share_prompts = share_prompts and all(pair.prefix_ids for pair in pairs)
    (packed,) = pack_samples(samples, budget_tokens=everything, share_prompts=share_prompts)
    last_row_N = packed.completion_cu_seqlens[1:] - 1
    order_N = torch.tensor(packed.samples).argsort()
    return PairBatch(packed, packed.row_index_R[last_row_N][order_N], indices)


def _num_shared(first: list[int], second: list[int]) -> int:
    """Length of the common beginning, at most such that both go on after it."""
    limit = min(len(first), len(second)) - 1
    num_shared = 0
    while num_shared < limit and first[num_shared] == second[num_shared]:
        num_shared += 1
    return num_shared
