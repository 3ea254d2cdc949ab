"""Ring attention over striped shards: keys and values travel, P - 1 hops forward.

For sequences of which one KV head does not fit a rank. Every step is causal attention of this
rank's stripe to another's, of nearly equal work for any packing (arXiv:2310.01889 for the ring,
arXiv:2311.09431 for stripes). Partial results are merged in fp32 (fp64 for fp64); natural log.
In backward each step uses the merged lse and out, so its shares of dq, dk, dv only add up; dk and
dv travel behind their keys, in fp32. Every rank takes part in every hop, whatever it sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.attention import (
    SegmentTable,
    attention_bwd,
    attention_fwd,
)
from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.sequence_parallel.communication import (
    PendingTensor,
    start_ring_shift,
)
from lwz_kernels.sequence_parallel.layout import SequenceLayout

__all__ = ["RingPlan", "merge_attention", "ring_attention"]


@dataclass(frozen=True)
class RingStep:
    """One hop: whose keys are here, what this rank's queries see of them, in which window."""

    table: SegmentTable
    window_size: int | None

    @property
    def is_empty(self) -> bool:
        return not self.table.segments or (self.window_size is not None and self.window_size < 1)


class RingPlan:
    """What one rank needs at every layer: the segments of each hop.

    Args:
        layout: of scheme `ring`.
        rank: in the ring.
    """

    def __init__(self, layout: SequenceLayout, rank: int) -> None:
        tokens = layout.local_tokens
        self._layout, self._rank = layout, rank
        self._sources = [(rank - hop) % layout.num_ranks for hop in range(layout.num_ranks)]
        self._tables = [
            SegmentTable(layout.ring_segments(rank, source), tokens, tokens)
            for source in self._sources
        ]

    def steps(self, window_size: int | None) -> list[RingStep]:
        """The hops in order, the rank's own keys first."""
        return [
            RingStep(
                table,
                None
                if window_size is None
                else self._layout.ring_window(self._rank, source, window_size),
            )
            for source, table in zip(self._sources, self._tables, strict=True)
        ]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    group: dist.ProcessGroup,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of a stream whose stripes lie on the ranks of `group`.

    Args:
        q: [n, H, K].
        k, v: [n, J, K]; J divides H.
        plan: of this rank in `group`.
        group: P ranks.
        softmax_scale, window_size, impl: as in `attention`.

    Returns:
        out [n, H, K] and lse [H, n] fp32 (fp64 for fp64); both differentiable.
    """
    if window_size is not None and window_size < 1:
        raise ValueError(f"expected window_size >= 1, or None for all keys, got {window_size}")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return _Ring.apply(q, k, v, plan.steps(window_size), group, scale, impl)


def merge_attention(
    out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both: out − σ(lse_part − lse) · (out − out_part).

    Args:
        out, out_part: [n, H, K]; `out` in fp32 or fp64, overwritten.
        lse, lse_part: [H, n] fp32 or fp64; −inf where nothing was seen.

    Returns:
        out and lse of both.
    """
    weight_HN = torch.sigmoid(lse_part - lse)
    # Where neither saw a key, −inf − −inf is no number.
    weight_HN = weight_HN.masked_fill(lse_part == float("-inf"), 0.0)
    out -= weight_HN.t().unsqueeze(-1) * (out - out_part)
    return out, torch.logaddexp(lse, lse_part)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        steps: list[RingStep],
        group: dist.ProcessGroup,
        scale: float,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(q.dtype)
        out_NHK = q.new_zeros(q.shape, dtype=wide)
        lse_HN = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide)
        kv_2NJK = torch.stack((k, v))
        for hop, step in enumerate(steps):
            pending = start_ring_shift(kv_2NJK, group) if hop + 1 < len(steps) else None
            if not step.is_empty:
                out_part, lse_part = attention_fwd(
                    q,
                    kv_2NJK[0],
                    kv_2NJK[1],
                    step.table,
                    softmax_scale=scale,
                    window_size=step.window_size,
                    impl=impl,
                )
                out_NHK, lse_HN = merge_attention(out_NHK, lse_HN, out_part, lse_part)
            if pending is not None:
                kv_2NJK = pending.wait()
        out = out_NHK.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_HN)
        ctx.steps, ctx.group, ctx.scale, ctx.impl = steps, group, scale, impl
        return out, lse_HN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HN = ctx.saved_tensors
        wide = wide_dtype(q.dtype)
        dq_NHK = q.new_zeros(q.shape, dtype=wide)
        kv_2NJK = torch.stack((k, v))
        travelling: PendingTensor | None = None
        for hop, step in enumerate(ctx.steps):
            pending = start_ring_shift(kv_2NJK, ctx.group) if hop + 1 < len(ctx.steps) else None
            dkv_2NJK = kv_2NJK.new_zeros(kv_2NJK.shape, dtype=wide)
            if not step.is_empty:
                dq_part, dkv_2NJK[0], dkv_2NJK[1] = attention_bwd(
                    dout,
                    q,
                    kv_2NJK[0],
                    kv_2NJK[1],
                    out,
                    lse_HN,
                    step.table,
                    dlse=dlse,
                    softmax_scale=ctx.scale,
                    window_size=step.window_size,
                    impl=ctx.impl,
                    grad_dtype=wide,
                )
                dq_NHK += dq_part
            if travelling is not None:
                dkv_2NJK += travelling.wait()
            # After the last hop this brings each gradient home.
            travelling = start_ring_shift(dkv_2NJK, ctx.group)
            if pending is not None:
                kv_2NJK = pending.wait()
        assert travelling is not None, "a ring has at least one hop"
        dk, dv = travelling.wait().to(q.dtype)
        return dq_NHK.to(q.dtype), dk, dv, *(None,) * 4
