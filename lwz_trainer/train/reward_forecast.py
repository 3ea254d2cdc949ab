"""What the reward models of a run hold, counted from their configurations before any is loaded."""

from dataclasses import replace

import torch

from lwz_trainer.config.rewards import RewardsConfig
from lwz_trainer.train.forecast import MemoryForecast

__all__ = ["with_reward_models"]


def with_reward_models(
    memory: MemoryForecast, config: RewardsConfig, device: torch.device
) -> MemoryForecast:
    """The forecast with the models that this process or its workers score with.

    On a GPU their weights wait in host memory, and a copy is there while they score, beside the KV
    cache. Worker processes have a copy each, on the CPU.

    Args:
        memory: of a rank without them.
        config: section `rewards`.
        device: of the rank.
    Raises:
        UserError: one of the models is not there.
    """
    in_process = config.pool.workers > 0 and config.pool.kind == "process"
    on_gpu = device.type == "cuda" and not in_process
    sizes = _model_bytes(config, None if on_gpu else torch.float32)
    if in_process:
        sizes = {
            f"{name}, {config.pool.workers} copies": config.pool.workers * size
            for name, size in sizes.items()
        }
    if device.type != "cuda":
        return replace(memory, always=memory.always | sizes)
    memory = replace(memory, host=memory.host | sizes)
    if not on_gpu:
        return memory
    scoring = {f"{name}, while it scores": size for name, size in sizes.items()}
    return replace(memory, rollout=memory.rollout | scoring)


def _model_bytes(config: RewardsConfig, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of each model's weights; the encoder's are fp32 anywhere."""
    models = {name: c.model for name, c in config.sourced.items() if c.source == "model"}
    if not models and not config.format.encoder:
        return {}
    # Brings in transformers' models, which a run without one does not wait for.
    from transformers import AutoModel, AutoModelForSequenceClassification

    from lwz_trainer.rewards.pretrained import forecast_model_bytes
    from lwz_trainer.rewards.score import section_of

    sizes = {
        f"reward model of {name}": forecast_model_bytes(
            AutoModelForSequenceClassification, path, f"{section_of(name)}.model", dtype=dtype
        )
        for name, path in models.items()
    }
    if config.format.encoder:
        sizes["sentence encoder"] = forecast_model_bytes(
            AutoModel, config.format.encoder, "rewards.format.encoder", dtype=torch.float32
        )
    return sizes
