"""The `[model]` section of a run's configuration: which weights, and how they are computed."""

from dataclasses import dataclass
from typing import Literal

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
        attention: the implementation used in the update. "auto" takes the first of
            these that runs here.
    """

    path: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_layers: bool = True
    attention: Literal[
        "auto",
        "flash_attn_3",
        "flash_attn_4",
        "flash_attn_2",
        "varlen",
        "triton",
        "sdpa",
        "torch",
        "reference",
    ] = "auto"
