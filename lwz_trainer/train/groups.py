"""Groups of a step on their way from the engine to the update."""

from collections.abc import Sequence
from dataclasses import dataclass

from lwz_trainer.rewards.advantages import GroupAdvantages
from lwz_trainer.rewards.score import RewardParts
from lwz_trainer.rollout.sequence import Sample
from lwz_trainer.train.prompt_set import GroupPrompt
from lwz_trainer.update.packing import TrainSample

__all__ = ["EndedGroup", "GroupCollector", "ScoredGroup"]


@dataclass(frozen=True)
class EndedGroup:
    """This rank's members of a group, all of them written to their end."""

    prompt: GroupPrompt
    samples: list[Sample]
    """By sample number."""

    @property
    def number(self) -> int:
        """0-based, in the step."""
        return self.prompt.request.group


@dataclass(frozen=True)
class ScoredGroup:
    """A group that will be learned from."""

    ended: EndedGroup
    parts: list[RewardParts]
    """Of this rank's members."""
    advantages: GroupAdvantages
    """Of the whole group, [1, G]."""

    def member(self, sample: Sample) -> int:
        """Place of a sample in its group."""
        return sample.sample % self.advantages.advantages_PG.shape[1]

    def train_samples(self, *, mask_truncated: bool) -> list[TrainSample]:
        """What the update needs of this rank's members."""
        return [
            TrainSample(
                group=sample.group,
                sample=sample.sample,
                prompt_ids=sample.prompt_ids,
                completion_ids=sample.completion_ids,
                sampling_logprobs=sample.logprobs,
                advantage=float(self.advantages.advantages_PG[0, self.member(sample)]),
                in_loss=not (sample.is_truncated and mask_truncated),
            )
            for sample in self.ended.samples
        ]


class GroupCollector:
    """Puts samples together that end at different times."""

    def __init__(self, prompts: Sequence[GroupPrompt]) -> None:
        self._prompts = {prompt.request.group: prompt for prompt in prompts}
        self._samples: dict[int, list[Sample]] = {number: [] for number in self._prompts}

    def add(self, samples: Sequence[Sample]) -> list[EndedGroup]:
        """The groups that these samples completed, in the order of their numbers."""
        for sample in samples:
            self._samples[sample.group].append(sample)
        complete = []
        for number in sorted({sample.group for sample in samples}):
            members = self._samples[number]
            if len(members) == len(self._prompts[number].request.samples):
                members.sort(key=lambda sample: sample.sample)
                complete.append(EndedGroup(self._prompts[number], members))
        return complete
