"""Near duplicates against a comparison of all pairs."""

import random

import numpy as np
import pytest

from lwz_trainer.prepare import duplicates
from lwz_trainer.prepare.duplicates import near_duplicates, text_key
from lwz_trainer.rewards.redundancy import word_shingles


def make_texts(num_texts: int, seed: int) -> list[str]:
    """Texts of 8 to 60 words; a third are copies of earlier ones with some words replaced."""
    generator = random.Random(seed)
    words = [f"w{number}" for number in range(500)]
    texts: list[str] = []
    for _ in range(num_texts):
        if texts and generator.random() < 1 / 3:
            copy = generator.choice(texts).split()
            for _ in range(generator.randrange(4)):
                copy[generator.randrange(len(copy))] = generator.choice(words)
            texts.append(" ".join(copy))
        else:
            texts.append(" ".join(generator.choices(words, k=generator.randint(8, 60))))
    return texts


def compare_all_pairs(texts: list[str], threshold: float) -> np.ndarray:
    kept: list[frozenset[tuple[str, ...]]] = []
    is_duplicate = []
    for text in texts:
        own = frozenset(word_shingles(text, 3))
        repeats = any(len(own & other) / len(own | other) >= threshold for other in kept)
        is_duplicate.append(repeats)
        if not repeats:
            kept.append(own)
    return np.array(is_duplicate)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    texts = make_texts(400, seed=int(threshold * 10))
    expected = compare_all_pairs(texts, threshold)
    found = near_duplicates(texts, threshold=threshold, shingle_size=3)
    assert 20 < expected.sum() < 200
    np.testing.assert_array_equal(found, expected)


def test_near_duplicates_without_texts_and_of_short_ones() -> None:
    assert near_duplicates([], threshold=0.8, shingle_size=3).shape == (0,)
    texts = ["one two", "One, two!", "two one", "一二三四五六", "一二三四五六。", "!!!"]
    found = near_duplicates(texts, threshold=0.8, shingle_size=3)
    assert found.tolist() == [False, True, False, False, True, False]


def test_one_changed_word_is_a_near_duplicate_in_long_requests_only() -> None:
    long_text = " ".join(f"w{number}" for number in range(60))
    texts = [
        "Write a five paragraph essay about the history of France",
        "Write a five paragraph essay about the history of Germany",
        long_text,
        long_text.replace("w30", "other"),
    ]
    found = near_duplicates(texts, threshold=0.8, shingle_size=3)
    assert found.tolist() == [False, False, False, True]


def test_a_crowded_bucket_is_compared_with_its_first_members_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    jaccard = duplicates._jaccard
    monkeypatch.setattr(duplicates, "_jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    monkeypatch.setattr(duplicates, "_MAX_COMPARED", 2)
    stem = " ".join(f"w{number}" for number in range(40))
    texts = [f"{stem} {name}{name}" for name in "abcdefghijkl"]
    found = near_duplicates(texts, threshold=1.0, shingle_size=3)
    assert not found.any()
    # At most two in each of the 16 bands' buckets, where all pairs would be 66.
    assert 11 <= len(compared) <= 16 * 2 * 11
    assert len(compared) < 66


def test_text_key_ignores_case_punctuation_and_spaces() -> None:
    assert text_key("Write, a story!") == text_key(" write A  story")
    assert text_key("Write a story") != text_key("Write the story")
    assert text_key("写一个故事。") == text_key("写一个故事")
