"""The configuration of `prepare`: which requests are read, which are kept, and who judges them.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["DuplicatesConfig", "LocalJudgeConfig", "PrepareConfig", "RulesConfig"]


@dataclass(frozen=True)
class RulesConfig:
    """Rows that are dropped before any model is asked."""

    min_words: int = 5
    """Requests of fewer words (Chinese: characters) are dropped."""
    max_words: int = 1000
    """Requests of more words are dropped: they hold a text to work on."""
    drop_flagged: bool = True
    """Drop conversations that the data set marks as toxic, redacted or flagged by moderation."""
    drop_code: bool = True
    """Drop requests that hold program code or ask for it."""
    drop_image_prompts: bool = True
    """Drop requests for the input of an image generator."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(
                "rules.min_words must be at least 1 and at most rules.max_words, got "
                f"{self.min_words} and {self.max_words}"
            )


@dataclass(frozen=True)
class DuplicatesConfig:
    """Requests that say the same as an earlier one."""

    threshold: float = 0.8
    """Jaccard similarity of two requests' shingles from which on the later one is dropped."""
    shingle_size: int = 3
    """Words in a shingle; Chinese shingles have half as many characters again."""

    def __post_init__(self) -> None:
        # Below 0.5 the index, which is made for the default, would miss many pairs.
        if not 0.5 <= self.threshold <= 1:
            raise UserError(f"duplicates.threshold must be in [0.5, 1], got {self.threshold}")
        if self.shingle_size < 1:
            raise UserError(f"duplicates.shingle_size must be at least 1, got {self.shingle_size}")


@dataclass(frozen=True)
class LocalJudgeConfig:
    """A model with a chat template, run by the trainer's own engine."""

    path: str = ""
    """Model directory, .gguf file or hub id."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" is a GPU if there is one."""
    temperature: float = 0.6
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus."""
    max_completion_tokens: int = 4096
    """Longest answer, thinking included."""
    max_answers: int = 3
    """Answers drawn before one that cannot be read is a failure."""
    max_num_seqs: int = 64
    """Answers written together, and kept together: a kill costs at most this many."""

    def __post_init__(self) -> None:
        for name in ("temperature", "max_completion_tokens", "max_answers", "max_num_seqs"):
            if not getattr(self, name) > 0:
                raise UserError(f"local.{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"local.top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class PrepareConfig:
    """From conversations to writing requests with word ranges."""

    inputs: tuple[str, ...] = ()
    """.parquet or .jsonl files, directories of them, or hub ids; ":en" or ":zh" at the end takes
    one language of it."""
    output: str = "prompts.jsonl"
    """The JSONL file that training reads; the report and the answers lie beside it."""
    judge: Literal["endpoint", "local", "none"] = "endpoint"
    """Who tells long writing from the rest and predicts ranges; "none" keeps explicit counts."""
    ask_quality: bool = True
    """Ask the judge whether a request needs long, well-written output; needs a judge."""
    min_range: int = 400
    """Requests whose range ends below this many words are dropped: they are no long writing."""
    max_requests: int = 0
    """Draw at most this many requests for the judge; 0 takes all that the rules leave."""
    seed: int = 0
    """Of that draw, and of a local judge's sampling."""
    progress: bool | None = None
    """Progress bars; unset: only on a terminal."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """Rules."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Duplicates."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The judge behind an OpenAI-compatible endpoint."""
    local: LocalJudgeConfig = field(default_factory=LocalJudgeConfig)
    """The judge in this process."""

    def __post_init__(self) -> None:
        if not self.output.endswith(".jsonl"):
            raise UserError(f"output must end in .jsonl, got '{self.output}'")
        check_seed(self.seed)
        for name in ("min_range", "max_requests"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.judge == "local" and not self.local.path:
            raise UserError("judge is 'local' but local.path is empty: name a model")
        if self.judge == "endpoint" and self.endpoint.base_url and not self.endpoint.model:
            raise UserError("endpoint.model is empty: name the model that the endpoint serves")
