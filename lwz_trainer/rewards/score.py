"""Scores samples: the one way from a completion's text to its rewards."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lwz_trainer.config.rewards import RewardsConfig
from lwz_trainer.rewards.advantages import GroupAdvantages, group_advantages
from lwz_trainer.rewards.answer import Answer, SourceScores
from lwz_trainer.rewards.length import length_reward
from lwz_trainer.rewards.overlong import overlong_reward
from lwz_trainer.rewards.redundancy import Redundancy, embedding_redundancy, shingle_redundancy
from lwz_trainer.rewards.shared_source import Asker, SharedSource
from lwz_trainer.rewards.structure import Completion, parse_completion
from lwz_trainer.rewards.text import Span, count_words

if TYPE_CHECKING:
    import torch

__all__ = [
    "RewardParts",
    "RewardSample",
    "Scorer",
    "compare_groups",
    "failed_parts",
    "section_of",
    "stack_rewards",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardSample:
    """What a reward may look at.

    Args:
        prompt: the writing request, without the template.
        length_range: fewest and most words asked for; None if the request does not say.
        completion: the tag that the template left open, if any, and what the model wrote.
        stopped_at_answer: the sampler stopped at the stop string </answer>.
        num_tokens: length of what the model wrote, which the overlong penalty reads.
        checklist: points that come with the request.
        reference: an answer that this one is compared with; "" for none.
        group: number of the group in the step, which may hold the same prompt twice.
    """

    prompt: str
    length_range: tuple[int, int] | None
    completion: str
    stopped_at_answer: bool
    num_tokens: int = 0
    checklist: tuple[str, ...] = ()
    reference: str = ""
    group: int = 0


@dataclass(frozen=True)
class RewardParts:
    """One scored sample.

    Args:
        completion: thinking and answer.
        num_think_words: words of the thinking.
        num_answer_words: words of the answer.
        redundancy: share of the answer that repeats itself.
        repeated_spans: character positions in `completion.answer` of the repeating passages.
        rewards: raw reward by name, for each reward that is switched on. NaN is a missing score: a
            failed one, unless the name is in `not_applicable`.
        not_applicable: rewards that the prompt does not ask for ("length" without a range). Their
            NaN is no failure.
        is_truncated_for_writing: the reward model did not read the answer to its end.
    """

    completion: Completion
    num_think_words: int
    num_answer_words: int
    redundancy: float
    repeated_spans: tuple[Span, ...]
    rewards: dict[str, float]
    not_applicable: frozenset[str]
    is_truncated_for_writing: bool


class Scorer:
    """Holds the reward models, if any, and scores samples.

    Args:
        config: section `rewards`.
        kind: which form the template asks for.
        device: where the reward model and the sentence encoder run.
        max_completion_tokens: where completions are cut off, for the overlong penalty.
        cache_path: file for the answers of servers; None keeps none.
    Raises:
        UserError: if a model, function or key is not there.
    """

    def __init__(
        self,
        config: RewardsConfig,
        kind: Literal["think", "direct"],
        device: "torch.device | str" = "cpu",
        max_completion_tokens: int = 0,
        cache_path: Path | None = None,
    ) -> None:
        self.config = config
        self.max_completion_tokens = max_completion_tokens
        self.kind: Literal["think", "direct"] = kind
        self.sources: dict[str, SharedSource] = {}
        # Models and servers bring in libraries that a run without them does not wait for.
        if config.sourced:
            from lwz_trainer.rewards.sources import make_source

            self.sources = {
                name: SharedSource(make_source(section_of(name), source, device, cache_path))
                for name, source in config.sourced.items()
            }
        self.encode: Callable[[list[str]], np.ndarray] | None = None
        if config.format.redundancy == "embedding":
            from lwz_trainer.rewards import encoder

            self.encode = encoder.SentenceEncoder(config.format.encoder, device)

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        """Scores all samples, in order; only a comparison depends on the others.

        Args:
            samples: of one group or of several.
            asker: to be given up when it takes too long; None: it is waited for.
        Raises:
            GivenUpError: it was.
        """
        asker = asker or Asker()
        completions = [_parse(sample, self.config, self.kind) for sample in samples]
        answers = [
            Answer(
                prompt=sample.prompt,
                text=completion.answer,
                thinking=completion.think,
                length_range=sample.length_range,
                checklist=sample.checklist,
                reference=sample.reference,
                group=sample.group,
            )
            for sample, completion in zip(samples, completions, strict=True)
        ]
        sourced = {name: self._ask(name, answers, asker) for name in self.sources}
        return [
            self._parts(sample, completions[index], sourced, index)
            for index, sample in enumerate(samples)
        ]

    def close(self) -> None:
        """Ends connections to servers."""
        for source in self.sources.values():
            source.close()

    def give_up(self, asker: Asker) -> None:
        """Other threads no longer wait for what this one asks."""
        for source in self.sources.values():
            source.give_up(asker)

    def _ask(self, name: str, answers: list[Answer], asker: Asker) -> SourceScores:
        """The scores of one source; what failed is in the log."""
        scores = self.sources[name].score(answers, asker)
        for reason, count in Counter(scores.failures).items():
            _logger.warning("reward '%s' failed for %d completions: %s", name, count, reason)
        return scores

    def _parts(
        self,
        sample: RewardSample,
        completion: Completion,
        sourced: dict[str, SourceScores],
        index: int,
    ) -> RewardParts:
        num_answer_words = count_words(completion.answer)
        redundancy = self._redundancy(completion.answer)
        rewards = {
            "length": self._length_reward(sample, num_answer_words),
            "format": completion.structure * (1 - redundancy.score),
            **{name: scores.scores[index] for name, scores in sourced.items()},
            "overlong": overlong_reward(
                sample.num_tokens,
                max_tokens=self.max_completion_tokens,
                buffer_tokens=self.config.overlong.buffer_tokens,
            ),
        }
        rewards = {name: rewards[name] for name in self.config.weights}
        unasked = {n for n, scores in sourced.items() if not scores.is_applicable[index]}
        return RewardParts(
            completion=completion,
            num_think_words=count_words(completion.think),
            num_answer_words=num_answer_words,
            redundancy=redundancy.score,
            repeated_spans=redundancy.spans,
            rewards=rewards,
            not_applicable=_not_applicable(sample, self.config) | unasked,
            is_truncated_for_writing=(
                "writing" in sourced and sourced["writing"].is_truncated[index]
            ),
        )

    def _length_reward(self, sample: RewardSample, num_words: int) -> float:
        if sample.length_range is None:
            return math.nan
        if num_words == 0:
            return 0.0  # A range from 0 ("at most 100 words") does not pay for writing nothing.
        return length_reward(num_words, sample.length_range, self.config.length.n_max)

    def _redundancy(self, answer: str) -> Redundancy:
        config = self.config.format
        if config.redundancy == "off":
            return Redundancy(score=0.0, spans=(), num_units=0)
        if self.encode is not None:
            return embedding_redundancy(
                answer,
                threshold=config.threshold,
                shingle_size=config.shingle_size,
                encode=self.encode,
            )
        return shingle_redundancy(
            answer, threshold=config.threshold, shingle_size=config.shingle_size
        )


def failed_parts(
    samples: list[RewardSample], *, config: RewardsConfig, kind: Literal["think", "direct"]
) -> list[RewardParts]:
    """What is known of samples whose scoring failed: the text, and that no reward is there."""
    completions = [_parse(sample, config, kind) for sample in samples]
    return [
        RewardParts(
            completion=completion,
            num_think_words=count_words(completion.think),
            num_answer_words=count_words(completion.answer),
            redundancy=math.nan,
            repeated_spans=(),
            rewards=dict.fromkeys(config.weights, math.nan),
            not_applicable=_not_applicable(sample, config),
            is_truncated_for_writing=False,
        )
        for sample, completion in zip(samples, completions, strict=True)
    ]


def stack_rewards(
    parts: list[RewardParts], group_size: int, sourced: Collection[str] = ("writing",)
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rewards and their applicability, as `group_advantages` takes them.

    A missing answer must not win: reward models have not learned what an empty one is worth. Its
    rewards from sources are held at or below the lowest of the written answers in its group.

    Args:
        parts: P * G scored samples; the G members of a group stand together.
        group_size: G.
        sourced: rewards that come from a source.
    Returns:
        rewards: name to [P, G] float64, NaN where missing.
        is_applicable: name to [P, G] bool.
    """
    if not parts or len(parts) % group_size:
        raise ValueError(
            f"parts must hold whole groups of {group_size}, got {len(parts)} scored samples"
        )
    shape = (len(parts) // group_size, group_size)
    names = list(parts[0].rewards)
    rewards = {
        name: np.array([part.rewards[name] for part in parts], np.float64).reshape(shape)
        for name in names
    }
    is_written = np.array([part.completion.answer != "" for part in parts]).reshape(shape)
    for name in rewards.keys() & set(sourced):
        lowest_P1 = np.nanmin(
            np.where(is_written, rewards[name], np.inf), axis=1, initial=np.inf, keepdims=True
        )
        capped = np.minimum(rewards[name], lowest_P1)
        rewards[name] = np.where(is_written, rewards[name], capped)
    is_applicable = {
        name: np.array([name not in part.not_applicable for part in parts], bool).reshape(shape)
        for name in names
    }
    return rewards, is_applicable


def compare_groups(
    parts: list[RewardParts], group_size: int, config: RewardsConfig
) -> tuple[dict[str, np.ndarray], GroupAdvantages]:
    """Rewards [P, G] of whole groups, by name, and the advantages that section `rewards` makes.

    Args:
        parts: P * G scored samples; the G members of a group stand together.
        group_size: G.
        config: section `rewards`.
    """
    rewards, is_applicable = stack_rewards(parts, group_size, config.sourced)
    advantages = group_advantages(
        rewards,
        config.weights,
        config.normalization,
        is_applicable=is_applicable,
        relative=config.relative,
        constraints=config.constraints,
    )
    return rewards, advantages


def _parse(
    sample: RewardSample, config: RewardsConfig, kind: Literal["think", "direct"]
) -> Completion:
    return parse_completion(
        sample.completion,
        kind=kind,
        mode=config.format.structure,
        stopped_at_answer=sample.stopped_at_answer,
    )


def _not_applicable(sample: RewardSample, config: RewardsConfig) -> frozenset[str]:
    is_unasked = "length" in config.weights and sample.length_range is None
    return frozenset({"length"} if is_unasked else ())


def section_of(name: str) -> str:
    """The section of the configuration that holds a reward from a source."""
    return "rewards.writing" if name == "writing" else f"rewards.others.{name}"
