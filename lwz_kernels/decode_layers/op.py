"""The torch.library operator of the decoder layers: schema, implementation, fake.

Inference only: there is no backward. `impl` is already decided here.
"""

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.decode_layers import reference

__all__ = ["decode_layers_op"]

torch.library.define(
    "lwz::decode_layers",
    "(Tensor x, Tensor?[] weights, Tensor(a!) k_caches, Tensor(b!) v_caches, Tensor cos, "
    "Tensor sin, Tensor page_table, Tensor context_lens, Tensor slot_mapping, int num_heads, "
    "float norm_eps, float softmax_scale, str impl) -> Tensor",
)
decode_layers_op = torch.ops.lwz.decode_layers.default


@torch.library.impl("lwz::decode_layers", "default")
def _decode_layers(
    x: Tensor,
    weights: list[Tensor | None],
    k_caches: Tensor,
    v_caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    norm_eps: float,
    softmax_scale: float,
    impl: str,
) -> Tensor:
    each = len(weights) // max(1, k_caches.shape[0])
    layers = [weights[i : i + each] for i in range(0, len(weights), each)]
    run = native.decode_layers if impl == "native" else reference.decode_layers
    return run(
        x,
        layers,
        k_caches,
        v_caches,
        cos,
        sin,
        page_table,
        context_lens,
        slot_mapping,
        num_heads=num_heads,
        norm_eps=norm_eps,
        softmax_scale=softmax_scale,
    )


@torch.library.register_fake("lwz::decode_layers")
def _decode_layers_fake(
    x: Tensor,
    weights: list[Tensor | None],
    k_caches: Tensor,
    v_caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    norm_eps: float,
    softmax_scale: float,
    impl: str,
) -> Tensor:
    del weights, k_caches, v_caches, cos, sin, page_table, context_lens, slot_mapping
    del num_heads, norm_eps, softmax_scale, impl
    return torch.empty_like(x)
