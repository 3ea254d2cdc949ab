"""Whole runs: what they write, that they resume bit for bit, and that ranks do not matter."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwz_trainer.__main__ import main
from tests.processes import Program
from tests.trainer.train_case import IN_PHASES, make_run_args, read_metrics, run_cli


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", local_files_only=True)
    return model.state_dict()


def assert_same_runs(one: Path, other: Path) -> None:
    """Metrics, samples and weights, bit for bit."""
    metrics = [read_metrics(run, without_clocks=True) for run in (one, other)]
    assert metrics[0] == metrics[1]
    for path in sorted((one / "samples").iterdir()):
        tables = [pq.read_table(run / "samples" / path.name).to_pylist() for run in (one, other)]
        assert [str(row) for row in tables[0]] == [str(row) for row in tables[1]]
    weights = [final_weights(run) for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_train_writes_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make_run_args(tmp_path, **{"num_steps": 3, "checkpoint.every": 1})) == 0
    run_dir = tmp_path / "run"
    metrics = read_metrics(run_dir)
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert metrics[0]["ratio_mean"] == metrics[0]["ratio_max"] == 1
    assert metrics[0]["sampler/prob_diff_mean"] < 0.005
    assert 0 <= metrics[0]["reward/format"] <= 1
    samples = pq.read_table(run_dir / "samples" / "step_000002.parquet").to_pylist()
    assert len(samples) == 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny-llama")
    for row in samples:
        assert len(row["completion_ids"]) == len(row["sampling_logprobs"])
        assert row["policy_version"] == 1
        text = tokenizer.decode(row["prompt_ids"] + row["completion_ids"])
        assert text.startswith(row["prompt_text"] + row["completion"].removeprefix("<answer>"))
        parts = row["weighted_length"] + row["weighted_format"]
        assert row["advantage"] == pytest.approx(parts)
    assert sum(row["advantage"] for row in samples) == pytest.approx(0, abs=1e-6)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000003"
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert names == ["step_000002", "step_000003"]
    assert list((run_dir / "tensorboard").glob("events.*"))
    implementations = json.loads((run_dir / "implementations.json").read_text())
    assert "sdpa" in implementations["attention"]
    assert "linear_policy_loss" in implementations
    assert "Learned in 3 steps" in (out := capsys.readouterr().out)
    assert "step 3/3" in out
    assert "<html" in (run_dir / "report.html").read_text()
    assert not list(run_dir.rglob("*.partial"))


def test_train_changes_the_weights_and_exports_them(tmp_path: Path) -> None:
    assert main(make_run_args(tmp_path, num_steps=1)) == 0
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama").state_dict()
    after = final_weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template


def test_train_learns_what_is_rewarded(tmp_path: Path) -> None:
    """A random model that is paid for words ends up writing more of them."""
    settings = {
        "num_steps": 30,
        "rollout.group_size": 16,
        "rewards.format.weight": 0,
        "optim.lr": 3e-3,
        "checkpoint.every": 0,
    }
    assert main(make_run_args(tmp_path, **settings)) == 0
    words = [record["words/answer_mean"] for record in read_metrics(tmp_path / "run")]
    assert sum(words[-5:]) > 1.3 * sum(words[:5])


def test_train_resumes_bit_for_bit(tmp_path: Path) -> None:
    """And with pages that take turns and an optimizer on the host, as in memory of its own."""
    assert main(make_run_args(tmp_path, "whole")) == 0
    assert main(make_run_args(tmp_path, "halves", num_steps=2, **IN_PHASES)) == 0
    # As a kill in the middle of step 3 leaves it: later lines, a torn one, a half-written file.
    halves = tmp_path / "halves"
    with (halves / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "reward/length": 0.5}) + '\n{"step": 4, "rew')
    (halves / "checkpoints" / ".step_000004.partial").mkdir()
    (halves / "samples" / "step_000003.parquet").write_bytes(b"torn")
    # The steps go on without an export: as a kill between the last step and the export leaves it.
    unexported = IN_PHASES | {"checkpoint.export": False}
    assert main(make_run_args(tmp_path, "halves", **unexported)) == 0
    assert (halves / "final" / "step").read_text() == "2\n"
    assert main(make_run_args(tmp_path, "halves", **IN_PHASES)) == 0
    assert (halves / "final" / "step").read_text() == "4\n"
    assert_same_runs(tmp_path / "whole", halves)


@pytest.mark.slow
def test_train_killed_anywhere_resumes_to_the_same_run(tmp_path: Path) -> None:
    settings = {"num_steps": 6, "checkpoint.every": 1}
    assert main(make_run_args(tmp_path, "whole", **settings)) == 0
    arguments = make_run_args(tmp_path, "killed", **settings)
    for wait_s in (0.0, 0.05, 0.3):
        process = Program("lwz_trainer", arguments)
        wait_for_new_step(tmp_path / "killed", process)
        time.sleep(wait_s)
        process.kill()
        process.wait()
    assert main(arguments) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def wait_for_new_step(run_dir: Path, process: Program) -> None:
    """Returns when the run has written one more step than it had."""
    path = run_dir / "metrics.jsonl"
    start = path.read_text().count("\n") if path.exists() else 0
    deadline = time.monotonic() + 120
    while process.returncode is None and time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") > start:
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {}),
        (
            signal.SIGTERM,
            {"update.schedule": "interleaved", "rewards.pool.workers": 2} | IN_PHASES,
        ),
    ],
    ids=["SIGTERM", "SIGINT", "interleaved"],
)
def test_train_saves_and_leaves_on_a_signal(
    tmp_path: Path, number: signal.Signals, settings: dict[str, Any]
) -> None:
    settings = settings | {"num_steps": 200, "checkpoint.every": 0, "log.tensorboard": False}
    process = Program("lwz_trainer", make_run_args(tmp_path, **settings))
    wait_for_new_step(tmp_path / "run", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"stopped by {number.name}" in out
    steps = len(read_metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{steps:06d}"


@pytest.mark.dist
@pytest.mark.parametrize("groups", [2, 1], ids=["whole groups", "a group over two ranks"])
def test_train_on_two_ranks_follows_the_same_curve(tmp_path: Path, groups: int) -> None:
    settings = {"num_steps": 3, "data.prompts_per_step": groups, "update.num_minibatches": groups}
    assert main(make_run_args(tmp_path, "one", **settings)) == 0
    result = run_cli(make_run_args(tmp_path, "two", **settings), processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    runs = [read_metrics(tmp_path / name, without_clocks=True) for name in ("one", "two")]
    for one, two in zip(*runs, strict=True):
        for key in ("reward/length", "reward/format", "loss", "grad_norm", "entropy"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (key, one["step"])
    weights = [final_weights(tmp_path / name) for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4)


@pytest.mark.dist
def test_train_with_shared_sequences_and_a_sharded_optimizer(tmp_path: Path) -> None:
    """Packs on one and on two ranks, ZeRO, a checkpoint: the curve of one process, bit for bit
    the same after a resume in phase memory."""
    settings = {"num_steps": 3, "checkpoint.every": 1, "update.microbatch_tokens": 48}
    assert main(make_run_args(tmp_path, "one", **settings)) == 0
    settings |= {"parallel.sequence": "auto", "parallel.shard_optimizer": True}
    in_phases = settings | IN_PHASES
    for name, steps, its in (
        ("whole", 3, settings),
        ("halves", 2, in_phases),
        ("halves", 3, in_phases),
    ):
        arguments = make_run_args(tmp_path, name, **(its | {"num_steps": steps}))
        result = run_cli(arguments, processes=2)
        assert result.returncode == 0, result.stderr[-2000:]
    assert_same_runs(tmp_path / "whole", tmp_path / "halves")
    weights = [final_weights(tmp_path / name) for name in ("one", "whole")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4)


def test_train_with_kl_several_updates_and_tis_runs(tmp_path: Path) -> None:
    settings = {
        "num_steps": 2,
        "loss.kl_coef": 0.1,
        "update.num_epochs": 2,
        "update.num_minibatches": 2,
        "loss.sampler_correction": "truncate",
        "loss.entropy_coef": 0.01,
        "update.mask_truncated": True,
        "rollout.max_completion_tokens": 64,
    }
    assert main(make_run_args(tmp_path, **settings)) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics[0]["policy_version"] == 4
    assert metrics[1]["kl"] > 0


def test_train_with_the_chat_template(tmp_path: Path) -> None:
    settings = {"num_steps": 1, "data.template": "chat", "data.chat_opened": "<answer>"}
    assert main(make_run_args(tmp_path, **settings)) == 0
    row = pq.read_table(tmp_path / "run" / "samples" / "step_000001.parquet").to_pylist()[0]
    assert row["prompt_text"].endswith("<|im_start|>assistant\n<answer>")
    assert row["completion"].startswith("<answer>")


def test_train_reads_a_yaml_file_and_flags_override_it(tmp_path: Path) -> None:
    flags = make_run_args(tmp_path, num_steps=1)[1:]
    config = tmp_path / "config.yaml"
    config.write_text("num_steps: 3\nrollout:\n  temperature: 1.1\n")
    flags = [flag for flag in flags if not flag.startswith("--rollout.temperature")]
    assert main(["train", str(config), *flags]) == 0
    assert len(read_metrics(tmp_path / "run")) == 1
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "temperature: 1.1" in saved


def test_dry_run_prints_config_and_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*make_run_args(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "max_completion_tokens: 16" in out
    assert "KV cache" in out
    assert "peak" in out
    assert "A step takes at most about" in out
    assert not (tmp_path / "run").exists()
