"""Interleaved runs: the same as sequential ones, and what happens when in a step."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_trainer.__main__ import main
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.sections import OptimConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError
from lwz_trainer.parallel import Ranks
from lwz_trainer.rewards.advantages import group_advantages
from lwz_trainer.train.groups import EndedGroup, ScoredGroup
from lwz_trainer.train.interleave import Interleaver
from lwz_trainer.train.loop import Trainer
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.policy_update import PolicyUpdate
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all
from tests.trainer.test_policy_update import ALONE, NO_TEAMS, TEMPERATURE, flat_grad
from tests.trainer.test_train import assert_same_runs, final_weights
from tests.trainer.train_case import make_run_args, read_metrics, run_cli

# Completions of very different lengths, in a cache that holds a few: groups end one by one.
MIXED = {
    "num_steps": 3,
    "data.prompts_per_step": 4,
    "rollout.group_size": 3,
    "rollout.temperature": 2.0,
    "rollout.max_completion_tokens": 48,
    "rollout.max_num_seqs": 5,
    "update.microbatch_tokens": 100,
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss.loss_type": "dapo", "loss.entropy_coef": 0.01, "loss.kl_coef": 0.1}],
    ids=["grpo", "dapo with entropy and KL"],
)
def test_interleaved_is_sequential_bit_for_bit_when_deterministic(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = MIXED | {"update.deterministic": True} | settings
    for schedule in ("sequential", "interleaved"):
        arguments = make_run_args(tmp_path, schedule, **settings, **{"update.schedule": schedule})
        assert main(arguments) == 0
    assert_same_runs(tmp_path / "sequential", tmp_path / "interleaved")


def test_interleaved_is_sequential_up_to_rounding(tmp_path: Path) -> None:
    for schedule in ("sequential", "interleaved"):
        assert (
            main(make_run_args(tmp_path, schedule, **MIXED, **{"update.schedule": schedule})) == 0
        )
    runs = [read_metrics(tmp_path / name) for name in ("sequential", "interleaved")]
    for one, other in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "entropy", "reward/length", "ratio_max"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (key, one["step"])
    weights = [final_weights(tmp_path / name) for name in ("sequential", "interleaved")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4)


def spans_of(run_dir: Path, step: int) -> dict[str, list[tuple[float, float]]]:
    """Begin and end in microseconds of whatever computes, by track."""
    path = run_dir / "trace" / f"step_{step:06d}_rank_0.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X" and event["name"] != "pack":
            spans[names[event["tid"]]].append((event["ts"], event["ts"] + event["dur"]))
    return {track: sorted(found) for track, found in spans.items()}


def test_trace_shows_updates_between_decode_bursts(tmp_path: Path) -> None:
    settings = MIXED | {"num_steps": 2, "checkpoint.every": 1, "log.trace_steps": 2}
    for schedule in ("sequential", "interleaved"):
        assert (
            main(make_run_args(tmp_path, schedule, **settings, **{"update.schedule": schedule}))
            == 0
        )
        assert len(list((tmp_path / schedule / "trace").iterdir())) == 1
        spans = spans_of(tmp_path / schedule, 2)
        decode, update = spans["decode"], spans["update"]
        within = [u for u in update if decode[0][1] <= u[0] and u[1] <= decode[-1][0]]
        assert bool(within) == (schedule == "interleaved")
        assert all(u[1] <= spans["optimizer"][0][0] for u in update)
        assert spans["optimizer"][-1][1] <= spans["checkpoint"][0][0]
        # One thread on a CPU: nothing overlaps.
        everything = sorted(span for track in spans.values() for span in track)
        assert all(one[1] <= other[0] for one, other in pairwise(everything))


@pytest.mark.dist
def test_interleaved_on_two_ranks_follows_the_same_curve(tmp_path: Path) -> None:
    settings = MIXED | {"update.schedule": "interleaved", "update.deterministic": True}
    assert main(make_run_args(tmp_path, "one", **settings)) == 0
    settings["parallel.shard_optimizer"] = True
    result = run_cli(make_run_args(tmp_path, "two", **settings), processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    runs = [read_metrics(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*runs, strict=True):
        for key in ("reward/length", "reward/format", "loss", "grad_norm", "entropy"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (key, one["step"])


PAIRWISE = {
    "weight": 1,
    "source": "pairwise",
    "endpoint.base_url": "http://x",
    "endpoint.model": "m",
}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"update.schedule": "interleaved"}, "update.schedule interleaved"),
        ({f"rewards.writing.{k}": v for k, v in PAIRWISE.items()}, "the reward source pairwise"),
    ],
)
def test_train_refuses_groups_that_span_ranks(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    arguments = make_run_args(tmp_path, **settings, **{"data.prompts_per_step": 1})
    config = parse_command_line(TrainConfig, arguments[1:], prog="train")
    ranks = Ranks(0, 2, torch.device("cpu"), None)
    with pytest.raises(UserError, match=f"{name} needs whole groups on every rank"):
        Trainer(config, ranks, StopSignal())


def scored_groups(model: Any, tokenizer: Any) -> list[ScoredGroup]:
    """Four groups of four, with rewards that differ."""
    samples = sample_all(make_engine(model, tokenizer, temperature=TEMPERATURE), make_requests())
    groups = []
    for number in range(4):
        members = [sample for sample in samples if sample.group == number]
        rewards = {"length": torch.tensor([[s.sample * 7 % 5 for s in members]]).double().numpy()}
        advantages = group_advantages(rewards, {"length": 1.0}, "zscore")
        groups.append(ScoredGroup(FakeEnded(number, members), [], advantages))
    return groups


class FakeEnded(EndedGroup):
    """A group without a prompt, whose number is given."""

    def __init__(self, number: int, samples: list[Any]) -> None:
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "_number", number)

    @property
    def number(self) -> int:
        return self._number  # type: ignore[attr-defined]


def interleaved_grad(
    tmp_path: Path, order: list[int], *, is_ordered: bool, in_thread: bool, advances: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient of four groups that finish in this order, and the metrics."""
    model, tokenizer = load_tiny(tmp_path)
    groups = scored_groups(model, tokenizer)
    optimizer = FlatAdamW(model, OptimConfig(lr=1e-3, max_grad_norm=0))
    update = PolicyUpdate(
        model,
        optimizer,
        ALONE,
        NO_TEAMS,
        UpdateConfig(schedule="interleaved", microbatch_tokens=60),
        LossConfig(),
        ref_model=None,
        temperature=TEMPERATURE,
        max_completion_tokens=24,
        section=ModelSection(attention="sdpa", checkpoint_layers=False),
    )
    interleaver = Interleaver(
        update,
        torch.device("cpu"),
        is_ordered=is_ordered,
        mask_truncated=False,
        in_thread=in_thread,
    )
    weights = [p.clone() for p in model.parameters()]
    with interleaver.rollout(range(4)):
        for number in order:
            interleaver.add(groups[number])
            for _ in range(advances):
                interleaver.advance()
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    values = interleaver.finish(lr=1e-3).values
    return flat_grad(optimizer).clone(), values


