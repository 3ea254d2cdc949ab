"""Collectives over a group that is an argument: gloo or NCCL, started early or differentiable.

Receive buffers are made by `new_empty(shape)`: `torch.empty_like` of a transposed view keeps its
strides, and gloo's all-to-all into such a buffer returns wrong data without an error. Gradients
are summed over ranks in fp32 (fp64 for fp64), then rounded once. Point-to-point transfers are
posted as one batch, because a send that waits for its receive deadlocks a ring.

The differentiable functions are for activations. A loss is reduced after `.detach()`: the adjoint
of a sum over ranks would multiply every gradient by their number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.dtypes import wide_dtype

__all__ = [
    "PendingTensor",
    "all_gather",
    "all_to_all",
    "reduce_scatter",
    "ring_shift",
    "start_all_gather",
    "start_reduce_scatter",
    "start_ring_shift",
    "transpose_ranks",
]


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is being received; `sent` is kept alive until it has arrived."""

    received: Tensor
    sent: Tensor
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """The tensor, when it may be read (on a GPU: by the current stream)."""
        for work in self.works:
            work.wait()
        return self.received


def transpose_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, ...]: row s goes to rank s, and row s of the result came from rank s; no autograd."""
    num_ranks = dist.get_world_size(group)
    if x.shape[0] != num_ranks:
        raise ValueError(f"expected one row for each of {num_ranks} ranks, got {[*x.shape]}")
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Starts to receive [S, *x.shape]: `x` of every rank."""
    num_ranks = dist.get_world_size(group)
    sent = x.contiguous()
    received = x.new_empty((num_ranks, *x.shape))
    flat = received.view(-1)  # the gathered shape that every backend accepts
    work = dist.all_gather_into_tensor(flat, sent.view(-1), group=group, async_op=True)
    return PendingTensor(received, sent, _works(work))


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> PendingTensor:
    """Starts to receive x.shape[1:]: the sum over ranks of their row for this one."""
    num_ranks = dist.get_world_size(group)
    if x.shape[0] != num_ranks:
        raise ValueError(f"expected one row for each of {num_ranks} ranks, got {[*x.shape]}")
    sent = x.contiguous()
    received = x.new_empty(x.shape[1:])
    work = dist.reduce_scatter_tensor(received.view(-1), sent.view(-1), group=group, async_op=True)
    return PendingTensor(received, sent, _works(work))


def start_ring_shift(x: Tensor, group: dist.ProcessGroup, shift: int = 1) -> PendingTensor:
    """Starts to receive `x` of the rank `shift` places before this one, with equal shapes."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sent = x.contiguous()
    if shift % num_ranks == 0:
        return PendingTensor(sent, sent, ())
    received = x.new_empty(x.shape)
    to, source = (rank + shift) % num_ranks, (rank - shift) % num_ranks
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=to),
            dist.P2POp(dist.irecv, received, group=group, group_peer=source),
        ]
    )
    return PendingTensor(received, sent, tuple(works))


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, ...]: row s goes to rank s; backward sends the gradients the same way back."""
    return _AllToAll.apply(x, group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] to [S, ...]; backward sums in fp32 what the ranks made of this rank's row."""
    return _AllGather.apply(x, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, ...] to [...]: this rank's row, summed over ranks in fp32; backward gathers."""
    return _ReduceScatter.apply(x, group)


def ring_shift(x: Tensor, group: dist.ProcessGroup, shift: int = 1) -> Tensor:
    """`x` of the rank `shift` places before; backward shifts the gradient the other way."""
    return _RingShift.apply(x, group, shift)


def _works(work: dist.Work | None) -> tuple[dist.Work, ...]:
    return () if work is None else (work,)


def _sum_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return start_reduce_scatter(x.to(wide_dtype(x.dtype)), group).wait().to(x.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return transpose_ranks(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return transpose_ranks(dout, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_all_gather(x, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_scattered(dout, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_scattered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return start_all_gather(dout, ctx.group).wait(), None


class _RingShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, shift: int) -> Tensor:
        ctx.group, ctx.shift = group, shift
        # A copy where nothing moves: an input returned as it is would lose its gradient function.
        return start_ring_shift(x, group, shift).wait().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return start_ring_shift(dout, ctx.group, -ctx.shift).wait(), None, None
