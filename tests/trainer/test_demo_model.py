"""The model of the demo, on a CPU: both schedules give the same bits, in the forecast memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.loading import load_hf_config, load_tokenizer
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.train.forecast import forecast_memory
from lwz_trainer.train.prompt_set import PromptSet
from tests.trainer.test_train import assert_same_runs
from tests.trainer.train_case import IN_PHASES, ROOT, read_metrics

SETTINGS = {
    "num_steps": 2,
    "num_threads": 1,
    "model.dtype": "fp32",
    "data.prompts_per_step": 2,
    "rollout.group_size": 3,
    "rollout.max_completion_tokens": 40,
    "update.deterministic": True,
    "update.microbatch_tokens": 300,
    "optim.warmup_steps": 0,
    "log.tensorboard": False,
}


def measured_run(tmp_path: Path, schedule: str, **memory: object) -> tuple[float, float]:
    """Peak of the last step, and the forecast, in GB."""
    settings = SETTINGS | {"output_dir": tmp_path / schedule, "update.schedule": schedule} | memory
    arguments = [
        str(ROOT / "configs" / "cpu_demo.yaml"),
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tests.trainer.measured_run", "train", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    program_gb = float(result.stdout.split()[1])
    config = parse_command_line(TrainConfig, arguments, prog="train")
    model_dir = resolve_model_dir(config.model.path)
    model = ModelConfig.from_hf(load_hf_config(model_dir))
    forecast = forecast_memory(
        config,
        model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        longest_prompt=PromptSet(config, load_tokenizer(model_dir), model.max_positions).longest,
        program_bytes=int(program_gb * 1e9),
    )
    return read_metrics(tmp_path / schedule)[-1]["memory/peak_gb"], forecast.peak / 1e9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_schedules_give_the_same_bits_within_the_forecast(tmp_path: Path) -> None:
    """One in phase memory with its optimizer parked, the other in plain memory."""
    for schedule, memory in (("sequential", IN_PHASES), ("interleaved", {})):
        peak_gb, forecast_gb = measured_run(tmp_path, schedule, **memory)
        print(f"{schedule}: peak {peak_gb:.3f} GB, forecast {forecast_gb:.3f} GB")
        assert 0.85 * forecast_gb < peak_gb <= forecast_gb, schedule
    assert_same_runs(tmp_path / "sequential", tmp_path / "interleaved")
