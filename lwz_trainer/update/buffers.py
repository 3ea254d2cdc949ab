"""Tensors of the update whose memory serves others while they are not needed.

The gradients and the optimizer's state each lie in buffers of one kind: torch's own memory, a
region of phase memory (`lwz_kernels.memory`), or either of them with the content waiting on the
host meanwhile. Tensors keep their identity, and in a region their addresses, whoever has the bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lwz_kernels.memory import Region

__all__ = ["Buffers", "ParkedBuffers", "RegionBuffers", "TorchBuffers"]

# Where a tensor may begin in a region: as strict as torch's own allocators.
ALIGNMENT_BYTES = 512


class Buffers(Protocol):
    """Tensors that come and go together."""

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """A new tensor [size] of zeros."""
        ...

    def release(self) -> None:
        """The memory may go to others until `restore`; nothing may touch the tensors meanwhile."""
        ...

    def restore(self) -> None:
        """The memory is back; the content is undefined unless the buffers keep it."""
        ...

    def wait(self) -> None:
        """The tensors may be read and written by what is computed from here on."""
        ...


class TorchBuffers:
    """In memory of torch's allocator, which gets it back while it is released."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        self._tensors.append(torch.zeros(size, dtype=dtype, device=self._device))
        return self._tensors[-1]

    def release(self) -> None:
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        for tensor in self._tensors:
            storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
            if storage.nbytes() != size:  # a resize to the same size copies into new memory
                storage.resize_(size)

    def wait(self) -> None:
        """They are there whenever they are not released."""


class RegionBuffers:
    """In a region of phase memory, whose switches take its pages and bring them back.

    Args:
        region: with `keeps_views=True`; mapped as it fills, so all tensors are made before the
            first phase begins.
        phase: in which the region has its pages.
    """

    def __init__(self, region: Region, phase: str) -> None:
        self._region = region
        self._phase = phase
        self.used_bytes = 0

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        offset = -(-self.used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = offset + size * dtype.itemsize
        mapped, page = self._region.mapped_bytes, self._region.memory.page_bytes
        if end > mapped:
            self._region.map(mapped, -(-(end - mapped) // page) * page)
        self.used_bytes = end
        return self._region.tensor((size,), dtype, offset=offset).zero_()

    def release(self) -> None:
        """The switch out of the phase does it."""

    def restore(self) -> None:
        """The switch into the phase has done it, or this raises PhaseMemoryError."""
        if self.used_bytes and not self._region.is_mapped(0, self.used_bytes):
            self._region.memory.require_phase(self._phase)

    def wait(self) -> None:
        """A switch is complete when it returns."""


class ParkedBuffers:
    """Buffers whose content waits on the host while they are released.

    On a GPU the host's copies are pinned, made once, and written and read on a stream of their own,
    beside what is computed; on a CPU they are plain copies.

    Args:
        buffers: where the tensors lie.
        device: of the tensors.
    """

    def __init__(self, buffers: Buffers, device: torch.device) -> None:
        self._buffers = buffers
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tensors: list[Tensor] = []
        self._host: list[Tensor] = []
        self._is_saved = False
        """The host has the present content."""
        self._is_released = False

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        self._tensors.append(self._buffers.zeros(size, dtype))
        return self._tensors[-1]

    def save(self) -> None:
        """Starts to copy the content, which does not change any more, to the host."""
        for tensor in self._tensors[len(self._host) :]:
            host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
            self._host.append(host)
        with self._beside():
            for host, tensor in zip(self._host, self._tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
        self._is_saved = True

    def release(self) -> None:
        if self._is_released:
            return
        if not self._is_saved:
            self.save()
        if self._stream is not None:
            self._stream.synchronize()
        self._buffers.release()
        self._is_released = True

    def restore(self) -> None:
        if not self._is_released:
            return
        self._buffers.restore()
        with self._beside():
            for host, tensor in zip(self._host, self._tensors, strict=True):
                tensor.copy_(host, non_blocking=True)
        self._is_released = False

    def wait(self) -> None:
        assert not self._is_released, "the optimizer's state is on the host"
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._is_saved = False  # who waits is about to change the content

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """The copying stream, behind everything that the current one was given."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
