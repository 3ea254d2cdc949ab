import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from lwz_trainer.config.rewards import (
    FormatRewardConfig,
    LengthRewardConfig,
    RewardsConfig,
    WritingRewardConfig,
)
from lwz_trainer.rewards.advantages import check_failures, group_advantages
from lwz_trainer.rewards.score import RewardSample, Scorer, stack_rewards
from tests.trainer.test_rewards_redundancy import PARAGRAPHS
from tests.trainer.test_rewards_writing import make_reward_model
from tests.trainer.tiny import make_tiny_tokenizer


def sample(
    completion: str, length_range: tuple[int, int] | None = (10, 20), stopped: bool = True
) -> RewardSample:
    return RewardSample("Write about the sea.", length_range, completion, stopped)


def test_scorer_fills_every_part() -> None:
    answer = "\n".join([*PARAGRAPHS, PARAGRAPHS[0]])
    (parts,) = Scorer(RewardsConfig(), "think").score_samples(
        [sample(f"<think>A short plan.</think> <answer> {answer}", (190, 300))]
    )
    assert parts.completion.answer == answer
    assert parts.num_think_words == 3
    assert parts.num_answer_words == sum(len(p.split()) for p in [*PARAGRAPHS, PARAGRAPHS[0]])
    assert parts.redundancy == pytest.approx(1 / 6)
    assert [answer[start:end] for start, end in parts.repeated_spans] == [PARAGRAPHS[0]]
    assert parts.rewards == pytest.approx({"length": parts.num_answer_words / 190, "format": 5 / 6})
    assert parts.not_applicable == frozenset()
    assert not parts.is_truncated_for_writing


def test_scorer_format_is_0_for_a_broken_form_but_length_is_not() -> None:
    text = "one two three four five"
    (parts,) = Scorer(RewardsConfig(), "think").score_samples(
        [sample(f"<think>p</think><answer>{text}", stopped=False)]
    )
    assert parts.rewards == {"length": 0.5, "format": 0.0}


def test_scorer_reads_the_structure_mode_and_kind() -> None:
    config = RewardsConfig(format=FormatRewardConfig(structure="graded"))
    completion = "<answer>one two three"
    rewards = [
        Scorer(config, kind).score_samples([sample(completion, stopped=False)])[0].rewards["format"]
        for kind in ("think", "direct")
    ]
    assert rewards == [0, 0.5]


def test_scorer_length_does_not_pay_for_a_missing_answer() -> None:
    samples = [sample("<think>p</think>", (0, 100)), sample("<think>p</think><answer>x", (0, 100))]
    parts = Scorer(RewardsConfig(), "think").score_samples(samples)
    assert [part.rewards["length"] for part in parts] == [0, 1]


def test_scorer_reads_n_max() -> None:
    config = RewardsConfig(length=LengthRewardConfig(n_max=30))
    (parts,) = Scorer(config, "direct").score_samples([sample("<answer>" + "word " * 25)])
    assert parts.rewards["length"] == pytest.approx(0.5)


def test_scorer_length_without_a_range_is_not_applicable() -> None:
    completions = ["<answer>one", "<answer>two", "<answer>three", "four"]
    ranges = [None, None, (1, 2), (1, 2)]
    samples = [sample(*pair) for pair in zip(completions, ranges, strict=True)]
    parts = Scorer(RewardsConfig(), "direct").score_samples(samples)
    assert [part.not_applicable for part in parts] == [{"length"}, {"length"}, set(), set()]
    rewards, is_applicable = stack_rewards(parts, 2)
    np.testing.assert_array_equal(rewards["length"], [[math.nan, math.nan], [1, 0]])
    np.testing.assert_array_equal(rewards["format"], [[1, 1], [1, 0]])
    result = group_advantages(
        rewards, RewardsConfig().weights, "zscore", is_applicable=is_applicable
    )
    check_failures(result.num_failed, result.num_applicable, 0.0, is_first_step=True)
    np.testing.assert_array_equal(result.advantages_PG, [[0, 0], [1, -1]])


