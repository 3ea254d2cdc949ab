"""`pretrain --dry-run`: the resolved configuration and what a step will need.

The update of packed windows is that of a reinforcement learning step with completions of a whole
context, so its memory is counted by the same function.
"""

import torch
from rich.console import Console

from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import dump_config
from lwz_trainer.config.sections import RolloutConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_hf_config
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import local_world_size, start_ranks
from lwz_trainer.train.forecast import (
    PROBE_ROWS,
    MemoryForecast,
    forecast_memory,
    num_parameters,
    print_memory,
    seconds_of,
)

__all__ = ["forecast_pretrain_memory", "print_pretrain_forecast"]


def forecast_pretrain_memory(
    config: PretrainConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_ranks: int = 1,
    ranks_per_node: int = 1,
) -> MemoryForecast:
    """What one rank of `num_ranks` holds, from the shapes alone."""
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
    return MemoryForecast(always=memory.always, rollout={}, update=update, host=memory.host)


def print_pretrain_forecast(
    config: PretrainConfig, *, num_ranks: int | None, device_gb: float | None
) -> None:
    """Prints the configuration, memory, and time of a step.

    Args:
        config: of the run.
        num_ranks: to forecast for, 8 on a node; None: those that were started.
        device_gb: memory of each rank's GPU in units of 1e9 bytes; None: of the GPU that is here.
    """
    ranks = start_ranks(
        device=config.device,
        num_threads=config.num_threads,
        timeout_s=config.parallel.timeout_s,
    )
    device = ranks.device if device_gb is None else torch.device("cuda")
    model = ModelConfig.from_hf(load_hf_config(resolve_model_dir(config.model.path)))
    world_size = num_ranks or ranks.world_size
    memory = forecast_pretrain_memory(
        config,
        model,
        dtype=resolve_dtype(config.model.dtype, device),
        device=device,
        num_ranks=world_size,
        ranks_per_node=local_world_size() if num_ranks is None else min(num_ranks, 8),
    )
    step_s = _forecast_seconds(config, model, ranks.device, world_size)
    ranks.close()
    if not ranks.is_main:
        return
    console = Console(highlight=False)
    console.print(dump_config(config), markup=False)
    print_memory(console, memory, ranks.device, device_gb=device_gb, num_ranks=world_size)
    tokens = config.data.batch_size * config.data.context_tokens
    console.print(
        f"A step of {tokens:,} tokens takes about {step_s:,.0f} s on this machine's "
        f"{ranks.device.type}; {config.num_steps:,} steps: {step_s * config.num_steps / 60:,.0f} "
        f"minutes, {tokens * config.num_steps / 1e9:,.2f} billion tokens."
    )


def _forecast_seconds(
    config: PretrainConfig, model: ModelConfig, device: torch.device, num_ranks: int
) -> float:
    """One step, from one measured matrix product; every window as long as it may be.

    Attention counts as if its arithmetic were that of further weights: two products with half of
    the context's tokens.
    """
    dtype = resolve_dtype(config.model.dtype, device)
    weight = torch.randn(model.ff, model.hidden, dtype=dtype, device=device)
    context = config.data.context_tokens
    products = num_parameters(model) + context * model.layers * model.heads * model.head_dim
    row_s = seconds_of(weight, PROBE_ROWS) / PROBE_ROWS * products / weight.numel()
    passes = 4 if config.model.checkpoint_layers else 3
    return config.data.batch_size * context / num_ranks * passes * row_s
