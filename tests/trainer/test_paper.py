"""The configurations of the paper load, and docs/paper.md names settings that exist."""

import dataclasses
import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from lwz_trainer.config.evaluation import EvalConfig
from lwz_trainer.config.generate import GenerateCommandConfig
from lwz_trainer.config.prepare import PrepareConfig
from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import dump_config, load_config, parse_command_line
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.pretrain.forecast import forecast_pretrain_memory
from lwz_trainer.reward_model.forecast import forecast_reward_model_memory
from lwz_trainer.train.forecast import num_parameters
from tests.trainer.test_config import all_fields
from tests.trainer.test_forecast import CUDA, QWEN_7B, QWEN_32B
from tests.trainer.train_case import ROOT

COMMANDS: dict[str, Any] = {
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "generate": GenerateCommandConfig,
    "eval": EvalConfig,
    "prepare": PrepareConfig,
}
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
NODES_OF_64: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "device": CUDA,
    "num_ranks": 64,
    "ranks_per_node": 8,
}
PAGE = (ROOT / "docs" / "paper.md").read_text()


def config_class(path: Path) -> Any:
    """By what the data are: texts, pairs, or requests."""
    data = yaml.safe_load(path.read_text())["data"]
    if "pairs" in data:
        return RewardModelConfig
    return PretrainConfig if "sources" in data else TrainConfig


def paper_rows() -> list[tuple[str, str, list[str]]]:
    """(sentence, command, settings) of every row."""
    rows = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[1] in ("P", "D1", "D2", "U", "L"):
            rows.append((cells[0], cells[2], re.findall(r"`([^`]+)`", cells[3])))
    return rows


def find_setting(config: Any, name: str) -> None:
    """Fails where a dotted name is no field."""
    for part in name.split("."):
        hints = get_type_hints(config)
        assert part in {field.name for field in dataclasses.fields(config)}, name
        config = hints[part]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_load_config_reads_every_config_in_a_folder(path: Path, tmp_path: Path) -> None:
    config = load_config(config_class(path), path)
    assert Path(config.output_dir).name == f"{path.parent.name}_{path.stem}"
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert load_config(type(config), saved) == config


def test_the_paper_has_its_settings() -> None:
    folder = ROOT / "configs" / "paper"
    nothink, think, pretrained = (
        load_config(TrainConfig, folder / f"{name}.yaml")
        for name in ("base_nothink", "base_think", "pretrain_think")
    )
    pretrain = load_config(PretrainConfig, folder / "pretrain.yaml")
    assert (nothink.data.template, think.data.template) == ("direct", "think")
    assert pretrained.model.path == f"{pretrain.output_dir}/final"
    for config in (nothink, think, pretrained):
        assert config.data.prompts_per_step * config.rollout.group_size == 32
        assert (config.rollout.temperature, config.rollout.top_p) == (0.8, 1.0)
        assert config.rollout.max_completion_tokens == 14_000
        assert (config.loss.clip_ratio_low, config.loss.kl_coef) == (0.2, 0.0)
        assert config.rewards.weights == {"length": 1.0, "format": 1.0, "writing": 1.0}
        assert (config.num_steps, config.rewards.normalization) == (150, "zscore")
    tokens = pretrain.num_steps * pretrain.data.batch_size * pretrain.data.context_tokens
    assert tokens == pytest.approx(30e9, rel=1e-3)
    shares = dict(zip(pretrain.data.sources, pretrain.data.weights, strict=True))
    assert shares["distilled=distilled.jsonl"] / sum(shares.values()) == 0.01
    defaults = GenerateCommandConfig()
    assert (defaults.temperature, defaults.top_p, defaults.max_tokens) == (0.6, 0.95, None)
    assert defaults.stop == ("<|user|>", "<|endoftext|>", "</answer>")


@pytest.mark.parametrize(("sentence", "command", "settings"), paper_rows())
def test_the_page_names_settings_that_exist(
    sentence: str, command: str, settings: list[str]
) -> None:
    if command == "reward-model":
        module = pytest.importorskip("lwz_trainer.config.reward_model")
        config = module.RewardModelConfig
    else:
        config = COMMANDS[command]
    for name in settings:
        find_setting(config, name)


def test_one_node_holds_the_7b_pretraining() -> None:
    config = load_config(PretrainConfig, ROOT / "configs" / "pretrain" / "qwen2.5_7b_8gpu.yaml")
    memory = forecast_pretrain_memory(
        config, QWEN_7B, dtype=torch.bfloat16, device=CUDA, num_ranks=8, ranks_per_node=8
    )
    assert not memory.misfits(80_000_000_000)
    assert not memory.rollout
    # The head's gradient is summed in fp32 and handed on in bf16.
    head = QWEN_7B.vocab_size * QWEN_7B.hidden
    assert memory.update["gradient of the head"] == 6 * head


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_64_gpus_hold_the_32b_pretraining(name: str) -> None:
    config = load_config(PretrainConfig, ROOT / "configs" / "paper" / f"{name}.yaml")
    memory = forecast_pretrain_memory(config, QWEN_32B, **NODES_OF_64)
    assert memory.misfits(80_000_000_000) == []
    assert memory.rollout == {}
    # The whole model, to be read and to be written, waits where no GPU is.
    assert memory.host["weights, to load and export"] == 2 * num_parameters(QWEN_32B)


def test_64_gpus_hold_the_72b_reward_model() -> None:
    model = replace(QWEN_7B, hidden=8192, ff=29568, layers=80, heads=64, kv_heads=8)
    assert num_parameters(model) == 72_706_203_648
    config = load_config(RewardModelConfig, ROOT / "configs" / "reward_model" / "72b_64gpu.yaml")
    longest = 2 * config.data.max_tokens
    memory = forecast_reward_model_memory(config, model, longest_pair=longest, **NODES_OF_64)
    assert memory.misfits(80_000_000_000) == []
    # No head: neither its weights nor its logits.
    assert "logits of one chunk" not in memory.update
    head = model.vocab_size * model.hidden
    assert memory.always["fp32 masters"] == 4 * (num_parameters(model) - head) // 64


def test_the_page_covers_the_method_and_names_every_file() -> None:
    assert len(paper_rows()) > 75
    for path in CONFIGS:
        assert path.stem in PAGE, path


@pytest.mark.parametrize(
    ("config", "package"), [(PretrainConfig, "pretrain"), (GenerateCommandConfig, "generate")]
)
def test_every_field_of_a_command_is_read_and_documented(
    config: Any, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (
        "pretrain",
        "generate",
        "train",
        "update",
        "model",
        "parallel.py",
        "config/parallel.py",
    )
    files = [
        file
        for name in folders
        for path in [ROOT / "lwz_trainer" / name]
        for file in ([path] if path.is_file() else path.glob("*.py"))
    ]
    text = "\n".join(file.read_text() for file in files)
    assert importlib.import_module(f"lwz_trainer.{package}.command")
    with pytest.raises(SystemExit):
        parse_command_line(config, ["--help"], prog=package)
    help_text = capsys.readouterr().out.replace("_", "-")
    for name, _ in all_fields(config):
        assert f".{name.split('.')[-1]}" in text, name
        assert f"--{name}".replace("_", "-") in help_text, name