def test_interleaver_in_order_gives_the_same_bits_whoever_ends_first(tmp_path: Path) -> None:
    expected = interleaved_grad(
        tmp_path, [0, 1, 2, 3], is_ordered=True, in_thread=False, advances=0
    )
    for order, in_thread, advances in (
        ([3, 2, 1, 0], False, 1),
        ([1, 0, 3, 2], True, 2),
        ([2, 0, 1, 3], True, 0),
    ):
        grad, values = interleaved_grad(
            tmp_path, order, is_ordered=True, in_thread=in_thread, advances=advances
        )
        assert torch.equal(grad, expected[0])
        assert values == expected[1]
    grad, _ = interleaved_grad(
        tmp_path, [3, 1, 2, 0], is_ordered=False, in_thread=False, advances=1
    )
    torch.testing.assert_close(grad, expected[0], rtol=1e-3, atol=1e-7)


def test_interleaver_goes_on_behind_a_dropped_group(tmp_path: Path) -> None:
    for order in ([1, 3], [3, 1]):
        grad, values = interleaved_grad(
            tmp_path, order, is_ordered=True, in_thread=False, advances=1
        )
        assert grad.norm() > 0
        assert values["ratio_mean"] == 1


def test_interleaver_hands_on_what_goes_wrong_in_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PolicyUpdate, work: Any) -> None:
        raise ValueError("a broken micro-batch")

    monkeypatch.setattr(PolicyUpdate, "add", fail)
    with pytest.raises(ValueError, match="a broken micro-batch"):
        interleaved_grad(tmp_path, [0, 1, 2, 3], is_ordered=True, in_thread=True, advances=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"update.num_epochs": 2}, "update.num_epochs 2"),
        ({"update.num_minibatches": 2}, "update.num_minibatches 2"),
        ({"loss.entropy_coef": 0.1}, "loss.entropy_coef depends on the length"),
        ({"parallel.sequence": 2}, "needs whole sequences on one rank"),
    ],
)
def test_interleaved_refuses_what_is_not_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    assert main(make_run_args(tmp_path, **settings, **{"update.schedule": "interleaved"})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: update.schedule interleaved")
    assert expected in error
    assert not (tmp_path / "run").exists()
