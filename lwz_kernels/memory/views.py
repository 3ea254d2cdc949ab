"""Tensors over raw addresses, and knowing when the last one is gone.

torch keeps the object that a storage was made from until the storage is freed. A weak reference to
that object therefore tells whether any tensor, slice or saved activation still uses the addresses.
"""

import ctypes
import weakref
from typing import Any

import torch

__all__ = ["make_view"]


class _CudaSpan:
    """Device addresses in the words of `__cuda_array_interface__`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        self.owner: Any = None


def make_view(
    owner: object, address: int, nbytes: int, device: torch.device
) -> tuple[torch.Tensor, weakref.ref]:
    """A uint8 tensor [nbytes] at `address`, and a reference that dies with its storage.

    Nothing is copied. The storage keeps `owner` alive.
    """
    if device.type == "cpu":
        buffer = (ctypes.c_ubyte * nbytes).from_address(address)
        buffer.owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8), weakref.ref(buffer)
    span = _CudaSpan(address, nbytes)
    span.owner = owner
    return torch.as_tensor(span, device=device), weakref.ref(span)
