"""Where numbers go: metrics.jsonl always, TensorBoard by default, wandb and trackio on request."""

import importlib
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lwz_kernels.dispatch import impl_choices
from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.reading import dump_config
from lwz_trainer.config.run import RunConfig
from lwz_trainer.errors import UserError
from lwz_trainer.parallel import Ranks
from lwz_trainer.update.optimizer import moments_dtype

__all__ = ["Recorder", "prepare_run_dir"]

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
IMPLEMENTATIONS_FILE = "implementations.json"
"""What each operator's `impl="auto"` meant in the run's latest process."""


def prepare_run_dir(config: RunConfig, ranks: Ranks, model: nn.Module) -> None:
    """Creates the run directory, after everything that speaks against it; all ranks together.

    Args:
        config: of the run.
        ranks: of the run; the main one writes.
        model: of whose checkpoints one more than `checkpoint.keep` must fit.
    """
    if ranks.is_main:
        # fp32 masters and two moments of every parameter.
        size = 4 + 2 * moments_dtype(config.optim).itemsize
        _make_run_dir(config, size * sum(parameter.numel() for parameter in model.parameters()))
    ranks.barrier()


def _make_run_dir(config: RunConfig, checkpoint_bytes: int) -> None:
    run_dir = Path(config.output_dir)
    for name in ("wandb", "trackio"):
        if getattr(config.log, name):
            _import_extra(name)
    if not config.checkpoint.resume and (run_dir / METRICS_FILE).exists():
        raise UserError(
            f"output_dir {run_dir} already holds a run: pass another output_dir, or "
            "--checkpoint.resume=True to go on with it"
        )
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    needed = (config.checkpoint.keep + 1) * checkpoint_bytes
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{free / 1e9:.2f} GB are free on the disk of output_dir {run_dir}, checkpoints need "
            f"{needed / 1e9:.2f} GB: free space, lower checkpoint.keep, or pass another output_dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".write_probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {run_dir} ({error.strerror}): pass another output_dir"
        ) from error


class Recorder:
    """Saves the config, appends one line a step, forwards it to the trackers that are on."""

    def __init__(self, config: RunConfig, run_dir: Path, *, num_steps_done: int) -> None:
        write_text_atomically(run_dir / "config.yaml", dump_config(config))
        self._path = run_dir / METRICS_FILE
        self.history = _keep_first_steps(self._path, num_steps_done)
        for path in (run_dir / "samples").glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > num_steps_done:
                path.unlink()
        self._run_dir = run_dir
        self._impls: dict[str, tuple[str, ...]] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._trackio: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=num_steps_done + 1
            )
        settings = {
            "name": run_dir.name,
            "config": yaml.safe_load(dump_config(config)),
        }
        if config.log.wandb:
            wandb = _import_extra("wandb")
            self._wandb = wandb.init(
                project=config.log.wandb,
                dir=str(run_dir),
                id=_wandb_id(run_dir),
                resume="allow",  # else every process would be a run of its own
                **settings,
            )
        if config.log.trackio:
            self._trackio = _import_extra("trackio")
            self._trackio.init(project=config.log.trackio, **settings)

    def write(self, metrics: dict[str, Any]) -> None:
        """One step; NaN is written as null."""
        self.history.append(metrics)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_json_line(metrics))
        if (impls := impl_choices()) != self._impls:
            self._impls = impls
            write_text_atomically(
                self._run_dir / IMPLEMENTATIONS_FILE, json.dumps(impls, indent=1) + "\n"
            )
        numbers = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value) and name != "step"
        }
        step = metrics["step"]
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._trackio is not None:
            self._trackio.log(numbers, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._trackio is not None:
            self._trackio.finish()


def _keep_first_steps(path: Path, num_steps: int) -> list[dict[str, Any]]:
    """Drops what a killed run wrote after the checkpoint that it goes on from."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # the line that the kill tore; every later step is sampled again
        if record["step"] > num_steps:
            break
        kept.append(record)
    write_text_atomically(path, "".join(_json_line(record) for record in kept))
    return kept


def _wandb_id(run_dir: Path) -> str:
    """The same for all processes of a run; in a directory that moves with it."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        write_text_atomically(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


def _json_line(metrics: dict[str, Any]) -> str:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plain = {name: finite(value) for name, value in metrics.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"log.{name} is set, but {name} is not installed: pip install 'longwriter-zero[{name}]'"
        ) from error
