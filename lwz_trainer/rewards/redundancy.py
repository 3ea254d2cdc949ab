"""How much of an answer only repeats what it has said before.

A policy that is paid for length learns to restate its own paragraphs (LongWriter-Zero, arXiv
2506.18841, penalises this by semantic overlap). The answer is cut into units, and the redundancy is
the share of units that repeat an earlier one. Two measures of similarity are interchangeable:
shared runs of words (shingles; needs no model) and the cosine of sentence embeddings.

Units are paragraphs, or sentences where there are fewer than four paragraphs. A unit of fewer than
eight words is joined to what follows it, because two such units can be similar by one common phrase
alone, and because text cut into short lines must not escape. A rest too short at the end is left
out. A unit that repeats within itself ("very, very, very, ...") counts as a repetition too:
otherwise copies could hide inside one long paragraph.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lwz_trainer.rewards.text import Span, split_paragraphs, split_sentences

__all__ = ["Redundancy", "embedding_redundancy", "shingle_redundancy", "word_shingles"]

_MIN_PARAGRAPHS = 4
_MIN_UNIT_WORDS = 8
# A Chinese word has about one and a half characters, so sizes in words are scaled by this.
_CHARACTERS_PER_WORD = 1.5
# A unit repeats itself when more than this share of its shingles stood earlier in the same unit.
_SELF_REPEATED_FRAC = 0.5

_IDEOGRAPHIC = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_IDEOGRAPHIC}]|[^\W_{_IDEOGRAPHIC}]+")
_CHARACTER = re.compile(rf"[{_IDEOGRAPHIC}]")


@dataclass(frozen=True)
class Redundancy:
    """How repetitive an answer is.

    Args:
        score: share of units that repeat, 0 (none) to below 1.
        spans: where in the answer the repeating units stand, in order.
        num_units: number of units that were compared.
    """

    score: float
    spans: tuple[Span, ...]
    num_units: int


@dataclass(frozen=True)
class _Unit:
    span: Span
    tokens: list[str]


def shingle_redundancy(answer: str, *, threshold: float, shingle_size: int) -> Redundancy:
    """Redundancy where similarity is the Jaccard index of the units' sets of shingles.

        J(a, b) = |shingles(a) ∩ shingles(b)| / |shingles(a) ∪ shingles(b)|

    A shingle is a run of `shingle_size` words without case and punctuation; in a unit that is
    mostly Chinese, Japanese or Korean, a run of 1.5 times as many characters. For words replaced at
    random with probability p, J is near s / (2 - s) with s = (1 - p)^shingle_size.

    Args:
        answer: the text; an empty one has redundancy 0.
        threshold: a unit repeats an earlier one from this similarity on.
        shingle_size: words in a shingle.
    """
    units = _units(answer)
    shingles = [_shingles(unit.tokens, shingle_size) for unit in units]
    is_repeated = np.array([_repeats_itself(unit_shingles) for unit_shingles in shingles], bool)

    units_with: dict[tuple[str, ...], list[int]] = {}
    seen_sets: set[frozenset[tuple[str, ...]]] = set()
    sizes: list[int] = []
    for index, unit_shingles in enumerate(shingles):
        shingle_set = frozenset(unit_shingles)
        sizes.append(len(shingle_set))
        if shingle_set in seen_sets:
            is_repeated[index] = True
            continue  # An equal set stands in the index already.
        seen_sets.add(shingle_set)
        num_shared: Counter[int] = Counter()
        for shingle in shingle_set:
            earlier = units_with.setdefault(shingle, [])
            num_shared.update(earlier)
            earlier.append(index)
        is_repeated[index] |= any(
            shared >= threshold * (sizes[index] + sizes[other] - shared)
            for other, shared in num_shared.items()
        )
    return _redundancy(units, is_repeated)


def embedding_redundancy(
    answer: str,
    *,
    threshold: float,
    shingle_size: int,
    encode: Callable[[list[str]], np.ndarray],
) -> Redundancy:
    """Redundancy where similarity is the cosine of the units' embeddings.

    Args:
        answer: the text; an empty one has redundancy 0.
        threshold: a unit repeats an earlier one from this cosine on. Encoders differ a lot in the
            cosine of unrelated sentences, so it belongs to the encoder.
        shingle_size: words in a shingle, for units that repeat within themselves.
        encode: gives one vector per text, [N, D], e.g. a `SentenceEncoder`.
    """
    units = _units(answer)
    if not units:
        return _redundancy(units, np.zeros(0, bool))
    is_repeated = np.array(
        [_repeats_itself(_shingles(unit.tokens, shingle_size)) for unit in units], bool
    )
    vectors_ND = encode([answer[start:end] for start, end in (unit.span for unit in units)])
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND = vectors_ND / np.maximum(norms_N1, 1e-12)
    cosines_NN = np.tril(vectors_ND @ vectors_ND.T, k=-1)
    # Rounding leaves the cosine of equal texts a little below 1.
    is_repeated |= (cosines_NN >= threshold - 1e-6).any(axis=1)
    return _redundancy(units, is_repeated)


def word_shingles(text: str, shingle_size: int) -> list[tuple[str, ...]]:
    """All shingles of a text in order, as in `shingle_redundancy`; repeated ones stay."""
    return _shingles(_TOKEN.findall(text.casefold()), shingle_size)


def _redundancy(units: list[_Unit], is_repeated: np.ndarray) -> Redundancy:
    spans = tuple(unit.span for unit, repeated in zip(units, is_repeated, strict=True) if repeated)
    return Redundancy(
        score=len(spans) / len(units) if units else 0.0, spans=spans, num_units=len(units)
    )


def _units(answer: str) -> list[_Unit]:
    paragraphs = _joined(answer, split_paragraphs(answer))
    if len(paragraphs) >= _MIN_PARAGRAPHS:
        return paragraphs
    return _joined(answer, split_sentences(answer))


def _joined(answer: str, spans: list[Span]) -> list[_Unit]:
    """The spans as units, each joined to those after it until it is long enough to compare."""
    units: list[_Unit] = []
    start: int | None = None
    tokens: list[str] = []
    num_words = 0.0
    for span_start, span_end in spans:
        start = span_start if start is None else start
        span_tokens = _TOKEN.findall(answer[span_start:span_end].casefold())
        tokens = tokens + span_tokens
        num_characters = _num_characters(span_tokens)
        num_words += len(span_tokens) - num_characters + num_characters / _CHARACTERS_PER_WORD
        if num_words >= _MIN_UNIT_WORDS:
            units.append(_Unit((start, span_end), tokens))
            start, tokens, num_words = None, [], 0.0
    return units


def _shingles(tokens: list[str], shingle_size: int) -> list[tuple[str, ...]]:
    """All runs of tokens, in order; the whole text where it is shorter than a shingle."""
    if 2 * _num_characters(tokens) > len(tokens):
        shingle_size = math.ceil(shingle_size * _CHARACTERS_PER_WORD)
    if len(tokens) <= shingle_size:
        return [tuple(tokens)]
    return list(zip(*(tokens[offset:] for offset in range(shingle_size)), strict=False))


def _num_characters(tokens: list[str]) -> int:
    return sum(len(token) == 1 and _CHARACTER.match(token) is not None for token in tokens)


def _repeats_itself(shingles: list[tuple[str, ...]]) -> bool:
    return len(set(shingles)) < (1 - _SELF_REPEATED_FRAC) * len(shingles)
