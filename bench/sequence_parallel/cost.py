"""A MODEL, nothing measured: bytes that a scheme sends per rank and layer, and the links' time.

The formulas are those of docs/ops/sequence_parallel.md. Nothing overlaps here, so times are upper
estimates; `Links` are nominal speeds times an assumed efficiency, and the benchmark reports half
and twice of them beside.
"""

from dataclasses import dataclass

from lwz_kernels.sequence_parallel import SequenceLayout

__all__ = ["Heads", "Links", "Traffic", "exchange_ms", "traffic_of"]

FP32_BYTES = 4


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads of one layer."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one layer: in head exchanges, and of keys and values."""

    heads_forward: float
    heads_backward: float
    kv_forward: float
    kv_backward: float


@dataclass(frozen=True)
class Links:
    """Speed in one direction per GPU, units of 1e9 bytes a second."""

    node_gb_per_s: float
    network_gb_per_s: float
    ranks_per_node: int


def traffic_of(layout: SequenceLayout, heads: Heads, item_bytes: int) -> Traffic:
    """The formulas; U ranks exchange heads, G = P / U exchange keys and values."""
    tokens, ranks, groups = layout.local_tokens, layout.ulysses_ranks, layout.kv_ranks
    spread = 2 * heads.query + 2 * max(heads.kv, ranks)
    exchanged = (ranks - 1) / ranks * tokens * heads.size * item_bytes * spread
    # A KV rank's tokens are those of its U ranks, each of which has 1 / U of the heads.
    own_kv = tokens * ranks * 2 * max(heads.kv / ranks, 1) * heads.size
    forward = (groups - 1) * own_kv * item_bytes
    gradients = (groups - 1) * own_kv * FP32_BYTES
    if layout.scheme == "ring":  # gradients make one hop more, home
        gradients = groups * own_kv * FP32_BYTES
    if groups == 1:
        forward = gradients = 0.0
    return Traffic(exchanged, exchanged, forward, forward + gradients)


def exchange_ms(
    layout: SequenceLayout, traffic: Traffic, links: Links, *, speed: float = 1.0
) -> tuple[float, float]:
    """(forward, backward) of one layer. `speed` multiplies both links.

    Heads go to U - 1 peers alike: those on other nodes are reached by the network. Keys and values
    pass a ring, which is as slow as its slowest link.
    """
    ranks = layout.ulysses_ranks
    near = min(ranks, links.ranks_per_node) - 1
    share_near = near / (ranks - 1) if ranks > 1 else 0.0
    node, network = (speed * gb * 1e6 for gb in (links.node_gb_per_s, links.network_gb_per_s))
    ring = node if layout.num_ranks <= links.ranks_per_node else network

    def ms(heads_bytes: float, kv_bytes: float) -> float:
        near_ms, far_ms = heads_bytes * share_near / node, heads_bytes * (1 - share_near) / network
        return max(near_ms, far_ms) + kv_bytes / ring

    return (
        ms(traffic.heads_forward, traffic.kv_forward),
        ms(traffic.heads_backward, traffic.kv_backward),
    )
