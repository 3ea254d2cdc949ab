"""vLLM as rollout engine: in the trainer's processes, or as a server. Optional; docs/vllm.md."""

from lwz_trainer.rollout.vllm.colocated import VllmEngine
from lwz_trainer.rollout.vllm.server import VllmServerEngine

__all__ = ["VllmEngine", "VllmServerEngine"]
