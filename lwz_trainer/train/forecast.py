"""What a rank holds in a step, counted from the shapes before anything is loaded."""

import sys
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.table import Table

from lwz_kernels.loss_head import default_chunk_bytes
from lwz_trainer.config.parallel import SequencePlan, plan_sequence
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.rollout.kv_cache import plan_pages
from lwz_trainer.update.optimizer import moments_dtype

__all__ = [
    "MemoryForecast",
    "forecast_memory",
    "gpu_memory_bytes",
    "num_parameters",
    "print_memory",
]

# Left free of a GPU: its context, libraries' workspaces, and gaps between tensors.
SPARE_FRAC = 0.05
# Workspaces and gaps of a process on a CPU: 4% of its tensors were measured (test_demo_model.py).
PROCESS_SPARE_FRAC = 0.08


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one rank, by owner; the KV cache and the update's tensors take turns, unless the
    schedule is interleaved."""

    always: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    """In host memory; not part of the peak."""
    parked: dict[str, int] = field(default_factory=dict)
    """Of the update alone: on the host while the rollout runs."""
    is_interleaved: bool = False
    """The rollout and the update are there at the same time."""

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """Owners that are there together, beside those that always are."""
        update = self.update | self.parked
        if not self.is_interleaved:
            return {"rollout": self.rollout, "update": update}
        together = {"rollout and update": self.rollout | self.update}
        return together | ({"update": update} if self.parked else {})

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(sum(p.values()) for p in self.phases.values())

    def without_rollout(self) -> "MemoryForecast":
        """Of a run that only updates: sharded weights are whole on the main rank's host alone."""
        whole = self.rollout.get("weights, gathered", 0)
        host = self.host | ({"weights, to load and export": whole} if whole else {})
        return replace(self, rollout={}, host=host)

    def in_process(self, program_bytes: int) -> "MemoryForecast":
        """With the interpreter and its libraries, and what is left free of a GPU; 0: without."""
        if not program_bytes:
            return self
        copies = {f"{owner}, on the host": size for owner, size in self.parked.items()}
        counted = replace(self, always=self.always | copies)
        program = {
            "program and libraries": program_bytes,
            "workspaces and gaps": int(PROCESS_SPARE_FRAC * counted.peak),
        }
        return replace(counted, always=counted.always | program)

    def misfits(self, device_bytes: int) -> list[str]:
        """For each phase that needs more than the device can give: how much, and what for."""
        usable = int(device_bytes * (1 - SPARE_FRAC))
        found = []
        for phase, owners in self.phases.items():
            everything = self.always | owners
            needed = sum(everything.values())
            if needed > usable:
                largest = sorted(everything, key=lambda owner: -everything[owner])[:2]
                parts = ", ".join(f"{o} {everything[o] / 1e9:,.1f} GB" for o in largest)
                found.append(
                    f"{phase}: {needed / 1e9:,.1f} GB of {usable / 1e9:,.1f} GB; largest: {parts}"
                )
        return found


def num_parameters(model: ModelConfig) -> int:
    """Matrices and norms; a tied head once."""
    return model.layers * _num_layer_parameters(model) + _num_end_parameters(model)


def _num_layer_parameters(model: ModelConfig) -> int:
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    layer = model.hidden * (qkv + model.heads * model.head_dim + 3 * model.ff + 2)
    layer += qkv if model.qkv_bias else 0
    return layer + (2 * model.head_dim if model.qk_norm else 0)


def _num_end_parameters(model: ModelConfig) -> int:
    """Of embedding, head and final norm."""
    heads = 1 if model.tie_embeddings else 2
    return heads * model.vocab_size * model.hidden + model.hidden


def forecast_memory(
    config: TrainConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    longest_prompt: int,
    num_ranks: int = 1,
    ranks_per_node: int = 1,
    program_bytes: int = 0,
    device_bytes: int | None = None,
) -> MemoryForecast:
    """What one rank of `num_ranks` holds, from the shapes alone.

    Where `rollout.offload_optimizer` is unset, the optimizer's state waits on the host during the
    rollout if a GPU of `device_bytes` cannot hold it beside the KV cache that is wanted.

    Args:
        config: of the run.
        model: sizes.
        dtype: of the weights.
        device: of the weights.
        longest_prompt: in tokens.
        num_ranks, ranks_per_node: how many there are.
        program_bytes: of the interpreter and its libraries, on a CPU, where all of the process
            counts; then what is left free of a GPU is counted too.
        device_bytes: memory of a GPU; None: not known, or there is none.
    """

    def count(config: TrainConfig) -> MemoryForecast:
        return _count_memory(
            config,
            model,
            dtype=dtype,
            device=device,
            longest_prompt=longest_prompt,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            program_bytes=program_bytes,
        )

    found = count(config)
    is_undecided = config.rollout.offload_optimizer is None and config.rollout.engine == "own"
    if not is_undecided or device_bytes is None:
        return found
    if not any(misfit.startswith("rollout") for misfit in found.misfits(device_bytes)):
        return found
    return count(replace(config, rollout=replace(config.rollout, offload_optimizer=True)))


