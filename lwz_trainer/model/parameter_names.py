"""Where each tensor of a Hugging Face checkpoint lives inside the decoder's fused parameters.

Loading copies into these rows and export copies out of them, so the two cannot disagree.
"""

from dataclasses import dataclass

from lwz_trainer.model.architecture import ModelConfig

__all__ = ["CheckpointSlice", "checkpoint_slices"]


@dataclass(frozen=True)
class CheckpointSlice:
    """Rows `start` to `stop` of `parameter` hold the checkpoint's tensor `name`.

    `parameter` is a name of `Decoder.named_parameters()`.
    """

    name: str
    parameter: str
    start: int
    stop: int


def checkpoint_slices(
    config: ModelConfig, *, names_tied_head: bool = False
) -> list[CheckpointSlice]:
    """All tensors of the checkpoint, in the order in which the model uses them.

    Args:
        config: of the model.
        names_tied_head: a tied head is `lm_head.weight` too, for a program that copies it; else
            tied models have no such tensor.
    """
    slices = [CheckpointSlice("model.embed_tokens.weight", "embed", 0, config.vocab_size)]
    for index in range(config.layers):
        slices += _layer_slices(config, f"model.layers.{index}", f"layers.{index}")
    slices.append(CheckpointSlice("model.norm.weight", "final_norm", 0, config.hidden))
    if not config.tie_embeddings:
        slices.append(CheckpointSlice("lm_head.weight", "lm_head", 0, config.vocab_size))
    elif names_tied_head:
        slices.append(CheckpointSlice("lm_head.weight", "embed", 0, config.vocab_size))
    return slices


def _layer_slices(config: ModelConfig, theirs: str, ours: str) -> list[CheckpointSlice]:
    q_rows = config.heads * config.head_dim
    kv_rows = config.kv_heads * config.head_dim
    qkv_rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}

    def fused(parent: str, kind: str, rows: dict[str, int], parameter: str) -> None:
        start = 0
        for name, num_rows in rows.items():
            full_name = f"{theirs}.{parent}.{name}.{kind}"
            slices.append(
                CheckpointSlice(full_name, f"{ours}.{parameter}", start, start + num_rows)
            )
            start += num_rows

    def whole(name: str, rows: int, parameter: str) -> None:
        slices.append(CheckpointSlice(f"{theirs}.{name}.weight", f"{ours}.{parameter}", 0, rows))

    slices: list[CheckpointSlice] = []
    whole("input_layernorm", config.hidden, "attn_norm")
    fused("self_attn", "weight", qkv_rows, "qkv_proj")
    if config.qkv_bias:
        fused("self_attn", "bias", qkv_rows, "qkv_bias")
    if config.qk_norm:
        whole("self_attn.q_norm", config.head_dim, "q_norm")
        whole("self_attn.k_norm", config.head_dim, "k_norm")
    whole("self_attn.o_proj", config.hidden, "o_proj")
    whole("post_attention_layernorm", config.hidden, "mlp_norm")
    fused("mlp", "weight", {"gate_proj": config.ff, "up_proj": config.ff}, "gate_up_proj")
    whole("mlp.down_proj", config.hidden, "down_proj")
    return slices
