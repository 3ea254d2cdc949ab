"""What a step of `train` will need: memory from the shapes, time from one matrix product.

The product is measured on this machine and scaled by the arithmetic of a step in which every
completion is as long as it may be: an upper estimate.
"""

import time
from dataclasses import dataclass

import torch

from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.linear import linear, resolve_dtype
from lwz_trainer.model.loading import load_hf_config, load_tokenizer
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.train.forecast import MemoryForecast, forecast_memory, num_parameters
from lwz_trainer.train.metrics import peak_memory_gb
from lwz_trainer.train.prompt_set import PromptSet
from lwz_trainer.train.reward_forecast import with_reward_models

__all__ = ["Target", "forecast_train", "update_seconds"]

PROBE_ROWS = 512


@dataclass(frozen=True)
class Target:
    """The ranks that a run is forecast for."""

    device: torch.device
    """Of the weights."""
    num_ranks: int
    ranks_per_node: int
    here: torch.device
    """Of this process, which measures how fast it is."""
    device_bytes: int | None
    """Memory of the GPU, where there is one."""

    @property
    def program_bytes(self) -> int:
        """Of this process so far, on a CPU, where all of it counts."""
        return int(peak_memory_gb(self.device) * 1e9) if self.device.type == "cpu" else 0


def forecast_train(config: TrainConfig, target: Target) -> tuple[MemoryForecast, str]:
    """Memory of a rank, and the time of a step in words."""
    model_dir = resolve_model_dir(config.model.path)
    model = ModelConfig.from_hf(load_hf_config(model_dir))
    prompts = PromptSet(config, load_tokenizer(model_dir), model.max_positions)
    memory = forecast_memory(
        config,
        model,
        dtype=resolve_dtype(config.model.dtype, target.device),
        device=target.device,
        longest_prompt=prompts.longest,
        num_ranks=target.num_ranks,
        ranks_per_node=target.ranks_per_node,
        program_bytes=target.program_bytes,
        device_bytes=target.device_bytes,
    )
    memory = with_reward_models(memory, config.rewards, target.device)
    rollout_s, update_s = _forecast_seconds(config, model, target, prompts.longest)
    return memory, (
        f"A step takes at most about {rollout_s + update_s:,.0f} s on this machine's "
        f"{target.here.type} (rollout {rollout_s:,.0f} s, update {update_s:,.0f} s) if every "
        f"completion has {config.rollout.max_completion_tokens} tokens; "
        f"{config.num_steps} steps: {(rollout_s + update_s) * config.num_steps / 60:,.0f} minutes."
    )


def _forecast_seconds(
    config: TrainConfig, model: ModelConfig, target: Target, longest_prompt: int
) -> tuple[float, float]:
    """Rollout and update of one step, from one measured matrix product of each kind.

    In decode a sequence's keys and values, on average those of half of its tokens, count as if they
    were further weights.
    """
    tokens = config.rollout.max_completion_tokens + longest_prompt
    per_rank = config.data.prompts_per_step * config.rollout.group_size / target.num_ranks
    rows = max(1, min(config.rollout.max_num_seqs, int(per_rank)))
    keys = rows * tokens * model.layers * model.kv_heads * model.head_dim
    decode_s = (num_parameters(model) + keys) * _product_seconds(config.model, model, target, rows)
    rollout_s = per_rank / rows * config.rollout.max_completion_tokens * decode_s
    further = int(config.update.num_epochs * config.update.num_minibatches > 1)
    further += int(config.loss.kl_coef > 0)
    update_s = update_seconds(
        config.model,
        model,
        target,
        num_tokens=per_rank * tokens,
        sequence_tokens=tokens,
        further_passes=further,
    )
    return rollout_s, update_s * config.update.num_epochs


def update_seconds(
    section: ModelSection,
    model: ModelConfig,
    target: Target,
    *,
    num_tokens: float,
    sequence_tokens: float,
    further_passes: int = 0,
) -> float:
    """Forward and backward passes over tokens, from one measured matrix product.

    Attention counts as if its arithmetic were that of further weights: two products with half of a
    sequence's tokens.

    Args:
        section: how the model is computed.
        model: sizes.
        target: what is forecast for.
        num_tokens: of one rank.
        sequence_tokens: of each sequence.
        further_passes: forward passes beside those of a gradient.
    """
    attended = sequence_tokens * model.layers * model.heads * model.head_dim
    row_s = _product_seconds(section, model, target, PROBE_ROWS) / PROBE_ROWS
    passes = (4 if section.checkpoint_layers else 3) + further_passes
    return num_tokens * passes * (num_parameters(model) + attended) * row_s


def _product_seconds(
    section: ModelSection, model: ModelConfig, target: Target, num_rows: int
) -> float:
    """Median seconds of a product with `num_rows` rows, over a tenth of a second, per weight."""
    dtype = resolve_dtype(section.dtype, target.here)
    weight = torch.randn(model.ff, model.hidden, dtype=dtype, device=target.here)
    x = torch.randn(num_rows, model.hidden, dtype=dtype, device=target.here)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.1:
        started = time.perf_counter()
        linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] / weight.numel()
