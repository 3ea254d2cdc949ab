"""Times calls in turns, with cold caches; on a GPU as replays of captured CUDA graphs."""

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Run", "captured", "time_interleaved"]

Run = Callable[[], Any]

WARM_UP_S = 0.5
FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


def captured(runs: dict[str, Run]) -> dict[str, Run]:
    """Replays of calls that have run before, so that whatever they compile is compiled.

    The graphs share their memory: a replay overwrites what the others left.
    """
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    replays: dict[str, Run] = {}
    for name, run in runs.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        replays[name] = graph.replay
    return replays


def time_interleaved(runs: dict[str, Run], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call; they take turns, so that a slow phase of the machine hits all.

    Before each call a buffer larger than the caches is written. Wall clock on a CPU, events on a
    GPU; the first half second is not counted.
    """
    flush = torch.zeros(FLUSH_BYTES[device], dtype=torch.uint8, device=device)
    time_ms = _cpu_time_ms if device == "cpu" else _cuda_time_ms
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_UP_S + seconds:
        for name, run in runs.items():
            flush.add_(1)
            sample = time_ms(run)
            if elapsed > WARM_UP_S:
                times_ms[name].append(sample)
    return times_ms


def _cpu_time_ms(run: Run) -> float:
    before = time.perf_counter()
    run()
    return (time.perf_counter() - before) * 1e3


def _cuda_time_ms(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
