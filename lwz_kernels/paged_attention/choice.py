"""Which implementation of paged attention runs, and why another cannot.

Decided inside the operators, so that `torch.compile` has nothing to trace here.
"""

import torch

from lwz_kernels import native
from lwz_kernels.dispatch import log_choice_once

__all__ = ["choose"]

IMPLS = ("auto", "triton", "native", "torch")
TRITON_MAX_HEAD_SIZE = 256
# One tile holds the query heads of a KV head; exact fp32 products take registers.
TRITON_MAX_GROUP = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
TRITON_MIN_CAPABILITY = (8, 0)


def choose(op: str, impl: str, x: torch.Tensor, group: int = 1) -> str:
    """The implementation for queries or keys x [*, heads, K], with `group` heads per KV head.

    Raises where one that was asked for by name cannot run.
    """
    if impl not in IMPLS:
        expected = f"{', '.join(IMPLS)} or reference"
        raise ValueError(f"{op}: unknown impl {impl!r}, expected {expected}")
    if impl == "torch":
        return impl
    fast = ("native" if x.device.type == "cpu" else "triton") if impl == "auto" else impl
    obstacle = _native_obstacle(x) if fast == "native" else _triton_obstacle(x, group)
    if obstacle:
        if impl != "auto":
            raise NotImplementedError(f"{op}: impl={impl!r} {obstacle}; use impl='torch' or 'auto'")
        log_choice_once(op, "torch", f"{fast} {obstacle}")
        return "torch"
    if fast == "native" and not native.is_available():
        if impl != "auto":
            raise RuntimeError(
                f"{op}: impl='native' is not available: {native.unavailable_reason()}"
            )
        log_choice_once(op, "torch", native.unavailable_reason())
        return "torch"
    if impl == "auto":
        level = f", {native.best_level()}" if fast == "native" else ""
        log_choice_once(op, fast, f"{x.device.type} tensors{level}")
    return fast


def _native_obstacle(x: torch.Tensor) -> str:
    """Why the native library has no kernel; empty if it has one."""
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device.type}"
    if x.dtype not in native.DTYPE_CODES:
        return f"needs bfloat16 or float32, got {x.dtype}"
    if not native.supports_head_size(x.shape[2]):
        return (
            f"needs a head size that is a multiple of {native.HEAD_SIZE_STEP} up to "
            f"{native.MAX_HEAD_SIZE}, got {x.shape[2]}"
        )
    return ""


def _triton_obstacle(x: torch.Tensor, group: int) -> str:
    """Why the Triton kernels cannot run; empty if they can."""
    if not x.is_cuda:
        return f"needs CUDA tensors, got {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < TRITON_MIN_CAPABILITY:
        return f"needs sm_80 or later, got {torch.cuda.get_device_name(x.device)}"
    if x.shape[2] > TRITON_MAX_HEAD_SIZE:
        return f"needs a head size up to {TRITON_MAX_HEAD_SIZE}, got {x.shape[2]}"
    if group > TRITON_MAX_GROUP[x.dtype]:
        limit = TRITON_MAX_GROUP[x.dtype]
        return f"takes up to {limit} query heads for each KV head in {x.dtype}, got {group}"
    return ""
