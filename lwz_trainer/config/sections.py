"""Sections of the training configuration that belong to the loop: data, rollout, update, output.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from lwz_trainer.config.vllm_server import VllmServerConfig
from lwz_trainer.errors import UserError

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LogConfig",
    "OptimConfig",
    "RolloutConfig",
    "UpdateConfig",
]


@dataclass(frozen=True)
class DataConfig:
    """Which requests, and how they are put to the model."""

    prompts: str = "writing"
    """Bundled set ("writing", "demo") or a JSONL / Parquet file with `prompt`, `length_range`."""
    template: str = "think"
    """"think", "direct", "think_example", "chat" (the model's own template), or a .txt file."""
    chat_opened: str = "<think>"
    """Tag opened after the chat template's generation prompt; only used with template "chat"."""
    chat_system: str = ""
    """System message of the chat template; empty for none."""
    prompts_per_step: int = 4
    """P: groups in one optimizer step, over all ranks."""

    def __post_init__(self) -> None:
        _require_positive("data", self, "prompts_per_step")
        if self.chat_opened not in ("", "<think>", "<answer>"):
            raise UserError(
                f"data.chat_opened must be '', '<think>' or '<answer>', got '{self.chat_opened}'"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling and the engine's limits."""

    group_size: int = 8
    """G: completions per prompt; at least 2, since advantages are relative to the group."""
    max_completion_tokens: int = 1024
    """Longest completion in tokens; one that reaches it counts as truncated."""
    temperature: float = 0.8
    """Divides the logits before the log-softmax, in the engine and in the loss."""
    top_p: float = 1.0
    """Nucleus: sample from the smallest set of tokens with this probability mass."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 means all."""
    stop: tuple[str, ...] = ("<|user|>", "<|endoftext|>", "</answer>")
    """A completion ends when one of these strings appears in it."""
    max_num_seqs: int = 64
    """Most sequences decoded together on one rank."""
    page_size: int = 16
    """Tokens in one page of the KV cache."""
    kv_cache_tokens: int = 0
    """Size of the KV cache in tokens on one rank; 0 sizes it for max_num_seqs within memory."""
    memory: Literal["auto", "phase", "plain"] = "auto"
    """"phase": the KV cache keeps its addresses over the run, and its pages are gradients and
    activations in the update; "plain": torch's allocator; "auto": phase on a GPU that can."""
    offload_optimizer: bool | None = None
    """Keep the optimizer's state in host memory during the rollout; unset: on a GPU where the KV
    cache that is wanted does not fit beside it."""
    prefill_tokens: int = 8192
    """Most prompt tokens processed in one forward pass."""
    burst_steps: int = 0
    """Decode steps between two looks of the host; 0 means 8 on a GPU, 1 on a CPU. A sequence that
    meets a stop string draws up to burst_steps - 1 tokens in vain; samples do not change."""
    cuda_graphs: bool = True
    """Record the decode step of each batch size as a CUDA graph; used on a GPU only."""
    max_replacements: int = 0
    """Times that a group whose advantages are all 0 is replaced by one of another prompt in the
    same step (dynamic sampling, DAPO, arXiv:2503.14476)."""
    enough_groups_frac: float = 1.0
    """The rollout ends when this share of a rank's groups is complete; the others are dropped."""
    share_work: bool = False
    """Let a rank without waiting samples draw those of other ranks; the samples are the same."""
    engine: Literal["own", "vllm", "vllm_server"] = "own"
    """"own" samples from the trainer's weights themselves; "vllm" from a copy of them in the same
    processes, "vllm_server" from one in a vLLM server: docs/vllm.md."""
    vllm_eager: bool = False
    """Start engine vllm without torch.compile and CUDA graphs: sooner, but it decodes slower."""
    server: VllmServerConfig = field(default_factory=VllmServerConfig)
    """The server of engine vllm_server."""

    def __post_init__(self) -> None:
        _require_positive(
            "rollout",
            self,
            "max_completion_tokens",
            "temperature",
            "max_num_seqs",
            "page_size",
            "prefill_tokens",
        )
        if self.group_size < 2:
            raise UserError(
                f"rollout.group_size must be at least 2, got {self.group_size}: advantages compare "
                "the completions of one prompt"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"rollout.top_p must be in (0, 1], got {self.top_p}")
        _require_not_negative(
            "rollout", self, "top_k", "kv_cache_tokens", "burst_steps", "max_replacements"
        )
        if not 0 < self.enough_groups_frac <= 1:
            raise UserError(
                f"rollout.enough_groups_frac must be in (0, 1], got {self.enough_groups_frac}"
            )
        if self.share_work and (self.enough_groups_frac < 1 or self.max_replacements > 0):
            raise UserError(
                "rollout.share_work completes groups when all ranks have drawn their samples: "
                "leave rollout.enough_groups_frac and rollout.max_replacements out"
            )
        if self.enough_groups_frac < 1 and self.max_replacements > 0:
            raise UserError(
                "rollout.enough_groups_frac ends the rollout early, rollout.max_replacements "
                "prolongs it: set one of them"
            )
        if any(not stop for stop in self.stop):
            raise UserError("rollout.stop holds an empty string: it would end every completion")
        if self.engine not in ("own", "vllm", "vllm_server"):
            raise UserError(f"rollout.engine must be own, vllm or vllm_server, got '{self.engine}'")
        if self.memory not in ("auto", "phase", "plain"):
            raise UserError(f"rollout.memory must be auto, phase or plain, got '{self.memory}'")
        for name, is_set in (
            ("memory phase", self.memory == "phase"),
            ("offload_optimizer", self.offload_optimizer),
        ):
            if is_set and self.engine != "own":
                raise UserError(
                    f"rollout.{name} makes room for the KV cache of rollout.engine own, got "
                    f"{self.engine}: leave it out"
                )
        if self.engine == "vllm_server":
            self.server.require()
        if self.share_work and self.engine != "own":
            raise UserError(
                f"rollout.share_work hands samples over between own engines, got rollout.engine "
                f"{self.engine}: use one of them"
            )

    @property
    def truncates_sampling(self) -> bool:
        """Whether some tokens are never drawn, so that others are likelier than the policy says."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class UpdateConfig:
    """How a rollout batch becomes gradients."""

    schedule: Literal["sequential", "interleaved"] = "sequential"
    """"interleaved": the gradient of a group whose completions and rewards are all in is
    accumulated while the others are still being written; the weights change when all are in."""
    deterministic: bool = False
    """Pack each group on its own and add the gradients in the order of the groups, so that both
    schedules give the same bits."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss (overlong filtering)."""
    num_minibatches: int = 1
    """Optimizer updates per pass over a rollout batch; groups are split evenly."""
    num_epochs: int = 1
    """Passes over each rollout batch."""
    microbatch_tokens: int = 8192
    """Token budget of one packed forward and backward pass on one rank."""
    share_prompts: bool | None = None
    """Compute a prompt once for its whole group; unset: where the attention backend can."""

    def __post_init__(self) -> None:
        _require_positive("update", self, "num_minibatches", "num_epochs", "microbatch_tokens")
        if self.is_interleaved and self.num_minibatches * self.num_epochs > 1:
            raise UserError(
                "update.schedule interleaved is one update a step, before which no weight may "
                f"change; got update.num_minibatches {self.num_minibatches} and update.num_epochs "
                f"{self.num_epochs}: set both to 1, or use update.schedule sequential"
            )

    @property
    def is_interleaved(self) -> bool:
        """Whether gradients are accumulated during the rollout."""
        return self.schedule == "interleaved"

    @property
    def packs_by_group(self) -> bool:
        """Whether no micro-batch holds samples of two groups."""
        return self.is_interleaved or self.deterministic


MAX_BF16_BETA2 = 0.98
"""bf16 keeps a running square that moves by less than 0.2 to 0.4% of itself where it was; here one
step moves it by that much when the squared gradient is 10 to 20% off."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on fp32 master weights."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over num_steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_frac: float = 0.0
    """Learning rate at the end of a decay, as a fraction of lr."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the gradient's running square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of both moments: bf16 takes 4 bytes a parameter less. Masters and gradients are fp32."""

    def __post_init__(self) -> None:
        _require_positive("optim", self, "lr", "eps")
        _require_not_negative("optim", self, "warmup_steps", "weight_decay", "max_grad_norm")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.moments_dtype == "bf16" and self.beta2 > MAX_BF16_BETA2:
            raise UserError(
                f"optim.moments_dtype bf16 needs optim.beta2 <= {MAX_BF16_BETA2}, "
                f"got {self.beta2}: rounding would lose a slower running square; lower beta2, "
                "or use fp32"
            )
        if not 0 <= self.min_lr_frac <= 1:
            raise UserError(f"optim.min_lr_frac must be in [0, 1], got {self.min_lr_frac}")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 10
    """Save after every this many steps; 0 saves only at the end and on a signal."""
    keep: int = 2
    """Complete checkpoints kept; older ones are removed after a save."""
    resume: bool = True
    """Go on from the run directory's latest checkpoint if there is one."""
    export: bool = True
    """Write the final weights as a Hugging Face directory, `final/`."""

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, "keep")
        _require_not_negative("checkpoint", self, "every")


@dataclass(frozen=True)
class LogConfig:
    """What is written beside metrics.jsonl and samples/."""

    tensorboard: bool = True
    """Write TensorBoard event files under tensorboard/."""
    wandb: str = ""
    """Project name; empty is off (needs the wandb extra)."""
    trackio: str = ""
    """Project name; empty is off (needs the trackio extra)."""
    progress: bool | None = None
    """Progress bars while sampling and training; unset: only on a terminal."""
    trace_steps: tuple[int, ...] = ()
    """1-based steps whose timeline is written to trace/, to be opened in Perfetto."""


def _require_positive(section: str, config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{section}.{name} must be above 0, got {getattr(config, name)}")


def _require_not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{section}.{name} must be at least 0, got {getattr(config, name)}")
