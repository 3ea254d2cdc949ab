"""What every operator's `impl="auto"` shares: saying once which implementation was chosen."""

import functools
import logging

import torch

__all__ = ["log_choice_once"]


def log_choice_once(op: str, impl: str, reason: str) -> None:
    """Logs at INFO level that `op` runs as `impl` because of `reason`, once per such triple."""
    if not torch.compiler.is_compiling():
        _log(op, impl, reason)


@functools.cache
def _log(op: str, impl: str, reason: str) -> None:
    logging.getLogger("lwz_kernels").info("%s: impl=%s (%s)", op, impl, reason)
