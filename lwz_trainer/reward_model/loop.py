"""The reward model's trainer: read pairs, update, evaluate, record, save."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.data.prompts import prompt_order
from lwz_trainer.digest import short_digest
from lwz_trainer.errors import UserError
from lwz_trainer.model.export import ScoreHead, save_pretrained
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_decoder, load_hf_config, load_tokenizer, weights_digest
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import Ranks
from lwz_trainer.reward_model.batches import encode_pairs
from lwz_trainer.reward_model.calibration import ScoredPair, heldout_metrics, heldout_report
from lwz_trainer.reward_model.model import RewardModel, choose_pad_token_id
from lwz_trainer.reward_model.pairs import Pair, load_split
from lwz_trainer.reward_model.report import report_markdown
from lwz_trainer.reward_model.update import PairUpdate
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.rewards.text import count_words
from lwz_trainer.train.metrics import peak_memory_gb
from lwz_trainer.train.recorder import prepare_run_dir
from lwz_trainer.train.run import Run
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.train.starting import started_ranks
from lwz_trainer.train.weights import TrainedWeights, loading_place
from lwz_trainer.update.optimizer import learning_rate

__all__ = ["RewardModelTrainer", "run_reward_model"]


def run_reward_model(config: RewardModelConfig) -> None:
    """The `reward-model` command: from a configuration to a run directory."""
    with started_ranks(config) as (ranks, stop):
        RewardModelTrainer(config, ranks, stop).train()


@dataclass(frozen=True)
class _Progress:
    """What a run needs besides tensors to go on as if it had not stopped."""

    step: int
    """Complete steps; also the position in the order of the pairs."""


class RewardModelTrainer:
    """Owns the reward model, and everything that a step needs."""

    def __init__(self, config: RewardModelConfig, ranks: Ranks, stop: StopSignal) -> None:
        self._config = config
        self._ranks = ranks
        self._pairs, heldout = load_split(config.data, config.seed)
        self._model_dir = resolve_model_dir(config.model.path)
        self._tokenizer = load_tokenizer(self._model_dir)
        limit = int(load_hf_config(self._model_dir).max_position_embeddings)
        self._encoder = AnswerEncoder(self._tokenizer, min(config.data.max_tokens, limit))
        self._pad_token_id = choose_pad_token_id(
            self._tokenizer, closing_ids=self._encoder.closing_ids, model_dir=self._model_dir
        )
        self._heldout = encode_pairs(heldout, self._encoder)
        update = config.update
        self._num_steps = int(update.num_epochs * len(self._pairs) / update.pairs_per_step)
        self._refuse_schedule()
        dtype = resolve_dtype(config.model.dtype, ranks.device)
        place = loading_place(config.parallel, ranks)
        decoder = load_decoder(self._model_dir, dtype=dtype, **place)
        self._model = RewardModel(decoder)
        prepare_run_dir(config, ranks, self._model)
        weights = TrainedWeights(self._model, config, ranks)
        self._run = Run(
            config,
            ranks,
            stop,
            decoder.config,
            weights,
            self._identity(heldout),
            progress=_Progress,
            num_steps=self._num_steps,
            steps_setting="update.num_epochs",
        )
        self._console = self._run.console
        self._update = PairUpdate(weights.trained, weights.optimizer, ranks, update, config.model)
        self._step = 0
        self._scored: list[ScoredPair] = []

    def train(self) -> None:
        """All remaining steps; saves and leaves when asked to stop."""
        self._run.resume(self._restore)
        with self._run.recording(self._step):
            self._announce()
            while self._step < self._num_steps and not self._run.must_stop():
                metrics = self._train_step()
                self._run.record(metrics, _step_line(metrics, self._num_steps))
                self._run.save_if_due(_Progress(self._step))
        self._run.save(_Progress(self._step))
        if not self._run.was_stopped(self._step):
            self._finish()

    def _train_step(self) -> dict[str, Any]:
        """One update, and the held-out scores where they are due."""
        started = time.perf_counter()
        self._ranks.enter(f"updating, step {self._step + 1}")
        update, seed = self._config.update, self._config.seed
        lr = learning_rate(self._config.optim, self._step, self._num_steps)
        first = self._step * update.pairs_per_step
        order = prompt_order(len(self._pairs), seed, first, update.pairs_per_step)
        mine = [self._pairs[i] for i in order[self._ranks.rank :: self._ranks.world_size]]
        encoded = encode_pairs(mine, self._encoder)
        with self._console.bar(f"step {self._step + 1} updating", 1, "micro-batches") as bar:
            result = self._update.step(
                encoded,
                num_pairs=update.pairs_per_step,
                lr=lr,
                on_microbatch=lambda done, total: bar.update(done, total=total),
            )
        self._step += 1
        updated = time.perf_counter()
        metrics = {"step": self._step} | result.values
        metrics |= {"lr": lr, "epoch": self._step * update.pairs_per_step / len(self._pairs)}
        every = update.eval_every
        if self._step == self._num_steps or (every and self._step % every == 0):
            self._scored = self._score_heldout()
            scored = heldout_metrics(self._scored)
            metrics |= {f"heldout/{name}": value for name, value in scored.items()}
        (memory,) = self._ranks.max([peak_memory_gb(self._ranks.device)])
        return metrics | {
            "update/tokens_per_s": result.num_packed_tokens / (updated - started),
            "time/update_s": updated - started,
            "time/step_s": time.perf_counter() - started,
            "memory/peak_gb": memory,
        }

    def _score_heldout(self) -> list[ScoredPair]:
        """All held-out pairs, on every rank."""
        self._ranks.enter(f"scoring held-out pairs, step {self._step}")
        rank, world_size = self._ranks.rank, self._ranks.world_size
        parts = self._ranks.gather(self._update.evaluate(self._heldout[rank::world_size]))
        scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._heldout)
        for number, part in enumerate(parts):
            scores[number::world_size] = part
        return [
            ScoredPair(
                prompt=encoded.pair.prompt,
                source=encoded.pair.source,
                chosen=chosen,
                rejected=rejected,
                chosen_words=count_words(encoded.pair.chosen),
                rejected_words=count_words(encoded.pair.rejected),
            )
            for encoded, (chosen, rejected) in zip(self._heldout, scores, strict=True)
        ]

    def _finish(self) -> None:
        """The report and the final weights."""
        if not self._scored:  # the run was complete before this process
            self._scored = self._score_heldout()
        self._run.export(self._step, self._write_final)
        if not self._ranks.is_main:
            return
        report = heldout_report(self._scored, seed=self._config.seed) | {
            "base": self._config.model.path,
            "pairs": Path(self._config.data.pairs).name,
            "num_trained_pairs": len(self._pairs),
            "num_steps": self._num_steps,
            "truncated_frac": fmean(pair.is_truncated for pair in self._heldout),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text_atomically(self._run.dir / "report.json", text)
        write_text_atomically(self._run.dir / "report.md", report_markdown(report))
        self._run.conclude(
            f"held out: accuracy {_number(report['accuracy'])}, at matched length "
            f"{_number(report['accuracy_matched_length'])}, longer is better "
            f"{_number(report['longer_is_better_accuracy'])}. Look at {self._run.dir / 'report.md'}"
        )

    def _identity(self, heldout: list[Pair]) -> dict[str, str]:
        pairs_per_step = self._config.update.pairs_per_step
        return {
            "weights of model.path": weights_digest(self._model_dir),
            "seed": short_digest(self._config.seed),
            "pairs to train on": short_digest([dataclasses.astuple(p) for p in self._pairs]),
            "held-out pairs": short_digest([dataclasses.astuple(p) for p in heldout]),
            "update.pairs_per_step": short_digest(pairs_per_step),
        }

    def _restore(self, progress: _Progress) -> None:
        self._step = progress.step

    def _write_final(self, final: Path) -> None:
        head = ScoreHead(self._model.score.detach(), self._pad_token_id)
        save_pretrained(
            self._model.decoder, self._tokenizer, self._model_dir, final, score_head=head
        )

    def _announce(self) -> None:
        num_parameters = sum(p.numel() for p in self._model.parameters())
        self._console.print(
            f"{self._config.model.path}: {num_parameters / 1e6:.0f}M parameters, "
            f"{self._ranks.world_size} x {self._ranks.device.type}; {len(self._pairs)} pairs to "
            f"train on, {len(self._heldout)} held out, {self._num_steps} steps, writing to "
            f"{self._run.dir}"
        )

    def _refuse_schedule(self) -> None:
        update, warmup = self._config.update, self._config.optim.warmup_steps
        if self._num_steps < 1:
            raise UserError(
                f"update.num_epochs {update.num_epochs} of {len(self._pairs)} pairs are less than "
                f"one step of update.pairs_per_step {update.pairs_per_step}: lower that, or raise "
                "update.num_epochs"
            )
        if warmup >= self._num_steps and warmup > 0:
            raise UserError(
                f"optim.warmup_steps ({warmup}) must be below the number of steps "
                f"({self._num_steps}): the peak rate would never be reached"
            )


def _step_line(metrics: dict[str, Any], num_steps: int) -> str:
    heldout = ""
    if "heldout/accuracy" in metrics:
        heldout = f"  held out: accuracy {metrics['heldout/accuracy']:.3f}"
    return (
        f"step {metrics['step']:>{len(str(num_steps))}}/{num_steps}  loss {metrics['loss']:.3f}  "
        f"accuracy {metrics['accuracy']:.2f}  margin {metrics['margin']:.2f}  "
        f"grad {metrics['grad_norm']:.2f}  {metrics['time/step_s']:.1f} s{heldout}"
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
