"""The whole configuration of `train`, and what must hold between its sections."""

from dataclasses import dataclass, field

from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.rewards import RewardsConfig
from lwz_trainer.config.sections import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    RolloutConfig,
    UpdateConfig,
)
from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """GRPO for long-form writing: sample, score, update."""

    output_dir: str = "runs/train"
    """Everything of the run is written here: config, metrics, samples, checkpoints, weights."""
    seed: int = 0
    """Seeds the data order and, with step, sample and position, every sampled token."""
    num_steps: int = 150
    """Rollout and update rounds."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    num_threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores among its ranks."""
    model: ModelSection = field(default_factory=ModelSection)
    """The policy."""
    data: DataConfig = field(default_factory=DataConfig)
    """Requests and template."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """What is rewarded."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """From a rollout batch to gradients."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several ranks."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = field(default_factory=LogConfig)
    """Recording."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.num_threads < 0:
            raise UserError(f"num_threads must be at least 0, got {self.num_threads}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, got '{self.device}'")
        check_seed(self.seed)
        if self.optim.warmup_steps >= self.num_steps and self.optim.warmup_steps > 0:
            raise UserError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below num_steps "
                f"({self.num_steps}): the peak rate would never be reached"
            )
        if self.data.prompts_per_step % self.update.num_minibatches:
            raise UserError(
                f"data.prompts_per_step ({self.data.prompts_per_step}) must be a multiple of "
                f"update.num_minibatches ({self.update.num_minibatches}): whole groups are split"
            )
        for name in ("sampler_correction", "off_policy_kl_max"):
            if self.rollout.truncates_sampling and getattr(self.loss, name) is not None:
                raise UserError(
                    f"loss.{name} takes what sampler and trainer differ by for an error; with "
                    "rollout.top_p or top_k they draw from different distributions: set top_p 1 "
                    f"and top_k 0, or leave loss.{name} out"
                )
        if self.update.is_interleaved:
            self._refuse_what_waits_for_all_groups()
        if self.parallel.sequence != 1:
            self._refuse_what_shards_cannot_do()

    def num_samples_per_rank(self, num_ranks: int) -> int:
        """Most samples of one step on one rank."""
        return -(-self.data.prompts_per_step * self.rollout.group_size // num_ranks)

    def _refuse_what_waits_for_all_groups(self) -> None:
        """Settings under which a group's gradient depends on the other groups."""
        if self.loss.entropy_coef > 0 and self.loss.needs_num_sequences:
            raise UserError(
                f"update.schedule interleaved: in loss.loss_type {self.loss.loss_type} the weight "
                "of loss.entropy_coef depends on the length of all completions: use dapo, bnpo, "
                "cispo or vespo, set entropy_coef 0, or use update.schedule sequential"
            )
        if self.parallel.sequence != 1:
            raise UserError(
                f"update.schedule interleaved needs whole sequences on one rank, got "
                f"parallel.sequence {self.parallel.sequence}: set it to 1, or use "
                "update.schedule sequential"
            )
        if self.rollout.share_work:
            raise UserError(
                "update.schedule interleaved adds groups while others are being drawn, "
                "rollout.share_work completes them at the end: use one of them"
            )
        if self.parallel.shard_parameters:
            raise UserError(
                "update.schedule interleaved adds groups when they end, on each rank at another "
                "time; parallel.shard_parameters needs all ranks in every pass: leave it out, or "
                "use update.schedule sequential"
            )

    def _refuse_what_shards_cannot_do(self) -> None:
        """Settings that a sequence spread over ranks does not know."""
        sequence = f"parallel.sequence {self.parallel.sequence}"
        if self.update.share_prompts and self.parallel.sequence != "auto":
            raise UserError(
                f"update.share_prompts needs whole sequences on one rank, with {sequence} there "
                "are none: leave it out"
            )
        if self.loss.impl == "reference":
            raise UserError(
                f"loss.impl reference holds whole sequences, with {sequence} a rank has parts of "
                "them: use loss.impl torch or auto"
            )
        if self.model.attention not in ("auto", "triton", "torch", "reference"):
            raise UserError(
                f"model.attention {self.model.attention} attends within one rank; {sequence} needs "
                "auto, triton, torch or reference"
            )
