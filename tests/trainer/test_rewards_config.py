from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.reading import dump_config, load_config, parse_command_line
from lwz_trainer.config.rewards import (
    ConstraintConfig,
    FormatRewardConfig,
    LengthRewardConfig,
    RewardsConfig,
    WritingRewardConfig,
)
from lwz_trainer.config.train import TrainConfig
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
        if section.name == "others":  # only names that a file gives have flags
            continue
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


SERVER = EndpointConfig(base_url="http://localhost:1/v1", model="judge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.5}, "weight must be a finite number"),
        ({"weight": 1.0}, "model is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_tokens": 3}, "max_tokens must be at least 16, got 3"),
        ({"source": "oracle"}, "source must be one of model, classify, .*, got 'oracle'"),
        ({"criteria": ()}, "criteria must hold at least one text"),
        ({"criteria": ("good", " ")}, "criteria must hold at least one text"),
        ({"advance_above": 1.0}, r"advance_above must be in \[0, 1\), got 1.0"),
        ({"weight": 1.0, "source": "judge"}, "source 'judge' asks a server: set .*base_url"),
        ({"weight": 1.0, "source": "function"}, "function must be an import path"),
        ({"weight": 1.0, "source": "function", "function": "no_colon"}, "function .*no_colon"),
        ({"weight": 1.0, "model": "rm", "criteria": ("a",)}, "criteria is only used with .* judge"),
        ({"weight": 1.0, "model": "rm", "function": "a:b"}, "function is only used with"),
        ({"weight": 1.0, "model": "rm", "endpoint": SERVER}, "endpoint is only used with"),
        (
            {"weight": 1.0, "source": "judge", "endpoint": SERVER, "model": "rm"},
            "model is only used with .* model or classify or pooling, got 'judge'",
        ),
        (
            {"weight": 1.0, "source": "score", "endpoint": SERVER, "batch_size": 4},
            "batch_size is only used with .* model, got 'score'",
        ),
        (
            {"weight": 1.0, "source": "judge", "endpoint": SERVER, "max_tokens": 128},
            "max_tokens is only used with .* model or classify or pooling, got 'judge'",
        ),
        (
            {"weight": 1.0, "source": "classify", "endpoint": SERVER, "max_tokens": 128},
            "max_tokens is counted by the tokenizer of .*model, which is empty",
        ),
        (
            {"weight": 1.0, "source": "pooling", "endpoint": replace(SERVER, temperature=0.3)},
            "endpoint.temperature is only used with .* judge or .*, got 'pooling'",
        ),
    ],
)
@pytest.mark.parametrize("name", ["writing", "others.taste"])
def test_rewards_config_refuses_a_bad_source_by_its_sections_name(
    name: str, settings: dict[str, Any], message: str
) -> None:
    section = WritingRewardConfig(**settings)
    rewards = {"writing": section} if name == "writing" else {"others": {"taste": section}}
    with pytest.raises(UserError, match=f"rewards.{name}.{message}") as error:
        RewardsConfig(**rewards)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["length", "writing", "Taste", "a-b", ""])
def test_rewards_config_refuses_a_bad_name(name: str) -> None:
    with pytest.raises(UserError, match="cannot be a name"):
        RewardsConfig(others={name: WritingRewardConfig()})


def test_rewards_config_reads_further_rewards_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = (
        "rewards:\n  others:\n    taste:\n      weight: 0.5\n      source: judge\n"
        "      criteria: [wit]\n      endpoint:\n        base_url: http://localhost:1/v1\n"
        "        model: judge\n"
    )
    path.write_text(text)
    config = load_config(TrainConfig, path)
    assert config.rewards.weights == {"length": 1.0, "format": 1.0, "taste": 0.5}
    assert config.rewards.sourced["taste"].criteria == ("wit",)
    path.write_text(dump_config(config))
    assert load_config(TrainConfig, path) == config
    arguments = [str(path), "--rewards.others.taste.weight=0.7"]
    changed = parse_command_line(TrainConfig, arguments, prog="x").rewards
    assert changed.weights["taste"] == 0.7
    assert changed.sourced["taste"].criteria == ("wit",)
    for flag in ("--rewards.others.wit.weight=1", "--rewards.others={}"):
        with pytest.raises(UserError, match=r"names under rewards.others are given in a YAML"):
            parse_command_line(TrainConfig, [str(path), flag], prog="x")
    path.write_text(text.replace("weight", "wait"))
    with pytest.raises(UserError, match=r"'rewards.others.taste.wait'; did you mean .*weight"):
        load_config(TrainConfig, path)


def test_rewards_config_refuses_constraints_that_are_off() -> None:
    with pytest.raises(UserError, match=r"names 'writing', expected one of .*: length, format"):
        RewardsConfig(constraints=ConstraintConfig(rewards=("writing",)))
    with pytest.raises(UserError, match="gap must be above 0, got 0"):
        ConstraintConfig(gap=0)


def test_rewards_config_refuses_two_rewards_with_references() -> None:
    section = WritingRewardConfig(weight=1.0, source="references", endpoint=SERVER)
    with pytest.raises(UserError, match="two rewards have the source 'references'"):
        RewardsConfig(writing=section, others={"taste": section})
