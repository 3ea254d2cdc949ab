"""Bad input ends with one line that says what to do, exit code 2, and nothing half-written."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lwz_trainer.__main__ import main
from tests.trainer.test_rewards_writing import make_reward_model
from tests.trainer.tiny import make_tiny_model
from tests.trainer.train_case import make_run_args, run_cli


def assert_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], *expected: str, code: int = 2
) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, errors
    for text in expected:
        assert text in errors[0]


def break_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_eos(model: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        path = model / name
        if path.exists():
            settings = json.loads(path.read_text())
            settings.pop("eos_token", None)
            settings.pop("eos_token_id", None)
            path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda model: shutil.rmtree(model), "no model at"),
        (lambda model: (model / "config.json").unlink(), "is not a model directory"),
        (break_weights, "is damaged or incomplete"),
        (remove_eos, "no end-of-sequence token"),
    ],
    ids=["no directory", "no config", "truncated safetensors", "no EOS"],
)
def test_train_refuses_a_bad_model(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], Any],
    expected: str,
) -> None:
    arguments = make_run_args(tmp_path)
    harm(tmp_path / "tiny-llama")
    assert_refused(arguments, capsys, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rollout.group_size": 1}, "rollout.group_size must be at least 2, got 1"),
        ({"rollout.max_completion_tokens": 500}, "the model's context is 512"),
        ({"rollout.temperature": 0}, "rollout.temperature must be above 0"),
        ({"data.template": "thinking"}, "unknown template 'thinking'"),
        ({"rollout.kv_cache_tokens": 16}, "raise rollout.kv_cache_tokens"),
        (
            {"rollout.kv_cache_tokens": 16, "rollout.memory": "phase"},
            "raise rollout.kv_cache_tokens",
        ),
        (
            {"rollout.memory": "phase", "rollout.engine": "vllm"},
            "rollout.memory phase makes room for the KV cache of rollout.engine own",
        ),
        ({"update.num_minibatches": 3}, "must be a multiple of update.num_minibatches"),
        ({"optim.warmup_steps": 4}, "must be below num_steps"),
        (
            {"optim.moments_dtype": "bf16", "optim.beta2": 0.99},
            "optim.moments_dtype bf16 needs optim.beta2 <= 0.98, got 0.99",
        ),
        ({"rewards.length.weight": 0, "rewards.format.weight": 0}, "rewards"),
        ({"rewards.writing.weight": 1}, "rewards.writing.model is empty"),
        ({"loss.sampler_correction": "truncate", "rollout.top_p": 0.9}, "sampler_correction"),
        ({"loss.off_policy_kl_max": 0.01, "rollout.top_k": 20}, "off_policy_kl_max"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"log.wandb": "project"}, "wandb is not installed"),
    ],
)
def test_train_refuses_impossible_settings(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    if "device" in settings and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_refused(make_run_args(tmp_path, **settings), capsys, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        ('{"prompt": "a", "length_range": [9, 3]}\n', "line 1"),
        ("not json\n", "line 1"),
    ],
)
def test_train_refuses_bad_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    arguments = make_run_args(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(content)
    assert_refused(arguments, capsys, "prompts.jsonl", expected)
    assert not (tmp_path / "run").exists()


def test_train_names_the_row_of_a_prompt_longer_than_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_run_args(tmp_path)
    rows = [{"prompt": "short"}, {"prompt": "a very long request " * 200}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert_refused(arguments, capsys, "row 2", "the model's context is 512")


def test_train_stops_when_every_reward_is_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = Path(make_reward_model(tmp_path / "classifier"))
    weights = load_file(classifier / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], float("nan"))
    save_file(weights, classifier / "model.safetensors", metadata={"format": "pt"})
    settings = {"rewards.writing.weight": 1, "rewards.writing.model": classifier}
    assert_refused(make_run_args(tmp_path, **settings), capsys, "reward 'writing' failed for 100%")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_train_refuses_an_output_directory_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    arguments = make_run_args(tmp_path, output_dir=tmp_path / "file" / "run")
    assert_refused(arguments, capsys, "cannot write to output_dir")


def test_train_refuses_a_disk_too_small_for_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_run_args(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(arguments, capsys, "free on the disk of output_dir", "checkpoint.keep")


def test_train_on_a_disk_that_fills_up_keeps_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lwz_trainer.train.records as records

    real, calls = records.pq.write_table, []

    def write_table(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(records.pq, "write_table", write_table)
    arguments = make_run_args(tmp_path)
    assert_refused(arguments, capsys, "the disk is full")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000002"
    monkeypatch.undo()
    assert main(arguments) == 0


def test_train_refuses_the_checkpoint_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    other = make_tiny_model(tmp_path / "other", "qwen2")
    arguments = make_run_args(tmp_path, **{"model.path": other})
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert_refused(arguments, capsys, "is of another model", "family")
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_train_refuses_the_checkpoint_of_another_run_and_names_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    (tmp_path / "other.jsonl").write_text('{"prompt": "Write on the moon."}\n' * 2)
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 7},
        "data.prompts": {"data.prompts": tmp_path / "other.jsonl"},
        "data.template": {"data.template": "direct"},
        "data.prompts_per_step": {"data.prompts_per_step": 1},
        "rollout.group_size": {"rollout.group_size": 2},
        "optim.moments_dtype": {"optim.moments_dtype": "bf16"},
        "weights of model.path": {"model.path": make_tiny_model(tmp_path / "other", seed=1)},
    }
    for name, settings in changes.items():
        arguments = make_run_args(tmp_path, num_steps=1, **settings)
        assert_refused(arguments, capsys, f"is of another run ({name} differ)")


def test_train_goes_on_with_settings_that_may_change_and_a_model_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    settings = {
        "model.path": (tmp_path / "tiny-llama").rename(tmp_path / "moved"),
        "num_steps": 2,
        "optim.lr": 2e-4,
        "update.microbatch_tokens": 100,
        "rewards.length.weight": 2,
        "checkpoint.every": 0,
    }
    assert main(make_run_args(tmp_path, **settings)) == 0
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.dist
def test_train_refuses_the_checkpoint_of_another_world_size(tmp_path: Path) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    result = run_cli(make_run_args(tmp_path), processes=2)
    assert result.returncode != 0
    assert "was written by 1 processes, this run has 2" in result.stderr


def test_train_refuses_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    assert_refused(make_run_args(tmp_path), capsys, "cannot be read", "latest")


def test_train_refuses_a_second_run_in_the_same_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_run_args(tmp_path, num_steps=1, **{"checkpoint.resume": False})
    assert main(arguments) == 0
    assert_refused(arguments, capsys, "already holds a run")


def test_unknown_keys_are_refused_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rollout:\n  temprature: 1.0\n")
    assert_refused(["train", str(config)], capsys, "did you mean 'rollout.temperature'?")
    with pytest.raises(SystemExit) as error:
        main(["train", "--rollout.temprature=1.0"])
    assert error.value.code == 2
    assert "rollout.temperature" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: 3\n", "'rollout' is a section"),
        ("num_steps: many\n", "num_steps"),
        ("a: [\n", "line 2"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_bad_yaml_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert_refused(["train", str(config)], capsys, "config.yaml", expected)


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["tarin"], capsys, "unknown command 'tarin'")
    assert_refused(["train", "nowhere.yaml"], capsys, "no config file nowhere.yaml")
