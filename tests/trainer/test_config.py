"""Configuration files: the ones that ship are valid, and reading is the inverse of writing."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from lwz_trainer.config.reading import dump_config, load_config, parse_command_line
from lwz_trainer.config.train import TrainConfig
from tests.trainer.train_case import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_load_config_reads_every_config_that_ships(path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert Path(config.output_dir).name == path.stem
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert load_config(TrainConfig, saved) == config


def test_parse_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 5\nrollout:\n  top_p: 0.9\n  stop: ['END']\n")
    config = parse_command_line(
        TrainConfig, [str(path), "--rollout.top_p=0.5", "--optim.lr=1e-5"], prog="train"
    )
    assert (config.seed, config.rollout.top_p, config.optim.lr) == (5, 0.5, 1e-5)
    assert config.rollout.stop == ("END",)


def all_fields(config_class: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            found += all_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, config_class))
    return found


def test_every_field_is_read_somewhere() -> None:
    """A field that no module outside config/ names is a knob that does nothing."""
    trainer = [p for p in (ROOT / "lwz_trainer").rglob("*.py") if p.parent.name != "config"]
    loss = (ROOT / "lwz_kernels/linear_policy_loss").glob("o*.py")  # the loss section's readers
    sources = [path.read_text() for path in (*trainer, *loss)]
    text = "\n".join(sources)
    unread = [name for name, _ in all_fields(TrainConfig) if f".{name.split('.')[-1]}" not in text]
    # Read through FormatRewardConfig.threshold, LossConfig.chunk_bytes and plan_sequence.
    derived = {
        "rewards.format.redundancy_threshold",
        "loss.chunk_mb",
        "parallel.sequence_scheme",
    }
    assert set(unread) <= derived


def test_every_field_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_command_line(TrainConfig, ["--help"], prog="train")
    assert error.value.code == 0
    help_text = capsys.readouterr().out
    in_file_only = {"rewards.others"}  # names are the user's: docs/rewards.md
    for name in {name for name, _ in all_fields(TrainConfig)} - in_file_only:
        assert f"--{name}".replace("_", "-") in help_text.replace("_", "-"), name
