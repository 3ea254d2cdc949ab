"""Words, sentences and paragraphs of English and Chinese text.

Convention: a `Span` is a half-open pair of character positions in the text it was found in.
"""

import re
from typing import TypeAlias

__all__ = ["Span", "count_words", "split_paragraphs", "split_sentences"]

Span: TypeAlias = tuple[int, int]

_LATIN = "A-Za-zÀ-ÖØ-öø-\u024f\u1e00-\u1eff"
_WORD = re.compile(
    rf"[{_LATIN}0-9][{_LATIN}0-9\u0300-\u036f]*"  # a letter may carry combining accents
    rf"(?:['\u2019\u2010\u2011-][{_LATIN}0-9][{_LATIN}0-9\u0300-\u036f]*"
    rf"|(?<=[0-9])[.,][0-9][{_LATIN}0-9]*)*"
)
_CHINESE_CHARACTER = re.compile(r"[\u4e00-\u9fff]")

_LINE = re.compile(r"[^\r\n\u2028\u2029]+")
# Western stops end a sentence before white space only ("3.14", "v1.2"); Chinese ones always.
_CLOSING = r"[\"'\u2019\u201d)\]\u300d\u300f\uff09\u300b*_]*"
_SENTENCE_END = re.compile(rf"[.!?\u2026]+{_CLOSING}(?=\s|$)|[\u3002\uff01\uff1f\u2026]+{_CLOSING}")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|cf|ca|approx|e\.g|i\.e|[A-Z])|^\s*\d{1,3})\.\Z"
)


def count_words(text: str) -> int:
    """Chinese characters plus Latin-script words.

    A Chinese character is one of U+4E00 to U+9FFF and counts one. A word is a run of Latin letters
    (accents included) and digits; apostrophes and hyphens between two such runs join them ("don't",
    "state-of-the-art"), and so do a point or comma between digits ("3.14", "10,000"). A dash, a
    slash and an underscore separate. Punctuation and other scripts count nothing.

    The counter of LongBench-Write, after which this is made, counts neither numbers nor accented
    letters, and splits at apostrophes and hyphens.
    """
    return len(_CHINESE_CHARACTER.findall(text)) + len(_WORD.findall(text))


def split_paragraphs(text: str) -> list[Span]:
    """Every line that holds more than white space, without the white space around it.

    One line break is enough: written text of a model is not hard-wrapped, and Chinese text often
    has no blank lines between its paragraphs.
    """
    spans = (_stripped(text, match.start(), match.end()) for match in _LINE.finditer(text))
    return [(start, end) for start, end in spans if start < end]


def split_sentences(text: str) -> list[Span]:
    """Sentences, without the white space around them; a line break always ends one.

    A sentence ends after a full-width stop and closing quotes, or after `.!?…` and closing quotes
    where white space follows. Titles, initials, "e.g." and a list item's number do not end one.
    """
    sentences: list[Span] = []
    for line_start, line_end in split_paragraphs(text):
        start = line_start
        for match in _SENTENCE_END.finditer(text, line_start, line_end):
            is_abbreviation = match.group() == "." and _ABBREVIATION.search(
                text[max(start, match.end() - 8) : match.end()]
            )
            if not is_abbreviation:
                sentences.append(_stripped(text, start, match.end()))
                start = match.end()
        if text[start:line_end].strip():
            sentences.append(_stripped(text, start, line_end))
    return sentences


def _stripped(text: str, start: int, end: int) -> Span:
    passage = text[start:end]
    start += len(passage) - len(passage.lstrip())
    return start, start + len(passage.strip())
