"""What every loss-head operator demands of its tensors, with one-line errors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from lwz_kernels.dtypes import wide_dtype

__all__ = [
    "check_head",
    "check_labels",
    "check_softcap",
    "expand_temperature",
    "head_parameters",
    "whole_weight",
    "without_autocast",
]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_bytes: int | None
) -> None:
    """Shapes, dtypes and devices of hidden [T, D], weight [V, D], labels [T] and bias [V]."""
    if isinstance(hidden, DTensor):
        raise TypeError("hidden is a DTensor: pass hidden.to_local() or hidden.full_tensor()")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {[*hidden.shape]} and {[*weight.shape]}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: expected [V, D] with V > 0")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one")
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{hidden.shape[0]}], got {labels.dtype} {[*labels.shape]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {[*bias.shape]}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")


def check_labels(labels: Tensor, counts: Tensor, vocab_size: int) -> None:
    """Labels of rows that count lie in [0, V). Read on a CPU; asserted on the device on CUDA."""
    is_wrong = counts & ((labels < 0) | (labels >= vocab_size))
    if labels.is_cuda:
        torch._assert_async(~is_wrong.any())
    elif bool(is_wrong.any()):
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index, "
            f"got {int(labels[is_wrong][0])}"
        )


def check_softcap(softcap: float | None) -> None:
    """None, or a bound that logits can approach."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def expand_temperature(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """Temperature of each row, [T] in the accumulation type of `rows` [T, ...].

    A tensor is read on a CPU, and asserted on the device on CUDA.
    """
    wide = wide_dtype(rows.dtype)
    if isinstance(temperature, Tensor):
        if temperature.shape not in (torch.Size([]), rows.shape[:1]):
            raise ValueError(
                f"temperature must be a scalar or [{rows.shape[0]}], got {[*temperature.shape]}"
            )
        value = temperature.detach().to(device=rows.device, dtype=wide)
        if value.is_cuda:
            torch._assert_async((value > 0).all())
        elif not torch.compiler.is_compiling() and not bool((value > 0).all()):
            raise ValueError(
                f"temperature must be positive, got {float(value[~(value > 0)].flatten()[0])}"
            )
    else:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        value = torch.full((), temperature, dtype=wide, device=rows.device)
    return value.expand(rows.shape[0]).contiguous()


def whole_weight(weight: Tensor) -> Tensor:
    """The head weight as one dense local tensor; a sharded DTensor is gathered once.

    Its gradient is the sum over the ranks of its mesh, each with rows of its own.

    Raises:
        ValueError: the weight is a DeepSpeed ZeRO-3 placeholder.
    """
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            "weight is partitioned by DeepSpeed ZeRO-3 and empty here: call this inside "
            "deepspeed.zero.GatheredParameters([weight])"
        )
    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return weight


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Inside, products keep the types of their operands, whatever the caller's autocast says."""
    return torch.autocast(tensor.device.type, enabled=False)


def head_parameters(lm_head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias of an output layer, refusing layers that compute something else.

    Raises:
        TypeError: the layer is no plain linear layer: adapters (LoRA) or quantised weights would
            be ignored without a word.
    """
    base: Any = lm_head
    if hasattr(lm_head, "lora_A") or hasattr(lm_head, "base_layer"):
        raise TypeError(
            f"the head is a {type(lm_head).__name__} with an adapter, whose weight alone is not "
            "what it computes: merge the adapter, leave the head out of it (or list it in "
            "modules_to_save), or pass weight + scale * (B @ A) yourself: it carries gradients "
            "to A and B"
        )
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"the head is a {type(lm_head).__name__}: expected a linear layer with a "
            "floating-point weight [V, D]"
        )
    return weight, getattr(base, "bias", None)
