"""A step's groups: sampled, scored as they end, and replaced where all members are alike."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.parallel import Ranks
from lwz_trainer.rewards.advantages import check_failures
from lwz_trainer.rewards.references import ReferenceSchedule
from lwz_trainer.rewards.score import RewardParts, RewardSample, compare_groups
from lwz_trainer.rollout import EngineStats, RolloutInterrupted, Sample
from lwz_trainer.rollout.interface import SamplingEngine
from lwz_trainer.rollout.shared_work import SharedWork
from lwz_trainer.timeline import Timeline
from lwz_trainer.train.groups import EndedGroup, GroupCollector, ScoredGroup
from lwz_trainer.train.prompt_set import GroupPrompt, PromptSet
from lwz_trainer.train.reward_pool import Scoring

__all__ = ["StepHooks", "StepSampler", "StepSamples"]

_logger = logging.getLogger(__name__)


@dataclass
class StepSamples:
    """What a step learns from, on this rank."""

    groups: list[ScoredGroup] = field(default_factory=list)
    """By number, once the step is complete."""
    stats: list[EngineStats] = field(default_factory=list)
    """One for each round of the engine."""
    reward_s: float = 0.0
    """Time in which this rank did nothing but score or wait for scores."""
    num_replaced: int = 0
    """Groups without spread whose prompt was replaced."""
    num_dropped: int = 0
    """Groups that were not complete when enough others were."""
    num_worker_failures: int = 0
    """Completions whose reward worker failed."""
    num_handed: int = 0
    """Samples that this rank drew for others."""
    num_failed: dict[str, int] = field(default_factory=dict)
    """Missing scores, by reward; of groups that were replaced too."""
    num_applicable: dict[str, int] = field(default_factory=dict)
    failed_frac: dict[str, float] = field(default_factory=dict)
    """Share of missing scores, by reward, over all ranks; 0 where no prompt calls for it."""


@dataclass(frozen=True)
class StepHooks:
    """What the trainer does while a step is sampled."""

    on_group: Callable[[ScoredGroup], None]
    """Called with each group that will be learned from, when that is known."""
    between_bursts: Callable[[], None]
    """Called after each burst of the engine."""
    on_progress: Callable[[int, int], None]
    should_stop: Callable[[], bool]


class StepSampler:
    """Asks the engine for groups and the rewards for scores.

    Args:
        config: of the run.
        ranks: whose samples belong to the step.
        engine: draws samples.
        prompts: what is asked for.
        scoring: scores groups, maybe beside the decode.
        references: what a prompt's answers are compared with, where a reward does that.
        timeline: notes when what happened.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        engine: SamplingEngine,
        prompts: PromptSet,
        scoring: Scoring,
        references: ReferenceSchedule,
        timeline: Timeline,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._engine = engine
        self._prompts = prompts
        self._scoring = scoring
        self._references = references
        self._timeline = timeline
        self._has_whole_groups = config.data.prompts_per_step % ranks.world_size == 0
        self._found = StepSamples()
        self._ended: dict[int, EndedGroup] = {}
        """Ended and not judged yet, by group number."""
        self._scored: dict[int, list[RewardParts]] = {}
        """Scores of this rank's members of groups that lie on several ranks."""
        self._alike: list[EndedGroup] = []
        """Without spread, to be replaced in the next round."""

    def run(
        self, groups: Sequence[GroupPrompt], step: int, *, policy_version: int, hooks: StepHooks
    ) -> StepSamples | None:
        """All groups of a step; None if it was interrupted on some rank.

        Args:
            groups: of this rank, from `PromptSet.step_groups`.
            step: 0-based.
            policy_version: of the weights.
            hooks: the caller's part.
        """
        self._found, self._ended = StepSamples(), {}
        num_failures_before = self._scoring.num_failures
        waiting, attempt, is_interrupted = list(groups), 0, False
        while waiting and not is_interrupted:
            self._alike = []
            can_replace = attempt < self._config.rollout.max_replacements
            is_interrupted = not self._round(waiting, step, policy_version, can_replace, hooks)
            attempt += 1
            waiting = [self._prompts.replacement(old.prompt, step, attempt) for old in self._alike]
            self._found.num_replaced += len(waiting)
        if self._ranks.max([float(is_interrupted)])[0]:
            self._scoring.forget()
            return None
        if not self._has_whole_groups:
            self._judge_shared_groups(hooks)
        self._found.num_worker_failures = self._scoring.num_failures - num_failures_before
        self._found.groups.sort(key=lambda group: group.ended.number)
        return self._found

    def _round(
        self,
        prompts: list[GroupPrompt],
        step: int,
        policy_version: int,
        can_replace: bool,
        hooks: StepHooks,
    ) -> bool:
        """Samples and scores these groups; False if it was interrupted."""
        collector = GroupCollector(prompts)
        shared = self._shared_work(prompts, step) if self._config.rollout.share_work else None
        num_enough = math.ceil(self._config.rollout.enough_groups_frac * len(prompts))
        num_ended = 0
        began_s = time.perf_counter()

        def take(samples: list[Sample]) -> None:
            nonlocal num_ended
            for group in collector.add(samples):
                num_ended += 1
                self._ended[group.number] = group
                self._scoring.submit(group.number, self._reward_samples(group))

        def on_burst(finished: list[Sample]) -> bool:
            nonlocal began_s
            self._timeline.add("decode", "decode", began_s, time.perf_counter())
            if shared is None:  # else groups are complete when all ranks are done
                take(finished)
            if self._has_whole_groups:
                self._judge(self._timed(self._scoring.completed), can_replace, hooks)
            hooks.between_bursts()
            began_s = time.perf_counter()
            return num_ended < num_enough

        drawn: list[Sample] | None = None
        try:
            drawn, stats = self._engine.generate(
                [prompt.request for prompt in prompts] if shared is None else shared,
                seed=self._config.seed,
                step=step,
                policy_version=policy_version,
                on_progress=hooks.on_progress,
                should_stop=hooks.should_stop,
                on_burst=on_burst,
            )
        except RolloutInterrupted:
            _logger.info("rollout of step %d interrupted", step + 1)
        if shared is not None and self._ranks.max([float(drawn is None)])[0]:
            return False
        if drawn is None:
            return False
        if shared is not None:
            take(self._exchange(drawn, prompts))
        self._found.stats.append(stats)
        self._found.num_dropped += len(prompts) - num_ended
        scored = self._timed(self._scoring.drain)
        if len(scored) < len(self._ended):
            return False  # asked to stop before all were scored
        if self._has_whole_groups:
            self._judge(scored, can_replace, hooks)
        else:
            self._scored = dict(scored)
        return True

    def _shared_work(self, own: list[GroupPrompt], step: int) -> SharedWork | None:
        """This rank's samples and those of the others; None where there are no others."""
        if self._ranks.store is None:
            return None
        world_size = self._ranks.world_size
        helped = [(self._ranks.rank + away) % world_size for away in range(1, world_size)]
        others = [
            self._prompts.step_groups(step, rank=rank, world_size=world_size) for rank in helped
        ]
        return SharedWork(
            self._ranks.store,
            f"samples of step {step}",
            [prompt.request for prompt in own],
            [[prompt.request for prompt in prompts] for prompts in others],
        )

    def _exchange(self, drawn: list[Sample], prompts: list[GroupPrompt]) -> list[Sample]:
        """Hands the samples of others over; those of this rank, wherever they were drawn."""
        own = {sample for prompt in prompts for sample in prompt.request.samples}
        foreign = [sample for sample in drawn if sample.sample not in own]
        self._found.num_handed += len(foreign)
        everyone = (sample for part in self._ranks.gather(foreign) for sample in part)
        return [sample for sample in (*drawn, *everyone) if sample.sample in own]

    def _reward_samples(self, group: EndedGroup) -> list[RewardSample]:
        prompt = group.prompt.prompt
        return [
            RewardSample(
                prompt=prompt.prompt,
                length_range=prompt.length_range,
                completion=self._prompts.opened + sample.text,
                stopped_at_answer=sample.stop_string == "</answer>",
                num_tokens=len(sample.completion_ids),
                checklist=prompt.checklist,
                reference=self._references.current(prompt.prompt),
                group=group.number,
            )
            for sample in group.samples
        ]

    def _timed(
        self, scores: Callable[[], list[tuple[int, list[RewardParts]]]]
    ) -> list[tuple[int, list[RewardParts]]]:
        began_s = time.perf_counter()
        found = scores()
        self._found.reward_s += time.perf_counter() - began_s
        return found

    def _judge(
        self, scored: list[tuple[int, list[RewardParts]]], can_replace: bool, hooks: StepHooks
    ) -> None:
        """Advantages of whole groups, and whether they are worth learning from."""
        for number, parts in scored:
            group = self._ended.pop(number)
            self._accept(group, parts, parts, can_replace, hooks)

    def _judge_shared_groups(self, hooks: StepHooks) -> None:
        """Advantages of groups whose members are spread over ranks; all ranks call it together."""
        own = self._scored
        members = [
            (sample.sample, part)
            for number, parts in own.items()
            for sample, part in zip(self._ended[number].samples, parts, strict=True)
        ]
        everyone = sorted(
            (pair for pairs in self._ranks.gather(members) for pair in pairs),
            key=lambda pair: pair[0],
        )
        size = self._config.rollout.group_size
        for number, parts in own.items():
            whole = [part for _, part in everyone[number * size : (number + 1) * size]]
            self._accept(self._ended.pop(number), parts, whole, False, hooks)

    def _accept(
        self,
        group: EndedGroup,
        parts: list[RewardParts],
        whole: list[RewardParts],
        can_replace: bool,
        hooks: StepHooks,
    ) -> None:
        """Takes a group over, or notes it for replacement.

        Args:
            group: with this rank's members.
            parts: their scores.
            whole: the scores of all members.
            can_replace: a group without spread may get another prompt.
            hooks: the caller's part.
        """
        rewards, advantages = compare_groups(whole, len(whole), self._config.rewards)
        # A group that several ranks share is counted by each of them: their shares are what counts.
        for name in rewards:
            for total, counts in (
                (self._found.num_failed, advantages.num_failed),
                (self._found.num_applicable, advantages.num_applicable),
            ):
                total[name] = total.get(name, 0) + counts[name]
        if can_replace and not advantages.advantages_PG.any():
            self._alike.append(group)
            return
        self._found.groups.append(ScoredGroup(group, parts, advantages))
        hooks.on_group(self._found.groups[-1])

    def check_failures(self, step: int) -> None:
        """Of all groups that were scored in this 0-based step; all ranks call it together.

        Raises:
            UserError, TrainingStopped: too many scores are missing, on every rank.
        """
        names = list(self._config.rewards.weights)
        counts = [
            float(count.get(name, 0))
            for count in (self._found.num_failed, self._found.num_applicable)
            for name in names
        ]
        sums = [int(total) for total in self._ranks.sum(counts)]
        failed = dict(zip(names, sums[: len(names)], strict=True))
        applicable = dict(zip(names, sums[len(names) :], strict=True))
        self._found.failed_frac = {name: failed[name] / max(1, applicable[name]) for name in names}
        check_failures(
            failed,
            applicable,
            self._config.rewards.max_failed_frac,
            is_first_step=step == 0,
        )
