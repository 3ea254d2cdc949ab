"""What a step of `reward-model` will need, from the pairs and before the model is loaded.

The update of packed pairs is that of a reinforcement learning step without a head, so its memory is
counted by the same function.
"""

from dataclasses import replace
from statistics import fmean

import torch

from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.config.sections import RolloutConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_hf_config, load_tokenizer
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.reward_model.batches import encode_pairs
from lwz_trainer.reward_model.pairs import load_split
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.train.forecast import MemoryForecast, forecast_memory
from lwz_trainer.train.step_forecast import Target, update_seconds
from lwz_trainer.update.work import can_share_prompts

__all__ = ["forecast_reward_model", "forecast_reward_model_memory"]


def forecast_reward_model_memory(
    config: RewardModelConfig,
    model: ModelConfig,
    *,
    longest_pair: int,
    dtype: torch.dtype,
    device: torch.device,
    num_ranks: int = 1,
    ranks_per_node: int = 1,
    program_bytes: int = 0,
) -> MemoryForecast:
    """What one rank of `num_ranks` holds; further arguments as `forecast_memory`.

    Args:
        config: of the run.
        model: sizes of the language model.
        longest_pair: in tokens of a pack.
    """
    per_rank = -(-config.update.pairs_per_step // num_ranks)
    budget = max(config.update.microbatch_tokens, longest_pair)
    equivalent = TrainConfig(
        model=config.model,
        parallel=config.parallel,
        rollout=RolloutConfig(max_completion_tokens=longest_pair),
        update=UpdateConfig(microbatch_tokens=min(budget, per_rank * longest_pair)),
    )
    memory = forecast_memory(
        equivalent,
        replace(model, tie_embeddings=True),  # without a head of its own
        dtype=dtype,
        device=device,
        longest_prompt=0,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
    )
    update = {o: size for o, size in memory.update.items() if o != "logits of one chunk"}
    return replace(memory.without_rollout(), update=update).in_process(program_bytes)


def forecast_reward_model(config: RewardModelConfig, target: Target) -> tuple[MemoryForecast, str]:
    """Memory of a rank, and the time of a step in words."""
    model_dir = resolve_model_dir(config.model.path)
    model = ModelConfig.from_hf(load_hf_config(model_dir))
    encoder = AnswerEncoder(
        load_tokenizer(model_dir), min(config.data.max_tokens, model.max_positions)
    )
    can_share = can_share_prompts(target.device, config.model.attention)
    share_prompts = (
        can_share if config.update.share_prompts is None else config.update.share_prompts
    )
    pairs = [pair for part in load_split(config.data, config.seed) for pair in part]
    sizes = [p.num_packed(share_prompts=share_prompts) for p in encode_pairs(pairs, encoder)]
    memory = forecast_reward_model_memory(
        config,
        model,
        longest_pair=max(sizes),
        dtype=resolve_dtype(config.model.dtype, target.device),
        device=target.device,
        num_ranks=target.num_ranks,
        ranks_per_node=target.ranks_per_node,
        program_bytes=target.program_bytes,
    )
    step_s = update_seconds(
        config.model,
        replace(model, vocab_size=0),  # nothing is multiplied with a head
        target,
        num_tokens=config.update.pairs_per_step / target.num_ranks * fmean(sizes),
        sequence_tokens=fmean(sizes) / 2,
    )
    return memory, (
        f"A step of {config.update.pairs_per_step} pairs of {fmean(sizes):,.0f} tokens takes about "
        f"{step_s:,.1f} s on this machine's {target.here.type}, without the held-out pairs."
    )
