"""The `[model]` section of a run's configuration: which weights, and how they are computed."""

from dataclasses import dataclass
from typing import Literal

from lwz_trainer.errors import UserError

__all__ = ["ModelSection"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model is trained, and how its forward pass is computed.

    Attributes:
        path: "smollm2-135m-instruct" (the model that comes with the demo's packages), a local
            directory in Hugging Face layout, a `.gguf` file, or a hub id such as "org/name".
        dtype: type of the weights and activations. "auto" is bf16 on a GPU and on a CPU with
            bf16 matrix instructions, fp32 elsewhere.
        checkpoint_layers: keep only each layer's input for the backward pass and compute the rest
            again; about a third more arithmetic for memory that no longer grows with depth.
        offload_layers: let these inputs wait in host memory, pinned on a GPU's machine.
        mlp_tile_tokens: tokens whose feed-forward values exist at a time, for very long sequences;
            each tile is computed again for the backward pass. 0 takes all tokens at once.
        attention: the implementation used in the update. "auto" takes the first of
            these that runs here.
    """

    path: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_layers: bool = True
    offload_layers: bool = False
    mlp_tile_tokens: int = 0
    attention: Literal[
        "auto",
        "flash_attn_3",
        "flash_attn_4",
        "flash_attn_2",
        "varlen",
        "triton",
        "native",
        "sdpa",
        "torch",
        "reference",
    ] = "auto"

    def __post_init__(self) -> None:
        if self.offload_layers and not self.checkpoint_layers:
            raise UserError(
                "model.offload_layers parks what model.checkpoint_layers keeps: set that too"
            )
        if self.mlp_tile_tokens < 0:
            raise UserError(f"model.mlp_tile_tokens must be at least 0, got {self.mlp_tile_tokens}")
