"""One rank's part of a layer, run alone: its exact shapes and segments, no process group.

Keys and values that other ranks would send are cut from the whole pack, so that the results of all
ranks together must be those of one process: that is the gate before anything is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.sequence_parallel.cost import Heads
from lwz_kernels.attention import SegmentTable, attention_bwd, attention_fwd
from lwz_kernels.sequence_parallel import GatherPlan, RingPlan, SequenceLayout
from lwz_kernels.sequence_parallel.ring import merge_attention
from lwz_kernels.sequence_parallel.ulysses import merge_heads, pack_heads

__all__ = ["Pack", "RankWork", "make_pack", "rank_works", "whole_attention"]

Pass = Callable[[], Tensor]


@dataclass(frozen=True)
class Pack:
    """q, k, v and dout of all tokens, padding included, and their documents."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    table: SegmentTable


@dataclass(frozen=True)
class RankWork:
    """What one rank computes in one layer; `backward` needs `forward` to have run."""

    rank: int
    forward: Pass
    """Returns out [n', H', K] of the tokens and heads that this rank attends for."""
    backward: Pass
    relayout: Pass
    """Local copies before and after the forward exchange."""
    pairs: int
    """Visible (query, key) pairs times query heads."""
    tokens: Tensor
    """The positions in the stream, and below the heads, of `forward`'s result."""
    heads: slice


def make_pack(
    layout: SequenceLayout, heads: Heads, dtype: torch.dtype, device: torch.device
) -> Pack:
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        shape = (layout.padded_tokens, num_heads, heads.size)
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    return Pack(
        draw(heads.query),
        draw(heads.kv),
        draw(heads.kv),
        draw(heads.query),
        SegmentTable.from_cu_seqlens(layout.cu_seqlens),
    )


def whole_attention(pack: Pack) -> Tensor:
    """out [T, H, K] of one process."""
    return attention_fwd(pack.q, pack.k, pack.v, pack.table)[0]


