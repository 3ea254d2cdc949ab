"""The loss head over process groups (gloo): split vocabularies and split sequences."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss
from tests.kernels.loss_case import ROWS, call, logprob_arguments, make_case
from tests.processes import start_ranks

pytestmark = pytest.mark.dist
# Shards of different sizes: 37 rows over the ranks.
EDGES = {2: [0, 20, 37], 3: [0, 5, 6, 37]}


def run_ranks(check: Callable[[int, int], None], world_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, str(Path(folder) / "store"), check)
        context = start_ranks(_rank_main, arguments, world_size)
        while not context.join():
            pass


def _rank_main(rank: int, world_size: int, store: str, check: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        check(rank, world_size)
        dist.barrier()  # a rank that leaves early takes its connections with it
    finally:
        dist.destroy_process_group()


def _own_vocabulary(case: dict[str, Any], rank: int, world_size: int) -> slice:
    """Cuts weight and bias of a case down to this rank's rows."""
    own = slice(EDGES[world_size][rank], EDGES[world_size][rank + 1])
    for name in ("weight", "bias"):
        case[name] = case[name].detach()[own].clone().requires_grad_()
    return own


def _check_vocabulary_logprobs(rank: int, world_size: int) -> None:
    whole, shard = make_case(), make_case()
    own = _own_vocabulary(shard, rank, world_size)
    mix = torch.linspace(-1, 2, 3 * ROWS).view(3, ROWS)
    results = []
    for case, group in ((whole, None), (shard, dist.group.WORLD)):
        found = linear_logprobs(
            **logprob_arguments(case), softcap=4.0, tp_group=group, chunk_bytes=1000
        )
        sum((m * r).sum() for m, r in zip(mix, found, strict=True)).backward()
        results.append(found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(shard["hidden"].grad, whole["hidden"].grad)
    for name in ("weight", "bias"):
        torch.testing.assert_close(shard[name].grad, whole[name].grad[own])


def _check_vocabulary_loss(rank: int, world_size: int) -> None:
    for loss_type in ("dapo", "gspo"):
        config = PolicyLossConfig(loss_type=loss_type, entropy_coef=0.1, kl_coef=0.1)
        whole, shard = make_case(), make_case()
        own = _own_vocabulary(shard, rank, world_size)
        expected, _ = call(linear_policy_loss, whole, config=config)
        buffer = torch.zeros_like(shard["weight"])
        loss, _ = call(
            linear_policy_loss,
            shard,
            config=config,
            tp_group=dist.group.WORLD,
            weight_grad=buffer,
        )
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(shard["hidden"].grad, whole["hidden"].grad)
        torch.testing.assert_close(buffer, whole["weight"].grad[own])
        torch.testing.assert_close(shard["bias"].grad, whole["bias"].grad[own])


def _check_sequences(rank: int, world_size: int) -> None:
    """Every rank holds a part of the rows of each sequence, and gives its true length."""
    edges = {2: [0, 7, 13], 3: [0, 2, 9, 13]}[world_size]
    own = slice(edges[rank], edges[rank + 1])
    for loss_type in ("grpo", "gspo", "luspo", "vespo"):
        config = PolicyLossConfig(loss_type=loss_type, kl_coef=0.1)
        whole, part = make_case(), make_case()
        expected, _ = call(linear_policy_loss, whole, config=config)
        expected.backward()
        mask = whole["loss_mask"] & (whole["labels"] != -100)
        starts, stops = whole["cu_seqlens"][:-1].tolist(), whole["cu_seqlens"][1:].tolist()
        lengths = torch.tensor([int(mask[a:b].sum()) for a, b in zip(starts, stops, strict=True)])
        per_row = (
            *("hidden", "labels", "advantages", "loss_mask"),
            *("old_logprobs", "ref_logprobs", "sampling_logprobs"),
        )
        loss, _ = call(
            linear_policy_loss,
            part,
            config=config,
            cu_seqlens=(whole["cu_seqlens"].clamp(own.start, own.stop) - own.start),
            sequence_loss_tokens=lengths,
            sequence_group=dist.group.WORLD,
            **{name: part[name][own] for name in per_row},
        )
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach())
        torch.testing.assert_close(part["hidden"].grad[own], whole["hidden"].grad[own])
        weight_grad = part["weight"].grad
        dist.all_reduce(weight_grad)
        torch.testing.assert_close(weight_grad, whole["weight"].grad)


def _check_dtensor(rank: int, world_size: int) -> None:
    """A sharded weight is gathered once; its gradient is summed over ranks and sharded again."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole, sharded = make_case(), make_case()
    weight = distribute_tensor(whole["weight"].detach(), mesh, [Shard(0)]).requires_grad_()
    expected, _ = call(linear_policy_loss, whole)
    loss, _ = call(linear_policy_loss, sharded, weight=weight)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad.full_tensor(), whole["weight"].grad * world_size)
    del rank


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "check",
    [_check_vocabulary_logprobs, _check_vocabulary_loss, _check_sequences],
    ids=lambda check: check.__name__.removeprefix("_check_"),
)
def test_loss_head_over_ranks_is_that_of_one(
    check: Callable[[int, int], None], world_size: int
) -> None:
    run_ranks(check, world_size)


def test_loss_head_gathers_a_sharded_weight() -> None:
    run_ranks(_check_dtensor, 2)
