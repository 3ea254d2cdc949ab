"""What a judge is asked about a request, and how its reply is read.

The instructions are in our own words, with the rules of LongWriter-Zero's filter and range
predictor (arXiv 2506.18841).
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from lwz_trainer.data.length_range import MAX_WIDTH, MAX_WORDS
from lwz_trainer.endpoint.replies import json_objects

__all__ = ["Question", "quality_question", "range_question"]

T = TypeVar("T")
_STEP = 100


@dataclass(frozen=True)
class Question(Generic[T]):
    """One question, asked about every request.

    Attributes:
        name: in progress bars and the report.
        instructions: with `{request}` where the request goes.
        parse: reads a reply; ValueError if it cannot.
    """

    name: str
    instructions: str
    parse: Callable[[str], T]

    def text(self, request: str) -> str:
        """What the model reads; braces in the request are only characters."""
        return self.instructions.replace("{request}", request)


def quality_question() -> Question[bool]:
    """Whether a request needs a long and well-written text."""
    return Question("quality", _instructions("quality"), _parse_quality)


def range_question() -> Question[tuple[int, int]]:
    """How many words a good reply has; (0, 0) if the request cannot be fulfilled."""
    return Question("range", _instructions("range"), _parse_range)


def _instructions(name: str) -> str:
    folder = resources.files("lwz_trainer.prepare") / "instructions"
    return (folder / f"{name}.txt").read_text("utf-8")


def _parse_quality(reply: str) -> bool:
    keep = _last_object(reply, "keep")["keep"]
    if not isinstance(keep, bool):
        raise ValueError(f"keep must be true or false, got {keep!r}")
    return keep


def _parse_range(reply: str) -> tuple[int, int]:
    bounds = _last_object(reply, "range")["range"]
    # type() and not isinstance: JSON's true and false are ints to Python.
    if not isinstance(bounds, list) or [type(bound) for bound in bounds] != [int, int]:
        raise ValueError(f"range must be two integers, got {bounds!r}")
    low, high = bounds
    if (low, high) == (0, 0):
        return 0, 0
    if low % _STEP or high % _STEP:
        raise ValueError(f"both bounds must be multiples of {_STEP}, got {bounds}")
    if not 0 <= low < high <= MAX_WORDS or high - low > MAX_WIDTH:
        raise ValueError(
            f"expected 0 <= low < high <= {MAX_WORDS}, at most {MAX_WIDTH} apart, got {bounds}"
        )
    return low, high


def _last_object(reply: str, key: str) -> dict[str, Any]:
    """The last JSON object with this key, after the thinking if there is any."""
    found = [value for value in json_objects(reply) if key in value]
    if not found:
        raise ValueError(f'expected a JSON object with "{key}", got {reply[-80:]!r}')
    return found[-1]
