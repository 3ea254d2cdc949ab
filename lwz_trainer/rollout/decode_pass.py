"""The forward pass of a decode step: the decoder itself, or all of its layers in one native call.

On a CPU the layers of a small model take less time than the operator calls of Python that make them
up, so there, where the native kernels are the fast ones, one call runs them all: the same
operations, rounded at the same places.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lwz_kernels.decode_layers import DecodeLayer, can_run_native, decode_layers
from lwz_trainer.model.decoder import Decoder, DecoderLayer
from lwz_trainer.model.linear import embedding, is_fast_for_few_rows
from lwz_trainer.model.rotary import rotary_tables
from lwz_trainer.rollout.attend import DecodeAttend

__all__ = ["decode_pass"]


def decode_pass(
    model: Decoder, input_ids: Tensor, position_ids: Tensor, attend: DecodeAttend
) -> Tensor:
    """Hidden states [B, D] after the final norm of one new token of each sequence.

    Args:
        model: its parameters are read where they are.
        input_ids, position_ids: [B] int64.
        attend: where the caches are; the new keys and values are written.
    """
    if not _runs_native(model):
        return model(input_ids, position_ids, attend)
    config = model.config
    x_BD = embedding(input_ids, model.embed)
    cos_B1K, sin_B1K = rotary_tables(
        position_ids, model.inv_freq, model.attention_factor, x_BD.dtype
    )
    x_BD = decode_layers(
        x_BD,
        [_weights(layer) for layer in model.layers],
        attend.cache.keys,
        attend.cache.values,
        cos_B1K.squeeze(1),
        sin_B1K.squeeze(1),
        attend.page_table_BP,
        attend.context_lens_B,
        attend.slots_B,
        num_heads=config.heads,
        norm_eps=config.rms_eps,
    )
    return F.rms_norm(x_BD, (config.hidden,), model.final_norm, config.rms_eps)


def _runs_native(model: Decoder) -> bool:
    config, weight = model.config, model.embed
    return is_fast_for_few_rows(weight.dtype) and can_run_native(
        weight.device,
        weight.dtype,
        hidden=config.hidden,
        ff=config.ff,
        head_size=config.head_dim,
    )


def _weights(layer: nn.Module) -> DecodeLayer:
    assert isinstance(layer, DecoderLayer)
    return DecodeLayer(
        attn_norm=layer.attn_norm,
        qkv_proj=layer.qkv_proj,
        o_proj=layer.o_proj,
        mlp_norm=layer.mlp_norm,
        gate_up_proj=layer.gate_up_proj,
        down_proj=layer.down_proj,
        qkv_bias=layer.qkv_bias,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
    )
