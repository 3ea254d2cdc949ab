"""Importing the kernels needs torch alone."""

import subprocess
import sys

CODE = """
import sys
import lwz_kernels
import lwz_kernels.attention
import lwz_kernels.native
import lwz_kernels.paged_attention
import torch
heavy = {"transformers", "triton", "vllm", "lwz_trainer", "flash_attn"} & set(sys.modules)
print("heavy:", sorted(heavy))
print("cuda started:", torch.cuda.is_initialized())
print("native loaded:", lwz_kernels.native._load.cache_info().currsize)
"""


def test_import_loads_no_heavy_package_and_starts_no_gpu() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "heavy: []",
        "cuda started: False",
        "native loaded: 0",
    ]
