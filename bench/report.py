"""What every benchmark says about the machine and the code, and how it writes its rows."""

import csv
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lwz_kernels import native

__all__ = [
    "MACHINE_COLUMNS",
    "commit",
    "cpu_capability",
    "cpu_name",
    "cuda_driver",
    "machine",
    "quantiles",
    "write_csv",
]

MACHINE_COLUMNS = {
    "cpu": ("device", "cpu_capability", "threads", "torch"),
    "cuda": ("device", "driver", "cuda", "torch", "triton"),
}


def machine(device: str, threads: int) -> dict[str, Any]:
    """What a row says of the machine, by MACHINE_COLUMNS of `device`, "cpu" or "cuda"."""
    if device == "cpu":
        values: tuple[Any, ...] = (cpu_name(), cpu_capability(), threads, torch.__version__)
    else:
        import triton

        name, cuda = torch.cuda.get_device_name(), torch.version.cuda
        values = (name, cuda_driver(), cuda, torch.__version__, triton.__version__)
    return dict(zip(MACHINE_COLUMNS[device], values, strict=True))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def cpu_capability() -> str:
    """Instruction sets in use: the native library's, then PyTorch's."""
    level = native.best_level() if native.is_available() else "no native library"
    return f"{level} (torch: {torch.backends.cpu.get_cpu_capability()})"


def cuda_driver() -> str:
    """Version of the NVIDIA driver; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.partition("\n")[0].strip()


def commit() -> str:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def write_csv(path: Path | None, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes a header and one line a row to `path`, or to standard output without a path."""
    if path is None:
        _write(sys.stdout, columns, rows)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        _write(file, columns, rows)


def _write(file: Any, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
