"""What every operator's `impl="auto"` shares: saying once which implementation was chosen."""

import functools
import logging

import torch

__all__ = ["impl_choices", "log_choice_once"]

_choices: dict[str, list[str]] = {}


def log_choice_once(op: str, impl: str, reason: str) -> None:
    """Logs at INFO level that `op` runs as `impl` because of `reason`, once per such triple."""
    if torch.compiler.is_compiling():
        return
    impls = _choices.setdefault(op, [])
    if impl not in impls:
        impls.append(impl)
    _log(op, impl, reason)


def impl_choices() -> dict[str, tuple[str, ...]]:
    """What `impl="auto"` has meant in this process, by operator: for a run's metadata."""
    return {op: tuple(impls) for op, impls in _choices.items()}


@functools.cache
def _log(op: str, impl: str, reason: str) -> None:
    logging.getLogger("lwz_kernels").info("%s: impl=%s (%s)", op, impl, reason)
