"""A policy whose parameters lie on all ranks: what it learns, what it holds, what the rollout sees.

Each number of processes starts once and runs all its cases; the tests compare what they found.
"""

import gc
import json
import re
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.linear_policy_loss import linear_policy_loss
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig, plan_sequence
from lwz_trainer.config.sections import OptimConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.loading import load_decoder
from lwz_trainer.parallel import Ranks, make_teams
from lwz_trainer.train.weights import TrainedWeights
from lwz_trainer.update import policy_update
from lwz_trainer.update.packing import TrainSample
from lwz_trainer.update.policy_update import PolicyUpdate
from lwz_trainer.update.work import make_idle_work
from tests.processes import start_ranks
from tests.trainer.test_sequence_parallel_update import GRPO_KL, SEQUENCE_LEVEL, TOKEN_LEVEL
from tests.trainer.test_sequence_parallel_update import make_samples as make_samples_of_lengths
from tests.trainer.tiny import make_tiny_model

pytestmark = [pytest.mark.timeout(600), pytest.mark.dist]

LOSSES = {"dapo": TOKEN_LEVEL, "gspo": SEQUENCE_LEVEL, "grpo_kl": GRPO_KL}


@dataclass(frozen=True)
class Case:
    loss: str
    data: int
    sequence: int
    dtype: torch.dtype = torch.float32
    family: str = "llama"
    section: dict[str, Any] = field(default_factory=dict)
    scheme: str = "auto"
    """How the ranks of a pack share it; auto is ulysses here."""

    @property
    def world_size(self) -> int:
        return self.data * self.sequence

    @property
    def alone(self) -> "Case":
        return replace(self, data=1, sequence=1, scheme="auto")

    @property
    def truth(self) -> "Case":
        return replace(self.alone, dtype=torch.float32)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.loss, self.family, dtype, *self.section, self.scheme]
        return "-".join([*parts, f"{self.data}x{self.sequence}"])


def make_cases() -> Iterator[Case]:
    long = {"offload_layers": True, "mlp_tile_tokens": 5}
    for data, sequence, scheme in ((2, 1, "auto"), (1, 2, "ring"), (2, 2, "auto")):
        for loss in ("dapo", "gspo"):
            yield Case(loss, data, sequence, scheme=scheme)
    # Biases, and a head that is not tied.
    yield Case("dapo", 2, 1, torch.bfloat16, "qwen2", long)
    yield Case("dapo", 2, 2, torch.bfloat16, "qwen2")
    yield Case("dapo", 1, 2, section=long, scheme="gather_kv")
    yield Case("grpo_kl", 2, 2, section={"checkpoint_layers": False})


CASES = list(make_cases())


def live_tensors() -> list[Tensor]:
    """All tensors of this process."""
    gc.collect()
    return [tensor for tensor in gc.get_objects() if type(tensor) in (Tensor, torch.nn.Parameter)]


def num_bytes(tensors: list[Tensor]) -> int:
    """Of their storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run_case(
    case: Case, folder: Path, rank: int, samples: list[TrainSample] | None = None
) -> dict[str, Any]:
    """Two optimizer steps of this rank's share; what they left behind."""
    # Held until the measurement: what an earlier case left, and some thread of the process group
    # lets go meanwhile, would be subtracted though it is no longer there.
    before = live_tensors()
    group = dist.group.WORLD if case.world_size > 1 else None
    ranks = Ranks(rank, case.world_size, torch.device("cpu"), group)
    parallel = ParallelConfig(
        sequence=case.sequence, sequence_scheme=case.scheme, shard_parameters=group is not None
    )
    # eps makes a step proportional to the gradient: no sign of a rounding error is amplified.
    config = TrainConfig(
        parallel=parallel,
        optim=OptimConfig(lr=0.5, eps=1.0, max_grad_norm=1.0),
        loss=LossConfig(**LOSSES[case.loss]),
        # Small packs: some ranks have more of them than others.
        update=UpdateConfig(num_epochs=2, microbatch_tokens=64),
        model=ModelSection(**case.section),
    )
    model_dir = folder / f"tiny-{case.family}"
    model = load_decoder(model_dir, dtype=case.dtype, device="cpu")
    weights = TrainedWeights(model, config, ranks)
    reference = None
    if config.loss.kl_coef > 0:
        reference = weights.spread(
            load_decoder(model_dir, dtype=case.dtype, device="cpu"), trainable=False
        )
    plan = plan_sequence(parallel, heads=4, kv_heads=2, num_ranks=case.world_size, ranks_per_node=2)
    update = PolicyUpdate(
        weights.trained,
        weights.optimizer,
        ranks,
        make_teams(plan, ranks, timeout_s=60),
        config.update,
        config.loss,
        ref_model=reference,
        temperature=0.7,
        max_completion_tokens=100,
        section=config.model,
    )
    samples = samples or make_samples_of_lengths()
    share = len(samples) // case.world_size
    mine = samples[rank * share : (rank + 1) * share]
    with mock.patch.object(policy_update, "make_idle_work", wraps=make_idle_work) as idle:
        values = update.run(mine, num_groups=2, lr=0.5).values
    del update  # it keeps what it knows of the samples
    held = num_bytes(live_tensors()) - num_bytes(before)
    del before
    grads = {}
    for name, parameter in weights.trained.named_parameters():
        grad = parameter.main_grad if group is None else parameter.grad.full_tensor()
        grads[name] = grad.clone()
    with weights.whole():
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    emptied = sum(p.untyped_storage().nbytes() for p in model.parameters())
    return {
        "values": values,
        "idle": idle.call_count,
        "held": held,
        "grads": grads,
        "weights": whole,
        "emptied": emptied,
    }


