"""Samples to packed micro-batches: no padding, a token budget, prompts computed once a group.

A micro-batch is a stream of T input tokens with `cu_seqlens`. With shared prompts a group is
``[prompt][completion 1][completion 2]…``, each completion attending to the prompt and to itself;
without, each sample is ``[prompt completion]``. The R rows of the loss are completion tokens:
``row_index`` says which of the T positions predicts each, the only place where labels are shifted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_kernels.sequence_parallel import SequenceLayout

__all__ = ["MicroBatch", "TrainSample", "empty_microbatch", "first_fit", "pack_samples"]


@dataclass(frozen=True)
class TrainSample:
    """What the update needs of one sample."""

    group: int
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    sampling_logprobs: list[float]
    advantage: float
    in_loss: bool
    """False leaves the sample out of loss and normaliser (overlong filtering)."""

    @property
    def num_fed(self) -> int:
        """Completion tokens that are fed: the last one predicts nothing."""
        return len(self.completion_ids) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample in a pack, its prompt included."""
        return len(self.prompt_ids) + self.num_fed


@dataclass(frozen=True)
class MicroBatch:
    """Packed tensors of one forward pass, on the CPU."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: list[int]
    prefix_of: list[int] | None
    row_index_R: Tensor
    labels_R: Tensor
    advantages_R: Tensor
    sampling_logprobs_R: Tensor
    loss_mask_R: Tensor
    completion_cu_seqlens: Tensor
    samples: list[int]
    """Sample numbers, in the order of `completion_cu_seqlens`."""
    layout: SequenceLayout | None = None
    """Where the tokens are a shard of a pack: how it lies on its ranks."""
    sequence_loss_tokens_N: Tensor | None = None
    """Where the rows are a shard: loss tokens of each whole sequence."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_T)


@dataclass(frozen=True)
class _Unit:
    """Samples that are packed together: one, or members of a group after their prompt."""

    members: list[TrainSample]
    num_tokens: int


def pack_samples(
    samples: Sequence[TrainSample], *, budget_tokens: int, share_prompts: bool
) -> list[MicroBatch]:
    """First-fit decreasing into micro-batches of at most `budget_tokens` tokens.

    A sample longer than the budget gets a micro-batch of its own. The result is a pure function
    of the arguments.
    """
    units = _split_groups(samples, budget_tokens) if share_prompts else _single_units(samples)
    units.sort(key=lambda unit: unit.members[0].sample)
    bins = first_fit([unit.num_tokens for unit in units], budget_tokens)
    return [_build([units[i] for i in indices], share_prompts=share_prompts) for indices in bins]


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices of `sizes` in bins whose sizes sum to at most `budget`.

    What is larger than the budget has a bin of its own. Equal sizes keep their order.
    """
    bins: list[tuple[int, list[int]]] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        for number, (total, content) in enumerate(bins):
            if total + sizes[item] <= budget:
                bins[number] = (total + sizes[item], [*content, item])
                break
        else:
            bins.append((sizes[item], [item]))
    return [content for _, content in bins]


def empty_microbatch() -> MicroBatch:
    """One token that predicts nothing: a forward and backward pass that adds 0."""
    none = torch.zeros(0)
    return MicroBatch(
        input_ids_T=torch.zeros(1, dtype=torch.long),
        position_ids_T=torch.zeros(1, dtype=torch.long),
        cu_seqlens=[0, 1],
        prefix_of=None,
        row_index_R=none.long(),
        labels_R=none.long(),
        advantages_R=none,
        sampling_logprobs_R=none,
        loss_mask_R=none.bool(),
        completion_cu_seqlens=torch.zeros(1, dtype=torch.long),
        samples=[],
    )


def _single_units(samples: Sequence[TrainSample]) -> list[_Unit]:
    return [_Unit([sample], sample.num_tokens) for sample in samples]


def _split_groups(samples: Sequence[TrainSample], budget_tokens: int) -> list[_Unit]:
    """Members of each group behind one prompt, in as few units of the budget as fit in order."""
    groups: dict[int, list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    units: list[_Unit] = []
    for members in groups.values():
        num_prompt = len(members[0].prompt_ids)
        part: list[TrainSample] = []
        total = num_prompt
        for member in members:
            if part and total + member.num_fed > budget_tokens:
                units.append(_Unit(part, total))
                part, total = [], num_prompt
            part.append(member)
            total += member.num_fed
        units.append(_Unit(part, total))
    return units


def _build(units: list[_Unit], *, share_prompts: bool) -> MicroBatch:
    ids: list[int] = []
    positions: list[int] = []
    cu_seqlens = [0]
    prefix_of: list[int] = []
    row_index: list[int] = []
    labels: list[int] = []
    completion_cu_seqlens = [0]
    members = [member for unit in units for member in unit.members]

    def add_sequence(token_ids: list[int], first_position: int, prefix: int) -> None:
        ids.extend(token_ids)
        positions.extend(range(first_position, first_position + len(token_ids)))
        cu_seqlens.append(len(ids))
        prefix_of.append(prefix)

    for unit in units:
        num_prompt = len(unit.members[0].prompt_ids)
        prompt = -1
        if share_prompts:
            add_sequence(unit.members[0].prompt_ids, 0, -1)
            prompt = len(prefix_of) - 1
            last_of_prompt = len(ids) - 1
        for member in unit.members:
            fed = member.completion_ids[:-1]
            if share_prompts:
                start = len(ids)
                if fed:
                    add_sequence(fed, num_prompt, prompt)
            else:
                add_sequence(member.prompt_ids + fed, 0, -1)
                last_of_prompt = cu_seqlens[-2] + num_prompt - 1
                start = last_of_prompt + 1
            row_index += [last_of_prompt, *range(start, start + len(fed))]
            labels += member.completion_ids
            completion_cu_seqlens.append(len(labels))

    def per_row(values: list[float]) -> Tensor:
        lengths = torch.tensor([len(member.completion_ids) for member in members])
        return torch.repeat_interleave(torch.tensor(values), lengths)

    return MicroBatch(
        input_ids_T=torch.tensor(ids),
        position_ids_T=torch.tensor(positions),
        cu_seqlens=cu_seqlens,
        prefix_of=prefix_of if share_prompts else None,
        row_index_R=torch.tensor(row_index),
        labels_R=torch.tensor(labels),
        advantages_R=per_row([member.advantage for member in members]).float(),
        sampling_logprobs_R=torch.tensor([x for m in members for x in m.sampling_logprobs]),
        loss_mask_R=per_row([float(member.in_loss) for member in members]).bool(),
        completion_cu_seqlens=torch.tensor(completion_cu_seqlens),
        samples=[member.sample for member in members],
    )
