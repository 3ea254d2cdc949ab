"""Inputs of checkpointed layers wait on the host between the forward and the backward pass.

A layer's input is copied out behind its forward pass and back behind the recomputation of the layer
after it, on a stream of their own. Host buffers are pinned and made once, then used again: the
allocation of pinned memory stops the device. On a CPU the same path runs with plain copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HostOffload"]


@dataclass(eq=False)
class _Parked:
    """One tensor that is on the host."""

    buffer: Tensor
    """[bytes] uint8; its start holds the tensor."""
    shape: torch.Size
    dtype: torch.dtype
    previous: "_Parked | None"
    """Parked before this one, so needed after it."""
    fetched: Tensor | None = None
    arrival: torch.cuda.Event | None = None

    @property
    def host(self) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return self.buffer[:size].view(self.dtype).view(self.shape)


class HostOffload:
    """Parks what autograd saves inside `layer_inputs`, and brings it back in reverse order.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Tensor] = []
        self._last: _Parked | None = None

    @contextmanager
    def layer_inputs(self) -> Iterator[None]:
        """Around one forward pass over checkpointed layers."""
        self._last = None
        with torch.autograd.graph.saved_tensors_hooks(self._park, self._take_back):
            yield
        self._last = None

    def _park(self, x: Tensor) -> Tensor | _Parked:
        if x.numel() == 0:  # the checkpoint saves an empty tensor beside the layer's input
            return x
        parked = _Parked(self._buffer(x.numel() * x.element_size()), x.shape, x.dtype, self._last)
        with self._on_stream():
            parked.host.copy_(x, non_blocking=True)
        if self._stream is not None:
            x.record_stream(self._stream)
        self._last = parked
        return parked

    def _take_back(self, parked: Tensor | _Parked) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        self._fetch(parked)
        x = parked.fetched
        assert x is not None, "it was just fetched"
        if parked.arrival is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(parked.arrival)
            x.record_stream(current)
        if parked.previous is not None:
            self._fetch(parked.previous)
        parked.fetched = parked.previous = None
        return x

    def _fetch(self, parked: _Parked) -> None:
        """Starts to copy a tensor back, unless that was done ahead."""
        if parked.fetched is not None:
            return
        with self._on_stream():
            x = torch.empty(parked.shape, dtype=parked.dtype, device=self._device)
            parked.fetched = x.copy_(parked.host, non_blocking=True)
            if self._stream is not None:
                parked.arrival = self._stream.record_event()
        # Later copies into this buffer are on the same stream, behind this one.
        self._free.append(parked.buffer)

    def _buffer(self, size: int) -> Tensor:
        """A free buffer, or a new one where the free one is too small."""
        if self._free and (buffer := self._free.pop()).numel() >= size:
            return buffer
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """The copying stream, behind everything that the current one was given."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
