from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import tyro

from lwz_trainer.config.rewards import (
    FormatRewardConfig,
    LengthRewardConfig,
    RewardsConfig,
    WritingRewardConfig,
)
from lwz_trainer.errors import UserError


def test_rewards_config_weights_hold_what_is_switched_on() -> None:
    assert RewardsConfig().weights == {"length": 1.0, "format": 1.0}
    config = RewardsConfig(
        length=LengthRewardConfig(weight=0.0), writing=WritingRewardConfig(weight=2.0, model="rm")
    )
    assert config.weights == {"format": 1.0, "writing": 2.0}


def test_format_reward_config_threshold_belongs_to_the_measure() -> None:
    assert FormatRewardConfig().threshold == 0.4
    assert FormatRewardConfig(redundancy="embedding", encoder="dir").threshold == 0.9
    assert FormatRewardConfig(redundancy_threshold=0.7).threshold == 0.7


def test_rewards_config_is_read_from_the_command_line() -> None:
    config = tyro.cli(
        RewardsConfig,
        args=[
            *("--length.n-max", "9000", "--format.structure", "graded"),
            *("--format.redundancy-threshold", "0.6", "--normalization", "minmax"),
        ],
    )
    assert config == RewardsConfig(
        length=LengthRewardConfig(n_max=9000),
        format=FormatRewardConfig(structure="graded", redundancy_threshold=0.6),
        normalization="minmax",
    )


def test_rewards_config_fields_all_have_a_flag_with_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(RewardsConfig, args=["--help"])
    text = capsys.readouterr().out
    for section in fields(RewardsConfig):
        nested = getattr(RewardsConfig(), section.name)
        names = [f"{section.name}.{f.name}" for f in fields(nested)] if is_dataclass(nested) else []
        for name in names or [section.name]:
            assert "--" + name.replace("_", "-") in text
    assert "shared runs of words" in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (LengthRewardConfig, {"weight": -1.0}, "length.weight must be a finite number"),
        (LengthRewardConfig, {"weight": float("nan")}, "length.weight must be a finite number"),
        (LengthRewardConfig, {"n_max": 0}, "n_max must be above 0, got 0"),
        (FormatRewardConfig, {"weight": float("inf")}, "format.weight must be a finite number"),
        (FormatRewardConfig, {"structure": "soft"}, "must be strict or graded, got 'soft'"),
        (FormatRewardConfig, {"redundancy": "bleu"}, "shingles, embedding or off, got 'bleu'"),
        (FormatRewardConfig, {"redundancy_threshold": 0.0}, r"must be in \(0, 1\], got 0.0"),
        (FormatRewardConfig, {"redundancy_threshold": 1.1}, r"must be in \(0, 1\], got 1.1"),
        (FormatRewardConfig, {"shingle_size": 0}, "shingle_size must be at least 1, got 0"),
        (FormatRewardConfig, {"redundancy": "embedding"}, "needs rewards.format.encoder"),
        (FormatRewardConfig, {"encoder": "dir"}, "only used with .* 'embedding'"),
        (WritingRewardConfig, {"weight": -0.5}, "writing.weight must be a finite number"),
        (WritingRewardConfig, {"weight": 1.0}, "writing.model is empty"),
        (WritingRewardConfig, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (WritingRewardConfig, {"max_tokens": 3}, "max_tokens must be at least 16, got 3"),
        (RewardsConfig, {"normalization": "rank"}, "zscore or minmax, got 'rank'"),
        (RewardsConfig, {"max_failed_frac": 1.5}, r"max_failed_frac must be in \[0, 1\]"),
    ],
)
def test_rewards_config_refuses_what_cannot_be(
    section: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        section(**settings)
    assert "\n" not in str(error.value)


def test_rewards_config_refuses_to_learn_nothing() -> None:
    with pytest.raises(UserError, match="every weight is 0"):
        RewardsConfig(length=LengthRewardConfig(weight=0.0), format=FormatRewardConfig(weight=0.0))
