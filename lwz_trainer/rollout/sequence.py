"""What goes into the engine, what comes out, and the state in between.

Token ids and log-probs are the record of a sample; text is derived from them for rewards and
people and is never tokenised again.
"""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FinishReason", "Request", "Sample", "Sequence"]

FinishReason = Literal["stop", "eos", "length"]


@dataclass(frozen=True)
class Request:
    """One group: a prompt and the numbers of the samples to draw from it."""

    group: int
    prompt_ids: list[int]
    samples: list[int]


@dataclass(frozen=True)
class Sample:
    """A finished completion.

    ``text`` ends before the stop string; ``logprobs`` has one entry for each completion token,
    natural log, under the distribution it was drawn from.
    """

    group: int
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    stop_string: str
    policy_version: int

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(eq=False)
class Sequence:
    """A completion being written. The last token is not in the cache until it is fed."""

    group: int
    sample: int
    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    row: int = -1
    """Row of the page table while running."""
    end: tuple[FinishReason, str] | None = None
    """Why it is complete, and the stop string or ""."""

    def cached_ids(self) -> list[int]:
        """Tokens that the cache must hold before the next decode step."""
        return self.prompt_ids + self.tokens[:-1]
