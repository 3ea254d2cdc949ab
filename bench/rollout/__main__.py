"""Rollout tokens per second against vLLM and transformers: same prompts, lengths and machine.

    python -m bench.rollout --preset cpu --vllm-python PATH --csv bench/results/cpu/rollout.csv

Temperature 1, no end token, so that all completions have the same length, and the log-prob of each
sampled token returned by all. Each provider runs in a process of its own, vLLM in an environment of
its own (docs/vllm.md says how to make one); in each round each provider has one turn. A turn
warms up with a few tokens and times one rollout. `bench/README.md` has the protocol.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench import report
from bench.rollout.gate import Gate
from bench.rollout.workload import Answer, Workload
from lwz_trainer.model.source import BUILTIN_MODEL, resolve_model_dir

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "Write a short story about a ship that never came home.",
    "Describe a rainy street in a small town, in about 300 words.",
    "Write a letter of thanks to a teacher whom you have not seen for years.",
    "Explain to a child why the sea is salt.",
]
# Module that runs it, and its further arguments.
PROVIDERS = {
    "lwz": ("run_lwz",),
    "vllm_compiled": ("run_vllm", "compiled"),
    "vllm_eager": ("run_vllm", "eager"),
    "transformers": ("run_transformers", "dynamic"),
    "transformers_static_compiled": ("run_transformers", "static"),
    "transformers_continuous": ("run_transformers", "continuous"),
}
COLUMNS = (
    "provider",
    "dtype",
    "status",
    "tokens_per_s",
    "min_tokens_per_s",
    "max_tokens_per_s",
    "lwz_ratio",
    "start_s",
    "peak_gb",
    "logprob_error",
    "batch",
    "new_tokens",
    "prompt_tokens",
    "rounds",
    "version",
    *report.MACHINE_COLUMNS["cpu"],
    "commit",
    "reason",
)


@dataclass(frozen=True)
class Preset:
    """Completions of each prompt, their tokens, and turns of each provider."""

    group_size: int
    num_tokens: int
    rounds: int


PRESETS = {
    "cpu": Preset(group_size=8, num_tokens=512, rounds=2),
    # Seconds: shows that everything runs, measures nothing worth keeping.
    "cpu-small": Preset(group_size=2, num_tokens=8, rounds=1),
}


@dataclass(eq=False)
class _Turns:
    """What one (provider, dtype) has shown so far."""

    tokens_per_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    version: str = ""
    reason: str = ""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    preset = PRESETS[options.preset]
    model = str(resolve_model_dir(options.model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    gate = Gate(model)
    turns = {(name, dtype): _Turns() for dtype in options.dtypes for name in options.providers}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds or preset.rounds):
            for (name, dtype), seen in turns.items():
                if seen.reason:
                    continue
                workload = Workload(
                    model=model,
                    dtype=dtype,
                    prompts=tokenizer(PROMPTS)["input_ids"],
                    group_size=options.group_size or preset.group_size,
                    num_tokens=options.num_tokens or preset.num_tokens,
                    seed=turn,
                    threads=options.threads,
                )
                _take_turn(name, workload, gate, seen, options, Path(folder))
                # After every turn, so that a run that is cut short keeps what it measured.
                report.write_csv(options.csv, COLUMNS, _rows(turns, workload))
                last = f"{seen.tokens_per_s[-1]:.1f} tokens/s" if seen.tokens_per_s else ""
                print(f"{name:28} {dtype} {last}{seen.reason}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollout", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--csv", type=Path, help="file for the rows; else standard output")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--providers", nargs="+", choices=tuple(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--model", default=BUILTIN_MODEL)
    parser.add_argument("--group-size", type=int, help=f"completions of each of {len(PROMPTS)}")
    parser.add_argument("--num-tokens", type=int, help="of each completion")
    parser.add_argument("--rounds", type=int, help="turns of each provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds of one turn")
    parser.add_argument("--vllm-python", default="", help="python of an environment with vLLM")
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD of vLLM's process")
    return parser


def _take_turn(
    name: str,
    workload: Workload,
    gate: Gate,
    seen: _Turns,
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """One process, and what it adds to `seen`."""
    module, *modes = PROVIDERS[name]
    is_vllm = module == "run_vllm"
    if is_vllm and not options.vllm_python:
        seen.reason = "missing: pass --vllm-python"
        return
    asked, answered = folder / "workload.json", folder / "answer.json"
    workload.save(asked)
    answered.unlink(missing_ok=True)
    python = options.vllm_python if is_vllm else sys.executable
    command = [python, "-m", f"bench.rollout.{module}", str(asked), str(answered), *modes]
    environment = os.environ | {"OMP_NUM_THREADS": str(workload.threads)}
    if is_vllm and options.vllm_preload:
        environment["LD_PRELOAD"] = options.vllm_preload
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        seen.reason = f"timeout: no answer within {options.timeout:g} s"
        return
    if result.returncode or not answered.exists():
        lines = result.stderr.strip().splitlines() or ["nothing on stderr"]
        seen.reason = f"error: {lines[-1][:200]}"
        return
    answer = Answer.load(answered)
    error, wrong = gate.check(workload, answer)
    if wrong:
        seen.reason = f"wrong: {wrong}"
        return
    seen.tokens_per_s.append(workload.batch * workload.num_tokens / answer.seconds)
    seen.start_s.append(answer.start_s)
    seen.errors.append(error)
    seen.peak_gb = max(seen.peak_gb, answer.peak_gb)
    seen.version = answer.version


def _rows(turns: dict[tuple[str, str], _Turns], workload: Workload) -> list[dict[str, Any]]:
    """One row a (provider, dtype): medians over its turns, and how much faster our best one is."""
    best = max(
        (
            statistics.median(seen.tokens_per_s)
            for (name, _), seen in turns.items()
            if name == "lwz" and seen.tokens_per_s and not seen.reason
        ),
        default=None,
    )
    rows = []
    for (name, dtype), seen in turns.items():
        row: dict[str, Any] = {
            "provider": name,
            "dtype": dtype,
            "status": seen.reason.partition(":")[0] or ("ok" if seen.tokens_per_s else "not run"),
            "batch": workload.batch,
            "new_tokens": workload.num_tokens,
            "prompt_tokens": sum(map(len, workload.prompts)) * workload.group_size,
            "rounds": len(seen.tokens_per_s),
            "version": seen.version,
            **report.machine("cpu", workload.threads),
            "commit": report.commit(),
            "reason": seen.reason,
        }
        if seen.tokens_per_s and not seen.reason:
            speed = statistics.median(seen.tokens_per_s)
            row |= {
                "tokens_per_s": f"{speed:.1f}",
                "min_tokens_per_s": f"{min(seen.tokens_per_s):.1f}",
                "max_tokens_per_s": f"{max(seen.tokens_per_s):.1f}",
                "lwz_ratio": "" if best is None else f"{best / speed:.2f}",
                "start_s": f"{statistics.median(seen.start_s):.1f}",
                "peak_gb": f"{seen.peak_gb:.2f}",
                "logprob_error": f"{max(seen.errors):.1e}",
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
