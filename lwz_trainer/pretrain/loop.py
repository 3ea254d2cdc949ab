"""The pretraining run: read, update, measure, record, save."""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwz_trainer.config.pretrain import PretrainConfig, named_paths
from lwz_trainer.data.templates import load_template
from lwz_trainer.digest import short_digest
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.export import save_pretrained
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_hf_config, load_pretrained, weights_digest
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import Ranks, start_teams
from lwz_trainer.prepare.sources import find_files
from lwz_trainer.pretrain.console import held_out_line, learned_line, step_line
from lwz_trainer.pretrain.rows import SUFFIXES, RowReader
from lwz_trainer.pretrain.stream import Batch, BatchReader, MixedStream, SourceStream
from lwz_trainer.pretrain.update import CrossEntropyUpdate, StepLoss
from lwz_trainer.pretrain.windows import Window
from lwz_trainer.train.metrics import peak_memory_gb
from lwz_trainer.train.recorder import prepare_run_dir
from lwz_trainer.train.run import Run
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.train.starting import started_ranks
from lwz_trainer.train.weights import TrainedWeights, loading_place
from lwz_trainer.update.optimizer import learning_rate

__all__ = ["Pretrainer", "run_pretrain"]


def run_pretrain(config: PretrainConfig) -> None:
    """The `pretrain` command: from a configuration to a run directory."""
    if not config.data.sources:
        raise UserError("data.sources is empty: name at least one text, as NAME=PATH")
    with started_ranks(config) as (ranks, stop):
        Pretrainer(config, ranks, stop).train()


@dataclass(frozen=True)
class _Progress:
    """What a run needs besides tensors to go on as if it had not stopped."""

    step: int
    """Complete steps."""
    stream: dict[str, Any]
    """Where the sources stand."""


