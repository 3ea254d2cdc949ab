"""One comparison: all providers at one shape and dtype, case by case, in turns."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import report
from bench.loss_head.gate import MAX_ERROR_VS_EAGER, Verdict
from bench.loss_head.measure import Memory, Setting, can_measure_memory
from bench.loss_head.process import Failure, ProviderProcess
from bench.loss_head.provider import Case, Provider

__all__ = ["COLUMNS", "Machine", "Plan", "compare"]

MIB = 2**20
COLUMNS = (
    "op",
    "mode",
    "provider",
    "version",
    "dtype",
    "tokens",
    "width",
    "vocab",
    "status",
    "reason",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "num_samples",
    "extra_mib",
    "retained_mib",
    "result_mib",
    "floor_tflop",
    "tflops",
    "floor_gb",
    "gb_per_s",
    "floor_frac",
    "error_vs_eager",
    "checked",
    "device",
    "cpu_capability",
    "threads",
    "driver",
    "cuda",
    "torch",
    "triton",
    "commit",
)


@dataclass(frozen=True)
class Machine:
    """The part of a row that says where and with what it was measured."""

    device: str
    threads: int
    commit: str

    def columns(self) -> dict[str, Any]:
        is_cuda = self.device == "cuda"
        return {
            "device": torch.cuda.get_device_name() if is_cuda else report.cpu_name(),
            "cpu_capability": "" if is_cuda else report.cpu_capability(),
            "threads": self.threads,
            "driver": report.cuda_driver() if is_cuda else "",
            "cuda": (torch.version.cuda or "") if is_cuda else "",
            "torch": torch.__version__,
            "triton": _triton_version(),
            "commit": self.commit,
        }


@dataclass
class _Result:
    """What is known of one provider in one case; the first failure ends it."""

    version: str
    status: str = "ok"
    reason: str = ""
    verdict: Verdict | None = None
    samples_ms: list[float] = field(default_factory=list)
    memory: Memory | None = None

    @property
    def median_ms(self) -> float | None:
        return report.quantiles(self.samples_ms)[1] if self.status == "ok" else None

    def take_verdict(self, reply: Verdict | Failure | None) -> None:
        if isinstance(reply, Failure):
            self._fail(reply)
        elif reply is not None:
            self.verdict = reply
            if not reply.passed:
                reason = f"{reply.output}: error {reply.error_vs_eager:.3g} x eager's"
                self._fail(Failure("wrong", f"{reason}, allowed {MAX_ERROR_VS_EAGER:.3g} x"))

    def take_samples(self, reply: list[float] | Failure) -> None:
        if isinstance(reply, Failure):
            self._fail(reply)
        else:
            self.samples_ms += reply

    def take_memory(self, reply: Memory | Failure) -> None:
        if isinstance(reply, Failure):
            self._fail(reply)
        else:
            self.memory = reply

    def columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "version": self.version,
            "status": self.status,
            "reason": self.reason,
        }
        if self.verdict is not None:
            columns["error_vs_eager"] = f"{self.verdict.error_vs_eager:.3g}"
            columns["checked"] = " ".join(self.verdict.checked)
        if self.status == "ok":
            p20, median, p80 = report.quantiles(self.samples_ms)
            columns |= {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}"}
            columns |= {"p80_ms": f"{p80:.4f}", "num_samples": len(self.samples_ms)}
        if self.memory is not None:
            columns["extra_mib"] = f"{self.memory.extra / MIB:.1f}"
            columns["retained_mib"] = f"{self.memory.retained / MIB:.1f}"
            columns["result_mib"] = f"{self.memory.results / MIB:.1f}"
        return columns

    def _fail(self, failure: Failure) -> None:
        self.status, self.reason = failure.status, failure.reason


@dataclass(frozen=True)
class Plan:
    """How long to measure: turns of `seconds` after `warm_up_s`, `rounds` times."""

    rounds: int
    warm_up_s: float
    seconds: float
    timeout_s: float


def compare(
    providers: Mapping[str, Provider],
    setting: Setting,
    cases: Sequence[Case],
    plan: Plan,
    machine: Machine,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each case as soon as they are there, and of who cannot start."""
    common = _setting_columns(setting) | machine.columns()
    processes = [
        ProviderProcess(name, provider, setting, plan.timeout_s)
        for name, provider in providers.items()
    ]
    try:
        for process in processes:
            process.start()
        for case in cases:
            able = [process for process in processes if process.supports(case)]
            lost = [process for process in processes if process.failure is not None]
            yield [_lost_row(process) | common for process in lost]
            processes = [process for process in processes if process not in lost]
            yield _rows(_measure(able, setting, case, plan), setting, case, common)
    finally:
        for process in processes:
            process.stop()


def _measure(
    processes: list[ProviderProcess], setting: Setting, case: Case, plan: Plan
) -> dict[str, _Result]:
    """Gate and first call of all, then rounds of turns, then memory."""
    results = {process.name: _Result(version=process.version) for process in processes}
    for process in processes:
        results[process.name].take_verdict(process.ask("check", case))
    for round_index in range(plan.rounds):
        # Another provider begins each round, so that none always follows the same one.
        for process in processes[round_index:] + processes[:round_index]:
            result = results[process.name]
            if result.status == "ok":
                result.take_samples(process.ask("time", case, plan.warm_up_s, plan.seconds))
    for process in processes:
        result = results[process.name]
        if result.status == "ok" and can_measure_memory(setting.device):
            result.take_memory(_ask_memory(process, setting, case))
    return results


def _ask_memory(process: ProviderProcess, setting: Setting, case: Case) -> Any:
    """A GPU's account is exact at any time; a CPU's resident set needs a process without past."""
    if setting.device == "cuda":
        return process.ask("memory", case)
    fresh = process.renewed(
        dataclasses.replace(setting, with_old_logprobs=case.mode == "off_policy")
    )
    fresh.start()
    try:
        return fresh.ask("memory", case)
    finally:
        fresh.stop()


def _rows(
    results: dict[str, _Result], setting: Setting, case: Case, common: dict[str, Any]
) -> list[dict[str, Any]]:
    shape = setting.shape
    floor_tflop = case.matmuls * 2 * shape.tokens * shape.width * shape.vocab / 1e12
    floor_gb = case.logits_passes * shape.tokens * shape.vocab * setting.dtype.itemsize / 1e9
    floor = results.get("floor")
    floor_ms = floor.median_ms if floor is not None else None
    rows = []
    for name, result in results.items():
        row = {"op": case.op, "mode": case.mode, "provider": name} | common | result.columns()
        if (median_ms := result.median_ms) is not None:
            if floor_tflop:
                row["floor_tflop"] = f"{floor_tflop:.4g}"
                row["tflops"] = f"{floor_tflop / (median_ms / 1e3):.4g}"
            if floor_gb:
                row["floor_gb"] = f"{floor_gb:.4g}"
                row["gb_per_s"] = f"{floor_gb / (median_ms / 1e3):.4g}"
            if floor_ms is not None:
                row["floor_frac"] = f"{floor_ms / median_ms:.3f}"
        rows.append(row)
    return rows


def _lost_row(process: ProviderProcess) -> dict[str, Any]:
    """A provider that cannot start has one row, without op and mode."""
    assert process.failure is not None
    status, reason = process.failure.status, process.failure.reason
    process.stop()
    return {"provider": process.name, "status": status, "reason": reason}


def _setting_columns(setting: Setting) -> dict[str, Any]:
    return {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "tokens": setting.shape.tokens,
        "width": setting.shape.width,
        "vocab": setting.shape.vocab,
    }


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
