"""Programs and ranks that start in a moment: forked from a process that has imported everything.

Importing torch and transformers takes a new process some seconds, and tests start a hundred of
them. So a process of tests starts one fork server (`multiprocessing`) that imports once. What is to
be shown of a fresh interpreter (imports, peak memory, torchrun) is tested with `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

__all__ = [
    "ROOT",
    "Program",
    "free_port",
    "rank_environment",
    "start_fork_server",
    "start_ranks",
]

ROOT = Path(__file__).resolve().parents[1]

PRELOAD = [
    "lwz_trainer.train.loop",
    "lwz_trainer.pretrain.loop",
    "lwz_trainer.reward_model.loop",
    "lwz_trainer.evaluation.run",
    "lwz_trainer.prepare.pipeline",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
]


def start_fork_server() -> None:
    """Called when tests were collected: bench.loss_head has named a list of its own by then."""
    # OpenMP reads it when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


class Program:
    """`python -m MODULE ARGUMENT …` under way, with what tests need of `subprocess.Popen`."""

    def __init__(
        self, module: str, arguments: list[str], env: dict[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._output:
            file.touch()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run_module,
            args=(
                module,
                arguments,
                os.environ | (env or {}),
                self._output,
            ),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, -N after signal N."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self._process.kill()

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Waits for the end; everything on stdout, and on stderr."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self._output)
        return out, err

    def lines(self) -> Iterator[str]:
        """Lines of stdout as they come, until the program has ended."""
        with self._output[0].open() as file:
            while True:
                is_over = self.returncode is not None
                line = file.readline()
                if line.endswith("\n"):
                    yield line[:-1]
                elif is_over:
                    return
                else:
                    file.seek(file.tell() - len(line))
                    time.sleep(0.005)


def _run_module(module: str, arguments: list[str], env: dict[str, str], output: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    # A parent that ignores SIGINT, as a job in the background does, would pass that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def rank_environment(num_ranks: int) -> list[dict[str, str]]:
    """For each rank what torchrun would set for `num_ranks` ranks of one node."""
    port, size = str(free_port()), str(num_ranks)
    return [
        {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
        }
        for rank in range(num_ranks)
    ]


def start_ranks(
    function: Callable[..., None], arguments: tuple[Any, ...], num_ranks: int
) -> ProcessContext:
    """`function(rank, *arguments)` under way in `num_ranks` processes."""
    context = start_processes(function, arguments, num_ranks, join=False, start_method="forkserver")
    assert context is not None
    return context
