"""A scorer that fails on request; processes import it, so it imports little."""

import os
import time
from collections.abc import Sequence

from lwz_trainer.config.rewards import LengthRewardConfig, RewardsConfig, WritingRewardConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.answer import Answer
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer
from lwz_trainer.rewards.shared_source import Asker

__all__ = ["CONFIG", "MoodyScorer", "SlowToStart", "WithoutModel", "mood_of_source"]

CONFIG = RewardsConfig(
    length=LengthRewardConfig(n_max=400),
    writing=WritingRewardConfig(
        weight=1, source="function", function="tests.trainer.moody_scorer:mood_of_source"
    ),
)


def mood_of_source(answers: Sequence[Answer]) -> list[float]:
    """The reward `writing`, which does what the prompt says before it scores."""
    mood = answers[0].prompt
    if mood == "hang":
        time.sleep(60)
    if mood == "slow":
        time.sleep(0.2)
    if mood == "die":
        os._exit(7)
    return [1.0] * len(answers)


class MoodyScorer(Scorer):
    """Does what the prompt says before it scores; what a source does is `mood_of_source`."""

    def __init__(self) -> None:
        super().__init__(CONFIG, "direct")

    def score_samples(
        self, samples: list[RewardSample], asker: Asker | None = None
    ) -> list[RewardParts]:
        mood = samples[0].prompt
        if mood == "raise":
            raise ValueError("no such endpoint\nsecond line")
        if mood == "garbage":
            return "0.7"  # type: ignore[return-value]
        parts = super().score_samples(samples, asker)
        if mood == "short":
            return parts[1:]
        if mood == "no number":
            parts[0].rewards["length"] = "0.7"  # type: ignore[assignment]
        if mood == "other rewards":
            parts[0].rewards["style"] = 0.7
        return parts


class WithoutModel(Scorer):
    """Cannot be made."""

    def __init__(self) -> None:
        raise UserError("rewards.writing.model: there is none")


class SlowToStart(Scorer):
    """Is never ready."""

    def __init__(self) -> None:
        time.sleep(60)
