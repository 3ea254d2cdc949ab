"""Saving and resuming: a checkpoint is complete or it does not exist.

A checkpoint is written beside its final name, renamed, and only then named in `latest`; a kill at
any moment leaves the previous one in force. The tensors go through torch.distributed.checkpoint;
`state.json` holds what is not a tensor.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
import torch.distributed.checkpoint as dcp

from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.parallel import Ranks

__all__ = ["CheckpointStore", "Progress", "Resumable"]

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Progress:
    """What a run needs besides tensors to go on as if it had not stopped."""

    step: int
    """Complete steps; also the position in the data order and the RNG's step."""
    policy_version: int
    expected_completion_tokens: float
    """The engine's running estimate, which decides admission."""
    reference_levels: dict[str, int] = dataclasses.field(default_factory=dict)
    """Prompts that have left references behind, see `rewards.references`."""


class Resumable(Protocol):
    """A dataclass of what JSON can hold, complete steps among it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int: ...


P = TypeVar("P", bound=Resumable)


class CheckpointStore(Generic[P]):
    """Checkpoints of one run directory.

    Args:
        run_dir: of the run.
        ranks: that save and load together.
        model: whose tensors are saved.
        dtype: of its parameters.
        identity: digests of what must stay as it was, by name: the weights that a run starts from,
            its seed, its data and their order. What may change between two starts of one run has no
            place in it: the number of steps, the learning rate, rewards, memory, saving.
        keep: checkpoints kept.
        progress: class of what is saved besides tensors.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        model: ModelConfig,
        dtype: torch.dtype,
        identity: dict[str, str],
        *,
        keep: int,
        progress: type[P],
    ) -> None:
        self._progress = progress
        self._dir = run_dir / "checkpoints"
        self._ranks = ranks
        self._model = json.loads(json.dumps(dataclasses.asdict(model) | {"dtype": str(dtype)}))
        self._identity = identity
        self._keep = keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        pointer = self._dir / "latest"
        if not pointer.is_file():
            return None
        path = self._dir / pointer.read_text(encoding="utf-8").strip()
        if not (path / STATE_FILE).is_file():
            raise UserError(
                f"{pointer} names {path.name}, which is missing or incomplete: restore it, write "
                "the name of another checkpoint there, or pass another output_dir"
            )
        return path

    def save(self, tensors: dict[str, Any], progress: P) -> Path:
        """Writes a checkpoint, points `latest` to it, and removes the oldest ones."""
        name = f"step_{progress.step:06d}"
        final, partial = self._dir / name, self._dir / f".{name}.partial"
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._ranks.barrier()
        try:
            with _without_single_process_warning():
                dcp.save(
                    tensors,
                    checkpoint_id=partial,
                    process_group=self._ranks.group,
                    no_dist=self._is_alone,
                )
        except dcp.CheckpointException as error:
            raise UserError(
                f"cannot write checkpoint {final} ({_reason(error)}): the one before it is still "
                "in force; free space or mend the disk, and the same command goes on"
            ) from error
        if self._ranks.is_main:
            state = {
                "progress": dataclasses.asdict(progress),
                "world_size": self._ranks.world_size,
                "model": self._model,
                "identity": self._identity,
            }
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _replace_text(self._dir / "latest", name)
            for old in sorted(self._dir.glob("step_*"))[: -self._keep]:
                shutil.rmtree(old)
        self._ranks.barrier()
        return final

    def read_progress(self, path: Path) -> P:
        """What is not a tensor; refuses a checkpoint of another run or number of ranks."""
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            progress = self._progress(**state["progress"])
            identity = dict(state["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"checkpoint {path} is damaged ({error}): write an older one's name into "
                f"{path.parent / 'latest'}"
            ) from error
        if state["model"] != self._model:
            differing = sorted(k for k in self._model if state["model"].get(k) != self._model[k])
            raise UserError(
                f"checkpoint {path} is of another model ({', '.join(differing)} differ): use the "
                "model that the run was started with, or another output_dir"
            )
        if identity != self._identity:
            names = sorted(identity.keys() | self._identity.keys())
            differing = [name for name in names if identity.get(name) != self._identity.get(name)]
            raise UserError(
                f"checkpoint {path} is of another run ({', '.join(differing)} differ): start with "
                f"the same, pass another output_dir, or remove {self._dir.parent} to begin anew"
            )
        if state["world_size"] != self._ranks.world_size:
            raise UserError(
                f"checkpoint {path} was written by {state['world_size']} processes, this run has "
                f"{self._ranks.world_size}: start it with --nproc-per-node such that there are "
                f"{state['world_size']}, or pass another output_dir"
            )
        return progress

    def load_tensors(self, path: Path, tensors: dict[str, Any]) -> None:
        """Reads into the given tensors, in place."""
        try:
            with _without_single_process_warning():
                dcp.load(
                    tensors,
                    checkpoint_id=path,
                    process_group=self._ranks.group,
                    no_dist=self._is_alone,
                )
        except (OSError, ValueError, RuntimeError, dcp.CheckpointException) as error:
            raise UserError(
                f"checkpoint {path} cannot be read ({_reason(error)}): write an older one's "
                f"name into {path.parent / 'latest'}"
            ) from error

    @property
    def _is_alone(self) -> bool:
        return self._ranks.group is None


def _reason(error: BaseException) -> str:
    """The cause in one line; torch wraps it once for each rank."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """torch warns that one process is one process; that is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _replace_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new content."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
