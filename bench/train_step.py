"""One GRPO step against TRL's `GRPOTrainer`: same model, prompts, batch, tokens, precision, CPU.

Each side trains in a process of its own, alternating; the first step of a process is a warm-up.
TRL runs in each of its settings below; compare with its best. This trainer runs with moments in
fp32, as TRL's are, and in bf16. Both see a copy of the model whose end token is one that it
practically never samples, so a completion has as many tokens as the workload says:

- `fixed`: all the same number.
- `natural`: as many as the model itself writes when asked in its chat format. It answers once, by
  its own end token, and both sides replay these lengths: most are short, some reach the limit.

    python -m bench.train_step --workload natural --csv bench/results/cpu/train_step_natural.csv

Needs `pip install trl==1.16.0`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import report
from bench.replayed_lengths import draw_lengths, replay_in_transformers, replayed_in_engine
from lwz_trainer.model.source import BUILTIN_MODEL, resolve_model_dir

PROMPTS = [
    "Write a short paragraph about the sea.",
    "Describe a rainy street in about 60 words.",
    "Write a note of thanks to a teacher.",
    "Explain in a few sentences why people like dogs.",
]
GROUP_SIZE = 8
RARE_TOKEN = "<reponame>"
TARGET_WORDS = 400
"""More than any answer has, so that rewards differ and no row is without a gradient."""


@dataclass(frozen=True)
class Workload:
    """What both sides are given."""

    max_tokens: int
    """Of one completion."""
    num_prompts: int
    """Of one step."""
    template: str
    microbatch_tokens: int
    """Of this trainer."""
    trl_settings: dict[str, tuple[int, dict[str, Any]]]
    """Completions of a micro-batch, and arguments of GRPOConfig."""

    @property
    def num_completions(self) -> int:
        return self.num_prompts * GROUP_SIZE


WORKLOADS = {
    "fixed": Workload(
        128,
        1,
        "{question}\n<answer>",
        280,
        {
            "trl": (8, {"gradient_checkpointing": True}),
            "trl, no checkpointing": (8, {"gradient_checkpointing": False}),
            "trl, no checkpointing, micro-batches of 2": (2, {"gradient_checkpointing": False}),
        },
    ),
    "natural": Workload(
        512,
        4,
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<answer>",
        1024,
        {
            "trl, micro-batches of 8": (8, {"gradient_checkpointing": True}),
            "trl, no checkpointing, micro-batches of 4": (4, {"gradient_checkpointing": False}),
            "trl, no checkpointing, micro-batches of 2": (2, {"gradient_checkpointing": False}),
            "trl, no checkpointing, micro-batches of 1": (1, {"gradient_checkpointing": False}),
        },
    ),
}
# Settings of `optim`.
OUR_SETTINGS: dict[str, dict[str, Any]] = {
    "lwz": {},
    "lwz, bf16 moments": {"moments_dtype": "bf16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="fixed")
    parser.add_argument("--providers", nargs="*", help="all of the workload, or these")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child = run_ours if args.child in OUR_SETTINGS else run_trl
        print(json.dumps(child(args) | {"peak_gb": peak_gb()}))
        return
    known = [*OUR_SETTINGS, *WORKLOADS[args.workload].trl_settings]
    providers = args.providers or known
    if unknown := set(providers) - set(known):
        raise SystemExit(f"no provider {sorted(unknown)}: there are {known}")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args)
        rows = [
            run_child(provider, Path(folder), args)
            for _ in range(args.rounds)
            for provider in providers
        ]
    write_rows(rows, args)


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """The model and the lengths that both sides get: `model`, `lengths.json`."""
    workload = WORKLOADS[args.workload]
    lengths = [[workload.max_tokens] * workload.num_completions] * (args.steps + 1)
    if args.workload == "natural":
        lengths = draw_lengths(
            BUILTIN_MODEL,
            [workload.template.replace("{question}", prompt) for prompt in PROMPTS],
            group_size=GROUP_SIZE,
            max_tokens=workload.max_tokens,
            num_steps=args.steps + 1,
        )
    (folder / "lengths.json").write_text(json.dumps(lengths))
    source = resolve_model_dir(BUILTIN_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer.eos_token = tokenizer.pad_token = RARE_TOKEN
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def read_lengths(args: argparse.Namespace) -> list[list[int]]:
    lengths: list[list[int]] = json.loads((args.folder / "lengths.json").read_text())
    return lengths


def run_child(provider: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.train_step", "--child", provider]
    command += ["--folder", str(folder)]
    command += ["--steps", str(args.steps), "--dtype", args.dtype, "--workload", args.workload]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{provider} failed:\n{result.stderr[-3000:]}")
    row = {"provider": provider, **json.loads(result.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    from lwz_trainer.config.reading import load_config
    from lwz_trainer.config.train import TrainConfig
    from lwz_trainer.train.loop import run_train

    workload = WORKLOADS[args.workload]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        words = [TARGET_WORDS, 2 * TARGET_WORDS]
        prompts.write_text(
            "\n".join(json.dumps({"prompt": p, "length_range": words}) for p in PROMPTS)
        )
        template = Path(folder) / "plain.txt"
        template.write_text(workload.template)
        settings = {
            "output_dir": f"{folder}/run",
            "num_steps": args.steps + 1,
            "model": {
                "path": str(args.folder / "model"),
                "dtype": args.dtype,
                "checkpoint_layers": False,
            },
            "data": {
                "prompts": str(prompts),
                "template": str(template),
                "prompts_per_step": workload.num_prompts,
            },
            "rollout": {
                "group_size": GROUP_SIZE,
                "max_completion_tokens": workload.max_tokens,
                "temperature": 1.0,
                "stop": [],
            },
            "loss": {"loss_type": "dapo"},
            "update": {"microbatch_tokens": workload.microbatch_tokens},
            "optim": {"lr": 1e-6, **OUR_SETTINGS[args.child]},
            "checkpoint": {"every": 0, "export": False},
            "log": {"tensorboard": False, "progress": False},
        }
        config_file = Path(folder) / "config.yaml"
        config_file.write_text(json.dumps(settings))  # JSON is YAML
        with replayed_in_engine(read_lengths(args)):
            run_train(load_config(TrainConfig, config_file))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][1:]
    tokens = [record["tokens/completion_mean"] for record in records]
    check_tokens(tokens, args)
    check_spread([record["zero_spread_frac"] for record in records])
    return {
        "step_s": [record["time/step_s"] for record in records],
        "rollout_s": [record["time/rollout_s"] for record in records],
        "tokens": tokens,
    }


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lwz_trainer.rewards.text import count_words

    workload = WORKLOADS[args.workload]
    num_at_once, settings = workload.trl_settings[args.child]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.started)

    def length(completions: list[str], **_: Any) -> list[float | None]:
        return [min(1.0, count_words(text) / TARGET_WORDS) for text in completions]

    # fp32 weights in both cases: bf16=True multiplies under autocast, as our fp32 masters do.
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.float32)
    replay_in_transformers(model, read_lengths(args), eos_id=tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=length,
            train_dataset=Dataset.from_list(
                [{"prompt": workload.template.replace("{question}", p)} for p in PROMPTS]
            ),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=args.dtype == "bf16",
                per_device_train_batch_size=num_at_once,
                gradient_accumulation_steps=workload.num_completions // num_at_once,
                num_generations=GROUP_SIZE,
                max_completion_length=workload.max_tokens,
                temperature=1.0,
                beta=0.0,
                loss_type="dapo",
                learning_rate=1e-6,
                max_steps=args.steps + 1,
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                **settings,
            ),
            callbacks=[Clock()],
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    tokens = [entry["completions/mean_length"] for entry in log][1:]
    check_tokens(tokens, args)
    check_spread([entry["frac_reward_zero_std"] for entry in log][1:])
    return {"step_s": times[1:], "rollout_s": [], "tokens": tokens}


def check_tokens(tokens: list[float], args: argparse.Namespace) -> None:
    """Refuses a step whose completions had other lengths than those that both sides were given."""
    given = [statistics.mean(step) for step in read_lengths(args)[1:]]
    assert all(abs(own - mean) < 1e-3 for own, mean in zip(tokens, given, strict=True)), tokens


def check_spread(zero_fractions: list[float]) -> None:
    """Refuses a step with a group of equal rewards: a trainer may skip rows without a gradient."""
    assert not any(zero_fractions), zero_fractions


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_rows(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """One row a provider: medians over all timed steps of all its processes."""
    import torch
    import transformers
    import trl

    workload = WORKLOADS[args.workload]
    summary: list[dict[str, Any]] = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        steps = [seconds for row in own for seconds in row["step_s"]]
        rollouts = [seconds for row in own for seconds in row["rollout_s"]]
        summary.append(
            {
                "provider": provider,
                "dtype": args.dtype,
                "workload": args.workload,
                "completions": workload.num_completions,
                "max_completion_tokens": workload.max_tokens,
                "mean_completion_tokens": round(
                    statistics.mean(tokens for row in own for tokens in row["tokens"]), 1
                ),
                "median_step_s": round(statistics.median(steps), 2),
                "min_step_s": round(min(steps), 2),
                "max_step_s": round(max(steps), 2),
                "median_rollout_s": round(statistics.median(rollouts), 2) if rollouts else "",
                "peak_gb": round(max(row["peak_gb"] for row in own), 2),
                "num_steps": len(steps),
                "cpu": report.cpu_name(),
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "trl": trl.__version__,
                "commit": report.commit(),
            }
        )
    ours = summary[0]
    for row in summary:
        row["step_ratio"] = round(row["median_step_s"] / ours["median_step_s"], 2)
        row["peak_ratio"] = round(ours["peak_gb"] / row["peak_gb"], 2)
    report.write_csv(args.csv, list(summary[0]), summary)


if __name__ == "__main__":
    main()
