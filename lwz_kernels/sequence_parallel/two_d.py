"""2D: heads are exchanged inside a node, keys and values are gathered across nodes.

A node's ranks together hold a shard of `gather_kv`; after the exchange each of them has the whole
shard with a part of the heads, and gathers these heads' keys and values from its peers.
"""

import torch.distributed as dist
from torch import Tensor

from lwz_kernels.sequence_parallel.gather_kv import GatherPlan, gather_kv_attention
from lwz_kernels.sequence_parallel.ulysses import gather_heads, scatter_heads

__all__ = ["two_d_attention"]


def two_d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: GatherPlan,
    ulysses_group: dist.ProcessGroup,
    kv_group: dist.ProcessGroup,
    *,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    need_lse: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a stream that lies on `ulysses_group` × `kv_group`.

    Args:
        q: [n, H, K]; the size U of `ulysses_group` divides H.
        k, v: [n, J, K]; U divides J, or J divides U.
        plan: of this rank in `kv_group`.
        ulysses_group: ranks that exchange heads, from `make_two_d_groups`.
        kv_group: ranks that exchange keys and values, from `make_two_d_groups`.
        softmax_scale, window_size, impl: as in `attention`.
        need_lse: also exchange lse, one more collective.

    Returns:
        out [n, H, K], and lse [H, n] fp32 (fp64 for fp64) or None; both differentiable.

    Raises:
        ValueError: heads that do not divide.
    """
    q_NHK, k_NJK, v_NJK = scatter_heads(q, k, v, ulysses_group)
    out_NHK, lse_HN = gather_kv_attention(
        q_NHK,
        k_NJK,
        v_NJK,
        plan,
        kv_group,
        softmax_scale=softmax_scale,
        window_size=window_size,
        impl=impl,
    )
    lse = gather_heads(lse_HN.t(), ulysses_group).t() if need_lse else None
    return gather_heads(out_NHK, ulysses_group), lse
