"""The range of words that a request asks for in so many words, found by rules.

A count N gives 0.9·N to 1.1·N; a lower bound N to 1.1·N, an upper bound 0.9·N to N, two bounds what
is between them. The limits are those of LongWriter-Zero's predictor (arXiv 2506.18841): at most
12,000 words, and a range at most 3,000 wide. What the paper leaves open and this module chooses: a
page is 500 words (250 double-spaced) or 800 Chinese characters; "three sections of 400 words each"
is 1,200; of several counts the largest is the piece's; a wider range keeps its middle.
"""

import re
import unicodedata

from lwz_trainer.data.length_chinese import chinese_mentions
from lwz_trainer.data.length_english import english_mentions

__all__ = ["MAX_WIDTH", "MAX_WORDS", "explicit_length_range"]

MAX_WORDS = 12_000
MAX_WIDTH = 3_000


def explicit_length_range(prompt: str) -> tuple[int, int] | None:
    """Words (Chinese characters, in Chinese) that a request asks for explicitly.

    Args:
        prompt: the request, English or Chinese.

    Returns:
        (lo, hi) with 0 < lo < hi <= 12,000 and hi - lo <= 3,000; (0, 0) if it asks for more than
        12,000; None if it names no length, or only that of a part or of a text it is given.

    Example:
        >>> explicit_length_range("Write a 2,000-word essay on tides.")
        (1800, 2200)
        >>> explicit_length_range("写一篇不少于八百字的作文")
        (800, 880)
    """
    text = _plain(prompt)
    mentions = [*english_mentions(text), *chinese_mentions(text)]
    if not mentions:
        return None
    piece = max(mentions, key=lambda mention: mention.words()[1])
    low, high = piece.words()
    if piece.high * piece.unit_words > MAX_WORDS or low >= MAX_WORDS:
        return 0, 0
    high = min(high, MAX_WORDS)  # the tolerance above a count of 12,000 is cut off
    if high - low > MAX_WIDTH:
        middle = (low + high) // 2
        low, high = middle - MAX_WIDTH // 2, middle + MAX_WIDTH // 2
    return max(1, low), max(2, high, low + 1)


_NOT = re.compile(r"n['’]t\b")
_DIGITS_AGAIN = re.compile(r"(?<=[a-z]) \(\d[\d,]*\)(?=[ -]?(?:words?|pages?)\b)")
_TOLERATED = re.compile(r"(?<=\d) ?(?:±|\+/-|\+-) ?\d[\d,]*(?: ?%)?(?= ?(?:words?|字))")
_TRADITIONAL = str.maketrans(
    "數於過內兩萬個單詞頁這長達約節條場漢餘來寫將縮幾",
    "数于过内两万个单词页这长达约节条场汉余来写将缩几",
)


def _plain(prompt: str) -> str:
    """In lower case and simplified characters; "isn't" as "is not", "two hundred (200)" once."""
    text = unicodedata.normalize("NFKC", prompt).lower().translate(_TRADITIONAL)
    return _TOLERATED.sub("", _DIGITS_AGAIN.sub("", _NOT.sub(" not", text)))
