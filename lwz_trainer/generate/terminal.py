"""A piece on the terminal as it is written, with a line below it that counts its words."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lwz_trainer.generate.parts import Part
from lwz_trainer.rewards.text import count_words

__all__ = ["TerminalPage", "length_words"]

_SECONDS_BETWEEN_COUNTS = 0.25


class TerminalPage:
    """Whole lines scroll by; the line being written and the counter stay at the bottom.

    Where the output is no terminal the text alone is written to it, as it comes; untagged text
    waits for the end there, since an <answer> would take it back.

    Args:
        length_range: words wanted, or None.
        show_thinking: show it, dimmed; else only its number of words.
        console: of the terminal.
    """

    def __init__(
        self,
        length_range: tuple[int, int] | None,
        *,
        show_thinking: bool,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._length_range = length_range
        self._show_thinking = show_thinking
        self._texts: dict[Part, str] = {"thinking": "", "untagged": "", "answer": ""}
        self._is_tagged = False
        self._shown: Part | None = None
        self._line = ""
        self._status = ""
        self._counted_at = 0.0
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()

    def add(self, part: Part, text: str) -> None:
        """The next piece of text."""
        if not self._texts[part]:
            text = text.lstrip()
        self._texts[part] += text
        self._is_tagged |= part == "answer"
        waits = part == "untagged" and self._live is None
        if text and not waits and (part != "thinking" or self._show_thinking):
            self._write(part, text)
        if self._live is not None:
            self._refresh()

    def restart(self, tag: str) -> None:
        """Untagged text so far is no answer, as `PartStream` found at this tag."""
        if tag == "</think>":
            self._texts["thinking"] += self._texts["untagged"]
            self._shown = "thinking" if self._shown == "untagged" else self._shown
        self._texts["untagged"] = ""
        self._is_tagged = tag == "<answer>"

    def close(self) -> tuple[str, str]:
        """Ends the last line; thinking and answer without white space around them."""
        if self._live is not None:
            self._end_line()
            self._live.stop()
        else:
            if not self._is_tagged and self._texts["untagged"]:
                self._write("untagged", self._texts["untagged"])
            if self._shown is not None:
                self._console.file.write("\n")
                self._console.file.flush()
        return self._texts["thinking"].strip(), self._answer().strip()

    def _answer(self) -> str:
        return self._texts["answer" if self._is_tagged else "untagged"]

    def _write(self, part: Part, text: str) -> None:
        if self._shown not in (None, part):
            text = "\n\n" + text
        if self._live is None:
            self._shown = part
            self._console.file.write(text)
            self._console.file.flush()
            return
        *ended, rest = (self._line + text).split("\n")
        for line in ended:
            self._line = line
            self._end_line(is_blank_kept=True)
        self._shown = part
        # A paragraph is longer than the screen is wide: its full lines scroll by too.
        lines = list(Text(rest, self._style()).wrap(self._console, self._console.width))
        for full in lines[:-1]:
            self._console.print(full)
        self._line = rest if len(lines) < 2 else lines[-1].plain

    def _end_line(self, *, is_blank_kept: bool = False) -> None:
        if self._line or is_blank_kept:
            self._console.print(Text(self._line, self._style()))
        self._line = ""

    def _style(self) -> str:
        return "dim" if self._shown == "thinking" else ""

    def _refresh(self) -> None:
        assert self._live is not None
        now = time.monotonic()
        if now - self._counted_at > _SECONDS_BETWEEN_COUNTS:
            self._counted_at = now
            self._status = self._counter()
        line = Text(self._line, self._style())
        self._live.update(Group(line, Text(self._status, "reverse")), refresh=True)

    def _counter(self) -> str:
        words = count_words(self._answer())
        if not words:
            return f" thinking: {count_words(self._texts['thinking']):,} words "
        return f" {length_words(words, self._length_range)} "


def length_words(words: int, length_range: tuple[int, int] | None) -> str:
    """How long a piece is, and how that compares with what was wanted."""
    if length_range is None:
        return f"{words:,} words"
    low, high = length_range
    if words < low:
        verdict = f"{low - words:,} too few"
    elif words > high:
        verdict = f"{words - high:,} too many"
    else:
        verdict = "in range"
    return f"{words:,} words of {low:,} to {high:,}, {verdict}"
