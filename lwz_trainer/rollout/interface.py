"""What a rollout engine is to those who sample with it, whichever program does the decoding."""

from collections.abc import Callable
from typing import Protocol

from lwz_trainer.rollout.engine import EngineStats, OnBurst, Progress
from lwz_trainer.rollout.sequence import Request, Sample
from lwz_trainer.rollout.shared_work import SharedWork

__all__ = ["SamplingEngine"]


class SamplingEngine(Protocol):
    """`RolloutEngine`, `VllmEngine` and `VllmServerEngine`."""

    expected_completion_tokens: float
    """Running estimate that admission goes by; kept in checkpoints."""

    def plan_cache(self, *, longest_prompt: int, num_samples: int) -> object:
        """Before the first rollout: refuses what cannot be decoded.

        Raises:
            UserError: one sequence does not fit, or the engine cannot be started.
        """
        ...

    def generate(
        self,
        requests: list[Request] | SharedWork,
        *,
        seed: int,
        step: int,
        policy_version: int,
        on_progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_burst: OnBurst | None = None,
    ) -> tuple[list[Sample], EngineStats]:
        """All samples of all requests, in order of their sample numbers, from the present weights.

        Args:
            requests: the groups; SharedWork with the own engine only.
            seed, step: with the sample number what a sample's randomness is keyed by.
            policy_version: kept with every sample; a new one means that the weights have changed.
            on_progress: called now and then with (samples done, tokens).
            should_stop: asked now and then; True raises RolloutInterrupted.
            on_burst: called with the samples that have ended since the last call; False ends the
                rollout, and what is not finished is dropped.
        """
        ...
