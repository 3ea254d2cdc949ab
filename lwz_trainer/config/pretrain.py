"""The whole configuration of `pretrain`: continual pretraining, and supervised fine-tuning.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.sections import CheckpointConfig, LogConfig, OptimConfig
from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["PretrainConfig", "PretrainUpdateConfig", "TextDataConfig", "named_paths"]


@dataclass(frozen=True)
class TextDataConfig:
    """Which texts, in which shares, and how they become token sequences."""

    sources: tuple[str, ...] = ()
    """NAME=PATH each: a .jsonl, .parquet or .txt file, a directory of them, or a hub id."""
    weights: tuple[float, ...] = ()
    """Share of the tokens that each source gives, in the order of sources; unset: equal shares."""
    held_out: tuple[str, ...] = ()
    """NAME=PATH each: texts that are never trained on, whose loss is measured."""
    held_out_every: int = 50
    """Steps between measurements of held_out; also before the first step and after the last."""
    held_out_tokens: int = 1_000_000
    """At most this many tokens of each held-out text."""
    text_field: str = "text"
    """Field of a plain document; rows without it hold prompt and answer, or messages."""
    template: str = "think"
    """How prompt and answer become text: "think", "direct", "think_example", "chat", or a .txt
    file; as in `train`."""
    chat_opened: Literal["", "<think>", "<answer>"] = ""
    """Tag that starts a reply to the chat template, which is then written with tags."""
    chat_system: str = ""
    """System message of the chat template; empty for none."""
    loss_on: Literal["all", "answer"] = "all"
    """Tokens that are learned of a row with a prompt: all, or the reply (thinking and answer)."""
    context_tokens: int = 32_768
    """Longest sequence; longer documents are cut into several, longer replies at their end."""
    batch_size: int = 512
    """Packed sequences of context_tokens in one step, over all ranks: their product, in tokens of
    whole sequences, is never passed."""
    shuffle_windows: int = 256
    """Sequences of a source that are read ahead and shuffled together."""

    def __post_init__(self) -> None:
        for name in ("held_out_tokens", "context_tokens", "batch_size", "shuffle_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.held_out_every < 0:
            raise UserError(f"data.held_out_every must be at least 0, got {self.held_out_every}")
        if not self.sources:
            return  # the command refuses that; here it would forbid a default configuration
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(
                f"data.weights has {len(self.weights)} entries, data.sources {len(self.sources)}: "
                "give one weight for each source, or none"
            )
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise UserError(f"data.weights must be above 0, got {weight}: leave the source out")
        named_paths("data.sources", self.sources)
        named_paths("data.held_out", self.held_out)


@dataclass(frozen=True)
class PretrainUpdateConfig:
    """How a batch of sequences becomes gradients."""

    microbatch_tokens: int = 32_768
    """Token budget of one packed forward and backward pass on one rank."""
    loss_impl: Literal["auto", "triton", "native", "torch", "reference"] = "auto"
    """How log-probs are computed; "reference" holds all logits and is for checks."""
    chunk_mb: int = 0
    """Size of one fp32 chunk of logits in MB; 0 is the kernels' choice."""

    def __post_init__(self) -> None:
        if self.microbatch_tokens < 1 or self.chunk_mb < 0:
            raise UserError(
                "update.microbatch_tokens must be at least 1 and update.chunk_mb at least 0, got "
                f"{self.microbatch_tokens} and {self.chunk_mb}"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Cross-entropy on texts, or on replies to prompts."""

    output_dir: str = "runs/pretrain"
    """Everything of the run is written here: config, metrics, checkpoints, weights."""
    seed: int = 0
    """Of the order of the data."""
    num_steps: int = 1000
    """Optimizer steps."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    num_threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores among its ranks."""
    model: ModelSection = field(default_factory=ModelSection)
    """The model that is trained further."""
    data: TextDataConfig = field(default_factory=TextDataConfig)
    """Texts."""
    update: PretrainUpdateConfig = field(default_factory=PretrainUpdateConfig)
    """From texts to gradients."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several ranks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = field(default_factory=LogConfig)
    """Recording."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.num_steps < 1 or self.num_threads < 0:
            raise UserError(
                "num_steps must be at least 1 and num_threads at least 0, got "
                f"{self.num_steps} and {self.num_threads}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, got '{self.device}'")
        if self.optim.warmup_steps >= self.num_steps and self.optim.warmup_steps > 0:
            raise UserError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below num_steps "
                f"({self.num_steps}): the peak rate would never be reached"
            )
        if self.log.trace_steps:
            raise UserError(
                "log.trace_steps writes the timeline of a rollout and its update, which only train "
                "has: leave it out"
            )
        if self.parallel.sequence != 1 and self.model.attention not in (
            "auto",
            "triton",
            "torch",
            "reference",
        ):
            raise UserError(
                f"model.attention {self.model.attention} attends within one rank; "
                f"parallel.sequence {self.parallel.sequence} needs auto, triton, torch or reference"
            )


def named_paths(setting: str, entries: tuple[str, ...]) -> dict[str, str]:
    """NAME=PATH entries as {name: path}, in order.

    Raises:
        UserError: an entry of another form, or a name that is there twice.
    """
    paths: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or "/" in name:
            raise UserError(f"{setting} takes NAME=PATH, got '{entry}'")
        if name in paths:
            raise UserError(f"{setting} names '{name}' twice: give each text a name of its own")
        paths[name] = path
    return paths
