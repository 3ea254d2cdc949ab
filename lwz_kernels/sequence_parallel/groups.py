"""Process groups for every power of two, made at start on all ranks in the same order.

A micro-batch of short documents then takes a smaller P without making a group in the loop.
Neighbours by global rank share a pack. Each function must be called by every rank of the default
group with equal arguments.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

__all__ = ["make_sequence_groups", "make_two_d_groups"]


def make_sequence_groups(
    largest: int, *, timeout: timedelta | None = None
) -> dict[int, dist.ProcessGroup]:
    """This rank's group of 1, 2, 4, ... up to `largest` neighbours.

    Args:
        largest: a power of two that divides the number of ranks.
        timeout: of collectives in these groups; None: the backend's.

    Returns:
        size -> group.

    Raises:
        ValueError: `largest` is not a power of two that divides the number of ranks.
    """
    world_size = dist.get_world_size()
    if largest < 1 or largest & (largest - 1) or world_size % largest:
        raise ValueError(
            f"largest must be a power of two that divides the {world_size} ranks, got {largest}"
        )
    groups: dict[int, dist.ProcessGroup] = {}
    size = 1
    while size <= largest:
        parts = [range(first, first + size) for first in range(0, world_size, size)]
        groups[size] = _make_groups(parts, timeout)
        size *= 2
    return groups


def make_two_d_groups(
    ulysses_ranks: int, num_ranks: int, *, timeout: timedelta | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(group that exchanges heads, group that exchanges keys and values) of this rank.

    Each `num_ranks` neighbours share a pack. The first group is `ulysses_ranks` neighbours (one
    node), the second the ranks at the same place of the pack's other nodes.

    Args:
        ulysses_ranks: divides `num_ranks`.
        num_ranks: P, divides the number of ranks.
        timeout: of collectives in these groups; None: the backend's.

    Raises:
        ValueError: the sizes do not divide.
    """
    world_size = dist.get_world_size()
    if num_ranks < 1 or world_size % num_ranks:
        raise ValueError(f"num_ranks must divide the {world_size} ranks, got {num_ranks}")
    if ulysses_ranks < 1 or num_ranks % ulysses_ranks:
        raise ValueError(f"ulysses_ranks must divide num_ranks={num_ranks}, got {ulysses_ranks}")
    nodes = [range(first, first + ulysses_ranks) for first in range(0, world_size, ulysses_ranks)]
    across = [
        range(pack + place, pack + num_ranks, ulysses_ranks)
        for pack in range(0, world_size, num_ranks)
        for place in range(ulysses_ranks)
    ]
    return _make_groups(nodes, timeout), _make_groups(across, timeout)


def _make_groups(parts: Sequence[range], timeout: timedelta | None) -> dist.ProcessGroup:
    """Makes all groups, which every rank must do, and returns the one that this rank is in."""
    own: dist.ProcessGroup | None = None
    for part in parts:
        group = dist.new_group(list(part), timeout=timeout)
        if dist.get_rank() in part:
            own = group
    assert own is not None, f"rank {dist.get_rank()} is in one of {list(parts)}"
    return own
