"""The `parallel` section, and what it means for a given model and number of ranks."""

from dataclasses import dataclass
from typing import Literal

from lwz_kernels.sequence_parallel import Scheme
from lwz_trainer.errors import UserError

__all__ = ["ParallelConfig", "SequencePlan", "plan_sequence"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the update is spread over ranks; every rank samples its own share whatever is set."""

    sequence: int | Literal["auto"] = 1
    """P: neighbouring ranks that share each packed sequence of the update, a power of two. "auto"
    takes for every pack the fewest ranks whose update.microbatch_tokens hold it."""
    sequence_scheme: Literal["auto", "ulysses", "gather_kv", "ring", "two_d"] = "auto"
    """What such ranks exchange; "auto" is ulysses where heads and node allow it, else two_d, else
    gather_kv."""
    shard_optimizer: bool = False
    """Keep AdamW's moments and the masters' lower halves of 1/N of the parameters on each of the N
    ranks (ZeRO stage 1); weights and gradients stay whole."""
    shard_parameters: bool = False
    """Keep 1/N of the fp32 masters, gradients and moments on each of the N ranks and no more
    (FSDP2, ZeRO stage 3): a layer is gathered when it is computed. To sample, every rank gathers a
    whole copy in the model's dtype and gives it up afterwards; to export, the first one."""
    timeout_s: float = 1800.0
    """Within this time of a rank's death or stall every other rank has named it and left: a
    collective waits half of it, a process may be silent an eighth, at most 20 s."""

    def __post_init__(self) -> None:
        if self.sequence != "auto" and not _is_power_of_two(self.sequence):
            raise UserError(
                f"parallel.sequence must be 'auto' or a power of two, got {self.sequence}"
            )
        if self.sequence == 1 and self.sequence_scheme != "auto":
            raise UserError(
                f"parallel.sequence_scheme is '{self.sequence_scheme}', but parallel.sequence is "
                "1: set that to 2, 4, … or auto, or leave the scheme out"
            )
        if self.shard_parameters and self.shard_optimizer:
            raise UserError(
                "parallel.shard_parameters shards the optimizer state too: leave "
                "parallel.shard_optimizer out"
            )
        if not self.timeout_s > 0:
            raise UserError(f"parallel.timeout_s must be above 0, got {self.timeout_s}")


@dataclass(frozen=True)
class SequencePlan:
    """The (data, sequence) mesh: rank = data rank · size + place in the team of `size` ranks."""

    size: int
    """Ranks of a team: the largest number that may share a pack."""
    smallest: int
    """The smallest number: `size`, or 1 under "auto"."""
    schemes: dict[int, tuple[Scheme, int | None]]
    """P -> scheme, and under two_d the ranks that exchange heads; for every P from 2 in use."""

    def num_ranks_for(self, num_tokens: int, budget_tokens: int) -> int:
        """The fewest ranks whose budgets hold a sequence, or all of a team."""
        num_ranks = self.smallest
        while num_ranks < self.size and num_tokens > num_ranks * budget_tokens:
            num_ranks *= 2
        return num_ranks


def plan_sequence(
    config: ParallelConfig, *, heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int
) -> SequencePlan:
    """Team size and schemes for a model with `heads` query and `kv_heads` key/value heads.

    Raises:
        UserError: a P that does not divide the number of ranks, or heads that a named scheme
            cannot split.
    """
    if config.sequence == "auto":
        size = num_ranks & -num_ranks  # the largest power of two that divides it
        while not _can_split(config, size, heads, kv_heads, ranks_per_node):
            size //= 2
        smallest = 1
    else:
        size = smallest = config.sequence
        if num_ranks % size:
            raise UserError(
                f"parallel.sequence is {size}, which does not divide the {num_ranks} processes: "
                "start a multiple of it, or lower it"
            )
        if not _can_split(config, size, heads, kv_heads, ranks_per_node):
            raise UserError(
                f"parallel.sequence_scheme '{config.sequence_scheme}' cannot split {heads} query "
                f"and {kv_heads} key/value heads over {size} ranks, {ranks_per_node} on a node: "
                "use parallel.sequence_scheme=auto"
            )
    schemes: dict[int, tuple[Scheme, int | None]] = {}
    ranks = max(2, smallest)
    while ranks <= size:
        schemes[ranks] = _scheme_of(config, ranks, heads, kv_heads, ranks_per_node)
        ranks *= 2
    return SequencePlan(size, smallest, schemes)


def _is_power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


def _can_exchange_heads(ranks: int, heads: int, kv_heads: int) -> bool:
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _ranks_for_heads(ranks: int, heads: int, kv_heads: int, ranks_per_node: int) -> int:
    """The most of `ranks` neighbours, on one node, that can exchange heads."""
    exchanging = ranks
    while exchanging > 1 and not (
        ranks_per_node % exchanging == 0 and _can_exchange_heads(exchanging, heads, kv_heads)
    ):
        exchanging //= 2
    return exchanging


def _can_split(
    config: ParallelConfig, ranks: int, heads: int, kv_heads: int, ranks_per_node: int
) -> bool:
    """Whether the configured scheme can share a pack over `ranks` ranks."""
    if ranks == 1:
        return True
    if config.sequence_scheme == "ulysses":
        return _can_exchange_heads(ranks, heads, kv_heads)
    if config.sequence_scheme == "two_d":
        return ranks == 2 or _ranks_for_heads(ranks // 2, heads, kv_heads, ranks_per_node) > 1
    return True


def _scheme_of(
    config: ParallelConfig, ranks: int, heads: int, kv_heads: int, ranks_per_node: int
) -> tuple[Scheme, int | None]:
    if config.sequence_scheme == "two_d":
        return "two_d", _ranks_for_heads(ranks // 2, heads, kv_heads, ranks_per_node)
    if config.sequence_scheme != "auto":
        return config.sequence_scheme, None
    exchanging = _ranks_for_heads(ranks, heads, kv_heads, ranks_per_node)
    if exchanging == ranks:
        return "ulysses", None
    return ("gather_kv", None) if exchanging == 1 else ("two_d", exchanging)