class Pretrainer:
    """Owns the model, its data and its optimizer."""

    def __init__(self, config: PretrainConfig, ranks: Ranks, stop: StopSignal) -> None:
        self._config = config
        self._ranks = ranks
        files = _files("data.sources", config.data.sources)
        held_out_files = _files("data.held_out", config.data.held_out)
        self._model_dir = resolve_model_dir(config.model.path)
        sizes = ModelConfig.from_hf(load_hf_config(self._model_dir))
        self._refuse_long_context(sizes.max_positions)
        teams = start_teams(config.parallel, ranks, heads=sizes.heads, kv_heads=sizes.kv_heads)
        dtype = resolve_dtype(config.model.dtype, ranks.device)
        self._model, self._tokenizer = load_pretrained(
            str(self._model_dir), dtype=dtype, **loading_place(config.parallel, ranks)
        )
        reader = RowReader(config.data, self._tokenizer)
        self._stream = _mixed_stream(config, files, reader)
        self._held_out_names = list(held_out_files)
        self._held_out = _held_out_windows(
            config, held_out_files, RowReader(config.data, self._tokenizer)
        )
        _refuse_without_text(files, reader)
        prepare_run_dir(config, ranks, self._model)
        weights = TrainedWeights(self._model, config, ranks)
        self._run = Run(
            config,
            ranks,
            stop,
            sizes,
            weights,
            _identity(config, files, self._model_dir),
            progress=_Progress,
            num_steps=config.num_steps,
        )
        self._console = self._run.console
        self._update = CrossEntropyUpdate(
            weights.trained, weights.optimizer, ranks, teams, config.update, config.model
        )
        self._reader = BatchReader(
            self._stream, config.data.batch_size * config.data.context_tokens
        )
        self._stream_state: dict[str, Any] = {}
        self._step = 0

    def train(self) -> None:
        """All remaining steps; saves and leaves when asked to stop."""
        self._run.resume(self._restore)
        with self._run.recording(self._step), closing(self._reader):
            self._announce()
            if self._step == 0:
                self._record({"step": 0} | self._measure())
            while self._step < self._config.num_steps and not self._run.must_stop():
                self._record(self._train_step())
                self._run.save_if_due(self._progress())
        self._run.save(self._progress())
        if self._run.was_stopped(self._step):
            return
        self._run.export(
            self._step,
            lambda final: save_pretrained(self._model, self._tokenizer, self._model_dir, final),
        )
        if self._ranks.is_main:
            self._run.conclude(learned_line(self._run.history, self._run.dir))

    def _train_step(self) -> dict[str, Any]:
        """One batch and its optimizer step; its metrics, on every rank."""
        started = time.perf_counter()
        self._ranks.enter(f"reading, step {self._step + 1}")
        batch = self._next_batch()
        updating = time.perf_counter()
        self._ranks.enter(f"updating, step {self._step + 1}")
        lr = learning_rate(self._config.optim, self._step, self._config.num_steps)
        with self._console.bar(f"step {self._step + 1}", 1, "micro-batches") as bar:
            loss = self._update.run(
                batch.windows,
                lr=lr,
                on_microbatch=lambda done, total: bar.update(done, total=total),
            )
        self._step += 1
        self._stream_state = batch.state
        ended = time.perf_counter()
        metrics = self._metrics(batch, loss, lr)
        metrics |= {
            "time/data_s": updating - started,
            "time/update_s": ended - updating,
            "time/step_s": ended - started,
            "update/tokens_per_s": metrics["tokens/step"] / (ended - updating),
        }
        every = self._config.data.held_out_every
        if self._step == self._config.num_steps or (every and self._step % every == 0):
            metrics |= self._measure()
        return metrics

    def _next_batch(self) -> Batch:
        """Every rank reads all of it; where one of them cannot, the last step is saved first."""
        batch: Batch | None = None
        error: UserError | None = None
        try:
            batch = self._reader.next()
        except UserError as found:
            error = found
        if self._ranks.max([float(batch is None)])[0]:
            self._run.save(self._progress())
            raise error or TrainingStopped("another rank cannot read its data, and says why")
        assert batch is not None, "no rank failed"
        return batch

    def _metrics(self, batch: Batch, loss: StepLoss, lr: float) -> dict[str, Any]:
        seen = sum(batch.tokens.values())
        metrics: dict[str, Any] = {"step": self._step, "loss": loss.losses.mean}
        if len(batch.tokens) > 1:
            by_source = loss.losses.by_source(list(batch.tokens))
            metrics |= {f"loss/{name}": value for name, value in by_source.items()}
            metrics |= {
                f"data/{name}_tokens_frac": tokens / seen for name, tokens in batch.tokens.items()
            }
        metrics |= {f"data/{name}_epochs": epochs for name, epochs in batch.epochs.items()}
        metrics |= {f"data/{name}_rows_skipped": rows for name, rows in batch.skipped.items()}
        return metrics | {
            "grad_norm": loss.grad_norm,
            "lr": lr,
            "tokens/step": sum(window.num_tokens for window in batch.windows),
            "tokens/loss": sum(window.num_loss_tokens for window in batch.windows),
            "tokens/seen": seen,
            "data/windows": len(batch.windows),
            "memory/peak_gb": self._ranks.max([peak_memory_gb(self._ranks.device)])[0],
        }

    def _measure(self) -> dict[str, float]:
        """Loss and perplexity of the held-out texts; nothing where there are none."""
        if not self._held_out:
            return {}
        self._ranks.enter(f"measuring after step {self._step}")
        losses = self._update.measure(self._held_out)
        metrics = {}
        for name, loss in losses.by_source(self._held_out_names).items():
            metrics[f"held_out/{name}_loss"] = loss
            metrics[f"held_out/{name}_perplexity"] = math.exp(min(loss, 700.0))
        return metrics

    def _record(self, metrics: dict[str, Any]) -> None:
        if len(metrics) == 1:  # a measurement of nothing
            return
        lines = []
        if "loss" in metrics:
            lines.append(step_line(metrics, self._config.num_steps))
        if any(name.startswith("held_out/") for name in metrics):
            lines.append(held_out_line(metrics))
        self._run.record(metrics, *lines)

    def _progress(self) -> _Progress:
        return _Progress(self._step, self._stream_state)

    def _restore(self, progress: _Progress) -> None:
        self._stream.restore(progress.stream)
        self._stream_state = progress.stream
        self._step = progress.step

    def _announce(self) -> None:
        config, data = self._config, self._config.data
        self._console.print(
            f"{config.model.path}: {sum(p.numel() for p in self._model.parameters()) / 1e6:.0f}M "
            f"parameters, {str(self._model.embed.dtype).removeprefix('torch.')}, "
            f"{self._ranks.world_size} x {self._ranks.device.type}; "
            f"{', '.join(source.name for source in self._stream.sources)}; at most "
            f"{data.batch_size * data.context_tokens:,} tokens a step, writing to {self._run.dir}"
        )

    def _refuse_long_context(self, max_positions: int) -> None:
        context = self._config.data.context_tokens
        if context > max_positions:
            raise UserError(
                f"data.context_tokens is {context}, the model's context is {max_positions}: lower "
                "that"
            )


