"""The trainer: sample, score, compare within groups, update, record, save."""

import faulthandler
import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.export import save_pretrained
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import (
    load_decoder,
    load_hf_config,
    load_pretrained,
)
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import Ranks, start_ranks, start_teams
from lwz_trainer.rewards.advantages import GroupAdvantages, check_failures, group_advantages
from lwz_trainer.rewards.score import RewardParts, RewardSample, Scorer, stack_rewards
from lwz_trainer.rollout import EngineStats, RolloutInterrupted, Sample
from lwz_trainer.rollout.making import make_engine
from lwz_trainer.train.checkpoint import CheckpointStore, Progress
from lwz_trainer.train.console import RunConsole, learned_line, step_line
from lwz_trainer.train.metrics import peak_memory_gb, sample_metrics, step_warnings
from lwz_trainer.train.prompt_set import GroupPrompt, PromptSet
from lwz_trainer.train.recorder import Recorder, prepare_run_dir
from lwz_trainer.train.records import sample_records, write_records
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.update.optimizer import FlatAdamW, learning_rate
from lwz_trainer.update.packing import TrainSample
from lwz_trainer.update.policy_update import PolicyUpdate, UpdateMetrics

__all__ = ["Trainer", "run_train"]


_logger = logging.getLogger(__name__)


def run_train(config: TrainConfig) -> None:
    """The `train` command: from a configuration to a run directory."""
    ranks = start_ranks(
        device=config.device,
        num_threads=config.num_threads,
        timeout_s=config.parallel.timeout_s,
    )
    if hasattr(signal, "SIGUSR1") and sys.__stderr__ is not None:
        # Where is it? Stacks of all threads, to the process's own stderr.
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    stop = StopSignal()
    stop.install()
    try:
        Trainer(config, ranks, stop).train()
    except BaseException as error:
        ranks.abandon(error)
        raise
    ranks.close()


@dataclass(frozen=True)
class _Rollout:
    """One step's groups of this rank, sampled."""

    groups: list[GroupPrompt]
    samples: list[Sample]
    stats: EngineStats
    seconds: float


