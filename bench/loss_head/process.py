"""A provider's process, and questions to it from the process that compares.

Each provider lives in a process of its own: what one allocates, compiles, tunes or breaks touches
no other. A question that fails is answered with a `Failure`; the process is then replaced.
"""

import gc
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.loss_head.measure import Setting, Worker
from bench.loss_head.provider import CASES, Case, Provider

__all__ = ["Failure", "ProviderProcess"]

MAX_REASON_CHARS = 200
STOP_S = 5.0
# Processes fork from a server that has imported PyTorch and run nothing: as fresh as a new
# interpreter, and started in a moment.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["bench.loss_head.process"])


@dataclass(frozen=True)
class Failure:
    """`status`: missing, wrong, out_of_memory, timeout or error."""

    status: str
    reason: str


class ProviderProcess:
    """Starts on `start()`; `wait_until_ready` and `ask` block. Replaces itself after a failure."""

    def __init__(self, name: str, provider: Provider, setting: Setting, timeout_s: float) -> None:
        self.name = name
        self.failure: Failure | None = None  # why it never answers
        self.version = ""
        self._setting = setting
        self._timeout_s = timeout_s
        self._provider = provider
        self._cases: frozenset[Case] | None = None

    def start(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve, args=(theirs, self._provider, self._setting)
        )
        self._process.start()
        theirs.close()
        self._cases = None

    def wait_until_ready(self) -> None:
        """After this, `failure` says whether the provider can be used at all."""
        if self._cases is not None or self.failure is not None:
            return
        reply = self._receive()
        if isinstance(reply, Failure):
            self.failure = reply
        else:
            self.version, self._cases = reply

    def renewed(self, setting: Setting) -> "ProviderProcess":
        """Another process of the same provider, not started."""
        return ProviderProcess(self.name, self._provider, setting, self._timeout_s)

    def supports(self, case: Case) -> bool:
        """False also where the provider cannot start: see `failure`."""
        self.wait_until_ready()
        return self._cases is not None and case in self._cases

    def ask(self, question: str, *args: Any) -> Any:
        """The answer of the `Worker`'s method, or a `Failure`."""
        self.wait_until_ready()
        if self.failure is not None:
            return self.failure
        self._connection.send((question, args))
        reply = self._receive()
        if isinstance(reply, Failure):
            self.stop()
            self.start()
        return reply

    def stop(self) -> None:
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while not self._connection.poll(0.2):
            if time.monotonic() > deadline:
                self._process.kill()
                return Failure("timeout", f"no answer within {self._timeout_s:.0f} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join(STOP_S)
            return Failure("error", f"the process ended with code {self._process.exitcode}")


def _serve(
    connection: multiprocessing.connection.Connection, provider: Provider, setting: Setting
) -> None:
    torch.set_num_threads(setting.num_threads)
    workers: list[Worker] = []

    def start() -> tuple[str, frozenset[Case]]:
        version = importlib.metadata.version(provider.package) if provider.package else ""
        calls = provider.load()
        workers.append(Worker(setting, calls))
        gc.freeze()  # what was imported stays: later collections need not walk it
        return version, frozenset(case for case in CASES if calls.supports(case))

    _reply(connection, start)
    while workers:
        try:
            question, args = connection.recv()
        except EOFError:
            return
        _reply(connection, partial(workers[0].answer, question, *args))


def _reply(connection: multiprocessing.connection.Connection, run: Callable[[], Any]) -> None:
    try:
        reply = run()
    except ImportError as error:
        reply = Failure("missing", _reason(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        reply = Failure("out_of_memory", _reason(error))
    except Exception as error:  # whatever a peer raises is its row's reason
        reply = Failure("error", f"{type(error).__name__}: {_reason(error)}")
    connection.send(reply)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON_CHARS] if lines else type(error).__name__
