"""Section `rewards` of the training configuration: what is rewarded, and by how much.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from lwz_trainer.errors import UserError

__all__ = [
    "FormatRewardConfig",
    "LengthRewardConfig",
    "OverlongRewardConfig",
    "RewardPoolConfig",
    "RewardsConfig",
    "WritingRewardConfig",
]

# Similarity from which on a passage repeats an earlier one. Shingles of 3 words: in the texts of
# GPL-3 and MPL-2.0, which repeat their terms a lot, the most similar pairs of paragraphs have 0.21
# and 0.19; of copies with every tenth word replaced at random, nine in ten have at least 0.41.
SHINGLES_THRESHOLD = 0.4
# Not measured: encoders differ in the cosine of unrelated text, so set it for the encoder in use.
EMBEDDING_THRESHOLD = 0.9


@dataclass(frozen=True)
class LengthRewardConfig:
    """How well the answer's number of words fits the range that the prompt asks for."""

    weight: float = 1.0
    """Share of the length advantage; 0 switches the reward off."""
    n_max: int = 14000
    """Number of words at which an answer that is too long has lost the whole reward."""

    def __post_init__(self) -> None:
        _require_weight("length", self.weight)
        if self.n_max <= 0:
            raise UserError(f"rewards.length.n_max must be above 0, got {self.n_max}")


@dataclass(frozen=True)
class FormatRewardConfig:
    """Tags in the right places, times the share of the answer that does not repeat itself."""

    weight: float = 1.0
    """Share of the format advantage; 0 switches the reward off."""
    structure: Literal["strict", "graded"] = "strict"
    """"strict": 1 for exactly the right tags, else 0. "graded": credit for each right piece."""
    redundancy: Literal["shingles", "embedding", "off"] = "shingles"
    """How two passages are compared: shared runs of words, or the cosine of embeddings."""
    redundancy_threshold: float | None = None
    """From this similarity on a passage repeats an earlier one; unset: 0.4, embedding 0.9."""
    shingle_size: int = 3
    """Words in a shingle; Chinese shingles have half as many characters again."""
    encoder: str = ""
    """Sentence encoder of "embedding": a Hugging Face directory or hub id."""

    def __post_init__(self) -> None:
        _require_weight("format", self.weight)
        if self.structure not in ("strict", "graded"):
            raise UserError(
                f"rewards.format.structure must be strict or graded, got '{self.structure}'"
            )
        if self.redundancy not in ("shingles", "embedding", "off"):
            raise UserError(
                "rewards.format.redundancy must be shingles, embedding or off, got "
                f"'{self.redundancy}'"
            )
        if not 0 < self.threshold <= 1:
            raise UserError(
                f"rewards.format.redundancy_threshold must be in (0, 1], got {self.threshold}"
            )
        if self.shingle_size < 1:
            raise UserError(
                f"rewards.format.shingle_size must be at least 1, got {self.shingle_size}"
            )
        if self.redundancy == "embedding" and not self.encoder:
            raise UserError(
                "rewards.format.redundancy 'embedding' needs rewards.format.encoder: name a "
                "Hugging Face sentence encoder, or use 'shingles'"
            )
        if self.encoder and self.redundancy != "embedding":
            raise UserError(
                "rewards.format.encoder is only used with rewards.format.redundancy 'embedding', "
                f"got '{self.redundancy}': set that, or remove the encoder"
            )

    @property
    def threshold(self) -> float:
        """The redundancy threshold, with the measure's own default where none is set."""
        if self.redundancy_threshold is not None:
            return self.redundancy_threshold
        return EMBEDDING_THRESHOLD if self.redundancy == "embedding" else SHINGLES_THRESHOLD


