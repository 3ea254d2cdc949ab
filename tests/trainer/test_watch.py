"""A rank that dies or stalls: every other one names it and its phase, in time, and fails."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import Program, rank_environment
from tests.trainer.train_case import make_run_args, read_metrics

pytestmark = pytest.mark.dist

TIMEOUT_S = 24.0


@contextmanager
def started(command: list[str], num_ranks: int = 2) -> Iterator[list[Program]]:
    """The ranks without torchrun, which would end the others itself."""
    processes = [Program(command[0], command[1:], env) for env in rank_environment(num_ranks)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def watched(mode: str, bad_rank: int, timeout_s: float = TIMEOUT_S) -> list[str]:
    return ["tests.trainer.watched_rank", mode, str(bad_rank), str(timeout_s)]


def wait_for_line(process: Program, line: str) -> None:
    if line in process.lines():
        return
    raise AssertionError(f"{line!r} never came: {process.communicate()[1][-2000:]}")


def outcome(process: Program) -> tuple[int, str, float]:
    """Exit code, stderr, seconds until then."""
    since = time.monotonic()
    _, err = process.communicate(timeout=60)
    return process.returncode, err, time.monotonic() - since


def test_a_rank_that_dies_before_the_first_beats_is_not_taken_for_a_common_failure() -> None:
    with started(watched("signal", -1)) as processes:
        wait_for_line(processes[0], "step 0")
        processes[0].send_signal(signal.SIGKILL)
        code, err, seconds = outcome(processes[1])
    assert code == 1, err
    assert "rank 0" in err
    assert seconds < TIMEOUT_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_is_gone_is_named_by_the_other(number: signal.Signals, bad_rank: int) -> None:
    with started(watched("signal", -1)) as processes:
        wait_for_line(processes[bad_rank], "step 100")  # beats were exchanged by now
        processes[bad_rank].send_signal(number)
        code, err, seconds = outcome(processes[1 - bad_rank])
    assert code == 1, err
    assert f"rank {bad_rank}" in err
    assert "in phase 'step " in err
    assert seconds < TIMEOUT_S


def test_a_rank_that_hangs_is_named_by_the_others_and_shows_its_stack() -> None:
    with started(watched("hang", 1), num_ranks=3) as processes:
        wait_for_line(processes[1], "step 2")
        outcomes = [outcome(process) for process in processes]
    for rank, (code, err, seconds) in enumerate(outcomes):
        assert code == 1
        assert seconds < TIMEOUT_S
        if rank != 1:
            assert "rank 1 in phase 'being bad, hang'" in err
    err = outcomes[1][1]
    assert "did not take part in a collective, but is alive" in err
    assert "watched_rank.py" in err  # where it hangs
    assert "in work" in err


def test_a_rank_that_raises_shows_why_to_the_others() -> None:
    with started(watched("raise", 0)) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, *_ in outcomes] == [1, 1]
    assert "Traceback" in outcomes[0][1]
    # Rank 0 holds the store here; either way its rank is named.
    assert "rank 0" in outcomes[1][1]
    with started(watched("raise", 1)) as processes:
        outcomes = [outcome(process) for process in processes]
    message = "rank 1 in phase 'being bad, raise' ended: RuntimeError: a bug of this rank alone"
    assert message in outcomes[0][1]


def test_ranks_that_finish_leave_quietly() -> None:
    with started(watched("finish", -1)) as processes:
        outcomes = [outcome(process) for process in processes]
    assert [code for code, *_ in outcomes] == [0, 0]
    assert all("error" not in err for _, err, _ in outcomes)


def test_train_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    settings = {"num_steps": 200, "parallel.timeout_s": TIMEOUT_S, "parallel.sequence": 2}
    command = ["lwz_trainer", *make_run_args(tmp_path, **settings)]
    with started(command) as processes:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].kill()
        code, err, seconds = outcome(processes[0])
    assert read_metrics(tmp_path / "run")
    assert code == 1, err
    assert "error: rank 1 in phase '" in err
    assert "step" in err
    assert seconds < TIMEOUT_S
