"""The update over (data, sequence) ranks: loss, gradients and steps are those of one process.

Each number of processes starts once and runs all its cases; the tests compare what they found.
"""

import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.attention import attention
from lwz_kernels.sequence_parallel import SequenceParallel
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig, plan_sequence
from lwz_trainer.config.sections import OptimConfig, UpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.loading import load_decoder
from lwz_trainer.model.main_grad import main_grad
from lwz_trainer.parallel import Ranks, make_teams
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.packing import TrainSample
from lwz_trainer.update.policy_update import PolicyUpdate
from lwz_trainer.update.work import ShardedAttend
from tests.processes import start_ranks
from tests.trainer.tiny import VOCAB_SIZE, make_tiny_model

pytestmark = pytest.mark.timeout(900)

LAYERS = 2
# (tokens of the prompt, tokens of the completion): uneven, one token, longer than a budget.
LENGTHS = [(5, 40), (5, 1), (5, 17), (5, 90), (9, 33), (9, 8), (9, 2), (9, 21)]


@dataclass(frozen=True)
class Case:
    name: str
    world_size: int
    parallel: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=lambda: {"loss_type": "dapo"})
    update: dict[str, Any] = field(default_factory=dict)
    max_ranks: int = 1
    """The most ranks that a pack of this case lies on."""


TOKEN_LEVEL = {"loss_type": "dapo", "clip_ratio_high": 0.28}
GRPO_KL = {"loss_type": "grpo", "kl_coef": 0.1, "entropy_coef": 0.01}
# Wide enough that the second pass clips some sequences and not all.
SEQUENCE_LEVEL = {"loss_type": "gspo", "clip_ratio_low": 0.5, "clip_ratio_high": 1.0}
LOSSES = {"dapo": TOKEN_LEVEL, "grpo_kl": GRPO_KL, "gspo": SEQUENCE_LEVEL}
# With two passes the second one has ratios, clipping and weights that the first one changed.
TWICE = {"num_epochs": 2, "microbatch_tokens": 64}