def _count_memory(
    config: TrainConfig,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    longest_prompt: int,
    num_ranks: int,
    ranks_per_node: int,
    program_bytes: int,
) -> MemoryForecast:
    size = dtype.itemsize
    count = num_parameters(model)
    is_fully_sharded = config.parallel.shard_parameters and num_ranks > 1
    shards = num_ranks if config.parallel.shard_optimizer or is_fully_sharded else 1
    holders = num_ranks if is_fully_sharded else 1  # of weights and gradients
    state = {"AdamW moments": 2 * moments_dtype(config.optim).itemsize * count // shards}
    if is_fully_sharded:
        always = {"fp32 masters": 4 * count // holders}
    else:
        always = {"weights": count * size}
        if dtype != torch.float32:
            state["lower halves of the masters"] = 2 * count // shards
    parked = state if config.rollout.offload_optimizer else {}
    if not parked:
        always |= state
    if config.loss.kl_coef > 0:
        always["reference model"] = count * size // holders
    rollout = config.rollout
    cache = plan_pages(
        rollout,
        model,
        dtype,
        longest_prompt=longest_prompt,
        num_samples=config.num_samples_per_rank(num_ranks),
        memory_limit_bytes=sys.maxsize,  # what is wanted
    )
    longest = longest_prompt + rollout.max_completion_tokens
    plan = plan_sequence(
        config.parallel,
        heads=model.heads,
        kv_heads=model.kv_heads,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
    )
    sharers = plan.num_ranks_for(longest, config.update.microbatch_tokens)
    tokens = max(config.update.microbatch_tokens, -(-longest // sharers))
    mlp_tokens = min(config.model.mlp_tile_tokens or tokens, tokens)
    kept = tokens * model.layers * model.hidden * size
    is_offloaded = config.model.offload_layers
    update = {
        "activations of one layer": size
        * (tokens * _layer_width(config, model) + mlp_tokens * 6 * model.ff),
        "hidden states and their gradient": 3 * tokens * model.hidden * size,
        "logits of one chunk": _logits_bytes(config, model, dtype, device, tokens),
    }
    if config.model.checkpoint_layers:
        # On the way out or in: the layer at hand, and its neighbour.
        update["inputs of all layers"] = 2 * kept // model.layers if is_offloaded else kept
    else:
        update["activations of the other layers"] = (
            (model.layers - 1) * tokens * size * (_kept_width(model))
        )
    if sharers > 1:
        update["exchange between ranks"] = _exchange_bytes(plan, sharers, model, tokens, size)
    if is_fully_sharded:
        gathered = _gathered_bytes(model, size, activations=sum(update.values()))
        update["weights at hand and their gradients"] = gathered
    update["gradients, fp32"] = 4 * count // holders
    sampling = {
        "KV cache": cache.num_bytes,
        "logits of one decode step": 3 * cache.max_num_seqs * model.vocab_size * 4,
    }
    if is_fully_sharded:
        sampling["weights, gathered"] = count * size
    host = {"inputs of all layers": kept} if is_offloaded else {}
    found = MemoryForecast(
        always=always,
        rollout=sampling,
        update=update,
        host=host | parked,
        parked=parked,
        is_interleaved=config.update.is_interleaved,
    )
    return found.in_process(program_bytes)


def _gathered_bytes(model: ModelConfig, size: int, *, activations: int) -> int:
    """What a fully sharded update holds whole beside `activations` bytes of other values.

    In backward: weights of embedding and head, the head's fp32 gradient, a layer's weights, those
    of the next one twice (as received, and in place), fp32 gradients of one layer and of the one
    before it on their way to their ranks. Or, behind all layers and without their activations:
    gradients of embedding and head, as accumulated and as sent, beside the first layer's as sent.
    """
    layer, ends = _num_layer_parameters(model), _num_end_parameters(model)
    head = model.vocab_size * model.hidden
    in_layers = size * ends + 4 * head + (3 * size + 8) * layer
    at_the_end = 8 * ends + 4 * layer
    return max(in_layers, at_the_end - activations)


def _layer_width(config: TrainConfig, model: ModelConfig) -> int:
    """Values a token that one layer holds at its peak, in backward, without its feed-forward.

    The counts were read off the peak of live bytes, see tests/trainer/test_forecast.py.
    """
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    tables = 2 * model.head_dim
    if config.model.mlp_tile_tokens:  # then the peak lies in the attention's backward
        return 4 * model.hidden + 4 * queries + 5 * keys + tables
    return 7 * model.hidden + queries + tables


def _kept_width(model: ModelConfig) -> int:
    """Values a token that a layer without checkpoint keeps for its backward."""
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    return 4 * model.hidden + 3 * qkv + model.heads * model.head_dim + 3 * model.ff


def _exchange_bytes(
    plan: SequencePlan, sharers: int, model: ModelConfig, tokens: int, size: int
) -> int:
    """Buffers of one layer's attention over `sharers` ranks with `tokens` tokens each, backward."""
    scheme, ulysses_ranks = plan.schemes[sharers]
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    heads_ranks = sharers if scheme == "ulysses" else ulysses_ranks or 1
    total = 0
    if heads_ranks > 1:  # q, k, v and their way back, each sent and received
        spread = max(model.kv_heads, heads_ranks) * model.head_dim
        total += tokens * (4 * queries + 4 * spread) * size
    if scheme == "ring":  # travelling keys and values, and their gradients in fp32
        total += tokens * 2 * keys * (2 * size + 3 * 4)
    elif scheme != "ulysses":  # one head of the stream: twice gathered, in order, fp32 gradients
        total += sharers * tokens * 2 * model.head_dim * (3 * size + 2 * 4)
    return total


def _logits_bytes(
    config: TrainConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, tokens: int
) -> int:
    """One chunk of fp32 logits, turned into their gradient in place, and on a CPU an fp32 head."""
    if config.loss.impl == "reference":  # logits, log-softmax and their gradients
        return 4 * 4 * tokens * model.vocab_size
    chunk = config.loss.chunk_bytes or default_chunk_bytes(device)
    is_copied = device.type == "cpu" and dtype != torch.float32
    return chunk + 4 * model.vocab_size * model.hidden * is_copied


def print_memory(
    console: Console,
    memory: MemoryForecast,
    *,
    device_bytes: int | None,
    num_ranks: int,
) -> None:
    """The table, and what does not fit into a GPU of `device_bytes`, where there is one."""
    console.print(_memory_table(memory, device_bytes, num_ranks))
    for misfit in memory.misfits(device_bytes) if device_bytes else []:
        console.print(f"DOES NOT FIT, {misfit}", markup=False)


def gpu_memory_bytes(device: torch.device, device_gb: float | None = None) -> int | None:
    """Of a GPU of `device_gb` GB, or of the one at hand; None where there is none."""
    if device_gb is not None:
        return int(device_gb * 1e9)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return None


def _memory_table(memory: MemoryForecast, device_bytes: int | None, world_size: int) -> Table:
    """What each rank holds, and whether that fits `device_bytes`."""
    title = f"Forecast, {world_size} rank{'s' if world_size > 1 else ''}"
    table = Table("memory on each rank", "phase", "GB", title=title)
    for phase, owners in (
        ("always", memory.always),
        ("rollout", memory.rollout),
        ("update", memory.update | memory.parked),
        ("host", memory.host),
    ):
        for owner, size in owners.items():
            table.add_row(owner, phase, f"{size / 1e9:,.2f}")
    table.add_section()
    for phase, owners in memory.phases.items():
        if owners:
            size = sum(memory.always.values()) + sum(owners.values())
            table.add_row("all that is there at the same time", phase, f"{size / 1e9:,.2f}")
    table.add_row("peak", "", f"{memory.peak / 1e9:,.2f}")
    if device_bytes is not None:
        fits = "does not fit" if memory.misfits(device_bytes) else "fits"
        table.add_row("the GPU has", fits, f"{device_bytes / 1e9:,.2f}")
    return table