def run_with_bad_loss(folder: Path, rank: int) -> str:
    samples = make_samples_of_lengths()
    samples[3] = TrainSample(**(vars(samples[3]) | {"advantage": float("nan")}))
    return message_of(folder, rank, samples)


def run_with_bad_gradient(folder: Path, rank: int) -> str:
    """The loss of one pack of rank 0 is finite, its gradient is not."""

    def loss_of(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = linear_policy_loss(hidden, *args, **kwargs)
        if rank == 0 and len(hidden) == 90:  # sample 3
            loss = loss + (hidden.sum() * 0).sqrt().float()
        return loss, metrics

    with mock.patch.object(policy_update, "linear_policy_loss", loss_of):
        return message_of(folder, rank, make_samples_of_lengths())


def message_of(folder: Path, rank: int, samples: list[TrainSample]) -> str:
    try:
        run_case(Case("dapo", 2, 1), folder, rank, samples)
    except TrainingStopped as error:
        return str(error)
    return "it went on"


def _rank_main(rank: int, world_size: int, name: str) -> None:
    torch.set_num_threads(1)
    folder = Path(name)
    found: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        for case in CASES:
            if case.world_size == world_size:
                found[str(case)] = run_case(case, folder, rank)
        if world_size == 2:
            found["bad loss"] = run_with_bad_loss(folder, rank)
            found["bad gradient"] = run_with_bad_gradient(folder, rank)
        dist.barrier()  # a rank that leaves early takes its connections with it
        dist.destroy_process_group()
    except BaseException:
        found["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(found, folder / f"found{rank}.pt")


@pytest.fixture(scope="module")
def found() -> Iterator[dict[int, list[dict[str, Any]]]]:
    """By number of processes and rank, what each case left behind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder)
        # Rows that do not divide by the ranks.
        uneven = {"vocab_size": 303, "intermediate_size": 129}
        make_tiny_model(folder, "qwen2", tie_word_embeddings=False, **uneven)
        alone = {str(c): c for case in CASES for c in (case.alone, case.truth)}
        results = {1: [{key: run_case(case, folder, 0) for key, case in alone.items()}]}
        for world_size in (2, 4):
            (folder / "store").unlink(missing_ok=True)
            context = start_ranks(_rank_main, (world_size, name), world_size)
            for process in context.processes:
                process.join(200)
                if process.is_alive():
                    process.kill()
            files = [folder / f"found{rank}.pt" for rank in range(world_size)]
            results[world_size] = [
                torch.load(file, weights_only=False) if file.exists() else {} for file in files
            ]
            for file in files:
                file.unlink(missing_ok=True)
        yield results


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
def test_update_is_that_of_one_process(found: dict[int, list[dict]], case: Case) -> None:
    expected = found[1][0][str(case.alone)]
    for rank in found[case.world_size]:
        assert str(case) in rank, rank.get("error", "did not run")
        ours = rank[str(case)]
        for key, value in expected["values"].items():
            assert ours["values"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        for kind in ("grads", "weights"):
            for name, value in expected[kind].items():
                assert relative_error(ours[kind][name], value) <= 1e-5, (kind, name)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.bfloat16], ids=str)
def test_bf16_update_is_as_exact_as_that_of_one_process(
    found: dict[int, list[dict]], case: Case
) -> None:
    """The error against fp32 is at most 1.5 times that of one process, and 2e-3."""
    truth, alone = found[1][0][str(case.truth)], found[1][0][str(case.alone)]
    for rank in found[case.world_size]:
        assert str(case) in rank, rank.get("error", "did not run")
        for kind in ("grads", "weights"):
            for name, value in truth[kind].items():
                limit = 1.5 * relative_error(alone[kind][name], value) + 2e-3
                assert relative_error(rank[str(case)][kind][name], value) <= limit, (kind, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_holds_its_share(found: dict[int, list[dict]], case: Case) -> None:
    """Masters, gradients and moments, 16 bytes a parameter in all, and no weights beside them."""
    count = sum(weight.numel() for weight in found[1][0][str(case.alone)]["weights"].values())
    share = 16 * count / case.world_size
    for rank in found[case.world_size]:
        reference = 4 * count / case.world_size if case.loss == "grpo_kl" else 0
        assert 0.98 * share <= rank[str(case)]["held"] - reference <= 1.05 * share
        assert rank[str(case)]["emptied"] == 0


def test_a_rank_with_fewer_packs_keeps_step(found: dict[int, list[dict]]) -> None:
    """Two packs for one team, one for the other."""
    assert [rank[str(Case("dapo", 2, 2))]["idle"] for rank in found[4]] == [0, 0, 1, 1]


def test_a_bad_loss_stops_every_rank_and_names_its_samples(found: dict[int, list[dict]]) -> None:
    for rank in found[2]:
        assert "not finite" in rank["bad loss"]
        assert "samples [3]" in rank["bad loss"]


def test_a_bad_gradient_stops_every_rank_and_names_its_pass(found: dict[int, list[dict]]) -> None:
    """Only the sum over ranks is known: sample 3 is alone in its pack, rank 1 had others."""
    messages = {rank["bad gradient"] for rank in found[2]}
    assert len(messages) == 1
    (message,) = messages
    assert "not finite" in message
    named = json.loads(re.search(r"samples (\[.*?\])", message)[1])
    assert 3 in named
    assert {0, 1, 2}.isdisjoint(named)
    assert any(sample >= 4 for sample in named)
