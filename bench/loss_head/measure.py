"""What one provider's process does: check, warm up, time, and measure memory.

Time: CUDA events, or the wall clock on a CPU, around one call; before each call a buffer larger
than the caches is written, so that inputs come from memory. Memory: the peak during one warm call
over what was allocated just before it: PyTorch's own account on a GPU, the process's resident set
on a CPU (Linux resets its high-water mark on request).
"""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.loss_head.gate import Verdict, judge
from bench.loss_head.problem import Problem, Shape, make_problem
from bench.loss_head.provider import Calls, Case, prepare, run_case

__all__ = ["Memory", "Setting", "Worker", "can_measure_memory"]

MIB = 2**20
FLUSH_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB}
# Past one 1.25 GB chunk of fp32 logits at V = 152,064, so that a chunk boundary is checked.
GATE_TOKENS = {"cpu": 384, "cuda": 2304}


@dataclass(frozen=True)
class Setting:
    """What all providers of one comparison share."""

    shape: Shape
    dtype: torch.dtype
    device: str  # "cpu" or "cuda"
    num_threads: int
    with_old_logprobs: bool


@dataclass(frozen=True)
class Memory:
    """Of one warm call, in bytes; `extra` includes the results, `retained` outlives the call."""

    extra: int
    retained: int
    results: int


class Worker:
    """Measures one provider's calls at one setting.

    A GPU's memory is free between turns: the inputs wait in page-locked memory of the host.
    """

    def __init__(self, setting: Setting, calls: Calls) -> None:
        self._calls = calls
        self._setting = setting
        self._device = torch.device(setting.device)
        self._stored = self._make(setting.shape)
        if setting.device == "cuda":
            self._stored = self._stored.to(torch.device("cpu")).pin()
            self._release()

    def answer(self, question: str, *args: Any) -> Any:
        """Runs `check`, `time` or `memory`, and gives the device's memory back."""
        try:
            return getattr(self, question)(*args)
        finally:
            self._release()

    def check(self, case: Case) -> Verdict | None:
        """The gate, at fewer tokens; then one call at full size, which compiles and tunes."""
        verdict = None
        if self._calls.matmuls is None:
            shape = self._setting.shape
            tokens = min(shape.tokens, GATE_TOKENS[self._setting.device])
            problem = self._make(Shape(tokens, shape.width, shape.vocab))
            verdict = judge(self._calls, case, problem)
        if verdict is None or verdict.passed:
            self._release()
            self._call(case)()
            self._synchronize()
        return verdict

    def time(self, case: Case, warm_up_s: float, seconds: float) -> list[float]:
        """Milliseconds of single calls: as many as fit into `seconds`, at least one."""
        call = self._call(case)
        num_bytes = FLUSH_BYTES[self._setting.device]
        flush = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        warm_until = time.perf_counter() + warm_up_s
        while time.perf_counter() < warm_until:
            call()
            self._synchronize()
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while not samples or time.perf_counter() < end:
            flush.add_(1)
            samples.append(self._time_call_ms(call))
        return samples

    def memory(self, case: Case) -> Memory:
        call = self._call(case)
        self._trim()
        before = self._allocated()
        call()
        self._synchronize()
        self._trim()
        warm = self._allocated()
        self._reset_peak()
        results = call()
        self._synchronize()
        peak = self._peak()
        num_bytes = sum(x.numel() * x.itemsize for x in results.values())
        return Memory(max(0, peak - warm), max(0, warm - before), num_bytes)

    def _make(self, shape: Shape) -> Problem:
        with_old_logprobs = self._setting.with_old_logprobs
        return make_problem(
            shape, self._setting.dtype, self._device, with_old_logprobs=with_old_logprobs
        )

    def _call(self, case: Case) -> Callable[[], dict[str, torch.Tensor]]:
        prepared = prepare(self._calls, case, self._stored.to(self._device))
        owned = {x.data_ptr() for x in prepared.scratch.values()}

        def call() -> dict[str, torch.Tensor]:
            outputs = run_case(self._calls, case, prepared)
            return {name: x for name, x in outputs.items() if x.data_ptr() not in owned}

        return call

    def _time_call_ms(self, call: Callable[[], object]) -> float:
        if self._setting.device == "cpu":
            before = time.perf_counter()
            call()
            return (time.perf_counter() - before) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _synchronize(self) -> None:
        if self._setting.device == "cuda":
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._setting.device == "cuda" else _status("VmRSS")

    def _peak(self) -> int:
        if self._setting.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM")

    def _reset_peak(self) -> None:
        if self._setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def _trim(self) -> None:
        gc.collect()
        if self._setting.device == "cpu" and sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def _release(self) -> None:
        self._trim()
        if self._setting.device == "cuda":
            torch.cuda.empty_cache()


def can_measure_memory(device: str) -> bool:
    """A CPU's peak needs Linux and a kernel that lets a process reset its high-water mark."""
    if device == "cuda":
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
