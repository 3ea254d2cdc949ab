"""The Llama-family decoder, written out for a flat row of tokens.

One forward pass serves the packed update, the prefill and the paged decode: it sees [T] tokens and
their positions, and asks `attend` for everything that mixes tokens. What those T tokens are (packed
sequences, one prompt, one token each of many sequences) is known to `attend` alone.

Projections that read the same input are one parameter: fewer, larger matrix products, and fewer
operator calls per decoded token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lwz_trainer.model.architecture import ModelConfig, YarnScaling
from lwz_trainer.model.elementwise import rms_norm, silu_gate
from lwz_trainer.model.linear import embedding, linear
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.model.rotary import inverse_frequencies, rotary_tables, rotate
from lwz_trainer.model.tiling import tiled_rows

__all__ = ["Attend", "Decoder", "DecoderLayer"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q [T, H, K], k [T, J, K], v [T, J, K]) -> [T, H, K].

q and k are already rotated. k and v may be strided views of one buffer; the scale K**-0.5 and
the causal mask are the callable's business.
"""


class DecoderLayer(nn.Module):
    """Attention and gated feed-forward, each behind an RMSNorm and added to the residual stream.

    Parameters are uninitialised until a loader fills them.
    """

    def __init__(
        self, index: int, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.index = index
        self.config = config
        qkv_rows = (config.heads + 2 * config.kv_heads) * config.head_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.attn_norm = parameter(config.hidden)
        self.qkv_proj = parameter(qkv_rows, config.hidden)
        self.qkv_bias = parameter(qkv_rows) if config.qkv_bias else None
        self.q_norm = parameter(config.head_dim) if config.qk_norm else None
        self.k_norm = parameter(config.head_dim) if config.qk_norm else None
        self.o_proj = parameter(config.hidden, config.heads * config.head_dim)
        self.mlp_norm = parameter(config.hidden)
        self.gate_up_proj = parameter(2 * config.ff, config.hidden)
        self.down_proj = parameter(config.hidden, config.ff)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, mlp_tile_tokens: int = 0
    ) -> Tensor:
        """Attention and feed-forward.

        Args:
            x: [T, D].
            cos, sin: [T, 1, K] of `rotary_tables`.
            attend: mixes tokens.
            mlp_tile_tokens: tokens whose [2F] intermediate values exist at a time; 0 for all.

        Returns:
            [T, D].
        """
        normed_TD = rms_norm(x, self.attn_norm, self.config.rms_eps)
        x = x + linear(self._attention(normed_TD, cos, sin, attend), self.o_proj)
        weights = (self.mlp_norm, self.gate_up_proj, self.down_proj)
        if mlp_tile_tokens:
            return tiled_rows(self._add_mlp, x, weights, tile_rows=mlp_tile_tokens)
        return self._add_mlp(x, *weights)

    def _add_mlp(self, x: Tensor, norm: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        """x and the gated feed-forward of it, [rows, D]."""
        normed_TD = rms_norm(x, norm, self.config.rms_eps)
        return x + linear(silu_gate(linear(normed_TD, gate_up_proj)), down_proj)

    def _attention(self, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads, kv_heads, head_dim = self.config.heads, self.config.kv_heads, self.config.head_dim
        num_tokens = normed.shape[0]
        qkv = linear(normed, self.qkv_proj, self.qkv_bias)
        qkv = qkv.view(num_tokens, heads + 2 * kv_heads, head_dim)
        # Queries and keys are neighbours in the fused output, so both are rotated in one go.
        qk, v_TJK = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk_weight = torch.cat((self.q_norm.expand(heads, -1), self.k_norm.expand(kv_heads, -1)))
            qk = F.rms_norm(qk, (head_dim,), eps=self.config.rms_eps) * qk_weight
        qk = rotate(qk, cos, sin)
        out_THK = attend(self.index, qk[:, :heads], qk[:, heads:], v_TJK)
        return out_THK.reshape(num_tokens, heads * head_dim)


class Decoder(nn.Module):
    """Embedding, decoder layers and final norm; the head is applied by whoever needs logits.

    Parameters are uninitialised until a loader fills them: see `loading.load_pretrained`.

    Args:
        config: sizes and switches.
        device: of the parameters.
        dtype: of the parameters and activations. Norm statistics and rotary angles are fp32 (or
            wider) whatever the type.
    """

    inv_freq: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        device = torch.device(device)
        embed_shape = (config.vocab_size, config.hidden)
        self.embed = nn.Parameter(torch.empty(embed_shape, device=device, dtype=dtype))
        self.layers = nn.ModuleList(
            DecoderLayer(index, config, device=device, dtype=dtype)
            for index in range(config.layers)
        )
        self.final_norm = nn.Parameter(torch.empty(config.hidden, device=device, dtype=dtype))
        self.lm_head = (
            None
            if config.tie_embeddings
            else nn.Parameter(torch.empty(embed_shape, device=device, dtype=dtype))
        )
        self.register_buffer("inv_freq", inverse_frequencies(config).to(device), persistent=False)
        scaling = config.rope_scaling
        self.attention_factor = (
            scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
        )

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the embedding itself where the two are tied."""
        return self.embed if self.lm_head is None else self.lm_head

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        # `.to(dtype)` reaches here. Rounded frequencies would move every angle, so the buffer
        # follows the device of the parameters but never their type.
        super()._apply(fn, recurse)
        self.inv_freq = inverse_frequencies(self.config).to(self.embed.device)
        return self

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        *,
        checkpoint_layers: bool = False,
        offload: HostOffload | None = None,
        mlp_tile_tokens: int = 0,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: [T] int.
            position_ids: [T] int, each token's position in its own sequence.
            attend: mixes tokens; called once per layer (again in the backward pass with
                `checkpoint_layers`).
            checkpoint_layers: keep only the input of each layer for the backward pass.
            offload: where these inputs wait; None: on the device.
            mlp_tile_tokens: as in `DecoderLayer`.

        Returns:
            [T, D] of the parameters' type.
        """
        x_TD = embedding(input_ids, self.embed)
        cos, sin = rotary_tables(position_ids, self.inv_freq, self.attention_factor, x_TD.dtype)
        if checkpoint_layers and torch.is_grad_enabled():
            with nullcontext() if offload is None else offload.layer_inputs():
                for layer in self.layers:
                    # The layer's input is the only tensor argument, so the only one to be parked.
                    run = partial(
                        layer, cos=cos, sin=sin, attend=attend, mlp_tile_tokens=mlp_tile_tokens
                    )
                    # The decoder draws no random numbers: no generator state needs to be kept.
                    x_TD = checkpoint(run, x_TD, use_reentrant=False, preserve_rng_state=False)
        else:
            for layer in self.layers:
                x_TD = layer(x_TD, cos, sin, attend, mlp_tile_tokens)
        return rms_norm(x_TD, self.final_norm, self.config.rms_eps)
