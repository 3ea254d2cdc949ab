"""Reward models that occupy the device only while they score."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ParkedModel"]


class ParkedModel:
    """A frozen model whose weights wait in host memory, pinned, between uses.

    They never change, so they are copied to the device and never back; the copy is dropped after
    use, and its memory is the update's. Parameters are moved in place, so threads take turns.

    Args:
        model: in host memory.
        device: where it runs; on a CPU nothing moves.
        to_device: makes the copy of one tensor, for tests; default `Tensor.to`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        to_device: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._to_device = to_device or (lambda host: host.to(device, non_blocking=True))
        self._in_use = threading.Lock()
        self._tensors: list[tuple[Tensor, Tensor]] = []
        if device.type == "cpu" and to_device is None:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            host = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
            tensor.data = host
            self._tensors.append((tensor, host))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The model runs on the device within this block."""
        if not self._tensors:
            yield
            return
        with self._in_use:
            try:
                for tensor, host in self._tensors:
                    tensor.data = self._to_device(host)
                yield
            finally:
                for tensor, host in self._tensors:
                    tensor.data = host
