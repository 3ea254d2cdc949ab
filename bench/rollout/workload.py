"""What every provider is asked to sample, and what it hands back; standard library alone.

A provider's process may lack everything but its own engine.
"""

import json
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["WARM_UP_TOKENS", "Answer", "Workload"]

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """`prompts` times `group_size` completions of `num_tokens` tokens, at a temperature of 1."""

    model: str
    """Hugging Face directory."""
    dtype: str
    """"fp32" or "bf16"."""
    prompts: list[list[int]]
    group_size: int
    num_tokens: int
    seed: int
    threads: int

    @property
    def batch(self) -> int:
        return len(self.prompts) * self.group_size

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt) for prompt in self.prompts)

    @property
    def sample_prompts(self) -> list[list[int]]:
        """The prompt of each sample: group by group."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Workload":
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Answer:
    """Completions in the order of `Workload.sample_prompts`."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    start_s: float
    """Until the engine could sample, compilation included."""
    seconds: float
    """Of the timed rollout."""
    version: str
    """Of the engine."""
    peak_gb: float = 0.0

    def save(self, path: Path) -> None:
        """With the peak of the resident set of this process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        path.write_text(json.dumps(asdict(self) | {"peak_gb": peak}))

    @classmethod
    def load(cls, path: Path) -> "Answer":
        return cls(**json.loads(path.read_text()))