class Trainer:
    """Owns the policy, and everything that a step needs."""

    def __init__(self, config: TrainConfig, ranks: Ranks, stop: StopSignal) -> None:
        self._config = config
        self._ranks = ranks
        self._stop = stop
        self._console = RunConsole(is_main=ranks.is_main, progress=config.log.progress)
        self._refuse_uneven_ranks()
        self._model_dir = resolve_model_dir(config.model.path)
        sizes = ModelConfig.from_hf(load_hf_config(self._model_dir))
        self._teams = start_teams(
            config.parallel, ranks, heads=sizes.heads, kv_heads=sizes.kv_heads
        )
        dtype = resolve_dtype(config.model.dtype, ranks.device)
        self._model, self._tokenizer = load_pretrained(
            str(self._model_dir), dtype=dtype, device=ranks.device
        )
        self._prompts = PromptSet(config, self._tokenizer, self._model.config.max_positions)
        self._scorer = Scorer(config.rewards, self._prompts.kind, ranks.device)
        self._run_dir = Path(config.output_dir)
        self._engine = make_engine(self._model, self._tokenizer, self._model_dir, config.rollout)
        self._engine.plan_cache(
            longest_prompt=self._prompts.longest, num_samples=config.rollout.max_num_seqs
        )
        if ranks.is_main:
            # fp32 masters and two moments of every parameter.
            size = 12 * sum(p.numel() for p in self._model.parameters())
            prepare_run_dir(config, checkpoint_bytes=size)
        ranks.barrier()
        shard_group = ranks.group if config.parallel.shard_optimizer else None
        self._optimizer = FlatAdamW(self._model, config.optim, shard_group)
        self._update = PolicyUpdate(
            self._model,
            self._optimizer,
            ranks,
            self._teams,
            config.update,
            config.loss,
            ref_model=self._load_reference(dtype),
            temperature=config.rollout.temperature,
            max_completion_tokens=config.rollout.max_completion_tokens,
            section=config.model,
        )
        self._checkpoints = CheckpointStore(
            self._run_dir, ranks, self._model.config, dtype, keep=config.checkpoint.keep
        )
        self._step = 0
        self._policy_version = 0
        self._saved_step = -1
        self._addresses = [p.data_ptr() for p in self._model.parameters()]

    def train(self) -> None:
        """All remaining steps; saves and leaves when asked to stop."""
        self._resume()
        recorder = (
            Recorder(self._config, self._run_dir, num_steps_done=self._step)
            if self._ranks.is_main
            else None
        )
        self._announce()
        try:
            while self._step < self._config.num_steps and not self._must_stop():
                metrics = self._train_step()
                if metrics is None:
                    break
                if recorder is not None:
                    recorder.write(metrics)
                    self._console.print(step_line(metrics, self._config.num_steps))
                self._save_if_due()
        finally:
            if recorder is not None:
                recorder.close()
        self._save()
        if self._stop.is_set:
            self._console.print(
                f"stopped by {self._stop.name} after step {self._step}; the same command goes on"
            )
        else:
            self._finish(recorder)

    def _train_step(self) -> dict[str, Any] | None:
        """One rollout and its update; None if a signal ended the rollout."""
        started = time.perf_counter()
        rollout = self._sample()
        if rollout is None:
            return None
        scoring = time.perf_counter()
        parts, advantages = self._score(rollout)
        updating = time.perf_counter()
        lr = learning_rate(self._config.optim, self._step, self._config.num_steps)
        update = self._update_policy(rollout, advantages, lr)
        self._step += 1
        ended = time.perf_counter()
        records = sample_records(
            self._step,
            rollout.groups,
            rollout.samples,
            parts,
            advantages,
            opened=self._prompts.opened,
        )
        times = {
            "time/rollout_s": rollout.seconds,
            "time/reward_s": updating - scoring,
            "time/update_s": ended - updating,
            "time/step_s": ended - started,
        }
        return self._record(records, rollout, update, times, lr)

    def _sample(self) -> _Rollout | None:
        """This rank's groups from the current weights."""
        started = time.perf_counter()
        self._ranks.enter(f"sampling, step {self._step + 1}")
        self._assert_same_addresses()
        self._optimizer.release_grads()
        groups = self._prompts.step_groups(
            self._step, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        total = sum(len(group.request.samples) for group in groups)
        result = None
        with self._console.bar(f"step {self._step + 1} sampling", total, "samples") as bar:
            try:
                result = self._engine.generate(
                    [group.request for group in groups],
                    seed=self._config.seed,
                    step=self._step,
                    policy_version=self._policy_version,
                    on_progress=lambda done, tokens: bar.update(done, f"{tokens} tokens"),
                    should_stop=lambda: self._stop.is_set,
                )
            except RolloutInterrupted:
                _logger.info("rollout of step %d interrupted", self._step + 1)
        seconds = time.perf_counter() - started
        if self._ranks.max([float(result is None)])[0] or result is None:
            return None
        return _Rollout(groups, *result, seconds=seconds)

    def _score(self, rollout: _Rollout) -> tuple[list[RewardParts], GroupAdvantages]:
        """Rewards of this rank's samples, and advantages of all groups of the step."""
        self._ranks.enter(f"scoring, step {self._step + 1}")
        prompt_of = {group.request.group: group.prompt for group in rollout.groups}
        parts = self._scorer.score_samples(
            [
                RewardSample(
                    prompt=prompt_of[sample.group].prompt,
                    length_range=prompt_of[sample.group].length_range,
                    completion=self._prompts.opened + sample.text,
                    stopped_at_answer=sample.stop_string == "</answer>",
                )
                for sample in rollout.samples
            ]
        )
        # Ranks may hold parts of a group; advantages need all of it.
        everyone = [part for rank_parts in self._ranks.gather(parts) for part in rank_parts]
        rewards, is_applicable = stack_rewards(everyone, self._config.rollout.group_size)
        advantages = group_advantages(
            rewards,
            self._config.rewards.weights,
            self._config.rewards.normalization,
            is_applicable=is_applicable,
        )
        check_failures(
            advantages.num_failed,
            advantages.num_applicable,
            self._config.rewards.max_failed_frac,
        )
        return parts, advantages

    def _update_policy(
        self, rollout: _Rollout, advantages: GroupAdvantages, lr: float
    ) -> UpdateMetrics:
        self._ranks.enter(f"updating, step {self._step + 1}")
        advantages_S = advantages.advantages_PG.flatten()
        train_samples = [
            TrainSample(
                group=sample.group,
                sample=sample.sample,
                prompt_ids=sample.prompt_ids,
                completion_ids=sample.completion_ids,
                sampling_logprobs=sample.logprobs,
                advantage=float(advantages_S[sample.sample]),
                in_loss=not (sample.is_truncated and self._config.update.mask_truncated),
            )
            for sample in rollout.samples
        ]
        with self._console.bar(f"step {self._step + 1} updating", 1, "micro-batches") as bar:
            update = self._update.run(
                train_samples,
                num_groups=self._config.data.prompts_per_step,
                lr=lr,
                on_microbatch=lambda done, total: bar.update(done, total=total),
            )
        self._policy_version += update.num_updates
        return update

    def _record(
        self,
        records: list[dict[str, Any]],
        rollout: _Rollout,
        update: UpdateMetrics,
        times: dict[str, float],
        lr: float,
    ) -> dict[str, Any]:
        """Writes all ranks' samples and returns the step's metrics, on every rank."""
        self._ranks.enter(f"recording step {self._step}")
        stats = rollout.stats
        everything = [record for part in self._ranks.gather(records) for record in part]
        everything.sort(key=lambda record: (record["group"], record["member"]))
        if self._ranks.is_main:
            write_records(self._run_dir / "samples" / f"step_{self._step:06d}.parquet", everything)
        tokens, prefill, preemptions = self._ranks.sum(
            [float(stats.num_tokens), float(stats.num_prefill_tokens), float(stats.num_preemptions)]
        )
        kv_used, memory = self._ranks.max([stats.peak_kv_frac, peak_memory_gb(self._ranks.device)])
        metrics: dict[str, Any] = {"step": self._step}
        metrics |= sample_metrics(everything)
        metrics |= update.values
        metrics |= times
        metrics |= {
            "lr": lr,
            "policy_version": self._policy_version,
            "rollout/tokens_per_s": tokens / times["time/rollout_s"],
            "rollout/prefill_tokens": prefill,
            "rollout/preemptions": preemptions,
            "rollout/kv_used_frac": kv_used,
            "update/tokens_per_s": update.num_packed_tokens / times["time/update_s"],
            "memory/peak_gb": memory,
        }
        metrics["warnings"] = step_warnings(metrics)
        return metrics

    def _resume(self) -> None:
        """Takes over the latest checkpoint, if there is one."""
        latest = self._checkpoints.latest() if self._config.checkpoint.resume else None
        if latest is None:
            return
        progress = self._checkpoints.read_progress(latest)
        if progress.step > self._config.num_steps:
            raise UserError(
                f"checkpoint {latest} has {progress.step} steps, num_steps is "
                f"{self._config.num_steps}: raise num_steps or pass another output_dir"
            )
        self._checkpoints.load_tensors(latest, self._optimizer.state_dict())
        self._optimizer.complete_weights()
        self._step = self._saved_step = progress.step
        self._policy_version = progress.policy_version
        self._engine.expected_completion_tokens = progress.expected_completion_tokens
        self._console.print(f"resumed from {latest}")

    def _save_if_due(self) -> None:
        every = self._config.checkpoint.every
        if every and self._step % every == 0:
            self._save()

    def _save(self) -> None:
        """A checkpoint of the last complete step, unless it exists."""
        if self._step == self._saved_step or self._step == 0:
            return
        self._ranks.enter(f"saving step {self._step}")
        self._checkpoints.save(
            self._optimizer.state_dict(),
            Progress(self._step, self._policy_version, self._engine.expected_completion_tokens),
        )
        self._saved_step = self._step

    def _finish(self, recorder: Recorder | None) -> None:
        """The final weights, the report, and the line that says what was learned."""
        if recorder is None:
            return
        if self._config.checkpoint.export:
            final = self._run_dir / "final"
            if not final.exists():
                save_pretrained(self._model, self._tokenizer, self._model_dir, final)
        from lwz_trainer.view.page import write_page

        write_page([self._run_dir])
        self._console.print(learned_line(recorder.history, self._run_dir))

    def _announce(self) -> None:
        config = self._config
        per_step = config.data.prompts_per_step * config.rollout.group_size
        self._console.print(
            f"{config.model.path}: {sum(p.numel() for p in self._model.parameters()) / 1e6:.0f}M "
            f"parameters, {str(self._model.embed.dtype).removeprefix('torch.')}, "
            f"{self._ranks.world_size} x {self._ranks.device.type}; {len(self._prompts)} prompts, "
            f"{per_step} samples a step, writing to {self._run_dir}"
        )
        for num_ranks, (scheme, _) in self._teams.plan.schemes.items():
            self._console.print(f"sequences of the update on {num_ranks} ranks: {scheme}")

    def _must_stop(self) -> bool:
        """True on every rank as soon as one was told to stop."""
        return bool(self._ranks.max([float(self._stop.is_set)])[0])

    def _load_reference(self, dtype: torch.dtype) -> Decoder | None:
        """The frozen initial policy, where the loss has a KL term."""
        if self._config.loss.kl_coef == 0:
            return None
        reference = load_decoder(self._model_dir, dtype=dtype, device=self._ranks.device)
        return reference.requires_grad_(False)

    def _refuse_uneven_ranks(self) -> None:
        samples = self._config.data.prompts_per_step * self._config.rollout.group_size
        if samples % self._ranks.world_size:
            raise UserError(
                f"data.prompts_per_step times rollout.group_size ({samples}) must be a multiple of "
                f"the number of processes ({self._ranks.world_size}): every rank takes as many"
            )

    def _assert_same_addresses(self) -> None:
        """The optimizer works in place: one copy of the weights, at fixed addresses."""
        if self._addresses != [p.data_ptr() for p in self._model.parameters()]:
            raise TrainingStopped("a parameter moved: the engine would sample from old weights")
