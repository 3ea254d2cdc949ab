"""Tiny runs of the whole program: a random model, a few prompts, real files."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.processes import ROOT, Program, rank_environment
from tests.trainer.tiny import make_tiny_model

__all__ = ["IN_PHASES", "ROOT", "make_run_args", "read_metrics", "run_cli"]

IN_PHASES = {"rollout.memory": "phase", "rollout.offload_optimizer": True}
"""Settings under which everything that can takes turns in the same memory."""

# Measured, not computed: they differ between two runs of the same thing.
CLOCKS = (
    "time/",
    "rollout/tokens_per_s",
    "rollout/longest_tokens_per_s",
    "rollout/decode_gb_per_s",
    "rollout/bandwidth_frac",
    "update/tokens_per_s",
    "memory/",
)


def make_run_args(tmp_path: Path, name: str = "run", **settings: Any) -> list[str]:
    """Arguments of a run that takes a second a step; `settings` override by dotted name."""
    model = tmp_path / "tiny-llama"
    if not model.exists():
        make_tiny_model(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        rows = [
            {"prompt": f"Write {n} words on the sea.", "length_range": [n, n + 20]}
            for n in range(3, 10)
        ]
        prompts.write_text("\n".join(json.dumps(row) for row in rows))
    defaults = {
        "output_dir": tmp_path / name,
        "num_steps": 4,
        "num_threads": 1,
        "model.path": model,
        "model.dtype": "fp32",
        "data.prompts": prompts,
        "data.template": ROOT / "tests" / "trainer" / "answer_only.txt",
        "data.prompts_per_step": 2,
        "rollout.group_size": 4,
        "rollout.max_completion_tokens": 16,
        "rollout.temperature": 0.9,
        "rollout.page_size": 8,
        "rewards.length.n_max": 400,
        "rewards.format.structure": "graded",
        "update.microbatch_tokens": 512,
        "optim.lr": 1e-3,
        "checkpoint.every": 2,
    }
    merged = defaults | settings
    return ["train", *(f"--{key}={value}" for key, value in merged.items())]


def run_cli(
    arguments: list[str], *, processes: int = 1, timeout: float = 240, env: dict | None = None
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, or in several that torchrun could have started."""
    environments = rank_environment(processes) if processes > 1 else [{}]
    ranks = [Program("lwz_trainer", arguments, found | (env or {})) for found in environments]
    deadline = time.monotonic() + timeout
    while any(rank.returncode is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.returncode for rank in ranks):
            break  # the others are ended, as torchrun would
        time.sleep(0.01)
    codes = [rank.returncode for rank in ranks]
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    outputs = [rank.communicate() for rank in ranks]
    return subprocess.CompletedProcess(
        arguments,
        next((code for code in codes if code != 0), 0),
        "".join(out for out, _ in outputs),
        "".join(err for _, err in outputs),
    )


def read_metrics(run_dir: Path, *, without_clocks: bool = False) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    if not without_clocks:
        return records
    return [
        {key: value for key, value in record.items() if not key.startswith(CLOCKS)}
        for record in records
    ]
