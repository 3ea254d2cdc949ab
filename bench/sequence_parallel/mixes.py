"""Packs of a training run: one long text, texts of a budget, long tails, and their mixture."""

import random
from collections.abc import Callable

__all__ = ["packed_mixes"]


def packed_mixes(tokens: int = 65536, seed: int = 0) -> dict[str, list[int]]:
    """Document lengths of packs of `tokens` tokens, at least 64; the same for equal arguments."""
    rng = random.Random(seed)
    unit = tokens / 65536

    def between(first: int, last: int) -> int:
        return max(1, round(unit * rng.randint(first, last)))

    def tail() -> int:
        return max(1, min(tokens, round(unit * max(16, rng.lognormvariate(8, 1.2)))))

    half = tokens // 2
    mixes = {
        "one": [tokens],
        "budget": _fill(tokens, lambda: between(9000, 15000)),
        "uniform": _fill(tokens, lambda: between(500, 20000)),
        "tail": _fill(tokens, tail),
        "half": [half, *_fill(tokens - half, lambda: between(100, 2000))],
        "short": _fill(tokens, lambda: between(50, 1500)),
    }
    for lengths in mixes.values():
        rng.shuffle(lengths)
    return mixes


def _fill(total: int, draw: Callable[[], int]) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(draw(), total - sum(lengths)))
    return lengths
