"""The trainer: sample, score, compare within groups, update, record, save."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.digest import short_digest
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.export import save_pretrained
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import (
    load_decoder,
    load_hf_config,
    load_pretrained,
    weights_digest,
)
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.parallel import Ranks, start_teams
from lwz_trainer.rewards.references import start_references
from lwz_trainer.rollout.decode_work import copy_bandwidth
from lwz_trainer.rollout.making import make_engine
from lwz_trainer.timeline import Timeline
from lwz_trainer.train.checkpoint import Progress
from lwz_trainer.train.console import learned_line, step_line
from lwz_trainer.train.groups import ScoredGroup
from lwz_trainer.train.interleave import Interleaver
from lwz_trainer.train.metrics import rollout_metrics, sample_metrics, step_warnings
from lwz_trainer.train.prompt_set import GroupPrompt, PromptSet
from lwz_trainer.train.recorder import prepare_run_dir
from lwz_trainer.train.records import sample_records, write_records
from lwz_trainer.train.reward_pool import make_scoring
from lwz_trainer.train.run import Run
from lwz_trainer.train.sampling import StepHooks, StepSampler, StepSamples
from lwz_trainer.train.signals import StopSignal
from lwz_trainer.train.starting import started_ranks
from lwz_trainer.train.step_memory import StepMemory
from lwz_trainer.train.weights import TrainedWeights
from lwz_trainer.update.optimizer import learning_rate
from lwz_trainer.update.policy_update import PolicyUpdate, UpdateMetrics

__all__ = ["Trainer", "run_train"]


def run_train(config: TrainConfig) -> None:
    """The `train` command: from a configuration to a run directory."""
    with started_ranks(config) as (ranks, stop):
        Trainer(config, ranks, stop).train()


class Trainer:
    """Owns the policy, and everything that a step needs."""

    def __init__(self, config: TrainConfig, ranks: Ranks, stop: StopSignal) -> None:
        self._config = config
        self._ranks = ranks
        self._stop = stop
        self._refuse_uneven_ranks()
        self._model_dir = resolve_model_dir(config.model.path)
        sizes = ModelConfig.from_hf(load_hf_config(self._model_dir))
        self._teams = start_teams(
            config.parallel, ranks, heads=sizes.heads, kv_heads=sizes.kv_heads
        )
        self._copy_bandwidth = copy_bandwidth(ranks.device)  # before the device holds anything
        dtype = resolve_dtype(config.model.dtype, ranks.device)
        self._model, self._tokenizer = load_pretrained(
            str(self._model_dir), dtype=dtype, device=ranks.device
        )
        self._prompts = PromptSet(config, self._tokenizer, self._model.config.max_positions)
        self._references = start_references(config.rewards, self._prompts.prompts)
        self._timeline = Timeline(ranks.rank)
        self._scoring = make_scoring(
            config, self._prompts.kind, ranks.device, self._timeline, lambda: stop.is_set
        )
        self._engine = make_engine(
            self._model, self._tokenizer, self._model_dir, config.rollout, ranks
        )
        self._memory = StepMemory(
            config, self._model, self._engine, ranks, longest_prompt=self._prompts.longest
        )
        prepare_run_dir(config, ranks, self._model)
        self._weights = TrainedWeights(
            self._model, config, ranks, grads=self._memory.grads, state=self._memory.state
        )
        self._optimizer = self._weights.optimizer
        self._update = PolicyUpdate(
            self._weights.trained,
            self._optimizer,
            ranks,
            self._teams,
            config.update,
            config.loss,
            ref_model=self._load_reference(dtype),
            temperature=config.rollout.temperature,
            max_completion_tokens=config.rollout.max_completion_tokens,
            section=config.model,
            timeline=self._timeline,
        )
        self._interleaver: Interleaver | None = None
        if config.update.is_interleaved:
            self._interleaver = Interleaver(
                self._update,
                ranks.device,
                is_ordered=config.update.deterministic,
                mask_truncated=config.update.mask_truncated,
                in_thread=ranks.device.type == "cuda",
            )
        self._sampler = StepSampler(
            config,
            ranks,
            self._engine,
            self._prompts,
            self._scoring,
            self._references,
            self._timeline,
        )
        self._run = Run(
            config,
            ranks,
            stop,
            self._model.config,
            self._weights,
            self._identity(),
            progress=Progress,
            num_steps=config.num_steps,
            timeline=self._timeline,
        )
        self._console = self._run.console
        self._step = 0
        self._policy_version = 0

    def train(self) -> None:
        """All remaining steps; saves and leaves when asked to stop."""
        self._run.resume(self._restore)
        with self._run.recording(self._step), closing(self._scoring):
            self._announce()
            while self._step < self._config.num_steps and not self._run.must_stop():
                is_traced = self._step + 1 in self._config.log.trace_steps
                self._timeline.start_step(keeps_spans=is_traced)
                metrics = self._train_step()
                if metrics is None:
                    break
                self._run.record(metrics, step_line(metrics, self._config.num_steps))
                self._run.save_if_due(self._progress())
                if is_traced:
                    name = f"step_{self._step:06d}_rank_{self._ranks.rank}.json"
                    self._timeline.write(self._run.dir / "trace" / name)
        self._memory.enter_update()  # a rollout may have been interrupted
        self._run.save(self._progress())
        if not self._run.was_stopped(self._step):
            self._finish()

    def _train_step(self) -> dict[str, Any] | None:
        """One rollout and its update; None if a signal ended the rollout."""
        started = time.perf_counter()
        lr = learning_rate(self._config.optim, self._step, self._config.num_steps)
        groups = self._prompts.step_groups(
            self._step, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        found = self._sample(groups)
        if found is None:
            return None
        self._check_failures()
        update = self._update_policy(found, lr)
        self._advance_references(found)
        self._step += 1
        records = sample_records(self._step, found.groups, opened=self._prompts.opened)
        times = {
            "time/rollout_s": self._timeline.seconds("decode"),
            "time/reward_s": found.reward_s,
            "time/update_s": self._timeline.seconds("update") + self._timeline.seconds("optimizer"),
            "time/step_s": time.perf_counter() - started,
        }
        return self._record(records, found, update, times, lr)

    def _sample(self, groups: list[GroupPrompt]) -> StepSamples | None:
        """Samples and scores of this rank; interleaved, with most of their gradients."""
        doing = "sampling" if self._interleaver is None else "sampling and updating"
        self._ranks.enter(f"{doing}, step {self._step + 1}")
        total = sum(len(group.request.samples) for group in groups)
        title = f"step {self._step + 1} {doing}"
        with self._weights.whole(), self._console.bar(title, total, "samples") as bar:

            def sample(
                on_group: Callable[[ScoredGroup], None], between_bursts: Callable[[], None]
            ) -> StepSamples | None:
                return self._sampler.run(
                    groups,
                    self._step,
                    policy_version=self._policy_version,
                    hooks=StepHooks(
                        on_group=on_group,
                        between_bursts=between_bursts,
                        on_progress=lambda done, tokens: bar.update(done, f"{tokens} tokens"),
                        should_stop=lambda: self._stop.is_set,
                    ),
                )

            if self._interleaver is None:
                self._optimizer.release_grads()
            self._memory.enter_rollout()
            if self._interleaver is None:
                return sample(lambda group: None, lambda: None)
            with self._interleaver.rollout([group.request.group for group in groups]):
                found = sample(self._interleaver.add, self._interleaver.advance)
            if found is None:
                self._interleaver.abandon()
            return found

    def _check_failures(self) -> None:
        """Ends the run, with a checkpoint of the last step, where too many scores are missing."""
        try:
            self._sampler.check_failures(self._step)
        except (UserError, TrainingStopped):
            if self._interleaver is not None:
                self._interleaver.abandon()
            self._memory.enter_update()
            self._run.save(self._progress())
            raise

    def _update_policy(self, found: StepSamples, lr: float) -> UpdateMetrics:
        self._ranks.enter(f"updating, step {self._step + 1}")
        self._memory.enter_update()
        if self._interleaver is not None:
            update = self._interleaver.finish(lr=lr)
        else:
            mask_truncated = self._config.update.mask_truncated
            with self._console.bar(f"step {self._step + 1} updating", 1, "micro-batches") as bar:
                update = self._update.run(
                    [
                        sample
                        for group in found.groups
                        for sample in group.train_samples(mask_truncated=mask_truncated)
                    ],
                    num_groups=self._config.data.prompts_per_step,
                    lr=lr,
                    on_microbatch=lambda done, total: bar.update(done, total=total),
                )
        self._memory.end_update()
        self._policy_version += update.num_updates
        return update

    def _advance_references(self, found: StepSamples) -> None:
        """The scores of all ranks decide which references the next step is compared with."""
        name = self._config.rewards.references_reward
        if name is None:
            return
        mine = [
            (group.ended.prompt.prompt.prompt, part.rewards[name])
            for group in found.groups
            for part in group.parts
        ]
        everyone = [pair for part in self._ranks.gather(mine) for pair in part]
        self._references.advance([p for p, _ in everyone], [score for _, score in everyone])

    def _record(
        self,
        records: list[dict[str, Any]],
        found: StepSamples,
        update: UpdateMetrics,
        times: dict[str, float],
        lr: float,
    ) -> dict[str, Any]:
        """Writes all ranks' samples and returns the step's metrics, on every rank."""
        self._ranks.enter(f"recording step {self._step}")
        everything = [record for part in self._ranks.gather(records) for record in part]
        everything.sort(key=lambda record: (record["group"], record["member"]))
        if self._ranks.is_main:
            write_records(self._run.dir / "samples" / f"step_{self._step:06d}.parquet", everything)
        (memory,) = self._ranks.max([self._memory.peak_gb()])
        metrics: dict[str, Any] = {"step": self._step}
        metrics |= sample_metrics(everything)
        metrics |= update.values
        metrics |= times
        metrics |= rollout_metrics(
            found,
            self._ranks,
            seconds=times["time/rollout_s"],
            copy_bandwidth=self._copy_bandwidth,
        )
        metrics |= {
            "lr": lr,
            "policy_version": self._policy_version,
            "rollout/longest_tokens_per_s": metrics["tokens/completion_max"]
            / times["time/rollout_s"],
            "update/tokens_per_s": update.num_packed_tokens / times["time/update_s"],
            "memory/peak_gb": memory,
        }
        metrics |= self._memory.metrics(self._ranks)
        if self._config.rewards.references_reward is not None:
            metrics["reward/reference_level"] = self._references.mean_level
        metrics["warnings"] = step_warnings(
            metrics, truncates_sampling=self._config.rollout.truncates_sampling
        )
        return metrics

    def _identity(self) -> dict[str, str]:
        config = self._config
        return self._prompts.identity | {
            "weights of model.path": weights_digest(self._model_dir),
            "seed": short_digest(config.seed),
            "data.prompts_per_step": short_digest(config.data.prompts_per_step),
            "rollout.group_size": short_digest(config.rollout.group_size),
        }

    def _progress(self) -> Progress:
        return Progress(
            self._step,
            self._policy_version,
            self._engine.expected_completion_tokens,
            self._references.levels,
        )

    def _restore(self, progress: Progress) -> None:
        self._step = progress.step
        self._policy_version = progress.policy_version
        self._engine.expected_completion_tokens = progress.expected_completion_tokens
        self._references.restore(progress.reference_levels)

    def _finish(self) -> None:
        """The final weights, the report, and the line that says what was learned."""
        self._run.export(
            self._step,
            lambda final: save_pretrained(self._model, self._tokenizer, self._model_dir, final),
        )
        if self._ranks.is_main:
            self._run.conclude(learned_line(self._run.history, self._run.dir))

    def _announce(self) -> None:
        config = self._config
        per_step = config.data.prompts_per_step * config.rollout.group_size
        self._console.print(
            f"{config.model.path}: {sum(p.numel() for p in self._model.parameters()) / 1e6:.0f}M "
            f"parameters, {str(self._model.embed.dtype).removeprefix('torch.')}, "
            f"{self._ranks.world_size} x {self._ranks.device.type}; {len(self._prompts)} prompts, "
            f"{per_step} samples a step, writing to {self._run.dir}"
        )
        self._console.print(self._memory.description)
        for num_ranks, (scheme, _) in self._teams.plan.schemes.items():
            self._console.print(f"sequences of the update on {num_ranks} ranks: {scheme}")

    def _load_reference(self, dtype: torch.dtype) -> Decoder | None:
        """The frozen initial policy, where the loss has a KL term."""
        if self._config.loss.kl_coef == 0:
            return None
        reference = load_decoder(self._model_dir, dtype=dtype, device=self._ranks.device)
        return self._weights.spread(reference, trainable=False)

    def _refuse_uneven_ranks(self) -> None:
        samples = self._config.data.prompts_per_step * self._config.rollout.group_size
        if samples % self._ranks.world_size:
            raise UserError(
                f"data.prompts_per_step times rollout.group_size ({samples}) must be a multiple of "
                f"the number of processes ({self._ranks.world_size}): every rank takes as many"
            )
        if self._config.data.prompts_per_step % self._ranks.world_size == 0:
            return
        rollout = self._config.rollout
        for name, is_set in (
            ("update.schedule interleaved", self._config.update.is_interleaved),
            ("rollout.max_replacements", rollout.max_replacements > 0),
            ("rollout.enough_groups_frac", rollout.enough_groups_frac < 1),
            ("the reward source pairwise", bool(self._config.rewards.relative)),
        ):
            if is_set:
                raise UserError(
                    f"{name} needs whole groups on every rank: data.prompts_per_step "
                    f"({self._config.data.prompts_per_step}) must be a multiple of the number of "
                    f"processes ({self._ranks.world_size})"
                )
