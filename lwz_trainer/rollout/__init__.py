"""The rollout engine: continuous batching over a paged KV cache, on the trainer's own weights."""

from lwz_trainer.rollout.engine import EngineStats, RolloutEngine, RolloutInterrupted
from lwz_trainer.rollout.sequence import Request, Sample

__all__ = ["EngineStats", "Request", "RolloutEngine", "RolloutInterrupted", "Sample"]
