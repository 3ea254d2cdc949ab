"""Loads the phase memory library (csrc/phase_memory.h, `lwz_kernels/_phase_memory.so`).

It is no part of `lwz_kernels/_native.so`: it needs no OpenMP, and torch loads it a second time, by
its path, as an allocator.
"""

import ctypes
import functools
from typing import Any

from lwz_kernels.shared_library import load_shared_library

__all__ = [
    "AllocatorStats",
    "Move",
    "NativeStats",
    "PhaseMemoryError",
    "call",
    "is_available",
    "path",
    "unavailable_reason",
]

ABI_VERSION = 1
_INVALID, _EXHAUSTED = 1, 2


class PhaseMemoryError(RuntimeError):
    """The device, the driver or the memory's state does not allow what was asked for."""


class Move(ctypes.Structure):
    """`num_pages` consecutive pages from one region to another; region -1 is the pool."""

    _fields_ = (
        ("src_region", ctypes.c_int64),
        ("src_page", ctypes.c_int64),
        ("dst_region", ctypes.c_int64),
        ("dst_page", ctypes.c_int64),
        ("num_pages", ctypes.c_int64),
    )


class NativeStats(ctypes.Structure):
    """`LwzMemoryStats`: counts of pages, but for the sizes in bytes."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "page_bytes",
            "capacity",
            "physical",
            "mapped",
            "free",
            "peak_physical",
            "peak_mapped",
            "created",
            "released",
            "maps",
            "unmaps",
            "handovers",
            "synchronizations",
            "rollbacks",
        )
    )


class AllocatorStats(ctypes.Structure):
    """`LwzMemoryAllocatorStats`."""

    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("used_bytes", ctypes.c_int64),
        ("end_bytes", ctypes.c_int64),
    )


def is_available() -> bool:
    """Whether the library was built and loads on this machine."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why the library is not available; empty where it is."""
    return _load()[1]


def path() -> str:
    """The library's file."""
    return _library()._name


def call(function: str, *args: Any) -> None:
    """Calls `lwz_memory_<function>` and raises what its status means."""
    library = _library()
    status = getattr(library, f"lwz_memory_{function}")(*args)
    if status == 0:
        return
    message = f"phase memory: {library.lwz_memory_error().decode()}"
    if status == _INVALID:
        raise ValueError(message)
    if status == _EXHAUSTED:
        raise MemoryError(message)
    raise PhaseMemoryError(message)


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise PhaseMemoryError(f"phase memory is not available: {reason}")
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    library, reason = load_shared_library(
        "lwz_kernels._phase_memory",
        "lwz_memory_abi_version",
        ABI_VERSION,
        needs="on Linux, install a C++ compiler and cmake, then run pip install . again",
    )
    if library is not None:
        _declare(library)
    return library, reason


def _declare(library: ctypes.CDLL) -> None:
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, argtypes in {
        "open_cpu": [i64, i64, pointer],
        "open_cuda": [ctypes.c_char_p, i32, i64, i64, pointer],
        "close": [pointer, i32],
        "reserve": [pointer, i64, pointer, pointer],
        "unreserve": [pointer, i64],
        "apply": [pointer, pointer, i64],
        "release_free": [pointer, i64, pointer],
        "page_table": [pointer, i64, pointer],
        "stats": [pointer, pointer],
        "device_free_bytes": [pointer, pointer],
        "bind_allocator": [pointer, i64, i32],
        "unbind_allocator": [i32],
        "allocator_stats": [i32, pointer],
    }.items():
        function = getattr(library, f"lwz_memory_{name}")
        function.argtypes, function.restype = argtypes, i32
    library.lwz_memory_error.restype = ctypes.c_char_p
