"""Configuration of `eval`: what is answered, who judges, and how figures are made.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass, field
from typing import Literal

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["EloConfig", "EvalConfig", "GenerateConfig", "MonitorConfig"]


@dataclass(frozen=True)
class GenerateConfig:
    """Answers by a model: a checkpoint in this process, or a served one."""

    name: str = ""
    """Name of these answers in tables and files; needed with model or endpoint.base_url."""
    model: str = ""
    """Checkpoint directory, .gguf file or hub id, run by this project's own engine."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the checkpoint's weights here; "auto" is bf16 where the device has it, else fp32."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """A served model instead; its sampling is set by the fields below."""
    template: str = "think"
    """"think", "direct", "think_example", "chat" (the model's own template), or a .txt file."""
    chat_opened: str = ""
    """Tag opened after the chat template's generation prompt; only with template "chat"."""
    chat_system: str = ""
    """System message of template "chat"; empty for none."""
    temperature: float | None = None
    """Unset: the benchmark's own (WritingBench 0.7, else 0.6)."""
    top_p: float | None = None
    """Unset: the benchmark's own (WritingBench 0.8, else 0.95)."""
    top_k: int | None = None
    """Unset: the benchmark's own (WritingBench 20, else 0, which means all)."""
    max_tokens: int | None = None
    """Longest response; unset: the benchmark's own (WritingBench 16,000, else 15,500)."""
    stop: tuple[str, ...] = ("<|user|>", "<|endoftext|>", "</answer>")
    """A response to a raw template ends at one of these strings."""
    seed: int = 0
    """Of the sampling here."""
    max_num_seqs: int = 64
    """Responses written together here, and recorded together: a killed run repeats the rest."""
    kv_cache_tokens: int = 0
    """Size of the KV cache in tokens; 0 sizes it for max_num_seqs within memory."""

    def __post_init__(self) -> None:
        is_served = bool(self.endpoint.base_url)
        if self.model and is_served:
            raise UserError("generate.model and generate.endpoint.base_url are both set: unset one")
        if bool(self.name) != (bool(self.model) or is_served):
            raise UserError(
                "generate.name and a model belong together: set generate.name and either "
                "generate.model or generate.endpoint.base_url"
            )
        if "/" in self.name or self.name.startswith("."):
            raise UserError(f"generate.name becomes a file name, got '{self.name}'")
        for name in ("temperature", "top_p", "max_tokens"):
            if getattr(self.endpoint, name) is not None:
                raise UserError(f"generate.endpoint.{name} is set: set generate.{name} instead")
        if self.chat_opened not in ("", "<think>", "<answer>"):
            raise UserError(
                f"generate.chat_opened must be '', '<think>' or '<answer>', got "
                f"'{self.chat_opened}'"
            )
        if self.template != "chat" and (self.chat_opened or self.chat_system):
            raise UserError(
                "generate.chat_opened and generate.chat_system need generate.template chat, got "
                f"'{self.template}'"
            )
        if is_served and self.chat_opened:
            raise UserError(
                "generate.chat_opened needs generate.model: a served model opens its own reply"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(f"generate.temperature must be above 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"generate.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"generate.top_k must be at least 0, got {self.top_k}")
        check_seed(self.seed, "generate.seed")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"generate.max_tokens must be at least 1, got {self.max_tokens}")
        if self.max_num_seqs < 1 or self.kv_cache_tokens < 0:
            raise UserError(
                "generate.max_num_seqs must be at least 1 and generate.kv_cache_tokens at least 0, "
                f"got {self.max_num_seqs} and {self.kv_cache_tokens}"
            )


@dataclass(frozen=True)
class EloConfig:
    """Ratings of Arena-Write."""

    anchor: float = 1000.0
    """Mean rating of the baselines; the paper does not name its own."""
    virtual_ties: float = 1.0
    """Ties added to each pair that met, so that a clean sweep has a finite rating; 0 adds none."""
    num_bootstrap: int = 1000
    """Resamples of the tasks for the 95% intervals; 0 gives none."""
    seed: int = 0
    """Of the resampling."""

    def __post_init__(self) -> None:
        check_seed(self.seed, "elo.seed")
        if self.virtual_ties < 0 or self.num_bootstrap < 0:
            raise UserError(
                "elo.virtual_ties and elo.num_bootstrap must be at least 0, got "
                f"{self.virtual_ties} and {self.num_bootstrap}"
            )


@dataclass(frozen=True)
class MonitorConfig:
    """Signs of reward hacking."""

    baseline: str = ""
    """Texts that overused words are measured against: a response file or a .txt file. Unset: the
    other systems' answers and the benchmark's baselines."""
    run: str = ""
    """A training run: the words that its reward model likes and that grew over its steps and, with
    a judge, reward model against judge."""
    run_steps: int = 10
    """Steps of the run that are looked at, evenly spread."""
    run_samples: int = 8
    """Samples judged at each of these steps."""

    def __post_init__(self) -> None:
        if self.run_steps < 1 or self.run_samples < 1:
            raise UserError(
                "monitor.run_steps and monitor.run_samples must be at least 1, got "
                f"{self.run_steps} and {self.run_samples}"
            )


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation: a benchmark's tasks, the systems that answered them, and a judge."""

    data: str = ""
    """The benchmark's JSONL file, as its authors publish it."""
    output_dir: str = ""
    """Responses, judgments, tables and report; the same command goes on where it stopped. Unset:
    runs/eval/BENCHMARK."""
    responses: tuple[str, ...] = ()
    """Existing answers, each NAME=FILE.jsonl with `index` and `response` a line."""
    requirements: tuple[str, ...] = ()
    """WritingBench only, each NAME=SUBSET.jsonl,CRITERIA.jsonl: the two files of a requirement."""
    limit: int = 0
    """Only the first so many tasks; 0 is all."""
    page_items: int = 100
    """Tasks whose answers can be read side by side in report.html."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """A model that answers the tasks."""
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    """Who judges; without base_url nothing is judged. Unset sampling is the benchmark's own."""
    elo: EloConfig = field(default_factory=EloConfig)
    """Ratings of Arena-Write."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Signs of reward hacking."""

    def __post_init__(self) -> None:
        if self.limit < 0 or self.page_items < 0:
            raise UserError(
                f"limit and page_items must be at least 0, got {self.limit} and {self.page_items}"
            )
