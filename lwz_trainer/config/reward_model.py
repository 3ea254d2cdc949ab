"""The configuration of `reward-model`: Bradley–Terry training on pairs of answers.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field

from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.sections import CheckpointConfig, LogConfig, OptimConfig
from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["PairDataConfig", "PairUpdateConfig", "RewardModelConfig"]


@dataclass(frozen=True)
class PairDataConfig:
    """Pairs of answers to one prompt, of which one was preferred."""

    pairs: str = ""
    """JSONL with `prompt`, `chosen`, `rejected` and, if wanted, `margin` and `source`."""
    heldout: str = ""
    """JSONL of the same form to evaluate on; empty: a share of the prompts of `pairs`."""
    heldout_frac: float = 0.1
    """Share of the prompts that is held out, with all their pairs; unused with `heldout`."""
    max_tokens: int = 8192
    """Longer inputs lose the end of the answer; also capped by the model's own limit."""

    def __post_init__(self) -> None:
        if not 0 < self.heldout_frac < 1:
            raise UserError(f"data.heldout_frac must be in (0, 1), got {self.heldout_frac}")
        if self.max_tokens < 16:
            raise UserError(f"data.max_tokens must be at least 16, got {self.max_tokens}")


@dataclass(frozen=True)
class PairUpdateConfig:
    """From pairs to gradients."""

    pairs_per_step: int = 64
    """Pairs in one optimizer step, over all ranks."""
    num_epochs: float = 1.0
    """Passes over the pairs; the last, incomplete step is left out."""
    use_margin: bool = False
    """Ask for a difference of `margin` between the two scores (Llama 2's loss)."""
    microbatch_tokens: int = 8192
    """Token budget of one packed forward and backward pass; a longer pair has one of its own."""
    share_prompts: bool | None = None
    """Compute what a pair's two inputs begin with once; unset: where the attention backend can."""
    eval_every: int = 20
    """Score the held-out pairs after every this many steps, and at the end; 0: only then."""

    def __post_init__(self) -> None:
        for name in ("pairs_per_step", "num_epochs", "microbatch_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"update.{name} must be above 0, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise UserError(f"update.eval_every must be at least 0, got {self.eval_every}")


@dataclass(frozen=True)
class RewardModelConfig:
    """A writing reward model, trained on preference pairs."""

    output_dir: str = "runs/reward_model"
    """Everything of the run is written here: config, metrics, report, checkpoints, weights."""
    seed: int = 0
    """Seeds the order of the pairs and the held-out split."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    num_threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores among its ranks."""
    model: ModelSection = field(default_factory=ModelSection)
    """The language model that the reward model starts from."""
    data: PairDataConfig = field(default_factory=PairDataConfig)
    """Pairs."""
    update: PairUpdateConfig = field(default_factory=PairUpdateConfig)
    """From pairs to gradients."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several ranks, each with its share of a step's pairs; a sequence is never shared."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    """The optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=100))
    """Saving and resuming."""
    log: LogConfig = field(default_factory=LogConfig)
    """Recording."""

    def __post_init__(self) -> None:
        if self.num_threads < 0:
            raise UserError(f"num_threads must be at least 0, got {self.num_threads}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, got '{self.device}'")
        check_seed(self.seed)
        if self.parallel.sequence != 1:
            raise UserError(
                "a reward model is trained with whole pairs on each rank, got parallel.sequence "
                f"{self.parallel.sequence}: leave it out"
            )
