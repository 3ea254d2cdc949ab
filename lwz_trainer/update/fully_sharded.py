"""A model whose parameters lie on all ranks, one N-th on each (FSDP2), and whole copies of it.

A layer is gathered in the model's dtype when it is computed, forward and backward, and its gradient
is summed over the ranks in fp32 right behind its backward pass. Embedding, final norm and head are
gathered together at the start of a forward pass and stay until its backward pass is done, so the
loss head finds a whole weight. Every pass is a collective: all ranks make the same number of them.

Sums, not means: the loss is already divided by global counts.

Rollout and export read a plain model beside it: its storages are empty until `WholeCopy.gather`
fills them from the shards, and empty again after `release`.
"""

import copy
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lwz_trainer.model.decoder import DecoderLayer
from lwz_trainer.parallel import Ranks

__all__ = [
    "WholeCopy",
    "is_fully_sharded",
    "num_idle_passes",
    "reshard",
    "shard_model",
    "sharded_parameters",
]


M = TypeVar("M", bound=nn.Module)


def shard_model(whole: M, mesh: DeviceMesh, *, trainable: bool) -> M:
    """The model of rank 0 on all ranks of `mesh`, which call this together.

    Args:
        whole: its dtype is that of the computation, its values count on rank 0 alone.
        mesh: one-dimensional.
        trainable: shards are fp32 masters that gradients reach; else of the model's own dtype,
            without gradients.
    """
    dtype = next(whole.parameters()).dtype
    stored = torch.float32 if trainable else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    empty = {id(p): nn.Parameter(p.detach().to("meta")) for p in whole.parameters()}
    sharded = copy.deepcopy(whole, empty)
    # A part at a time: no more than one layer exists in fp32.
    for part, sources in zip(_parts(sharded), _parts(whole), strict=True):
        for module, source in zip(part, sources, strict=True):
            for name, parameter in source.named_parameters(recurse=False):
                value = parameter.detach().to(mesh.device_type, stored)
                dist.broadcast(value, group=mesh.get_group(), group_src=0)
                setattr(module, name, nn.Parameter(value, requires_grad=trainable))
        root = fully_shard(part[0], mesh=mesh, mp_policy=policy)
        # gloo has no averages, and there is nothing to undo where nothing was divided.
        root.set_force_sum_reduction_for_comms(True)
        root.set_gradient_divide_factor(1.0)
        if trainable:
            _take_fp32_gradients(root, part)
    return sharded


def sharded_parameters(model: nn.Module) -> dict[str, DTensor]:
    """By name, each with this rank's rows as its local tensor."""
    found = dict(model.named_parameters())
    parameters: dict[str, DTensor] = {
        name: value for name, value in found.items() if isinstance(value, DTensor)
    }
    assert len(parameters) == len(found), "a layer is still gathered: its copy would be stale"
    return parameters


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether it is of `shard_model`."""
    return isinstance(model, FSDPModule)


def num_idle_passes(model: nn.Module, ranks: Ranks, num_passes: int) -> int:
    """Passes without samples by which this rank keeps step where each is a collective.

    Args:
        model: of `shard_model`; any other needs none.
        ranks: all of them ask together.
        num_passes: of this rank, with samples.
    """
    if not is_fully_sharded(model):
        return 0
    return int(ranks.max([float(num_passes)])[0]) - num_passes


def reshard(model: nn.Module) -> None:
    """Gives up what a forward pass without a backward pass leaves gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


class WholeCopy:
    """A plain model that holds the weights of a sharded one while they are needed whole.

    Args:
        whole: filled in place by `gather`; its parameters move at each. On any device.
        sharded: of `shard_model`.
    """

    def __init__(self, whole: nn.Module, sharded: nn.Module) -> None:
        whole.requires_grad_(False)
        self._targets = dict(whole.named_parameters())
        self._sources = sharded_parameters(sharded)

    @torch.no_grad()
    def gather(self, *, keeps: bool) -> None:
        """Takes over the present weights, rounded to the copy's dtype; a collective.

        Args:
            keeps: on this rank; else it only helps the others.
        """
        for name, target in self._targets.items():
            value = cast(DTensor, self._sources[name].to(target.dtype)).full_tensor()
            if keeps:
                target.untyped_storage().resize_(target.numel() * target.element_size())
                target.copy_(value)

    def release(self) -> None:
        """Gives the copy's memory to others until `gather`."""
        for target in self._targets.values():
            target.untyped_storage().resize_(0)


def _parts(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Modules that are gathered together: each layer alone, then the root with all the others."""
    others = []
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            yield [module]
        else:
            others.append(module)
    yield others


def _take_fp32_gradients(root: FSDPModule, part: list[nn.Module]) -> None:
    """Lets the gathered parameters, which stay the same objects, have gradients in fp32."""
    root.unshard()
    for module in part:
        for parameter in module.parameters(recurse=False):
            parameter.grad_dtype = torch.float32
    root.reshard()
