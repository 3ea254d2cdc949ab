"""Splits, calibration and length bias, against numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwz_trainer.errors import UserError
from lwz_trainer.reward_model.calibration import ScoredPair, heldout_metrics, heldout_report
from lwz_trainer.reward_model.pairs import Pair, split_by_prompt
from lwz_trainer.reward_model.report import report_markdown


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def scored(margin: float, words: tuple[int, int] = (10, 10), prompt: str = "p") -> ScoredPair:
    return ScoredPair(prompt, "s", margin, 0.0, *words)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_by_prompt_keeps_a_prompts_pairs_together(
    num_prompts: int, heldout_frac: float, seed: int
) -> None:
    pairs = [Pair(f"p{n % num_prompts}", "a", "b", 0.0, str(n)) for n in range(2 * num_prompts)]
    train, heldout = split_by_prompt(pairs, heldout_frac, seed)
    assert train
    assert heldout
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    assert sorted(pair.source for pair in train + heldout) == sorted(p.source for p in pairs)
    more = [*pairs, *(Pair(f"q{n}", "a", "b", 0.0, "") for n in range(40))]
    if 1 < len({pair.prompt for pair in heldout}) < num_prompts - 1:
        assert set(heldout) <= set(split_by_prompt(more, heldout_frac, seed)[1])


def test_split_by_prompt_meets_the_share_on_average() -> None:
    pairs = [Pair(f"p{n}", "a", "b", 0.0, "") for n in range(4000)]
    assert len(split_by_prompt(pairs, 0.25, 0)[1]) == pytest.approx(1000, abs=100)


def test_split_by_prompt_needs_two_prompts() -> None:
    with pytest.raises(UserError, match="have one prompt"):
        split_by_prompt([Pair("p", "a", "b", 0.0, "")] * 3, 0.5, 0)


def test_heldout_metrics_by_hand() -> None:
    margins = [logit(0.9), logit(0.9), -logit(0.9), 0.0]
    words = [(100, 95), (100, 50), (100, 91), (10, 11)]
    metrics = heldout_metrics([scored(*pair) for pair in zip(margins, words, strict=True)])
    assert metrics["accuracy"] == (2 + 0.5) / 4
    assert metrics["margin"] == pytest.approx(logit(0.9) / 4)
    expected = (-2 * math.log(0.9) - math.log(0.1) + math.log(2)) / 4
    assert metrics["loss"] == pytest.approx(expected)
    # 5% and 9% apart match, 50% does not; 1 of 11 words is less than 10%.
    assert metrics["accuracy_matched_length"] == pytest.approx((1 + 0 + 0.5) / 3)
    # Confidence 0.9 three times with accuracy 2/3, 0.5 once with accuracy 1/2.
    assert metrics["calibration_error"] == pytest.approx(3 / 4 * abs(2 / 3 - 0.9))


def test_heldout_report_length_bias_by_hand() -> None:
    pairs = [
        scored(1.0, (20, 10), "a"),
        scored(1.0, (10, 20), "b"),
        scored(-1.0, (10, 20), "c"),
        scored(2.0, (10, 10), "d"),
    ]
    report = heldout_report(pairs, seed=0)
    assert report["accuracy"] == 0.75
    assert report["longer_is_better_accuracy"] == (1 + 0 + 0 + 0.5) / 4
    assert report["gain_over_longer"] == 0.75 - 0.375
    assert report["gain_over_longer_low"] < 0.375 < report["gain_over_longer_high"]
    assert report["accuracy_chosen_longer"] == 1
    assert report["accuracy_chosen_shorter"] == 0.5
    assert report["num_matched_length"] == 1
    assert report["accuracy_matched_length"] == 1
    assert report["margin_length_correlation"] == pytest.approx(0.5)
    text = report_markdown(
        report
        | {
            "base": "m", "pairs": "p.jsonl", "num_trained_pairs": 1, "num_steps": 1,
            "truncated_frac": 0.0,
        }
    )  # fmt: skip
    assert "| accuracy | 0.750 (" in text
    assert "| accuracy above that | +0.375 (" in text


def test_heldout_report_sees_a_model_that_scores_length() -> None:
    pairs = [
        ScoredPair(f"p{n}", "s", float(n % 7), float(n % 5), n % 7 + 1, n % 5 + 1)
        for n in range(35)
    ]
    report = heldout_report(pairs, seed=0)
    assert report["accuracy"] == report["longer_is_better_accuracy"]
    assert report["gain_over_longer_low"] == report["gain_over_longer_high"] == 0
    assert report["score_length_correlation"] == pytest.approx(1)


def test_heldout_report_resamples_prompts_not_pairs() -> None:
    margins = [1.0, -1.0] * 20
    apart = [scored(margin, prompt=str(n)) for n, margin in enumerate(margins)]
    together = [scored(margin, prompt=str(n // 20)) for n, margin in enumerate(margins)]
    narrow, wide = (heldout_report(pairs, seed=0) for pairs in (apart, together))
    assert narrow["accuracy_low"] < 0.5 < narrow["accuracy_high"]
    assert wide["accuracy_low"] == wide["accuracy_high"] == 0.5  # each prompt has the same mean


def test_heldout_report_without_what_it_takes_has_none() -> None:
    report = heldout_report([scored(1.0, (20, 10))], seed=0)
    assert report["accuracy_matched_length"] is None
    assert report["accuracy_chosen_shorter"] is None
    assert report["score_length_correlation"] is None
