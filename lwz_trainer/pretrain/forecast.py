"""What a step of `pretrain` will need, before anything is loaded.

The update of packed windows is that of a reinforcement learning step with completions of a whole
context, so its memory is counted by the same function.
"""

from dataclasses import replace

import torch

from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.sections import RolloutConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_hf_config
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.train.forecast import MemoryForecast, forecast_memory
from lwz_trainer.train.step_forecast import Target, update_seconds

__all__ = ["forecast_pretrain", "forecast_pretrain_memory"]


def forecast_pretrain_memory(
    config: PretrainConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_ranks: int = 1,
    ranks_per_node: int = 1,
    program_bytes: int = 0,
) -> MemoryForecast:
    """What one rank of `num_ranks` holds, from the shapes alone; arguments as `forecast_memory`."""
    equivalent = TrainConfig(
        model=config.model,
        parallel=config.parallel,
        rollout=RolloutConfig(max_completion_tokens=config.data.context_tokens),
        update=UpdateConfig(microbatch_tokens=config.update.microbatch_tokens),
        loss=LossConfig(impl=config.update.loss_impl, chunk_mb=config.update.chunk_mb),
    )
    memory = forecast_memory(
        equivalent,
        model,
        dtype=dtype,
        device=device,
        longest_prompt=0,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
    )
    # linear_logprobs sums the head's gradient in fp32 and hands it on in the head's type.
    head = model.vocab_size * model.hidden
    rounded = 0 if dtype == torch.float32 else head * dtype.itemsize
    update = memory.update | {"gradient of the head": 4 * head + rounded}
    return replace(memory.without_rollout(), update=update).in_process(program_bytes)


def forecast_pretrain(config: PretrainConfig, target: Target) -> tuple[MemoryForecast, str]:
    """Memory of a rank, and the time of a step of windows as long as they may be, in words."""
    model = ModelConfig.from_hf(load_hf_config(resolve_model_dir(config.model.path)))
    memory = forecast_pretrain_memory(
        config,
        model,
        dtype=resolve_dtype(config.model.dtype, target.device),
        device=target.device,
        num_ranks=target.num_ranks,
        ranks_per_node=target.ranks_per_node,
        program_bytes=target.program_bytes,
    )
    tokens = config.data.batch_size * config.data.context_tokens
    step_s = update_seconds(
        config.model,
        model,
        target,
        num_tokens=tokens / target.num_ranks,
        sequence_tokens=config.data.context_tokens,
    )
    return memory, (
        f"A step of {tokens:,} tokens takes about {step_s:,.0f} s on this machine's "
        f"{target.here.type}; {config.num_steps:,} steps: {step_s * config.num_steps / 60:,.0f} "
        f"minutes, {tokens * config.num_steps / 1e9:,.2f} billion tokens."
    )
