"""`pretrain` and `reward-model` on two ranks are the runs of one process, whatever is sharded.

Two processes start once and make all runs; the tests read what they left behind.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.model import loading
from lwz_trainer.parallel import Ranks
from lwz_trainer.pretrain import update as pretrain_update
from lwz_trainer.pretrain.loop import Pretrainer
from lwz_trainer.reward_model import update as reward_update
from lwz_trainer.reward_model.loop import RewardModelTrainer
from lwz_trainer.train.signals import StopSignal
from tests.processes import start_ranks
from tests.trainer.pretrain_case import make_pretrain_args
from tests.trainer.test_reward_model import make_args as make_reward_args
from tests.trainer.train_case import read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(280)]

CPU = torch.device("cpu")
PARAMETERS = {"parallel.shard_parameters": True}
RUNS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "pretrain-optimizer": {"parallel.shard_optimizer": True},
    "pretrain-sequence": {"parallel.sequence": 2},
    "pretrain-parameters": PARAMETERS,
    # Some packs on both ranks, some on one.
    "pretrain-parameters-sequence": PARAMETERS
    | {"parallel.sequence": "auto", "update.microbatch_tokens": 64},
    "reward": {},
    "reward-optimizer": {"parallel.shard_optimizer": True},
    "reward-parameters": PARAMETERS,
}
RESUMED = ["pretrain-parameters", "reward-parameters"]
# eps makes a step proportional to the gradient: no sign of a rounding error is amplified.
OPTIM = {"optim.lr": 0.1, "optim.eps": 1.0, "optim.schedule": "constant", "optim.warmup_steps": 0}
OUTPUT = {"log.tensorboard": False, "checkpoint.every": 0}


def make_arguments(folder: Path, name: str, *, is_half: bool = False, **settings: Any) -> list[str]:
    """Of four steps, or of the first two of them."""
    settings = OPTIM | OUTPUT | settings
    if name.startswith("pretrain"):
        # Small packs, of which one rank has more than the other.
        shape = {"num_steps": 4, "data.held_out_every": 2, "update.microbatch_tokens": 128}
        settings = shape | settings | ({"num_steps": 2} if is_half else {})
        return make_pretrain_args(folder, name, **settings)[1:]
    shape = {"update.pairs_per_step": 3, "update.num_epochs": 0.8, "update.eval_every": 1}
    shape["update.microbatch_tokens"] = 1
    settings = shape | settings | ({"update.num_epochs": 0.4} if is_half else {})
    return make_reward_args(folder, name, **settings)[1:]


def train(arguments: list[str], name: str, ranks: Ranks, *, told_to_stop: bool = False) -> None:
    stop = StopSignal()
    if told_to_stop:
        stop.name = "SIGTERM"
    if name.startswith("pretrain"):
        config = parse_command_line(PretrainConfig, arguments, prog="pretrain")
        Pretrainer(config, ranks, stop).train()
    else:
        pairs = parse_command_line(RewardModelConfig, arguments, prog="reward-model")
        RewardModelTrainer(pairs, ranks, stop).train()


def _rank_main(rank: int, folder: Path, runs: dict[str, list[str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    ranks = Ranks(rank, 2, CPU, dist.group.WORLD)
    num_idle: dict[str, int] = {}
    num_read: dict[str, int] = {}
    works, batches = pretrain_update.make_idle_work, reward_update.empty_batch
    read_file = loading._read_file
    for name, arguments in runs.items():
        with (
            mock.patch.object(pretrain_update, "make_idle_work", wraps=works) as idle_works,
            mock.patch.object(reward_update, "empty_batch", wraps=batches) as idle_batches,
            mock.patch.object(loading, "_read_file", wraps=read_file) as reads,
        ):
            train(arguments, name, ranks, told_to_stop=rank == 1 and "stopped" in name)
        num_idle[name] = idle_works.call_count + idle_batches.call_count
        num_read[name] = reads.call_count
        dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps({"idle": num_idle, "read": num_read}))
    dist.barrier()  # a rank that leaves early takes its connections with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all runs, and those of one process."""
    path = tmp_path_factory.mktemp("two_ranks")
    runs: dict[str, list[str]] = {}
    for name, settings in RUNS.items():
        runs[name] = make_arguments(path, name, **settings)
        if name in RESUMED:
            settings = settings | {"output_dir": path / f"{name}-resumed"}
            runs[f"{name}-half"] = make_arguments(path, name, is_half=True, **settings)
            runs[f"{name}-resumed"] = make_arguments(path, name, **settings)
    for name in ("pretrain", "reward"):
        train(make_arguments(path, f"{name}-alone"), name, Ranks(0, 1, CPU, None))
        runs[f"{name}-stopped"] = make_arguments(path, f"{name}-stopped")
    context = start_ranks(_rank_main, (path, runs), 2)
    while not context.join():
        pass
    return path


def counts(folder: Path) -> list[dict[str, dict[str, int]]]:
    """By rank, passes without samples and files of weights that each run had."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("run", RUNS)
def test_run_on_two_ranks_is_that_of_one_process(folder: Path, run: str) -> None:
    alone = folder / f"{run.partition('-')[0]}-alone"
    records = [read_metrics(path, without_clocks=True) for path in (alone, folder / run)]
    assert len(records[0]) >= 3
    for one, two in zip(*records, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    start = load_file(folder / "tiny-llama" / "model.safetensors")
    expected, found = weights_of(alone), weights_of(folder / run)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-5, name
        before = start.get(name, torch.zeros_like(value))  # a score head starts at 0
        assert relative_error(found[name] - before, value - before) <= 1e-3, name


@pytest.mark.parametrize("run", RESUMED)
def test_run_of_sharded_parameters_resumes_bit_for_bit(folder: Path, run: str) -> None:
    whole, resumed = weights_of(folder / run), weights_of(folder / f"{run}-resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = [read_metrics(folder / name, without_clocks=True) for name in (run, f"{run}-resumed")]
    assert metrics[0] == metrics[1]


def test_a_rank_with_fewer_packs_keeps_step_where_parameters_are_sharded(folder: Path) -> None:
    found = counts(folder)
    for run in RUNS:
        idle = sum(rank["idle"][run] for rank in found)
        assert (idle > 0) is ("parameters" in run), run


def test_only_the_main_rank_reads_weights_that_are_sharded(folder: Path) -> None:
    found = counts(folder)
    for run in RUNS:
        assert found[0]["read"][run] == 1
        assert found[1]["read"][run] == int("parameters" not in run)


@pytest.mark.parametrize("run", ["pretrain", "reward"])
def test_a_signal_to_one_rank_stops_all(folder: Path, run: str) -> None:
    assert (folder / f"{run}-stopped" / "config.yaml").exists()
    assert not (folder / f"{run}-stopped" / "final").exists()
