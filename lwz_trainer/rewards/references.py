"""References of rising quality: once the policy beats one, it meets the next (Writing-RL).

The schedule is part of a run's state: it is saved with a checkpoint, and the same on all ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from lwz_trainer.config.rewards import RewardsConfig
from lwz_trainer.data.prompts import Prompt
from lwz_trainer.errors import UserError

__all__ = ["ReferenceSchedule", "start_references"]


def start_references(config: RewardsConfig, prompts: Sequence[Prompt]) -> "ReferenceSchedule":
    """The schedule at the start of a run.

    Raises:
        UserError: a reward looks for a checklist or references, and no prompt has any.
    """
    for name, reward in config.sourced.items():
        column = reward.source
        if column in ("checklist", "references") and not any(getattr(p, column) for p in prompts):
            raise UserError(
                f"reward '{name}' has the source '{column}', but no prompt has {column}: add that "
                "column to data.prompts, or choose another source"
            )
    compared = config.references_reward
    advance_above = config.sourced[compared].advance_above if compared else 0.0
    return ReferenceSchedule(prompts, advance_above)


class ReferenceSchedule:
    """Which reference each prompt's answers are compared with.

    Args:
        prompts: those with references have them in rising quality.
        advance_above: a prompt goes on when the mean score of its group is above this.
    """

    def __init__(self, prompts: Iterable[Prompt], advance_above: float) -> None:
        self._references = {p.prompt: p.references for p in prompts if p.references}
        self._advance_above = advance_above
        self._levels: dict[str, int] = {}

    def current(self, prompt: str) -> str:
        """The reference in force; "" for a prompt without."""
        references = self._references.get(prompt, ())
        return references[self._levels.get(prompt, 0)] if references else ""

    def advance(self, prompts: Sequence[str], scores: Iterable[float]) -> None:
        """After a step: every sample's prompt and its score against the reference in force.

        A missing score does not count.
        """
        by_prompt: dict[str, list[float]] = {}
        for prompt, score in zip(prompts, scores, strict=True):
            if math.isfinite(score):
                by_prompt.setdefault(prompt, []).append(float(score))
        for prompt, values in by_prompt.items():
            level = self._levels.get(prompt, 0)
            has_next = level + 1 < len(self._references.get(prompt, ()))
            if has_next and fmean(values) > self._advance_above:
                self._levels[prompt] = level + 1

    @property
    def levels(self) -> dict[str, int]:
        """How many references each prompt has left behind; prompts with none are left out."""
        return dict(self._levels)

    def restore(self, levels: Mapping[str, int]) -> None:
        """Goes on from what `levels` was; references that have gone since are skipped."""
        self._levels = {
            prompt: min(level, len(self._references[prompt]) - 1)
            for prompt, level in levels.items()
            if prompt in self._references
        }

    @property
    def mean_level(self) -> float:
        """Mean over the prompts with references."""
        if not self._references:
            return 0.0
        return sum(self._levels.values()) / len(self._references)
