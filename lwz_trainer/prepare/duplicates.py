"""Requests that were sent before, word for word or nearly so.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997): 16 bands of 4
minima. Two requests of Jaccard similarity J share a band with probability 1 - (1 - J^4)^16: 0.9998
at J = 0.8, 0.64 at 0.5. Pairs that do are compared exactly, so nothing is dropped by chance.
"""

import hashlib
import re
import zlib
from functools import lru_cache

import numpy as np

from lwz_trainer.rewards.redundancy import word_shingles

__all__ = ["near_duplicates", "text_key"]

_WORD = re.compile(r"\w+")
_NUM_BANDS, _BAND_ROWS = 16, 4
_NUM_MINIMA = _NUM_BANDS * _BAND_ROWS
# In a bucket of thousands (one template with other names in it) only the first are compared.
_MAX_COMPARED = 64


def text_key(text: str) -> bytes:
    """Equal for texts with the same words, whatever their case, punctuation and spaces."""
    words = " ".join(_WORD.findall(text.casefold()))
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def near_duplicates(texts: list[str], *, threshold: float, shingle_size: int) -> np.ndarray:
    """Which texts are near duplicates of an earlier one that is none itself; bool [N].

        J(a, b) = |shingles(a) ∩ shingles(b)| / |shingles(a) ∪ shingles(b)| >= threshold

    Args:
        texts: in order of precedence.
        threshold: in [0.5, 1].
        shingle_size: words in a shingle; Chinese shingles have half as many characters again.
    """
    is_duplicate = np.zeros(len(texts), bool)
    buckets_of = _shared_buckets(texts, shingle_size)
    kept_in: dict[int, list[int]] = {}

    @lru_cache(maxsize=4096)
    def shingles(index: int) -> frozenset[tuple[str, ...]]:
        return frozenset(word_shingles(texts[index], shingle_size))

    for index in sorted(buckets_of):
        buckets = [kept_in.setdefault(bucket, []) for bucket in buckets_of[index]]
        earlier = sorted({other for bucket in buckets for other in bucket[:_MAX_COMPARED]})
        is_duplicate[index] = any(
            _jaccard(shingles(index), shingles(other)) >= threshold for other in earlier
        )
        if not is_duplicate[index]:
            for bucket in buckets:
                bucket.append(index)
    return is_duplicate


def _shared_buckets(texts: list[str], shingle_size: int) -> dict[int, list[int]]:
    """For each text that shares a band with another one: the numbers of the shared buckets."""
    generator = np.random.default_rng(0)
    # Multiply-add hashes modulo 2^64; their upper halves are close to independent of each other.
    factors = generator.integers(0, 2**64, _NUM_MINIMA, dtype=np.uint64) | np.uint64(1)
    offsets = generator.integers(0, 2**64, _NUM_MINIMA, dtype=np.uint64)
    minima = np.empty((len(texts), _NUM_MINIMA), np.uint32)
    for index, text in enumerate(texts):
        shingles = {" ".join(shingle) for shingle in word_shingles(text, shingle_size)}
        hashes = np.array(
            [zlib.crc32(shingle.encode("utf-8", "surrogatepass")) for shingle in shingles],
            np.uint64,
        )
        mixed = (hashes[:, None] * factors + offsets) >> np.uint64(32)
        minima[index] = mixed.min(axis=0)
    buckets_of: dict[int, list[int]] = {}
    num_buckets = 0
    for band in range(_NUM_BANDS):
        columns = minima[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS].astype(np.uint64)
        # Mixed into one number; should two differ and collide, the comparison tells them apart.
        keys = np.zeros(len(texts), np.uint64)
        for column in columns.T:
            keys = (keys + column) * factors[0]
        _, bucket, size = np.unique(keys, return_inverse=True, return_counts=True)
        for index in np.flatnonzero(size[bucket] > 1).tolist():
            buckets_of.setdefault(index, []).append(num_buckets + int(bucket[index]))
        num_buckets += len(size)
    return buckets_of


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
