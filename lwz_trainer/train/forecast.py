"""`--dry-run`: the resolved configuration and what a step will need, before anything is loaded.

Memory is counted from the shapes. Time is one matrix product measured on this machine, scaled by
the arithmetic of a step in which every completion is as long as it may be: an upper estimate.
"""

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from lwz_kernels.loss_head import default_chunk_bytes
from lwz_trainer.config.reading import dump_config
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.linear import linear, resolve_dtype
from lwz_trainer.model.loading import load_hf_config, load_tokenizer
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import Ranks, start_ranks
from lwz_trainer.rollout.kv_cache import num_pages_for
from lwz_trainer.train.prompt_set import PromptSet

__all__ = ["MemoryForecast", "forecast_memory", "num_parameters", "print_forecast"]


PROBE_ROWS = 512


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one rank, by owner; the KV cache and the update's tensors take turns."""

    always: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        phases = (sum(self.rollout.values()), sum(self.update.values()))
        return sum(self.always.values()) + max(phases)


def num_parameters(model: ModelConfig) -> int:
    """Matrices and norms; a tied head once."""
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    layer = model.hidden * (qkv + model.heads * model.head_dim + 3 * model.ff + 2)
    layer += qkv if model.qkv_bias else 0
    layer += 2 * model.head_dim if model.qk_norm else 0
    heads = 1 if model.tie_embeddings else 2
    return model.layers * layer + heads * model.vocab_size * model.hidden + model.hidden


def forecast_memory(
    config: TrainConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    longest_prompt: int,
) -> MemoryForecast:
    """What one rank holds, from the shapes alone."""
    size = dtype.itemsize
    count = num_parameters(model)
    always = {"weights": count * size, "gradients, fp32": 4 * count, "AdamW moments": 8 * count}
    if dtype != torch.float32:
        always["lower halves of the masters"] = 2 * count
    if config.loss.kl_coef > 0:
        always["reference model"] = count * size
    rollout, update = config.rollout, config.update
    rows = min(rollout.max_num_seqs, config.data.prompts_per_step * rollout.group_size)
    page_bytes = 2 * model.layers * rollout.page_size * model.kv_heads * model.head_dim * size
    tokens = longest_prompt + rollout.max_completion_tokens
    pages = (num_pages_for(tokens, rollout.page_size) + 1) * (rows + 1)
    if rollout.kv_cache_tokens:
        pages = num_pages_for(rollout.kv_cache_tokens, rollout.page_size)
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    one_layer = 6 * model.hidden + 3 * qkv + 4 * model.ff
    kept = model.layers * (model.hidden if config.model.checkpoint_layers else one_layer)
    return MemoryForecast(
        always=always,
        rollout={
            "KV cache": pages * page_bytes,
            "logits of one decode step": 3 * rows * model.vocab_size * 4,
        },
        update={
            "activations": update.microbatch_tokens * (kept + one_layer) * size,
            "logits of one chunk": _logits_bytes(config, model, dtype, device),
        },
    )


def _logits_bytes(
    config: TrainConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """One chunk of fp32 logits, turned into their gradient in place, and on a CPU an fp32 head."""
    if config.loss.impl == "reference":  # logits, log-softmax and their gradients
        return 4 * 4 * config.update.microbatch_tokens * model.vocab_size
    chunk = config.loss.chunk_bytes or default_chunk_bytes(device)
    is_copied = device.type == "cpu" and dtype != torch.float32
    return chunk + 4 * model.vocab_size * model.hidden * is_copied


def print_forecast(config: TrainConfig) -> None:
    """Prints the configuration, memory by phase, and time of a step."""
    ranks = start_ranks(
        device=config.device,
        num_threads=config.num_threads,
        timeout_s=config.parallel.timeout_s,
    )
    model_dir = resolve_model_dir(config.model.path)
    model = ModelConfig.from_hf(load_hf_config(model_dir))
    prompts = PromptSet(config, load_tokenizer(model_dir), model.max_positions)
    dtype = resolve_dtype(config.model.dtype, ranks.device)
    memory = forecast_memory(
        config, model, dtype=dtype, device=ranks.device, longest_prompt=prompts.longest
    )
    rollout_s, update_s = _forecast_seconds(config, model, ranks, dtype, prompts.longest)
    if not ranks.is_main:
        return
    console = Console(highlight=False)
    console.print(dump_config(config), markup=False)
    console.print(_memory_table(memory, ranks))
    console.print(
        f"A step takes at most about {rollout_s + update_s:,.0f} s on this machine's "
        f"{ranks.device.type} (rollout {rollout_s:,.0f} s, update {update_s:,.0f} s) if every "
        f"completion has {config.rollout.max_completion_tokens} tokens; "
        f"{config.num_steps} steps: {(rollout_s + update_s) * config.num_steps / 60:,.0f} minutes."
    )


def _memory_table(memory: MemoryForecast, ranks: Ranks) -> Table:
    table = Table("memory on each rank", "phase", "GB", title="Forecast")
    for phase, owners in (
        ("always", memory.always),
        ("rollout", memory.rollout),
        ("update", memory.update),
    ):
        for owner, size in owners.items():
            table.add_row(owner, phase, f"{size / 1e9:,.2f}")
    table.add_section()
    table.add_row("peak", "", f"{memory.peak / 1e9:,.2f}")
    if ranks.device.type == "cuda":
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        fits = "fits" if memory.peak < total else "DOES NOT FIT"
        table.add_row("the GPU has", fits, f"{total / 1e9:,.2f}")
    return table


def _forecast_seconds(
    config: TrainConfig, model: ModelConfig, ranks: Ranks, dtype: torch.dtype, longest_prompt: int
) -> tuple[float, float]:
    """Rollout and update of one step, from one measured matrix product of each kind."""
    count = num_parameters(model)
    per_rank = config.data.prompts_per_step * config.rollout.group_size / ranks.world_size
    rows = max(1, min(config.rollout.max_num_seqs, int(per_rank)))
    weight = torch.randn(model.ff, model.hidden, dtype=dtype, device=ranks.device)
    decode_s = _seconds_of(weight, rows) * count / weight.numel()
    waves = per_rank / rows
    rollout_s = waves * config.rollout.max_completion_tokens * decode_s
    row_s = _seconds_of(weight, PROBE_ROWS) / PROBE_ROWS * count / weight.numel()
    passes = 4 if config.model.checkpoint_layers else 3
    if config.update.num_epochs * config.update.num_minibatches > 1:
        passes += 1
    if config.loss.kl_coef > 0:
        passes += 1
    tokens = per_rank * (config.rollout.max_completion_tokens + longest_prompt)
    return rollout_s, tokens * passes * row_s * config.update.num_epochs


def _seconds_of(weight: torch.Tensor, rows: int) -> float:
    """Median seconds of [rows, D] @ weight.T over at least a tenth of a second."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.1:
        started = time.perf_counter()
        linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