def _files(setting: str, entries: tuple[str, ...]) -> dict[str, list[Path]]:
    return {
        name: find_files(path, SUFFIXES) for name, path in named_paths(setting, entries).items()
    }


def _mixed_stream(
    config: PretrainConfig, files: dict[str, list[Path]], reader: RowReader
) -> MixedStream:
    data = config.data
    sources = [
        SourceStream(
            index,
            name,
            paths,
            reader.read,
            shuffle_windows=data.shuffle_windows,
            seed=config.seed,
        )
        for index, (name, paths) in enumerate(files.items())
    ]
    return MixedStream(sources, list(data.weights) or [1.0] * len(sources))


def _refuse_without_text(files: dict[str, list[Path]], reader: RowReader) -> None:
    """Reads the beginning of each source, so that what is wrong there is said at once."""
    for index, (name, paths) in enumerate(files.items()):
        if next(_windows(index, paths, reader), None) is None:
            reason = next(iter(reader.reasons(index)), "check its files")
            raise UserError(f"data source '{name}' holds no text to learn from: {reason}")


def _windows(index: int, paths: list[Path], reader: RowReader) -> Iterator[Window]:
    """All windows of a source in the order of its files; a row of a wrong form is refused."""
    for path in paths:
        for _, windows in reader.read(index, path, 0, is_strict=True):
            yield from windows


def _held_out_windows(
    config: PretrainConfig, files: dict[str, list[Path]], reader: RowReader
) -> list[Window]:
    """The first windows of each held-out text, up to the limit of tokens."""
    windows: list[Window] = []
    for index, (name, paths) in enumerate(files.items()):
        left = config.data.held_out_tokens
        for window in _windows(index, paths, reader):
            if window.num_tokens > left:
                break
            left -= window.num_tokens
            windows.append(window)
        if left == config.data.held_out_tokens:
            raise UserError(
                f"data.held_out '{name}' gives no window of at most {left} tokens: check its "
                "files, or raise data.held_out_tokens"
            )
    return windows


def _identity(
    config: PretrainConfig, files: dict[str, list[Path]], model_dir: Path
) -> dict[str, str]:
    """The order of the data depends on all of it but the model; held-out texts do not count."""
    settings = dataclasses.asdict(config.data)
    for name in ("sources", "held_out", "held_out_every", "held_out_tokens"):
        del settings[name]
    if config.data.template != "chat":
        settings["template"] = dataclasses.asdict(load_template(config.data.template))
    sizes = {
        name: [(path.name, path.stat().st_size) for path in paths] for name, paths in files.items()
    }
    return {f"data.{name}": short_digest(value) for name, value in settings.items()} | {
        "weights of model.path": weights_digest(model_dir),
        "seed": short_digest(config.seed),
        "names and sizes of data.sources": short_digest(sizes),
    }
