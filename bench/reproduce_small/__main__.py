"""Pretraining, fine-tuning, a reward model, RL with all three rewards, and an evaluation, on a CPU.

    python -m bench.reproduce_small --longbench longbench_write_en.jsonl

Each stage is a command of `lwz_trainer`, printed as it is run; a stage whose result is there is
passed over, and one that was killed goes on. `--publish DIR` gathers what shows the result: a
summary, curves, tables and answers. `--quick` takes two steps a stage and four requests: it shows
that everything runs, and nothing else. The reward model learns to tell real speeches from degraded
copies of them (shuffled, repeated, cut off), so its score says no more than that.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.reproduce_small.publish import publish
from bench.reproduce_small.requests import write_scaled_requests
from bench.reproduce_small.texts import write_answers, write_plays
from lwz_trainer.atomic_text import write_text_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECT = "bench/reproduce_small/direct_example.txt"
PAIR_WORDS = 60


@dataclass(frozen=True)
class Sizes:
    """How long each stage is."""

    pretrain_steps: int = 40
    sft_steps: int = 30
    rl_steps: int = 20
    num_pairs: int = 240
    num_answers: int = 240
    num_requests: int = 0
    """0: all."""


QUICK = Sizes(
    pretrain_steps=2, sft_steps=2, rl_steps=2, num_pairs=48, num_answers=24, num_requests=4
)


@dataclass(frozen=True)
class Stage:
    """A result, and what makes it."""

    name: str
    result: Path
    make: Callable[[], None]


def main(argv: list[str]) -> int:
    """Runs all stages in order; 0, or the exit code of the one that failed."""
    parser = argparse.ArgumentParser(prog="bench.reproduce_small", description=__doc__)
    parser.add_argument("--longbench", type=Path, required=True, help="English LongBench-Write")
    parser.add_argument("--out", type=Path, help="default runs/reproduce_small, with _quick if so")
    parser.add_argument("--publish", type=Path, help="a folder for what shows the result")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    if not options.longbench.is_file():
        return _fail(
            f"no file {options.longbench}: take longbench_write_en.jsonl from the evaluation "
            "folder of THUDM/LongWriter"
        )
    sizes = QUICK if options.quick else Sizes()
    default = ROOT / "runs" / ("reproduce_small_quick" if options.quick else "reproduce_small")
    out = _seen_from_root(options.out or default)
    longbench = options.longbench.resolve()
    publish_to = _seen_from_root(options.publish) if options.publish is not None else None
    model = options.model
    if Path(model).exists():
        model = str(_seen_from_root(Path(model)))
    os.chdir(ROOT)
    settings = json.dumps(dataclasses.asdict(sizes) | {"model": model}, indent=1) + "\n"
    kept = out / "settings.json"
    if kept.exists() and kept.read_text(encoding="utf-8") != settings:
        return _fail(f"{out} holds a run with other settings, see {kept}: pass another --out")
    write_text_atomically(kept, settings)
    for stage in _stages(out, longbench, model, sizes):
        if stage.result.exists():
            print(f"== {stage.name}: {stage.result} is there", flush=True)
        elif code := _make(stage, out / "seconds.json"):
            return code
    print((out / "evaluation" / "report.md").read_text(encoding="utf-8"))
    if publish_to is not None:
        publish(out, publish_to, systems=list(_systems(out)), num_requests=sizes.num_requests)
        print(f"== published: {publish_to / 'README.md'}")
    return 0


def _make(stage: Stage, times: Path) -> int:
    """Runs one stage and adds its seconds to those of its earlier tries; 0 or an exit code."""
    print(f"== {stage.name}", flush=True)
    seconds = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    started = time.perf_counter()
    code = 0
    try:
        stage.make()
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except KeyboardInterrupt:
        code = 130
    seconds[stage.name] = seconds.get(stage.name, 0.0) + time.perf_counter() - started
    write_text_atomically(times, json.dumps(seconds, indent=1) + "\n")
    if code or not stage.result.exists():
        print(f"== {stage.name} was not finished; the same command goes on", file=sys.stderr)
        return code or 1
    print(f"== {stage.name}: {seconds[stage.name]:.0f} s", flush=True)
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _seen_from_root(path: Path) -> Path:
    """Relative to the checkout where it lies in it: paths are written into configurations."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _systems(out: Path) -> dict[str, tuple[Path, str]]:
    """What is evaluated: a checkpoint and the template that it writes with."""
    pretrained = out / "pretrain" / "final"
    return {
        "pretrained_think": (pretrained, "think_example"),
        "pretrained_direct": (pretrained, DIRECT),
        "sft": (out / "sft" / "final", DIRECT),
        "rl_think": (out / "rl_think" / "final", "think_example"),
        "rl_direct": (out / "rl_direct" / "final", DIRECT),
    }


