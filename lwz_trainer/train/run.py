"""What surrounds the steps of every command that trains: resume, record, save, stop, export.

The command owns its steps and counts them; here is what it does between two of them, before the
first, and after the last.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from lwz_trainer.config.run import RunConfig
from lwz_trainer.digest import short_digest
from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.atomic_directory import replace_directory
from lwz_trainer.parallel import Ranks
from lwz_trainer.timeline import Timeline
from lwz_trainer.train.checkpoint import CheckpointStore, Resumable
from lwz_trainer.train.console import RunConsole
from lwz_trainer.train.recorder import Recorder
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.train.weights import TrainedWeights

__all__ = ["Run"]

STEP_FILE = "step"
"""In `final/`: the step whose weights these are."""

P = TypeVar("P", bound=Resumable)


class Run(Generic[P]):
    """A run directory, the weights that are trained in it, and how far that has come.

    Args:
        config: of the run.
        ranks: all of them make theirs together.
        stop: what signals ask of this rank.
        model: sizes of what is trained; a checkpoint of another one is refused.
        weights: of it.
        identity: digests of what must stay as it was, by name; see `CheckpointStore`.
        progress: class of what a checkpoint holds besides tensors.
        num_steps: of the whole run.
        steps_setting: what is raised for more of them.
        timeline: where saving is noted.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        stop: StopSignal,
        model: ModelConfig,
        weights: TrainedWeights[Any],
        identity: dict[str, str],
        *,
        progress: type[P],
        num_steps: int,
        steps_setting: str = "num_steps",
        timeline: Timeline | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._stop = stop
        self._weights = weights
        self._num_steps = num_steps
        self._steps_setting = steps_setting
        self._timeline = timeline or Timeline()
        self._recorder: Recorder | None = None
        self._saved_step = 0
        self.dir = Path(config.output_dir)
        self._final = self.dir / "final"
        self.console = RunConsole(is_main=ranks.is_main, progress=config.log.progress)
        keep = config.checkpoint.keep
        identity = identity | {"optim.moments_dtype": short_digest(config.optim.moments_dtype)}
        self._checkpoints = CheckpointStore(
            self.dir, ranks, model, weights.dtype, identity, keep=keep, progress=progress
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of all steps, on the main rank."""
        return [] if self._recorder is None else self._recorder.history

    def resume(self, restore: Callable[[P], None]) -> None:
        """Takes over the latest checkpoint, if there is one.

        Args:
            restore: takes over what it holds besides tensors, or refuses it.

        Raises:
            UserError: it has more steps than this run, is of another one, or damaged.
        """
        latest = self._checkpoints.latest() if self._config.checkpoint.resume else None
        if latest is None:
            return
        progress = self._checkpoints.read_progress(latest)
        if progress.step > self._num_steps:
            raise UserError(
                f"checkpoint {latest} has {progress.step} steps, this run has {self._num_steps}: "
                f"raise {self._steps_setting} or pass another output_dir"
            )
        restore(progress)
        self._checkpoints.load_tensors(latest, self._weights.optimizer.state_dict())
        self._weights.optimizer.complete_weights()
        self._saved_step = progress.step
        self.console.print(f"resumed from {latest}")

    @contextmanager
    def recording(self, num_steps_done: int) -> Iterator[None]:
        """Around all steps; what an earlier process recorded behind `num_steps_done` goes."""
        if self._ranks.is_main:
            if (self._exported_step() or 0) > num_steps_done:
                (self._final / STEP_FILE).unlink()
            # Of a run that begins anew the measurement before the first step goes too.
            self._recorder = Recorder(self._config, self.dir, num_steps_done=num_steps_done or -1)
        try:
            yield
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def record(self, metrics: dict[str, Any], *lines: str) -> None:
        """One step's metrics, and what a person sees of them."""
        if self._recorder is None:
            return
        self._recorder.write(metrics)
        for line in lines:
            self.console.print(line)

    def must_stop(self) -> bool:
        """True on every rank as soon as one was told to stop."""
        return bool(self._ranks.max([float(self._stop.is_set)])[0])

    def was_stopped(self, step: int) -> bool:
        """After the last step: whether a rank was told to stop; if so, it is said."""
        name = max(self._ranks.gather(self._stop.name))
        if name:
            self.console.print(f"stopped by {name} after step {step}; the same command goes on")
        return bool(name)

    def save_if_due(self, progress: P) -> None:
        every = self._config.checkpoint.every
        if every and progress.step % every == 0:
            self.save(progress)

    def save(self, progress: P) -> None:
        """A checkpoint of the last complete step, unless it exists."""
        if progress.step in (0, self._saved_step):
            return
        self._ranks.enter(f"saving step {progress.step}")
        with self._timeline.span("checkpoint", "save"):
            self._checkpoints.save(self._weights.optimizer.state_dict(), progress)
        self._saved_step = progress.step

    def export(self, step: int, write: Callable[[Path], None]) -> None:
        """Lets the main rank write `final/` from whole weights, unless it holds those of this step.

        All ranks call it together.
        """
        if not self._config.checkpoint.export:
            return
        is_due = self._ranks.is_main and self._exported_step() != step
        if not self._ranks.max([float(is_due)])[0]:
            return

        def write_with_step(directory: Path) -> None:
            write(directory)
            (directory / STEP_FILE).write_text(f"{step}\n", encoding="utf-8")

        with self._weights.whole(on_all_ranks=False):
            if self._ranks.is_main:
                replace_directory(self._final, write_with_step)

    def conclude(self, line: str) -> None:
        """The HTML page, and what the run came to; for the main rank."""
        from lwz_trainer.view.page import write_page

        write_page([self.dir])
        self.console.print(line)

    def _exported_step(self) -> int | None:
        """The step whose weights `final/` holds, if it says so."""
        path = self._final / STEP_FILE
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return int(text) if text.isdecimal() else None