def make_cases() -> Iterator[Case]:
    meshes = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
    for loss_name, loss in LOSSES.items():
        for data, sequence in meshes:
            parallel: dict[str, Any] = {"sequence": sequence}
            name = f"{loss_name}:{data}x{sequence}"
            yield Case(name, data * sequence, parallel, loss, TWICE, max_ranks=sequence)
    whole = (("gather_kv", 2), ("ring", 2), ("ulysses", 4), ("gather_kv", 4), ("ring", 4))
    for scheme, ranks in whole:
        parallel = {"sequence": ranks, "sequence_scheme": scheme}
        yield Case(f"gspo:{scheme}{ranks}", ranks, parallel, SEQUENCE_LEVEL, TWICE, max_ranks=ranks)
    two_d = {"sequence": 4, "sequence_scheme": "two_d"}
    yield Case("gspo:two_d4", 4, two_d, SEQUENCE_LEVEL, TWICE, max_ranks=4)
    for ranks in (2, 4):
        auto = {"sequence": "auto"}
        small = TWICE | {"microbatch_tokens": 30}
        yield Case(f"gspo:auto{ranks}", ranks, auto, SEQUENCE_LEVEL, small, max_ranks=ranks)
        shard = {"sequence": ranks // 2, "shard_optimizer": True}
        yield Case(f"gspo:shard{ranks}", ranks, shard, SEQUENCE_LEVEL, TWICE, max_ranks=ranks // 2)


CASES = {case.name: case for case in make_cases()}


def make_samples() -> list[TrainSample]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()

    prompts = {length: ids(length) for length in (5, 9)}
    return [
        TrainSample(
            group=sample // 4,
            sample=sample,
            prompt_ids=prompts[num_prompt],
            completion_ids=ids(num_completion),
            sampling_logprobs=[-5.0] * num_completion,
            advantage=(sample * 7 % 5 - 2) / 2,
            in_loss=sample != 4,
        )
        for sample, (num_prompt, num_completion) in enumerate(LENGTHS)
    ]


def run_case(case: Case, model_dir: Path, rank: int) -> dict[str, Any]:
    """One update of this rank's share; what it left behind."""
    device = torch.device("cpu")
    group = dist.group.WORLD if case.world_size > 1 else None
    ranks = Ranks(rank, case.world_size, device, group)
    model = load_decoder(model_dir, dtype=torch.float32, device=device)
    config = ParallelConfig(**case.parallel)
    plan = plan_sequence(
        config,
        heads=model.config.heads,
        kv_heads=model.config.kv_heads,
        num_ranks=case.world_size,
        ranks_per_node=2,
    )
    # eps makes a step proportional to the gradient: no sign of a rounding error is amplified.
    optim = OptimConfig(lr=0.5, eps=1.0, max_grad_norm=1.0)
    optimizer = FlatAdamW(model, optim, group if config.shard_optimizer else None)
    update = PolicyUpdate(
        model,
        optimizer,
        ranks,
        make_teams(plan, ranks, timeout_s=60),
        UpdateConfig(**case.update),
        LossConfig(**case.loss),
        ref_model=load_decoder(model_dir, dtype=torch.float32, device=device)
        if case.loss.get("kl_coef")
        else None,
        temperature=0.7,
        max_completion_tokens=100,
        section=ModelSection(offload_layers=True, mlp_tile_tokens=5),
    )
    share = len(LENGTHS) // case.world_size
    samples = make_samples()[rank * share : (rank + 1) * share]
    calls: list[tuple[int, int]] = []
    original = SequenceParallel.check_calls

    def noting(self: SequenceParallel, expected: int) -> None:
        calls.append((self.layout.num_ranks, self.calls))
        original(self, expected)

    with mock.patch.object(SequenceParallel, "check_calls", noting):
        result = update.run(samples, num_groups=2, lr=0.5)
    return {
        "values": result.values,
        "calls": calls,
        "grads": {n: main_grad(p).clone() for n, p in model.named_parameters()},
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "state": sum(x.numel() for x in optimizer.state_dict().values()),
    }


def run_case_with_nan(model_dir: Path, rank: int, world_size: int) -> str:
    """A bad sample on one rank stops all of them, with the same message."""
    case = Case("", world_size, {"sequence": "auto"}, SEQUENCE_LEVEL, {"microbatch_tokens": 64})
    samples = make_samples()
    samples[3] = TrainSample(**(vars(samples[3]) | {"advantage": float("nan")}))
    with mock.patch(f"{__name__}.make_samples", return_value=samples):
        try:
            run_case(case, model_dir, rank)
        except TrainingStopped as error:
            return str(error)
    return "it went on"


def run_case_that_attends_alone(model_dir: Path, rank: int, world_size: int) -> str:
    """A layer that quietly attends within its shard."""

    def alone(self: ShardedAttend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, [0, len(q)])[0]

    case = Case("", world_size, {"sequence": world_size})
    with mock.patch.object(ShardedAttend, "__call__", alone):
        try:
            run_case(case, model_dir, rank)
        except RuntimeError as error:
            return str(error)
    return "nobody noticed"


def _rank_main(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        model_dir = Path(folder) / "tiny-llama"
        for case in CASES.values():
            if case.world_size == world_size:
                found[case.name] = run_case(case, model_dir, rank)
        found["nan"] = run_case_with_nan(model_dir, rank, world_size)
        found["alone"] = run_case_that_attends_alone(model_dir, rank, world_size)
        dist.barrier()  # a rank that leaves early takes its connections with it
        dist.destroy_process_group()
    except BaseException:
        found["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(found, Path(folder) / f"found{rank}.pt")


@pytest.fixture(scope="module")
def found() -> Iterator[dict[int, list[dict[str, Any]]]]:
    """By number of processes and rank, what each case left behind."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder)
        results: dict[int, list[dict[str, Any]]] = {}
        alone = {
            c.name: run_case(c, folder / "tiny-llama", 0)
            for c in CASES.values()
            if c.world_size == 1
        }
        results[1] = [alone]
        for world_size in (2, 4):
            (folder / "store").unlink(missing_ok=True)
            context = start_ranks(_rank_main, (world_size, name), world_size)
            for process in context.processes:
                process.join(250)
                if process.is_alive():
                    process.kill()
            files = [folder / f"found{rank}.pt" for rank in range(world_size)]
            results[world_size] = [
                torch.load(file, weights_only=False) if file.exists() else {} for file in files
            ]
            for file in files:
                file.unlink(missing_ok=True)
        yield results


SPREAD = [name for name, case in CASES.items() if case.world_size > 1]


@pytest.mark.dist
@pytest.mark.parametrize("name", SPREAD)
def test_run_does_not_depend_on_the_mesh(found: dict[int, list[dict]], name: str) -> None:
    case = CASES[name]
    expected = found[1][0][f"{name.split(':')[0]}:1x1"]
    for rank in found[case.world_size]:
        assert name in rank, rank.get("error", "did not run")
        ours = rank[name]
        for key, value in expected["values"].items():
            assert ours["values"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        norm = expected["values"]["grad_norm"]
        assert ours["values"]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for parameter, weight in expected["weights"].items():
            torch.testing.assert_close(ours["weights"][parameter], weight, rtol=0, atol=1e-6)
        if case.parallel.get("shard_optimizer"):  # it has the sum of its own part only
            continue
        for parameter, grad in expected["grads"].items():
            assert grad.norm() > 0, parameter
            error = float((ours["grads"][parameter] - grad).norm() / grad.norm())
            assert error <= 1e-5, (parameter, error)


@pytest.mark.dist
@pytest.mark.parametrize("name", SPREAD)
def test_run_attends_over_the_ranks_of_a_pack(found: dict[int, list[dict]], name: str) -> None:
    """Every forward pass and every recomputation went through sequence parallelism."""
    case = CASES[name]
    for rank in found[case.world_size]:
        sizes = {size for size, _ in rank[name]["calls"]}
        assert max(sizes, default=1) == case.max_ranks
        assert {calls for _, calls in rank[name]["calls"]} <= {LAYERS}
    if name == "gspo:auto4":
        everyone = [size for rank in found[4] for size, _ in rank[name]["calls"]]
        assert set(everyone) == {2, 4}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_optimizer_holds_its_share(found: dict[int, list[dict]], ranks: int) -> None:
    whole = found[1][0]["gspo:1x1"]["state"]
    for rank in found[ranks]:
        assert rank[f"gspo:shard{ranks}"]["state"] <= whole / ranks + 16


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_run_with_a_bad_sample_stops_every_rank(found: dict[int, list[dict]], ranks: int) -> None:
    messages = {rank["nan"] for rank in found[ranks]}
    assert all("not finite" in message for message in messages)
    assert all("samples [3]" in message for message in messages)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_run_refuses_attention_within_a_shard(found: dict[int, list[dict]], ranks: int) -> None:
    for rank in found[ranks]:
        assert "attention ran 0 times, expected 2" in rank["alone"]