def _stages(out: Path, longbench: Path, model: str, sizes: Sizes) -> list[Stage]:
    systems = _systems(out)
    pretrained, reward = out / "pretrain" / "final", out / "reward_model" / "final"
    return [
        Stage("texts", out / "held_out.jsonl", lambda: _texts(out)),
        Stage("requests", out / "requests.jsonl", lambda: _requests(longbench, out)),
        Stage("pairs", out / "pairs.jsonl", lambda: _pairs(out, sizes)),
        Stage("answers", out / "answers.jsonl", lambda: _answers(out, sizes)),
        Stage("pretrain", pretrained, lambda: _pretrain(out, model, sizes)),
        Stage("sft", out / "sft" / "final", lambda: _sft(out, pretrained, sizes)),
        Stage("reward model", reward, lambda: _reward_model(out, model)),
        *(
            Stage(name, systems[name][0], partial(_rl, out, name, systems[name][1], sizes))
            for name in ("rl_think", "rl_direct")
        ),
        *(
            Stage(
                f"evaluate {name}",
                out / f"evaluate_{name}" / "report.md",
                partial(_evaluate, out, name, *systems[name], sizes),
            )
            for name in systems
        ),
        Stage("table", out / "evaluation" / "report.md", lambda: _table(out, list(systems), sizes)),
    ]


def _texts(out: Path) -> None:
    num_plays = write_plays(out / "plays.jsonl", out / "held_out.jsonl")
    print(f"{num_plays} plays to learn from")


def _requests(longbench: Path, out: Path) -> None:
    kept, dropped = write_scaled_requests(longbench, out / "requests.jsonl")
    print(f"{kept} requests, {dropped} dropped because they name several lengths")


def _pairs(out: Path, sizes: Sizes) -> None:
    unfinished = out / "pairs.partial"
    numbers = ["--num-pairs", str(sizes.num_pairs), "--max-words", str(PAIR_WORDS)]
    _run(["-m", "bench.reward_pairs", "degraded", "--out", str(unfinished), *numbers])
    unfinished.rename(out / "pairs.jsonl")


def _answers(out: Path, sizes: Sizes) -> None:
    print(f"{write_answers(out / 'answers.jsonl', sizes.num_answers)} answers to learn from")


def _pretrain(out: Path, model: str, sizes: Sizes) -> None:
    _trainer(
        "pretrain",
        "configs/pretrain/cpu_demo.yaml",
        f"--model.path={model}",
        f"--output_dir={out / 'pretrain'}",
        f"--num_steps={sizes.pretrain_steps}",
        f"--optim.warmup_steps={min(5, sizes.pretrain_steps - 1)}",
        "--checkpoint.keep=1",
        "--data.sources",
        f"plays={out / 'plays.jsonl'}",
        "--data.held_out",
        f"plays={out / 'held_out.jsonl'}",
    )


def _sft(out: Path, pretrained: Path, sizes: Sizes) -> None:
    _trainer(
        "pretrain",
        "configs/pretrain/cpu_demo.yaml",
        f"--model.path={pretrained}",
        f"--output_dir={out / 'sft'}",
        f"--num_steps={sizes.sft_steps}",
        f"--optim.warmup_steps={min(5, sizes.sft_steps - 1)}",
        "--checkpoint.keep=1",
        f"--data.template={DIRECT}",
        "--data.loss_on=answer",
        "--data.sources",
        f"answers={out / 'answers.jsonl'}",
    )


def _reward_model(out: Path, model: str) -> None:
    _trainer(
        "reward-model",
        "configs/reward_model/cpu.yaml",
        f"--model.path={model}",
        f"--output_dir={out / 'reward_model'}",
        f"--data.pairs={out / 'pairs.jsonl'}",
        "--checkpoint.every=10",
        "--checkpoint.keep=1",
    )


def _rl(out: Path, name: str, template: str, sizes: Sizes) -> None:
    _trainer(
        "train",
        "configs/cpu_demo.yaml",
        f"--model.path={out / 'pretrain' / 'final'}",
        f"--output_dir={out / name}",
        f"--num_steps={sizes.rl_steps}",
        f"--optim.warmup_steps={min(6, sizes.rl_steps - 1)}",
        "--checkpoint.every=5",
        "--checkpoint.keep=1",
        f"--data.template={template}",
        "--rewards.writing.weight=1.0",
        f"--rewards.writing.model={out / 'reward_model' / 'final'}",
        "--rewards.writing.max_tokens=512",
    )


def _evaluate(out: Path, name: str, model: Path, template: str, sizes: Sizes) -> None:
    _trainer(
        "eval",
        "longbench-write",
        f"--data={out / 'requests.jsonl'}",
        f"--output_dir={out / f'evaluate_{name}'}",
        f"--limit={sizes.num_requests}",
        f"--generate.name={name}",
        f"--generate.model={model}",
        f"--generate.template={template}",
        "--generate.max_tokens=256",
        "--generate.max_num_seqs=16",
    )


def _table(out: Path, names: list[str], sizes: Sizes) -> None:
    """All systems in one report, from the answers that are there."""
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    answers = [
        f"{name}={out / f'evaluate_{name}' / 'responses' / f'{name}.jsonl'}" for name in names
    ]
    _trainer(
        "eval",
        "longbench-write",
        f"--data={out / 'requests.jsonl'}",
        f"--output_dir={out / 'evaluation'}",
        f"--limit={sizes.num_requests}",
        "--responses",
        *answers,
    )


def _trainer(*arguments: str) -> None:
    _run(["-m", "lwz_trainer", *arguments])


def _run(arguments: list[str]) -> None:
    print("$ python", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
