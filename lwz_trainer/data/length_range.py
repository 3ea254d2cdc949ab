"""The range of words that a request asks for in so many words, found by rules.

A count N gives 0.9·N to 1.1·N; a lower bound N to 1.1·N, an upper bound 0.9·N to N, two bounds what
is between them. The limits are those of LongWriter-Zero's predictor (arXiv 2506.18841): at most
12,000 words, and a range at most 3,000 wide. What the paper leaves open and this module chooses: a
page is 500 words (250 double-spaced) or 800 Chinese characters; "three sections of 400 words each"
is 1,200; words are meant before pages, and of several counts the largest is the piece's; a wider
range keeps its middle.
"""

import re
import unicodedata

from lwz_trainer.data.length_chinese import chinese_mentions
from lwz_trainer.data.length_english import english_mentions
from lwz_trainer.data.length_mention import Mention

__all__ = ["MAX_WIDTH", "MAX_WORDS", "explicit_length_range"]

MAX_WORDS = 12_000
MAX_WIDTH = 3_000


def explicit_length_range(prompt: str) -> tuple[int, int] | None:
    """Words (Chinese characters, in Chinese) that a request asks for explicitly.

    Args:
        prompt: the request, English or Chinese.

    Returns:
        (lo, hi) with 0 < lo < hi <= 12,000 and hi - lo <= 3,000; (0, 0) if it asks for more than
        12,000; None if it names no length, or only that of a part or of a text it is given, or
        one above 12,000 beside one that is not.

    Example:
        >>> explicit_length_range("Write a 2,000-word essay on tides.")
        (1800, 2200)
        >>> explicit_length_range("写一篇不少于八百字的作文")
        (800, 880)
    """
    text = _plain(prompt)
    mentions = _of_the_whole([*english_mentions(text), *chinese_mentions(text)])
    if not mentions:
        return None
    too_long = [_is_too_long(mention) for mention in mentions]
    if any(too_long):
        return (0, 0) if all(too_long) else None  # one of them is another text's
    low, high = max((mention.words() for mention in mentions), key=lambda words: words[1])
    high = min(high, MAX_WORDS)  # the tolerance above a count of 12,000 is cut off
    if high - low > MAX_WIDTH:
        middle = (low + high) // 2
        low, high = middle - MAX_WIDTH // 2, middle + MAX_WIDTH // 2
    return max(1, low), max(2, high, low + 1)


def _of_the_whole(mentions: list[Mention]) -> list[Mention]:
    """Words rather than pages, and pages rather than the words of an abstract."""
    kinds = {mention.kind for mention in mentions}
    if "pages" in kinds:
        wanted = "words" if "words" in kinds else "pages"
        return [mention for mention in mentions if mention.kind == wanted]
    return mentions


def _is_too_long(mention: Mention) -> bool:
    return mention.high * mention.unit_words > MAX_WORDS or mention.words()[0] >= MAX_WORDS


_NOT = re.compile(r"n['’]t\b")
_DIGITS_AGAIN = re.compile(r"(?<=[a-z]) \(\d[\d,]*\)(?=[ -]?(?:words?|pages?)\b)")
_TOLERATED = re.compile(r"(?<=[a-z\d字]) ?(?:±|\+/-|\+-|plus or minus) ?\d[\d,]*(?: ?%)?")
# "2 000 words", "1 500 to 2 000 words"; but "2 500-word essays" are two.
_SPACED_THOUSANDS = re.compile(
    r"(?<![\d.,])(?<!chapter )(?<!part )([1-9]\d?) (\d{3})"
    r"(?=(?: ?(?:-|–|to|and) ?[1-9]\d? \d{3})?[ -]?(?:words\b|word\b(?! \w{3,}(?<![siu])s\b)|字))"
)
_TRADITIONAL = str.maketrans(
    "數於過內兩萬個單詞頁這長達約節條場漢餘來寫將縮幾",
    "数于过内两万个单词页这长达约节条场汉余来写将缩几",
)


def _plain(prompt: str) -> str:
    """In lower case and simplified characters; "isn't" as "is not", numbers in one form."""
    text = unicodedata.normalize("NFKC", prompt).lower().translate(_TRADITIONAL)
    text = _DIGITS_AGAIN.sub("", _NOT.sub(" not", text))
    return _SPACED_THOUSANDS.sub(r"\1\2", _TOLERATED.sub("", text))
