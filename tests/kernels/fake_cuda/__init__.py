"""A CUDA driver library for tests (driver.cpp), built with whatever C++ compiler there is."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["CSRC", "GRANULARITY", "FakeDriver", "find_compiler", "load"]

CSRC = Path(__file__).parents[3] / "csrc"
GRANULARITY = 64 << 10
OUT_OF_MEMORY = 2
OTHER_FAULT = 999


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@functools.cache
def load() -> "FakeDriver":
    """Builds the library once per process."""
    compiler = find_compiler()
    assert compiler is not None, "ask find_compiler() first"
    folder = Path(tempfile.mkdtemp(prefix="fake_cuda"))
    atexit.register(shutil.rmtree, folder)
    library = folder / "libfakecuda.so"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared"),
            f"-I{CSRC}",
            str(Path(__file__).with_name("driver.cpp")),
            *("-o", str(library)),
        ],
        check=True,
        timeout=120,
    )
    return FakeDriver(library)


class FakeDriver:
    """The library's controls; the code under test loads the same file by `path`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        for name in ("num_calls", "count", "num_reservations", "num_mappings", "num_physical"):
            getattr(self._library, f"fake_{name}").restype = ctypes.c_long
        for name in ("num_retained", "num_inaccessible"):
            getattr(self._library, f"fake_{name}").restype = ctypes.c_long
        self._library.fake_log.restype = ctypes.c_char_p
        self._library.fake_set_budget.argtypes = [ctypes.c_size_t]
        self._library.fake_fail.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int]

    def reset(self) -> None:
        self._library.fake_reset()

    def set_budget(self, nbytes: int) -> None:
        """Physical memory of the device."""
        self._library.fake_set_budget(nbytes)

    def set_virtual_memory(self, is_supported: bool) -> None:
        self._library.fake_set_virtual_memory(int(is_supported))

    def launch(self) -> None:
        """Starts work that may touch what is mapped until the context is synchronized."""
        self._library.fake_launch()

    def fail(self, first: int, count: int = 1, code: int = OTHER_FAULT) -> None:
        """Makes `count` calls fail, the first of them after `first` more successful ones."""
        self._library.fake_fail(first, count, code)

    def stop_failing(self) -> bool:
        """Whether a call did fail."""
        return bool(self._library.fake_stop_failing())

    @property
    def num_calls(self) -> int:
        return self._library.fake_num_calls()

    def count(self, symbol: str) -> int:
        return self._library.fake_count(symbol.encode())

    def calls_during(self, action: Callable[[], object]) -> list[str]:
        """The symbols that `action` calls."""
        self._library.fake_clear_log()
        action()
        return self._library.fake_log().decode().split()

    @property
    def holdings(self) -> dict[str, int]:
        """What the process holds of the driver; all zero after a clean close."""
        return {
            name: getattr(self._library, f"fake_{name}")()
            for name in ("num_reservations", "num_mappings", "num_physical", "num_retained")
        }

    @property
    def num_inaccessible(self) -> int:
        """Mappings that nothing may touch, because cuMemSetAccess was not called for them."""
        return self._library.fake_num_inaccessible()

    @property
    def has_current_context(self) -> bool:
        return bool(self._library.fake_has_current_context())