def test_scorer_names_only_rewards_that_are_on() -> None:
    config = RewardsConfig(length=LengthRewardConfig(weight=0.0))
    (parts,) = Scorer(config, "direct").score_samples([sample("<answer>one", None)])
    assert parts.rewards == {"format": 1.0}
    assert parts.not_applicable == frozenset()


def test_scorer_redundancy_off_marks_nothing() -> None:
    config = RewardsConfig(format=FormatRewardConfig(redundancy="off"))
    (parts,) = Scorer(config, "direct").score_samples([sample("<answer>" + "very " * 100)])
    assert (parts.redundancy, parts.repeated_spans, parts.rewards["format"]) == (0, (), 1)


def test_scorer_writing_reads_the_answer_and_not_the_thinking(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RewardsConfig(
        writing=WritingRewardConfig(weight=1.0, model=make_reward_model(tmp_path), max_tokens=64)
    )
    scorer = Scorer(config, "think")
    completions = [
        "<think>p</think><answer>The sea.",
        "<think>something else</think><answer>The sea.",
        "<think>p</think><answer>A letter.",
        "<think>p</think><answer>" + "The ship went north. " * 20,
    ]
    samples = [sample(completion) for completion in completions]
    parts = scorer.score_samples(samples)
    scores = [part.rewards["writing"] for part in parts]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert abs(scores[0] - scores[2]) > 1e-3
    assert [part.is_truncated_for_writing for part in parts] == [False, False, False, True]

    with torch.no_grad():
        scorer.sources["writing"].source.reward.model.score.weight.fill_(math.nan)
    with caplog.at_level(logging.WARNING):
        parts = scorer.score_samples(samples)
    assert all(math.isnan(part.rewards["writing"]) for part in parts)
    assert all(part.not_applicable == frozenset() for part in parts)
    assert "reward 'writing' failed for 4 completions" in caplog.text


def test_scorer_redundancy_by_embedding_uses_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    rewards = RewardsConfig(
        format=FormatRewardConfig(
            redundancy="embedding", encoder=str(tmp_path), redundancy_threshold=1.0
        )
    )
    answer = "\n".join([*PARAGRAPHS, PARAGRAPHS[3]])
    (parts,) = Scorer(rewards, "direct").score_samples([sample("<answer>" + answer)])
    assert parts.redundancy == pytest.approx(1 / 6)
    assert [answer[start:end] for start, end in parts.repeated_spans] == [PARAGRAPHS[3]]


def test_scorer_without_models_imports_no_torch() -> None:
    program = "import sys, lwz_trainer.rewards.score, lwz_trainer.rewards.advantages\n"
    program += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_stack_rewards_missing_answer_never_wins() -> None:
    config = RewardsConfig(length=LengthRewardConfig(weight=0.0))
    completions = ["<answer>one", "", "<answer>two"] * 4
    parts = Scorer(config, "direct").score_samples([sample(text) for text in completions])
    scores = [
        *(2.0, 9.0, 1.0),  # held at the lowest written answer
        *(2.0, 0.5, 1.0),  # below it by itself
        *(math.nan, 9.0, 3.0),  # a failed score is no lowest one
        *(math.nan, 9.0, math.nan),  # nothing to be held at
    ]
    scored = [
        replace(part, rewards={"writing": score}) for part, score in zip(parts, scores, strict=True)
    ]
    rewards, _ = stack_rewards(scored, 3)
    np.testing.assert_array_equal(
        rewards["writing"],
        [[2, 1, 1], [2, 0.5, 1], [math.nan, 3, 3], [math.nan, 9, math.nan]],
    )
    failed = [replace(part, rewards={"writing": math.nan}) for part in parts]
    assert np.isnan(stack_rewards(failed, 3)[0]["writing"]).all()


def test_stack_rewards_refuses_a_broken_group() -> None:
    parts = Scorer(RewardsConfig(), "direct").score_samples([sample("<answer>one")] * 3)
    with pytest.raises(ValueError, match="whole groups of 2, got 3"):
        stack_rewards(parts, 2)
    with pytest.raises(ValueError, match="whole groups of 2, got 0"):
        stack_rewards([], 2)
