"""What of a growing completion is thinking and what is the answer, as it is written."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

__all__ = ["Event", "Part", "PartStream", "TextStream"]

Part: TypeAlias = Literal["thinking", "untagged", "answer"]
Event: TypeAlias = Part | Literal["restart"]

# What ends each part; other tags in it are text. `final_answer` reads a whole response so.
_TAGS: dict[Part, tuple[str, ...]] = {
    "thinking": ("</think>",),
    "untagged": ("<think>", "</think>", "<answer>", "</answer>"),
    "answer": ("</answer>",),
}
_PART_AFTER: dict[str, Part] = {
    "<think>": "thinking",
    "</think>": "untagged",
    "<answer>": "answer",
}


class TextStream:
    """Tokens to text piece by piece; a character waits until all of its bytes are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Decoded together with what follows: some tokenizers treat the first token as a beginning.
        self._start = 0
        self._end = 0

    def new_text(self, tokens: list[int]) -> str:
        """Text that was added since the last call, of a list that has only grown."""
        known = self._decode(tokens[self._start : self._end])
        text = self._decode(tokens[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._start, self._end = self._end, len(tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        assert isinstance(text, str), "one list of tokens gives one text"
        return text


class PartStream:
    """Splits text at the tags, which may be cut anywhere between two pieces.

    Untagged text, outside of thinking and of <answer>, is the answer if no <answer> follows.
    Nothing follows `</answer>`.

    Args:
        opened: the tag that the template left open, or "".
        stop: strings that end a completion and are no part of it.
    """

    def __init__(self, opened: str, stop: tuple[str, ...]) -> None:
        self._part: Part | None = _PART_AFTER.get(opened, "untagged")
        self._stop = stop
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[Event, str]]:
        """(part, text) of all that can be told; what may be the beginning of a tag waits.

        ("restart", tag): untagged text so far is no answer. The tag is <answer>, or a </think>
        whose thinking the template had opened.
        """
        self._held += text
        while (found := self._first_mark()) is not None:
            place, mark = found
            yield from self._pieces(self._held[:place])
            self._held = self._held[place + len(mark) :]
            if mark in self._stop or mark == "</answer>":
                self._part = None
                continue
            if self._part == "untagged" and mark != "<think>":
                yield "restart", mark
            self._part = _PART_AFTER[mark]
        kept = self._num_held_back()
        ready = self._held[: len(self._held) - kept]
        self._held = self._held[len(ready) :]
        yield from self._pieces(ready)

    def finish(self) -> Iterator[tuple[Part, str]]:
        """What still waited: it was no tag."""
        yield from self._pieces(self._held)
        self._held = ""

    def _pieces(self, text: str) -> Iterator[tuple[Part, str]]:
        if text and self._part is not None:
            yield self._part, text

    def _marks(self) -> tuple[str, ...]:
        return () if self._part is None else (*_TAGS[self._part], *self._stop)

    def _first_mark(self) -> tuple[int, str] | None:
        marks = self._marks()
        found = [(self._held.find(mark), mark) for mark in marks if mark in self._held]
        return min(found) if found else None

    def _num_held_back(self) -> int:
        """Characters at the end that may be the beginning of a tag or stop string."""
        marks = self._marks()
        longest = min(len(self._held), max(map(len, marks), default=0))
        for size in range(longest, 0, -1):
            if any(mark.startswith(self._held[-size:]) for mark in marks):
                return size
        return 0
