"""What running out of memory looks like: torch has one error for a GPU and another for a CPU."""

import torch

__all__ = ["is_out_of_memory", "release_cached_memory"]

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator's error has no class of its own.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


def release_cached_memory(device: torch.device) -> None:
    """Gives freed blocks back, so that the next allocation may have another size.

    To be called outside the handler of the error, whose traceback holds the failed pass's tensors.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
