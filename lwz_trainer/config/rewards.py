"""Section `rewards` of the training configuration: what is rewarded, and by how much.

Each field's docstring is its help text on the command line.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.errors import UserError

__all__ = [
    "ConstraintConfig",
    "FormatRewardConfig",
    "LengthRewardConfig",
    "OverlongRewardConfig",
    "RewardPoolConfig",
    "RewardsConfig",
    "Source",
    "WritingRewardConfig",
]

# Similarity from which on a passage repeats an earlier one. Shingles of 3 words: in the texts of
# GPL-3 and MPL-2.0, which repeat their terms a lot, the most similar pairs of paragraphs have 0.21
# and 0.19; of copies with every tenth word replaced at random, nine in ten have at least 0.41.
SHINGLES_THRESHOLD = 0.4
# Not measured: encoders differ in the cosine of unrelated text, so set it for the encoder in use.
EMBEDDING_THRESHOLD = 0.9

JudgingSource = Literal["judge", "checklist", "pairwise", "references"]
Source = Literal[
    "model",
    "classify",
    "pooling",
    "score",
    "judge",
    "checklist",
    "pairwise",
    "references",
    "function",
]
_JUDGING_SOURCES: tuple[JudgingSource, ...] = get_args(JudgingSource)
CRITERIA = (
    "It does what the request asks for, all of it, for the readers it has in mind.",
    "It is rich: concrete, well informed or well imagined, without padding and repetition.",
    "It is built soundly from beginning to end, and keeps its level to the last paragraph.",
    "It is written well: clear, correct, alive, in a voice that fits.",
)
_OWN_NAMES = frozenset({"length", "format", "writing", "overlong"})
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
    """A score of the answer (not the thinking): by a model, a judge, or any function."""

    weight: float = 0.0
    """Share of this reward's advantage; 0 switches the reward off and loads no model."""
    source: Source = "model"
    """"model": in this process. "classify", "pooling", "score": a model that vLLM serves. "judge",
    "checklist", "pairwise", "references": a chat model that judges. "function": Python."""
    model: str = ""
    """Sequence-classification model with one label: a Hugging Face directory or hub id. With
    "classify" and "pooling" its tokenizer, to send token ids; empty: the server's template."""
    batch_size: int = 8
    """Answers in one forward pass of "model"."""
    max_tokens: int = 8192
    """Longer inputs lose the end of the answer; "model" is also capped by the model's own limit."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The server of the other sources, and how patiently it is asked."""
    criteria: tuple[str, ...] = CRITERIA
    """What "judge" scores; the reward is the mean, from 0 to 1."""
    advance_above: float = 0.5
    """A prompt meets its next of the "references" when its group's mean score is above this."""
    function: str = ""
    """Import path of "function", `module:function`: a list of answers in, as many numbers out."""

    def check(self, name: str) -> None:
        """Refuses what cannot be, and what would not be read.

        Args:
            name: of the section.
        """
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"{name}.weight must be a finite number >= 0, got {self.weight}")
        if self.source not in get_args(Source):
            raise UserError(
                f"{name}.source must be one of {', '.join(get_args(Source))}, got '{self.source}'"
            )
        if self.batch_size < 1:
            raise UserError(f"{name}.batch_size must be at least 1, got {self.batch_size}")
        if self.max_tokens < 16:
            raise UserError(f"{name}.max_tokens must be at least 16, got {self.max_tokens}")
        if not 0 <= self.advance_above < 1:
            raise UserError(f"{name}.advance_above must be in [0, 1), got {self.advance_above}")
        if not self.criteria or any(not text.strip() for text in self.criteria):
            raise UserError(f"{name}.criteria must hold at least one text, and no empty one")
        if self.weight == 0:
            return
        self._check_needs(name)
        self._check_unread(name)
        self._check_unread_of_server(name)

    def _check_needs(self, name: str) -> None:
        if self.source == "model" and not self.model:
            raise UserError(
                f"{name}.weight is {self.weight} but {name}.model is empty: name a reward model, "
                "or set the weight to 0"
            )
        if self.source == "function" and not _FUNCTION.fullmatch(self.function):
            raise UserError(
                f"{name}.function must be an import path such as my_rewards:novelty, got "
                f"'{self.function}'"
            )
        is_served = self.source not in ("model", "function")
        if is_served and not (self.endpoint.base_url and self.endpoint.model):
            raise UserError(
                f"{name}.source '{self.source}' asks a server: set {name}.endpoint.base_url and "
                f"{name}.endpoint.model"
            )

    def _check_unread(self, name: str) -> None:
        default = WritingRewardConfig()
        readers: dict[str, tuple[Source, ...]] = {
            "model": ("model", "classify", "pooling"),
            "batch_size": ("model",),
            "max_tokens": ("model", "classify", "pooling"),
            "endpoint": (*_JUDGING_SOURCES, "classify", "pooling", "score"),
            "criteria": ("judge",),
            "advance_above": ("references",),
            "function": ("function",),
        }
        for field_name, sources in readers.items():
            value = getattr(self, field_name)
            if value != getattr(default, field_name) and self.source not in sources:
                raise UserError(
                    f"{name}.{field_name} is only used with {name}.source {' or '.join(sources)}, "
                    f"got '{self.source}': set that, or remove it"
                )
        if self.max_tokens != default.max_tokens and not self.model:
            raise UserError(
                f"{name}.max_tokens is counted by the tokenizer of {name}.model, which is empty: "
                "name the model, or remove max_tokens"
            )

    def _check_unread_of_server(self, name: str) -> None:
        """A reward model gives one score, it is not sampled."""
        if self.source in _JUDGING_SOURCES:
            return
        for field_name in ("temperature", "top_p", "max_tokens", "max_answers"):
            value = getattr(self.endpoint, field_name)
            if value != getattr(EndpointConfig(), field_name):
                raise UserError(
                    f"{name}.endpoint.{field_name} is only used with {name}.source "
                    f"{' or '.join(_JUDGING_SOURCES)}, got '{self.source}': set that, or remove it"
                )


