"""What held-out pairs say about a reward model: accuracy, calibration, and what length explains.

Pure arithmetic on scores and word counts. Accuracy counts a tie as one half throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lwz_trainer.evaluation.monitor import rank_correlation

__all__ = ["MATCHED_FRAC", "ScoredPair", "heldout_metrics", "heldout_report"]

MATCHED_FRAC = 0.1
"""Two answers match in length when their words differ by less than this share of the longer."""
_NUM_BINS = 10
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class ScoredPair:
    """A held-out pair after scoring.

    Args:
        prompt, source: as in `Pair`.
        chosen, rejected: scores.
        chosen_words, rejected_words: lengths.
    """

    prompt: str
    source: str
    chosen: float
    rejected: float
    chosen_words: int
    rejected_words: int

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected

    @property
    def is_matched(self) -> bool:
        """Whether the two lengths match."""
        longer = max(self.chosen_words, self.rejected_words)
        return abs(self.chosen_words - self.rejected_words) < MATCHED_FRAC * longer


def heldout_metrics(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """The curves: loss, accuracy and margin, also at matched length, and calibration error."""
    margins = np.array([pair.margin for pair in pairs])
    matched = [pair for pair in pairs if pair.is_matched]
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "accuracy": _accuracy([pair.margin for pair in pairs]),
        "accuracy_matched_length": _accuracy([pair.margin for pair in matched]),
        "margin": float(margins.mean()),
        "calibration_error": _calibration(margins)[1],
    }


def heldout_report(pairs: Sequence[ScoredPair], *, seed: int) -> dict[str, Any]:
    """Everything as JSON: numbers that cannot be computed are None.

    Args:
        pairs: at least one.
        seed: of the bootstrap over prompts that gives the 95% intervals.
    """
    margins = np.array([pair.margin for pair in pairs])
    lengths = [_words_ahead(pair) for pair in pairs]
    bins, _ = _calibration(margins)
    scores = [score for pair in pairs for score in (pair.chosen, pair.rejected)]
    words = [count for pair in pairs for count in (pair.chosen_words, pair.rejected_words)]
    metrics = heldout_metrics(pairs)
    low, high = _bootstrap([pair.prompt for pair in pairs], _hits(margins), seed)
    gain = _hits(margins) - _hits(np.array(lengths))
    gain_low, gain_high = _bootstrap([pair.prompt for pair in pairs], gain, seed)
    report = {
        "num_pairs": len(pairs),
        "num_prompts": len({pair.prompt for pair in pairs}),
        **metrics,
        "accuracy_low": low,
        "accuracy_high": high,
        "longer_is_better_accuracy": _accuracy(lengths),
        "gain_over_longer": float(gain.mean()),
        "gain_over_longer_low": gain_low,
        "gain_over_longer_high": gain_high,
        "num_matched_length": sum(pair.is_matched for pair in pairs),
        "accuracy_chosen_longer": _accuracy([p.margin for p in pairs if _words_ahead(p) > 0]),
        "accuracy_chosen_shorter": _accuracy([p.margin for p in pairs if _words_ahead(p) < 0]),
        "score_length_correlation": rank_correlation(scores, words),
        "margin_length_correlation": rank_correlation(margins.tolist(), lengths),
        "calibration": bins,
        "sources": [
            {"source": source, **_source_row([pair for pair in pairs if pair.source == source])}
            for source in sorted({pair.source for pair in pairs})
        ],
    }
    return {name: _finite(value) for name, value in report.items()}


def _source_row(pairs: list[ScoredPair]) -> dict[str, Any]:
    row = {
        "num_pairs": len(pairs),
        "accuracy": _accuracy([pair.margin for pair in pairs]),
        "num_matched_length": sum(pair.is_matched for pair in pairs),
        "accuracy_matched_length": _accuracy([pair.margin for pair in pairs if pair.is_matched]),
        "longer_is_better_accuracy": _accuracy([_words_ahead(pair) for pair in pairs]),
    }
    return {name: _finite(value) for name, value in row.items()}


def _calibration(margins: np.ndarray) -> tuple[list[dict[str, Any]], float]:
    """Reliability of the confidence σ(|margin|), and the expected calibration error.

    The confidence is the probability that the model gives to the answer it prefers; the accuracy of
    a bin is how often that answer is the chosen one. The error is the mean over pairs of their
    bin's |accuracy − mean confidence|.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hits = _hits(margins)
    edges = np.linspace(0.5, 1.0, _NUM_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, _NUM_BINS - 1)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for index in range(_NUM_BINS):
        inside = place == index
        count = int(inside.sum())
        mean, accuracy = None, None
        if count:
            mean, accuracy = float(confidence[inside].mean()), float(hits[inside].mean())
            error += count / len(margins) * abs(accuracy - mean)
        bins.append(
            {
                "low": float(edges[index]),
                "high": float(edges[index + 1]),
                "num_pairs": count,
                "mean_confidence": mean,
                "accuracy": accuracy,
            }
        )
    return bins, error


def _bootstrap(prompts: list[str], values: np.ndarray, seed: int) -> tuple[float, float]:
    """95% interval of the mean; prompts are resampled, with all their pairs."""
    _, group = np.unique(prompts, return_inverse=True)
    num_prompts = int(group.max()) + 1
    sums = np.bincount(group, weights=values, minlength=num_prompts)
    counts = np.bincount(group, minlength=num_prompts)
    drawn = np.random.default_rng(seed).integers(num_prompts, size=(_NUM_RESAMPLES, num_prompts))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _hits(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, one half where it is 0."""
    return (margins > 0) + 0.5 * (margins == 0)


def _accuracy(margins: Sequence[float]) -> float:
    return float(_hits(np.array(margins)).mean()) if len(margins) else math.nan


def _words_ahead(pair: ScoredPair) -> int:
    """By how many words the chosen answer is longer."""
    return pair.chosen_words - pair.rejected_words


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
