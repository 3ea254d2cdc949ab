"""One object per micro-batch that runs the attention of its layout and counts that it did."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.attention import SegmentTable
from lwz_kernels.sequence_parallel.gather_kv import GatherPlan, gather_kv_attention
from lwz_kernels.sequence_parallel.layout import SequenceLayout
from lwz_kernels.sequence_parallel.ring import RingPlan, ring_attention
from lwz_kernels.sequence_parallel.two_d import two_d_attention
from lwz_kernels.sequence_parallel.ulysses import ulysses_attention

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """Attention of one pack whose tokens are spread over process groups.

    Holds the plan, made once and shared by all layers, and nothing about a model: head counts are
    read from the tensors, so that policy and reference model may share it.

    Args:
        layout: from `make_layout`, equal on all ranks.
        device: where q, k and v are.
        ulysses_group: `layout.ulysses_ranks` ranks that exchange heads (`ulysses`, `two_d`).
        kv_group: `layout.kv_ranks` ranks that exchange keys and values (`gather_kv`, `ring`,
            `two_d`).

    Raises:
        ValueError: a group is missing, not used by the scheme, or of another size.

    Example:
        layout = make_layout([3000, 500], num_ranks=4)
        parallel = SequenceParallel(layout, q.device, ulysses_group=groups[4])
        out, _ = parallel.attention(q, k, v)  # [n, H, K], in every layer
        parallel.check_calls(num_layers)
    """

    def __init__(
        self,
        layout: SequenceLayout,
        device: torch.device | str,
        *,
        ulysses_group: dist.ProcessGroup | None = None,
        kv_group: dist.ProcessGroup | None = None,
    ) -> None:
        uses_ulysses = layout.scheme in ("ulysses", "two_d")
        uses_kv = layout.scheme in ("gather_kv", "ring", "two_d")
        ulysses_rank = _rank("ulysses_group", layout, ulysses_group, uses_ulysses)
        kv_rank = _rank("kv_group", layout, kv_group, uses_kv)
        self.layout = layout
        self.rank = kv_rank * layout.ulysses_ranks + ulysses_rank
        self.calls = 0
        self._ulysses_group, self._kv_group = ulysses_group, kv_group
        self._plan: SegmentTable | GatherPlan | RingPlan
        if layout.scheme == "ulysses":
            self._plan = SegmentTable.from_cu_seqlens(layout.cu_seqlens)
        elif layout.scheme == "ring":
            self._plan = RingPlan(layout, kv_rank)
        else:
            self._plan = GatherPlan(layout, kv_rank, torch.device(device))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None = None,
        window_size: int | None = None,
        need_lse: bool = False,
        impl: str = "auto",
    ) -> tuple[Tensor, Tensor | None]:
        """Causal attention within documents; a collective that all ranks of the layout call.

        Args:
            q: [n, H, K], the tokens of `layout.shard_index(rank)`, rotated by their positions.
            k: [n, J, K], dtype of q; J divides H.
            v: [n, J, K], dtype of q.
            softmax_scale: None means 1 / sqrt(K).
            window_size: number of keys that a query sees at most; None for all.
            need_lse: return lse; under `ulysses` and `two_d` it costs one more collective.
            impl: of the local attention, as in `attention`.

        Returns:
            out [n, H, K], dtype of q, and lse [H, n] fp32 (fp64 for fp64) or None. Both are
            differentiable.

        Numerics: partial results are merged, and dk and dv summed over ranks, in fp32 (fp64 for
            fp64).

        Raises:
            ValueError: not this rank's number of tokens, or heads that the scheme cannot split.
        """
        if q.shape[0] != self.layout.local_tokens:
            raise ValueError(
                f"expected the {self.layout.local_tokens} tokens of this rank's shard, "
                f"got q {[*q.shape]}; shard with shard_tokens and the same layout"
            )
        options = {"softmax_scale": softmax_scale, "window_size": window_size, "impl": impl}
        out, lse = self._run(q, k, v, need_lse, options)
        self.calls += 1
        return out, lse if need_lse else None

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, need_lse: bool, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        plan, ulysses, kv = self._plan, self._ulysses_group, self._kv_group
        if isinstance(plan, SegmentTable):
            assert ulysses is not None, "checked when this object was made"
            return ulysses_attention(q, k, v, plan, ulysses, need_lse=need_lse, **options)
        assert kv is not None, "checked when this object was made"
        if isinstance(plan, RingPlan):
            return ring_attention(q, k, v, plan, kv, **options)
        if ulysses is None:
            return gather_kv_attention(q, k, v, plan, kv, **options)
        return two_d_attention(q, k, v, plan, ulysses, kv, need_lse=need_lse, **options)

    def check_calls(self, expected: int) -> None:
        """Raises if `attention` did not run `expected` times since the last check.

        A model that quietly keeps its own attention sees only its shard and still trains. Call
        this between forward and backward: recomputed activations count again.

        Raises:
            RuntimeError: another number of calls.
        """
        calls, self.calls = self.calls, 0
        if calls != expected:
            raise RuntimeError(
                f"sequence-parallel attention ran {calls} times, expected {expected}: part of the "
                "model attends within its shard only; register the attention for every layer"
            )


def _rank(name: str, layout: SequenceLayout, group: dist.ProcessGroup | None, is_used: bool) -> int:
    """Rank in a group that must be there exactly if the scheme uses it."""
    if group is None or not is_used:
        if is_used or group is not None:
            raise ValueError(
                f"scheme {layout.scheme!r} {'needs' if is_used else 'does not use'} {name}"
            )
        return 0
    expected = layout.ulysses_ranks if name == "ulysses_group" else layout.kv_ranks
    if dist.get_world_size(group) != expected:
        raise ValueError(
            f"{name}: the layout is for {expected} ranks, got {dist.get_world_size(group)}"
        )
    return dist.get_rank(group)
