"""Whole runs of a policy that is spread over its ranks."""

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from lwz_trainer.__main__ import main
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError
from tests.trainer.test_train import assert_same_runs, final_weights
from tests.trainer.test_watch import started
from tests.trainer.train_case import IN_PHASES, make_run_args, run_cli

pytestmark = pytest.mark.timeout(600)


def sampled_tokens(run_dir: Path) -> list[list[list[int]]]:
    """By step and sample."""
    tables = (pq.read_table(path) for path in sorted((run_dir / "samples").iterdir()))
    return [table.column("completion_ids").to_pylist() for table in tables]


def kill_after_a_step(arguments: list[str], run_dir: Path) -> None:
    """SIGKILL to both ranks of a run, as soon as it has written a checkpoint."""
    with started(["lwz_trainer", *arguments]) as processes:
        deadline = time.monotonic() + 200
        while not (run_dir / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
            assert processes[0].returncode is None, "it ended before its first checkpoint"
            time.sleep(0.02)


@pytest.mark.dist
def test_train_samples_from_the_weights_that_it_trains(tmp_path: Path) -> None:
    """Packs on one and on two ranks, a reference model, a checkpoint, a kill: samples and weights
    are those of one process, and bit for bit those of a run that was not killed. Pages take turns
    in the one that was."""
    settings = {
        "num_steps": 3,
        "checkpoint.every": 1,
        "update.microbatch_tokens": 48,
        "loss.kl_coef": 0.1,
        "optim.lr": 1e-2,
    }
    assert main(make_run_args(tmp_path, "one", **settings)) == 0
    settings |= {
        "parallel.sequence": "auto",
        "parallel.sequence_scheme": "ulysses",  # also where each rank takes itself for a node
        "parallel.shard_parameters": True,
    }
    in_phases = settings | IN_PHASES
    kill_after_a_step(make_run_args(tmp_path, "killed", **in_phases), tmp_path / "killed")
    for name, its_settings in (("whole", settings), ("killed", in_phases)):
        result = run_cli(make_run_args(tmp_path, name, **its_settings), processes=2)
        assert result.returncode == 0, result.stderr[-2000:]
    assert "resumed from" in result.stdout
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
    tokens = sampled_tokens(tmp_path / "one")
    assert tokens[0] != tokens[1]
    assert sampled_tokens(tmp_path / "whole") == tokens
    weights = [final_weights(tmp_path / name) for name in ("one", "whole")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parallel.shard_optimizer=True", r"leave parallel\.shard_optimizer out"),
        ("--update.schedule=interleaved", "needs all ranks in every pass"),
    ],
)
def test_sharded_parameters_refuse_what_they_cannot_do(flag: str, message: str) -> None:
    flags = ["--parallel.shard_parameters=True", flag]
    with pytest.raises(UserError, match=message):
        parse_command_line(TrainConfig, flags, prog="train")
