"""The launch scripts: one machine stands for two nodes, and two small commands for Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.trainer.train_case import ROOT, make_run_args, read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

LAUNCH = ROOT / "examples" / "launch"
# What the scripts call of Slurm: names of the nodes, more than a pipe holds, and one process for
# each task.
SCONTROL = """#!/bin/bash
set -eo pipefail
[ "$*" = "show hostnames here,there" ]
echo localhost
seq -f 'there-%g' 20000
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" & tasks+=($!)
done
for pid in "${tasks[@]}"; do wait "$pid" || exit 1; done
"""


def environment(**settings: object) -> dict[str, str]:
    found = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return os.environ | found | {key: str(value) for key, value in settings.items()}


def run_arguments(tmp_path: Path) -> list[str]:
    return make_run_args(tmp_path, **{"num_steps": 1, "parallel.timeout_s": 120})


def test_torchrun_script_joins_two_nodes(tmp_path: Path) -> None:
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "NNODES": 2}
    arguments = run_arguments(tmp_path)
    nodes = [
        subprocess.Popen(
            [LAUNCH / "torchrun.sh", *arguments],
            cwd=ROOT,
            env=environment(**shared, NODE_RANK=node, NPROC_PER_NODE=1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0]
    assert len(read_metrics(tmp_path / "run")) == 1


def test_torchrun_script_names_what_is_missing() -> None:
    environ = {key: value for key, value in environment().items() if key != "NNODES"}
    result = subprocess.run(
        [LAUNCH / "torchrun.sh", "train"],
        env=environ | {"MASTER_ADDR": "localhost"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "NNODES: number of nodes" in result.stderr


def test_slurm_script_starts_a_rank_for_each_task(tmp_path: Path) -> None:
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # So that the port that follows from the job is a free one.
    job = next(n for n in iter(free_port, None) if 20000 <= n < 40000) - 20000
    slurm = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "here,there",
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 1,
    }
    result = subprocess.run(
        [LAUNCH / "slurm.sbatch", *run_arguments(tmp_path)],
        cwd=ROOT,
        env=environment(**slurm) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "2 x cpu" in result.stdout
    assert len(read_metrics(tmp_path / "run")) == 1