@dataclass(frozen=True)
class WritingRewardConfig:
    """The score of a reward model that reads prompt and answer (not the thinking)."""

    weight: float = 0.0
    """Share of the writing advantage; 0 switches the reward off and loads no model."""
    model: str = ""
    """Sequence-classification model with one label: a Hugging Face directory or hub id."""
    batch_size: int = 8
    """Answers in one forward pass."""
    max_tokens: int = 8192
    """Longer inputs lose the end of the answer; also capped by the model's own limit."""

    def __post_init__(self) -> None:
        _require_weight("writing", self.weight)
        if self.weight > 0 and not self.model:
            raise UserError(
                f"rewards.writing.weight is {self.weight} but rewards.writing.model is empty: name "
                "a reward model, or set the weight to 0"
            )
        if self.batch_size < 1:
            raise UserError(f"rewards.writing.batch_size must be at least 1, got {self.batch_size}")
        if self.max_tokens < 16:
            raise UserError(
                f"rewards.writing.max_tokens must be at least 16, got {self.max_tokens}"
            )


@dataclass(frozen=True)
class OverlongRewardConfig:
    """A soft penalty for completions that come near the length limit (DAPO, arXiv:2503.14476)."""

    weight: float = 0.0
    """Share of the penalty's advantage; 0 switches it off."""
    buffer_tokens: int = 0
    """The penalty falls from 0 to -1 over the last so many of rollout.max_completion_tokens."""

    def __post_init__(self) -> None:
        _require_weight("overlong", self.weight)
        if self.buffer_tokens < (1 if self.weight > 0 else 0):
            raise UserError(
                "rewards.overlong.buffer_tokens must be at least 1 where rewards.overlong.weight "
                f"is above 0, got {self.buffer_tokens}"
            )


@dataclass(frozen=True)
class RewardPoolConfig:
    """Workers that score finished groups while others are being written."""

    workers: int = 0
    """Groups scored at the same time; 0 scores in the trainer's own thread."""
    kind: Literal["thread", "process"] = "thread"
    """Threads share the reward models and suit rewards that wait for a server; a process has its
    own copy, can be killed when it hangs, and suits models on the CPU."""
    timeout_s: float = 600.0
    """A group without scores after this long has failed: its scores are missing."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"rewards.pool.workers must be at least 0, got {self.workers}")
        if not self.timeout_s > 0:
            raise UserError(f"rewards.pool.timeout_s must be above 0, got {self.timeout_s}")


@dataclass(frozen=True)
class RewardsConfig:
    """Which rewards there are, and how they become one advantage."""

    length: LengthRewardConfig = field(default_factory=LengthRewardConfig)
    """Length of the answer."""
    format: FormatRewardConfig = field(default_factory=FormatRewardConfig)
    """Tags and repetition."""
    writing: WritingRewardConfig = field(default_factory=WritingRewardConfig)
    """Quality, by a reward model."""
    overlong: OverlongRewardConfig = field(default_factory=OverlongRewardConfig)
    """Nearness to the length limit."""
    pool: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    """Who computes them."""
    normalization: Literal["zscore", "minmax"] = "zscore"
    """Each reward within its group: mean 0 and standard deviation 1, or stretched to [-1, 1]."""
    max_failed_frac: float = 0.5
    """The run stops when more than this share of a step's scores of one reward is missing."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise UserError(
                "rewards: every weight is 0, so nothing would be learned; set the weight of "
                "length, format or writing above 0"
            )
        if self.normalization not in ("zscore", "minmax"):
            raise UserError(
                f"rewards.normalization must be zscore or minmax, got '{self.normalization}'"
            )
        if not 0 <= self.max_failed_frac <= 1:
            raise UserError(
                f"rewards.max_failed_frac must be in [0, 1], got {self.max_failed_frac}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward that is switched on, by name."""
        weights = {
            "length": self.length.weight,
            "format": self.format.weight,
            "writing": self.writing.weight,
            "overlong": self.overlong.weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}


def _require_weight(section: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise UserError(f"rewards.{section}.weight must be a finite number >= 0, got {weight}")
