"""Opening a memory on a device, and saying why that is not possible."""

import ctypes

import torch

from lwz_kernels.memory import library
from lwz_kernels.memory.library import PhaseMemoryError

__all__ = ["CUDA_DRIVER", "is_available", "open_native", "resolve_device", "unavailable_reason"]

CUDA_DRIVER = "libcuda.so.1"


def is_available(device: str | torch.device = "cpu", *, driver: str = CUDA_DRIVER) -> bool:
    """Whether `PhaseMemory` works on `device`."""
    return not unavailable_reason(device, driver=driver)


def unavailable_reason(device: str | torch.device = "cpu", *, driver: str = CUDA_DRIVER) -> str:
    """Why `PhaseMemory` does not work on `device`; empty where it does. Allocates nothing."""
    if not library.is_available():
        return library.unavailable_reason()
    try:
        library.call("close", open_native(resolve_device(device), 1 << 40, None, driver), 0)
    except PhaseMemoryError as error:
        return str(error)
    return ""


def open_native(
    device: torch.device, capacity_bytes: int, page_bytes: int | None, driver: str
) -> ctypes.c_void_p:
    """The library's object for these sizes; `None` takes the default page size."""
    if page_bytes is not None and page_bytes < 1:
        raise ValueError(f"phase memory: expected a page size of at least 1, got {page_bytes}")
    page_bytes = page_bytes or 0
    handle = ctypes.c_void_p()
    if device.type == "cpu":
        library.call("open_cpu", page_bytes, capacity_bytes, ctypes.byref(handle))
    else:
        library.call(
            "open_cuda",
            driver.encode(),
            device.index,
            page_bytes,
            capacity_bytes,
            ctypes.byref(handle),
        )
    return handle


def resolve_device(device: str | torch.device) -> torch.device:
    """The device with its index; raises ValueError for kinds without phase memory."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"phase memory: expected a cpu or cuda device, got {device}")
    if device.type == "cuda" and device.index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", index)
    return device
