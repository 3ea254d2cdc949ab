"""One count of words in a request, and how it is meant: about, at least, at most."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["BoundWords", "Mention", "join_bounds"]

_TOLERANCE = 0.1


@dataclass(frozen=True)
class Mention:
    """One count, or the two ends of a range, and where the request names it.

    Attributes:
        low: the count; the lower end of a range.
        high: the count again; the upper end of a range.
        bound: "about", "least", "most", or "range".
        unit_words: words that one of the counted things has; 0 where nothing says what is counted.
        kind: "words", "pages", or "part" for the words of an abstract or introduction.
        start: where the count begins, with the "at least" before it.
        end: where it ends, with the "or more" behind it.
    """

    low: float
    high: float
    bound: str
    unit_words: float
    kind: str
    start: int
    end: int

    def words(self) -> tuple[int, int]:
        low, high = self.low * self.unit_words, self.high * self.unit_words
        if self.bound in ("about", "most"):
            low *= 1 - _TOLERANCE
        if self.bound in ("about", "least"):
            high *= 1 + _TOLERANCE
        return round(low), round(high)


@dataclass(frozen=True)
class BoundWords:
    """What one language says before and after a count to make it a bound."""

    most_before: re.Pattern[str]
    most_after: re.Pattern[str]
    least_before: re.Pattern[str]
    least_after: re.Pattern[str]

    def read(self, before: str, after: str) -> tuple[str, int, int]:
        """The bound of a count, and how many characters before and after it say so.

        The longer phrase is right: "no less than" is no "less than".
        """
        most = _length(self.most_before.search(before))
        least = _length(self.least_before.search(before))
        if most or least:
            return "most" if most > least else "least", max(most, least), 0
        most = _length(self.most_after.match(after))
        least = _length(self.least_after.match(after))
        if most or least:
            return "most" if most > least else "least", 0, max(most, least)
        return "about", 0, 0


def join_bounds(mentions: Iterable[Mention], text: str, between: re.Pattern[str]) -> list[Mention]:
    """Make one range of "at least 500 words" and "at most 800" with only `between` in between.

    A count that names no unit is good for nothing but this, and dropped where it is not joined.
    """
    joined: list[Mention] = []
    for mention in mentions:
        if not mention.unit_words and mention.bound not in ("least", "most"):
            continue
        last = joined[-1] if joined else None
        both = last and _both_bounds(last, mention)
        if last and both and between.fullmatch(text, last.end, mention.start):
            joined[-1] = both
        else:
            joined.append(mention)
    return [mention for mention in joined if mention.unit_words]


def _both_bounds(first: Mention, second: Mention) -> Mention | None:
    if {first.bound, second.bound} != {"least", "most"}:
        return None
    least, most = (first, second) if first.bound == "least" else (second, first)
    units = {first.unit_words, second.unit_words} - {0}
    if least.low >= most.high or len(units) != 1:
        return None
    with_unit = first if first.unit_words else second
    return replace(
        with_unit,
        low=least.low,
        high=most.high,
        bound="range",
        start=first.start,
        end=second.end,
    )


def _length(said: re.Match[str] | None) -> int:
    return len(said.group()) if said else 0