@dataclass(frozen=True)
class ConstraintConfig:
    """Samples that break a constraint always get a negative advantage (RLMR)."""

    rewards: tuple[str, ...] = ()
    """Rewards that are constraints, such as length or format; none: off."""
    minimum: float = 1.0
    """A sample breaks the constraint when one of these rewards is below this; a missing score does
    not count."""
    gap: float = 0.1
    """Its advantage is at most minus this."""

    def __post_init__(self) -> None:
        if not self.gap > 0:
            raise UserError(f"rewards.constraints.gap must be above 0, got {self.gap}")


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
    start_timeout_s: float = 600.0
    """A run whose worker processes have not loaded their models after this long does not begin."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"rewards.pool.workers must be at least 0, got {self.workers}")
        for name in ("timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"rewards.pool.{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class RewardsConfig:
    """Which rewards there are, and how they become one advantage."""

    length: LengthRewardConfig = field(default_factory=LengthRewardConfig)
    """Length of the answer."""
    format: FormatRewardConfig = field(default_factory=FormatRewardConfig)
    """Tags and repetition."""
    writing: WritingRewardConfig = field(default_factory=WritingRewardConfig)
    """Quality, by a reward model or a judge."""
    overlong: OverlongRewardConfig = field(default_factory=OverlongRewardConfig)
    """Nearness to the length limit."""
    pool: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    """Who computes them."""
    others: dict[str, WritingRewardConfig] = field(default_factory=dict)
    """Further rewards by name, each with the fields of `writing`. Only a YAML file can name them;
    flags change those that it names."""
    constraints: ConstraintConfig = field(default_factory=ConstraintConfig)
    """Rewards that a sample must not fail."""
    normalization: Literal["zscore", "minmax"] = "zscore"
    """Each reward within its group: mean 0 and standard deviation 1, or stretched to [-1, 1]."""
    max_failed_frac: float = 0.5
    """The run stops when more than this share of a step's scores of one reward is missing."""

    def __post_init__(self) -> None:
        self.writing.check("rewards.writing")
        for name, config in self.others.items():
            if name in _OWN_NAMES or not _NAME.fullmatch(name):
                raise UserError(
                    f"rewards.others: '{name}' cannot be a name; use lower-case letters, digits "
                    f"and _, and not {', '.join(sorted(_OWN_NAMES))}"
                )
            config.check(f"rewards.others.{name}")
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
        if sum(config.source == "references" for config in self.sourced.values()) > 1:
            raise UserError(
                "two rewards have the source 'references', expected at most one: the references in "
                "force are those of one reward"
            )
        for name in self.constraints.rewards:
            if name not in self.weights:
                raise UserError(
                    f"rewards.constraints.rewards names '{name}', expected one of the rewards that "
                    f"are on: {', '.join(self.weights)}"
                )

    @property
    def sourced(self) -> dict[str, WritingRewardConfig]:
        """The rewards that come from a source and are switched on, by name."""
        sourced = {"writing": self.writing} | self.others
        return {name: config for name, config in sourced.items() if config.weight > 0}

    @property
    def references_reward(self) -> str | None:
        """The reward that compares with references, if there is one."""
        return next((n for n, c in self.sourced.items() if c.source == "references"), None)

    @property
    def relative(self) -> frozenset[str]:
        """Rewards that compare within the group already and are not normalised again."""
        return frozenset(n for n, config in self.sourced.items() if config.source == "pairwise")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward that is switched on, by name."""
        weights = {
            "length": self.length.weight,
            "format": self.format.weight,
            "writing": self.writing.weight,
            "overlong": self.overlong.weight,
            **{name: config.weight for name, config in self.others.items()},
        }
        return {name: weight for name, weight in weights.items() if weight > 0}


def _require_weight(section: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise UserError(f"rewards.{section}.weight must be a finite number >= 0, got {weight}")
