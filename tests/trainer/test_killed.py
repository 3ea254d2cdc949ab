"""SIGKILL between any two phases: the resumed run is the uninterrupted one, bit for bit."""

import signal
from pathlib import Path
from typing import Any

import pytest

from lwz_trainer.__main__ import main
from tests.processes import Program
from tests.trainer.test_train import assert_same_runs
from tests.trainer.train_case import IN_PHASES, make_run_args, read_metrics

SETTINGS: dict[str, Any] = {"num_steps": 3, "checkpoint.every": 1, "log.tensorboard": False}
INTERLEAVED = {"update.schedule": "interleaved", "update.deterministic": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a whole run in either schedule, in plain memory."""
    path = tmp_path_factory.mktemp("killed")
    assert main(make_run_args(path, "sequential", **SETTINGS)) == 0
    assert main(make_run_args(path, "interleaved", **SETTINGS, **INTERLEAVED)) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "num_recorded"),
    [
        ("sampling, step 2", 1),
        ("updating, step 2", 1),
        ("recording step 2", 1),
        ("saving step 2", 2),
        ("latest", 2),
        ("sampling and updating, step 2", 1),
    ],
)
def test_train_killed_in_a_phase_resumes_to_the_same_run(
    folder: Path, marker: str, num_recorded: int
) -> None:
    schedule = "interleaved" if "and updating" in marker else "sequential"
    settings = SETTINGS | IN_PHASES | (INTERLEAVED if schedule == "interleaved" else {})
    name = marker.replace(" ", "_")
    arguments = make_run_args(folder, name, **settings)
    process = Program("tests.trainer.killed_run", [marker, *arguments])
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err[-2000:]
    assert len(read_metrics(folder / name)) == num_recorded
    assert (folder / name / "checkpoints" / "latest").read_text() == "step_000001"
    assert main(arguments) == 0
    assert_same_runs(folder / schedule, folder / name)
