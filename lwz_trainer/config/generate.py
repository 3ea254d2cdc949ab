"""The configuration of `generate`.

Each field's docstring is its help text on the command line.
"""

from dataclasses import dataclass
from typing import Literal

from lwz_trainer.config.seed import check_seed
from lwz_trainer.errors import UserError

__all__ = ["GENERATE_MAX_TOKENS", "GenerateCommandConfig"]

GENERATE_MAX_TOKENS = 15_500
"""As the released LongWriter-Zero is run."""


@dataclass(frozen=True)
class GenerateCommandConfig:
    """One piece on the terminal, or a file of them; sampling as for the released model."""

    model: str = ""
    """Checkpoint directory, .gguf file or hub id."""
    prompt: str = ""
    """A request: its answer appears on the terminal while it is written."""
    prompts: str = ""
    """A JSONL or Parquet file of requests instead; needs output."""
    output: str = ""
    """JSONL file that the answers to prompts are appended to; the same command goes on with it."""
    length_range: tuple[int, int] | None = None
    """Words wanted; unset: the file's own, else what the request says in so many words."""
    show_thinking: bool = False
    """Show the thinking, dimmed, and not only how long it is."""
    template: str = "think"
    """"think", "direct", "think_example", "chat" (the model's own template), or a .txt file."""
    chat_opened: Literal["", "<think>", "<answer>"] = ""
    """Tag opened after the chat template's generation prompt."""
    chat_system: str = ""
    """System message of the chat template; empty for none."""
    temperature: float = 0.6
    """Divides the logits."""
    top_p: float = 0.95
    """Nucleus: sample from the smallest set of tokens with this probability mass."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 means all."""
    max_tokens: int | None = None
    """Longest completion; unset: 15,500, or what the model's context leaves."""
    stop: tuple[str, ...] = ("<|user|>", "<|endoftext|>", "</answer>")
    """A completion ends at one of these strings."""
    seed: int = 0
    """Of the sampling."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the weights; "auto" is bf16 where the device has it, else fp32."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    num_threads: int = 0
    """CPU threads; 0 takes all cores."""
    max_num_seqs: int = 16
    """Answers to a file that are written together."""
    kv_cache_tokens: int = 0
    """Size of the KV cache in tokens; 0 sizes it for max_num_seqs within memory."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompts:
            raise UserError("prompt and prompts are both set: unset one")
        if bool(self.output) != bool(self.prompts):
            raise UserError(
                "prompts and output belong together: a single prompt is answered on the terminal"
            )
        if self.length_range is not None and not 0 <= self.length_range[0] < self.length_range[1]:
            raise UserError(f"length_range must have 0 <= lo < hi, got {self.length_range}")
        if self.template != "chat" and (self.chat_opened or self.chat_system):
            raise UserError(
                f"chat_opened and chat_system need template chat, got '{self.template}'"
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                "temperature must be above 0, top_p in (0, 1] and top_k at least 0, got "
                f"{self.temperature}, {self.top_p} and {self.top_k}"
            )
        check_seed(self.seed)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.max_num_seqs < 1 or self.kv_cache_tokens < 0 or self.num_threads < 0:
            raise UserError(
                "max_num_seqs must be at least 1, kv_cache_tokens and num_threads at least 0, got "
                f"{self.max_num_seqs}, {self.kv_cache_tokens} and {self.num_threads}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device must be auto, cpu or cuda, got '{self.device}'")
