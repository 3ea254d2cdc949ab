"""A scorer that fails on request; processes import it, so it imports little."""

import os
import time

from lwz_trainer.config.rewards import LengthRewardConfig, RewardsConfig
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer

__all__ = ["CONFIG", "MoodyScorer"]

CONFIG = RewardsConfig(length=LengthRewardConfig(n_max=400))


class MoodyScorer(Scorer):
    """Does what the prompt says before it scores."""

    def __init__(self) -> None:
        super().__init__(CONFIG, "direct")

    def score_samples(self, samples: list[RewardSample]) -> list[RewardParts]:
        mood = samples[0].prompt
        if mood == "hang":
            time.sleep(60)
        if mood == "die":
            os._exit(7)
        if mood == "raise":
            raise ValueError("no such endpoint\nsecond line")
        if mood == "garbage":
            return "0.7"  # type: ignore[return-value]
        parts = super().score_samples(samples)
        if mood == "short":
            return parts[1:]
        if mood == "no number":
            parts[0].rewards["length"] = "0.7"  # type: ignore[assignment]
        if mood == "other rewards":
            parts[0].rewards["style"] = 0.7
        return parts
