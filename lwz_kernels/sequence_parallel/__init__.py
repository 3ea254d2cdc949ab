"""Exact causal attention over packs whose tokens are spread over process groups."""

from lwz_kernels.sequence_parallel.api import SequenceParallel
from lwz_kernels.sequence_parallel.communication import (
    all_gather,
    all_to_all,
    reduce_scatter,
    ring_shift,
)
from lwz_kernels.sequence_parallel.gather_kv import GatherPlan, gather_kv_attention
from lwz_kernels.sequence_parallel.groups import make_sequence_groups, make_two_d_groups
from lwz_kernels.sequence_parallel.layout import Scheme, SequenceLayout, make_layout
from lwz_kernels.sequence_parallel.ring import RingPlan, ring_attention
from lwz_kernels.sequence_parallel.sharding import (
    position_ids,
    shard_tokens,
    shift_labels,
    unshard_tokens,
)
from lwz_kernels.sequence_parallel.two_d import two_d_attention
from lwz_kernels.sequence_parallel.ulysses import ulysses_attention

__all__ = [
    "GatherPlan",
    "RingPlan",
    "Scheme",
    "SequenceLayout",
    "SequenceParallel",
    "all_gather",
    "all_to_all",
    "gather_kv_attention",
    "make_layout",
    "make_sequence_groups",
    "make_two_d_groups",
    "position_ids",
    "reduce_scatter",
    "ring_attention",
    "ring_shift",
    "shard_tokens",
    "shift_labels",
    "two_d_attention",
    "ulysses_attention",
    "unshard_tokens",
]
