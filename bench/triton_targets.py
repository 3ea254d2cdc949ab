"""Compiles a launcher's Triton kernels for a GPU that is not there.

A launcher is called with meta tensors while a stand-in driver names the target: what comes out is
what the launch would run, with its own block sizes, warps, stages and argument specialisation.
Nothing here needs a GPU, and nothing may run in a process with TRITON_INTERPRET set.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

__all__ = ["CAPABILITIES", "SHARED_MEMORY_LIMIT", "CompiledLaunch", "compile_launches"]

CAPABILITIES = (80, 90, 100)
# Bytes that one block may have: 163 KiB on A100, 227 KiB on H100, H200 and B200.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Matrix instructions as PTX spells them, newest first.
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class CompiledLaunch:
    """One kernel as a launcher would have started it."""

    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    shared_bytes: int
    ptx: str
    cubin: bytes

    @property
    def matrix_instruction(self) -> str:
        """The PTX instruction of the matrix product, or "" where there is none."""
        return next((name for name in _MATRIX_INSTRUCTIONS if name in self.ptx), "")

    @property
    def async_copy(self) -> str:
        """How tiles get to shared memory: "tma", "cp.async", or "" through registers."""
        if "cp.async.bulk.tensor" in self.ptx:
            return "tma"
        return "cp.async" if "cp.async" in self.ptx else ""

    @property
    def uses_fp64(self) -> bool:
        """Whether a Python float, or a promotion, put double precision into the kernel."""
        return ".f64" in self.ptx

    @property
    def stores_behind_barrier(self) -> bool:
        """No vector store to global memory follows a vector load without a barrier between."""
        order = re.findall(r"(ld\.global\.v\d|st\.global\.v\d|bar\.sync)", self.ptx)
        return not any(
            first.startswith("ld") and second.startswith("st")
            for first, second in itertools.pairwise(order)
        )

    def resource_usage(self) -> dict[str, int]:
        """What cuobjdump says of the cubin: REG, STACK, LOCAL (spills use both last), ..."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            output = subprocess.run(
                [str(_CUOBJDUMP), "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        lines = [line for line in output.splitlines() if "REG:" in line]
        assert len(lines) == 1, f"expected one kernel in the cubin, got:\n{output}"
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", lines[0])}


@contextmanager
def compile_launches(capability: int) -> Iterator[list[CompiledLaunch]]:
    """Within it launches compile for `capability` and are collected instead of run."""
    launches: list[CompiledLaunch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        metadata = compiled.metadata
        launches.append(
            CompiledLaunch(
                kernel=self.__name__,
                grid=tuple(grid),
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                shared_bytes=metadata.shared,
                ptx=compiled.asm["ptx"],
                cubin=compiled.asm["cubin"],
            )
        )
        return compiled

    config = triton.runtime.driver
    before = config._active
    config.set_active(_AbsentDriver(capability))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original
        config._active = before


class _AbsentDriver:
    """What a launch asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Kernels are cached by device: one number for each target keeps them apart.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": _NUM_MULTIPROCESSORS.get(device, 128)}
