"""A decoder whose parameters lie on all ranks, one N-th on each (FSDP2), and whole copies of it.

A layer is gathered in the model's dtype when it is computed, forward and backward, and its gradient
is summed over the ranks in fp32 right behind its backward pass. Embedding, final norm and head are
gathered together at the start of a forward pass and stay until its backward pass is done, so the
loss head finds a whole weight. Every pass is a collective: all ranks make the same number of them.

Sums, not means: the loss is already divided by global counts.

The rollout reads a plain decoder beside it: its storages are empty until `WholeCopy.gather` fills
them from the shards, and empty again after `release`.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lwz_trainer.model.decoder import Decoder

__all__ = ["WholeCopy", "is_fully_sharded", "reshard", "shard_decoder", "sharded_parameters"]


def shard_decoder(whole: Decoder, mesh: DeviceMesh, *, trainable: bool) -> Decoder:
    """The same model on the ranks of `mesh`; `whole` is only read. All of them call it together.

    Args:
        whole: its dtype is that of the computation.
        mesh: one-dimensional.
        trainable: shards are fp32 masters that gradients reach; else of the model's own dtype,
            without gradients.
    """
    dtype = whole.embed.dtype
    stored = torch.float32 if trainable else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    sharded = Decoder(whole.config, device="meta", dtype=stored)
    sharded.inv_freq = whole.inv_freq
    # A layer at a time, the root last: no more than one layer exists in fp32.
    for part, source in zip([*sharded.layers, sharded], [*whole.layers, whole], strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            value = parameter.detach().to(stored)
            setattr(part, name, nn.Parameter(value, requires_grad=trainable))
        module = fully_shard(part, mesh=mesh, mp_policy=policy)
        # gloo has no averages, and there is nothing to undo where nothing was divided.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        if trainable:
            _take_fp32_gradients(module, part)
    return sharded


def sharded_parameters(model: Decoder) -> dict[str, DTensor]:
    """By name, each with this rank's rows as its local tensor."""
    found = dict(model.named_parameters())
    parameters: dict[str, DTensor] = {
        name: value for name, value in found.items() if isinstance(value, DTensor)
    }
    assert len(parameters) == len(found), "a layer is still gathered: its copy would be stale"
    return parameters


def is_fully_sharded(model: Decoder) -> bool:
    """Whether it is of `shard_decoder`."""
    return isinstance(model, FSDPModule)


def reshard(model: Decoder) -> None:
    """Gives up what a forward pass without a backward pass leaves gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


class WholeCopy:
    """A plain decoder that holds the weights of a sharded one while they are needed whole.

    Args:
        whole: filled in place by `gather`; its parameters move at each.
        sharded: of `shard_decoder`.
    """

    def __init__(self, whole: Decoder, sharded: Decoder) -> None:
        whole.requires_grad_(False)
        self._targets = dict(whole.named_parameters())
        self._sources = sharded_parameters(sharded)

    @torch.no_grad()
    def gather(self) -> None:
        """Takes over the present weights, rounded to the copy's dtype; a collective."""
        for name, target in self._targets.items():
            target.untyped_storage().resize_(target.numel() * target.element_size())
            rows = cast(DTensor, self._sources[name].to(target.dtype))
            target.copy_(rows.full_tensor())

    def release(self) -> None:
        """Gives the copy's memory to others until `gather`."""
        for target in self._targets.values():
            target.untyped_storage().resize_(0)


def _take_fp32_gradients(module: FSDPModule, part: nn.Module) -> None:
    """Lets the gathered parameters, which stay the same objects, have gradients in fp32."""
    module.unshard()
    for parameter in part.parameters(recurse=False):
        parameter.grad_dtype = torch.float32
    module.reshard()