def rank_works(layout: SequenceLayout, pack: Pack) -> list[RankWork]:
    """One for each rank, in order; ranks that exchange heads do the same and are named once."""
    if layout.scheme == "ulysses":
        return [_ulysses_work(layout, pack)]
    if layout.scheme == "ring":
        stripes = [_stripe(pack, layout, rank) for rank in range(layout.num_ranks)]
        return [_ring_work(layout, stripes, rank) for rank in range(layout.num_ranks)]
    num_kv = max(pack.k.shape[1] // layout.ulysses_ranks, 1)
    keys = [tuple(x[:, j : j + 1].contiguous() for x in (pack.k, pack.v)) for j in range(num_kv)]
    return [_gather_work(layout, pack, keys, rank) for rank in range(layout.kv_ranks)]


def _attend(
    table: SegmentTable, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Pass, Pass]:
    """Forward and backward passes of one local attention."""
    found: dict[str, Tensor] = {}

    def forward() -> Tensor:
        found["out"], found["lse"] = attention_fwd(q, k, v, table)
        return found["out"]

    def backward() -> Tensor:
        return attention_bwd(dout, q, k, v, found["out"], found["lse"], table)[0]

    return forward, backward


def _relayout(layout: SequenceLayout, pack: Pack) -> Pass:
    """Of the heads' exchange: packing q, k and v, and putting the output's heads together."""
    tokens, ranks = layout.local_tokens, layout.ulysses_ranks
    q, k, v = (x[:tokens] for x in (pack.q, pack.k, pack.v))
    received_SNHK = pack.dout[:tokens].view(ranks, tokens, -1, pack.q.shape[2])

    def relayout() -> Tensor:
        pack_heads(q, k, v, ranks)
        return merge_heads(received_SNHK)

    return relayout


def _ulysses_work(layout: SequenceLayout, pack: Pack) -> RankWork:
    heads = slice(0, pack.q.shape[1] // layout.num_ranks)
    kv_heads = slice(0, max(pack.k.shape[1] // layout.num_ranks, 1))
    forward, backward = _attend(
        pack.table, pack.q[:, heads], pack.k[:, kv_heads], pack.v[:, kv_heads], pack.dout[:, heads]
    )
    pairs = layout.pairs(0) * heads.stop
    tokens = torch.arange(layout.padded_tokens)
    return RankWork(0, forward, backward, _relayout(layout, pack), pairs, tokens, heads)


def _gather_work(
    layout: SequenceLayout, pack: Pack, keys: list[tuple[Tensor, ...]], kv_rank: int
) -> RankWork:
    """A KV rank's chunks against the whole stream, a KV head at a time."""
    ranks = layout.ulysses_ranks
    plan = GatherPlan(layout, kv_rank, pack.q.device)
    first = kv_rank * ranks
    tokens = torch.tensor(
        [t for rank in range(first, first + ranks) for t in layout.shard_index(rank)]
    )
    num_heads = pack.q.shape[1] // ranks
    shared = num_heads // len(keys)
    index = tokens.to(pack.q.device)
    q, dout = (x.index_select(0, index)[:, :num_heads] for x in (pack.q, pack.dout))
    passes = []
    for head, (k, v) in enumerate(keys):
        queries = slice(head * shared, (head + 1) * shared)
        passes.append(_attend(plan.table, q[:, queries], k, v, dout[:, queries]))
    gathered = torch.stack((pack.k[:, 0], pack.v[:, 0]))
    gathered = gathered.view(2, layout.kv_ranks, -1, pack.k.shape[2]).transpose(0, 1)
    exchange = _relayout(layout, pack) if ranks > 1 else None

    def relayout() -> Tensor:
        if exchange is not None:
            exchange()
        for _ in keys:
            stream, _ = plan.to_stream(gathered)
        return stream

    def forward() -> Tensor:
        return torch.cat([run() for run, _ in passes], 1)

    def backward() -> Tensor:
        return torch.cat([run() for _, run in passes], 1)

    pairs = layout.pairs(kv_rank) * num_heads
    return RankWork(first, forward, backward, relayout, pairs, tokens, slice(0, num_heads))


def _stripe(pack: Pack, layout: SequenceLayout, rank: int) -> tuple[Tensor, ...]:
    """q, k, v and dout of a rank."""
    index = torch.tensor(layout.shard_index(rank), device=pack.q.device)
    return tuple(x.index_select(0, index) for x in (pack.q, pack.k, pack.v, pack.dout))


def _ring_work(layout: SequenceLayout, stripes: list[tuple[Tensor, ...]], rank: int) -> RankWork:
    """A stripe's queries against one stripe of keys after another, merged."""
    q, own_k, own_v, dout = stripes[rank]
    steps = RingPlan(layout, rank).steps(None)
    sources = [(rank - hop) % layout.num_ranks for hop in range(layout.num_ranks)]
    found: dict[str, Tensor] = {}

    def forward() -> Tensor:
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
        for source, step in zip(sources, steps, strict=True):
            _, keys, values, _ = stripes[source]
            part = attention_fwd(q, keys, values, step.table)
            out, lse = merge_attention(out, lse, *part)
        found["out"], found["lse"] = out.to(q.dtype), lse
        return found["out"]

    def backward() -> Tensor:
        total = torch.zeros_like(q, dtype=torch.float32)
        for source, step in zip(sources, steps, strict=True):
            _, keys, values, _ = stripes[source]
            total += attention_bwd(
                dout,
                q,
                keys,
                values,
                found["out"],
                found["lse"],
                step.table,
                grad_dtype=torch.float32,
            )[0]
        return total

    def relayout() -> Tensor:
        return torch.stack((own_k, own_v))

    tokens = torch.tensor(layout.shard_index(rank))
    starts = torch.tensor(layout.cu_seqlens)
    seen = tokens - starts[torch.bucketize(tokens, starts, right=True) - 1] + 1
    pairs = int(seen.sum()) * q.shape[1]
    return RankWork(rank, forward, backward, relayout, pairs, tokens, slice(0, q.shape[1]))
