"""One rollout batch to one or more optimizer steps, with one global normaliser each.

The gradient of an update is a plain sum over the tokens of all micro-batches and ranks. It is
accumulated without its normaliser, which is a count over the whole batch, and divided once at the
end: neither packing nor the number of ranks changes the result beyond rounding, and micro-batches
may be added before the batch is complete (`begin`, `add`, `finish`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.linear_policy_loss import linear_policy_loss
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.sections import UpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.main_grad import grad_buffer
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.parallel import Ranks, Teams
from lwz_trainer.timeline import Timeline
from lwz_trainer.update.accumulation import Accumulation
from lwz_trainer.update.fully_sharded import is_fully_sharded, num_idle_passes, reshard
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.packing import TrainSample, pack_samples
from lwz_trainer.update.sharded_adamw import ShardedAdamW
from lwz_trainer.update.sharding import PlacedPack, place_packs
from lwz_trainer.update.totals import UpdateMetrics, UpdateTotals
from lwz_trainer.update.work import Work, can_share_prompts, make_idle_work, make_work

__all__ = ["PolicyUpdate", "UpdateMetrics"]


class PolicyUpdate:
    """Gradients and optimizer steps; owns no weights."""

    def __init__(
        self,
        model: Decoder,
        optimizer: FlatAdamW | ShardedAdamW,
        ranks: Ranks,
        teams: Teams,
        config: UpdateConfig,
        loss_config: LossConfig,
        *,
        ref_model: Decoder | None,
        temperature: float,
        max_completion_tokens: int,
        section: ModelSection,
        timeline: Timeline | None = None,
    ) -> None:
        assert (ref_model is not None) == (loss_config.kl_coef > 0), "a KL term needs its reference"
        self._model = model
        self._optimizer = optimizer
        self._is_fully_sharded = is_fully_sharded(model)
        self._ranks = ranks
        self._teams = teams
        self._config = config
        self._ref_model = ref_model
        self._temperature = temperature
        if loss_config.loss_type == "dr_grpo" and loss_config.max_completion_tokens is None:
            loss_config = replace(loss_config, max_completion_tokens=max_completion_tokens)
        self._loss_config = loss_config
        self._section = section
        self._timeline = timeline or Timeline()
        self._offload = HostOffload(ranks.device) if section.offload_layers else None
        shares = config.share_prompts
        can_share = can_share_prompts(ranks.device, section.attention)
        self._share_prompts = can_share if shares is None else shares
        self._samples: dict[int, TrainSample] = {}
        self._old: dict[int, Tensor] = {}
        self._ref: dict[int, Tensor] = {}
        self._accumulation = self._new_accumulation()

    def run(
        self,
        samples: list[TrainSample],
        *,
        num_groups: int,
        lr: float,
        on_microbatch: Callable[[int, int], None] | None = None,
    ) -> UpdateMetrics:
        """All updates of a rollout batch: `num_epochs` passes of `num_minibatches` each.

        Args:
            samples: this rank's samples.
            num_groups: groups in the whole rollout batch, over all ranks.
            lr: learning rate of these updates.
            on_microbatch: called with (micro-batches done, in all) of the current update.

        Raises:
            TrainingStopped: a loss or gradient is not finite, or memory does not suffice for one
                sample; the weights were not touched.
        """
        config = self._config
        self._forget_samples()
        counts = [self._count(part) for part in self._split(samples, num_groups)]
        shared = self._teams.gather(samples)
        parts = self._split(shared, num_groups)
        minibatches = [self._in_step(self.plan(part)) for part in parts]
        if config.num_minibatches * config.num_epochs > 1:
            with self._timeline.span("update", "log-probs before the update"):
                for works in minibatches:
                    for work in works:
                        self._old |= self._logprobs(self._model, work)
        if self._ref_model is not None and self._is_fully_sharded:  # all ranks together
            with self._timeline.span("update", "log-probs of the reference"):
                for works in minibatches:
                    for work in works:
                        self._ref |= self._logprobs(self._ref_model, work)
        totals = UpdateTotals()
        for _ in range(config.num_epochs):
            for works, count in zip(minibatches, counts, strict=True):
                totals.num_updates += 1
                if count[0] == 0:
                    continue
                self._start_gradient()
                for done, work in enumerate(works, start=1):
                    self.add(work, mean_sequence_tokens=count[0] / count[1])
                    if on_microbatch is not None:
                        on_microbatch(done, len(works))
                self._step(totals, count, lr=lr)
        return totals.reduce(self._ranks)

    def begin(self) -> None:
        """Starts the gradient of a rollout batch that is not complete yet: one update, one pass."""
        assert self._config.num_minibatches * self._config.num_epochs == 1
        self._forget_samples()
        self._start_gradient()

    def plan(self, samples: list[TrainSample]) -> list[Work]:
        """This rank's micro-batches of the samples of its team.

        A deterministic update packs each group on its own, so that its micro-batches do not depend
        on which other groups are there.
        """
        self._samples |= {sample.sample: sample for sample in samples}
        parts = [samples]
        if self._config.packs_by_group:
            groups = sorted({sample.group for sample in samples})
            parts = [[s for s in samples if s.group == group] for group in groups]
        with self._timeline.span("update", "pack", samples=len(samples)):
            return [work for part in parts for work in self._place(part)]

    def add(self, work: Work, *, mean_sequence_tokens: float = 1.0) -> None:
        """Adds the gradient of a micro-batch.

        Args:
            work: from `plan`.
            mean_sequence_tokens: loss tokens a sequence in the whole batch. Only an entropy bonus
                beside a loss that is a mean over sequences depends on it.
        """
        device = self._ranks.device
        with self._timeline.span("update", "micro-batch", tokens=work.batch.num_tokens):
            self._accumulation.add(work, mean_sequence_tokens)
            if self._timeline.keeps_spans and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # else it ends at the launch

    def finish(self, *, lr: float) -> UpdateMetrics:
        """After the last `add` on this rank: normalises, sums over ranks, and steps.

        Raises:
            TrainingStopped: as `run`.
        """
        count = self._count(list(self._samples.values()))
        totals = UpdateTotals()
        totals.num_updates = 1
        if count[0] > 0:
            self._step(totals, count, lr=lr)
        return totals.reduce(self._ranks)

    def _split(self, samples: list[TrainSample], num_groups: int) -> Iterator[list[TrainSample]]:
        """Groups 0..n-1, n..2n-1, …: the same parts on every rank, some of them maybe empty."""
        per_part = num_groups // self._config.num_minibatches
        for part in range(self._config.num_minibatches):
            yield [sample for sample in samples if sample.group // per_part == part]

    def _place(self, samples: list[TrainSample]) -> list[Work]:
        placed = place_packs(
            samples,
            self._teams.plan,
            budget_tokens=self._config.microbatch_tokens,
            share_prompts=self._share_prompts,
        )
        return [self._make_work(pack) for pack in placed[self._teams.place]]

    def _make_work(self, pack: PlacedPack) -> Work:
        return make_work(pack, self._teams, self._ranks.device, self._section.attention)

    def _halves(self, work: Work) -> list[Work]:
        """The samples of a micro-batch in two, about equally long; one that cannot be split alone.

        Parts of packs that are spread over ranks stay, and all of a fully sharded model: the other
        ranks know nothing of a split.
        """
        samples = [self._samples[number] for number in work.batch.samples]
        is_shared = work.group is not None or self._is_fully_sharded
        if is_shared or len(samples) < 2:
            return [work]
        ends = list(accumulate(sample.num_fed for sample in samples))
        cut = min(range(1, len(samples)), key=lambda count: abs(2 * ends[count - 1] - ends[-1]))
        return [
            self._make_work(PlacedPack(1, batch))
            for part in (samples[:cut], samples[cut:])
            for batch in pack_samples(
                part, budget_tokens=work.batch.num_tokens, share_prompts=self._share_prompts
            )
        ]

    def _in_step(self, works: list[Work]) -> list[Work]:
        """As many on every rank where each pass is a collective, that of a fully sharded model."""
        num_idle = num_idle_passes(self._model, self._ranks, len(works))
        device, impl = self._ranks.device, self._section.attention
        return works + [make_idle_work(device, impl) for _ in range(num_idle)]

    def _hidden(self, model: Decoder, work: Work) -> Tensor:
        """Hidden states [R, D] of the positions that predict the completion tokens."""
        return work.hidden(model, self._section, self._offload)

    @torch.no_grad()
    def _logprobs(self, model: Decoder, work: Work) -> dict[int, Tensor]:
        """Log-probs of each sample's rows on this rank, by sample number, under a fixed model."""
        logprobs_R = linear_logprobs(
            self._hidden(model, work),
            model.head_weight,
            work.batch.labels_R.to(self._ranks.device),
            temperature=self._temperature,
            chunk_bytes=self._loss_config.chunk_bytes,
            impl=self._loss_config.impl,
        )[0]
        reshard(model)
        lengths = work.batch.completion_cu_seqlens.diff().tolist()
        return dict(zip(work.batch.samples, logprobs_R.split(lengths), strict=True))

    def _rows(self, known: dict[int, Tensor], work: Work) -> Tensor | None:
        """[R] of what is known of the samples of a micro-batch."""
        if work.is_idle:
            return torch.zeros(0, device=self._ranks.device)
        if not known:
            return None
        return torch.cat([known[number] for number in work.batch.samples])

    def _accumulate(
        self, work: Work, mean_sequence_tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of a micro-batch's rows on this rank; their loss and metrics."""
        device, batch, config = self._ranks.device, work.batch, self._loss_config
        if self._ref_model is not None and not self._ref.keys() >= set(batch.samples):
            self._ref |= self._logprobs(self._ref_model, work)
        hidden_RD = self._hidden(self._model, work)
        # Whole from the forward pass on, where the model is sharded. dW goes straight into its fp32
        # gradient; the oracle's autograd cannot do that.
        head_weight = self._model.head_weight
        is_oracle = config.impl == "reference"
        shard_tokens_N = batch.sequence_loss_tokens_N
        num_loss_tokens: int | Tensor = 1
        if config.needs_num_sequences:  # then it divides the entropy bonus alone
            num_loss_tokens = torch.tensor(mean_sequence_tokens, dtype=torch.float64)
        loss, metrics = linear_policy_loss(
            hidden_RD,
            head_weight,
            batch.labels_R.to(device),
            batch.advantages_R.to(device),
            batch.loss_mask_R.to(device),
            cu_seqlens=batch.completion_cu_seqlens.to(device),
            num_loss_tokens=num_loss_tokens,
            num_sequences=1,
            sequence_loss_tokens=None if shard_tokens_N is None else shard_tokens_N.to(device),
            old_logprobs=self._rows(self._old, work),
            ref_logprobs=self._rows(self._ref, work),
            sampling_logprobs=batch.sampling_logprobs_R.to(device),
            temperature=self._temperature,
            sequence_group=work.group,
            weight_grad=None if is_oracle else grad_buffer(head_weight),
            config=config,
            chunk_bytes=config.chunk_bytes,
            impl=config.impl,
        )
        loss.backward()
        work.check_calls(self._model.config.layers if self._section.checkpoint_layers else 0)
        return loss.detach(), metrics

    def _new_accumulation(self) -> Accumulation:
        return Accumulation(
            self._accumulate,
            self._halves,
            self._optimizer.zero_grad,
            device=self._ranks.device,
        )

    def _start_gradient(self) -> None:
        self._optimizer.zero_grad()
        self._accumulation = self._new_accumulation()

    def _forget_samples(self) -> None:
        self._samples, self._old, self._ref = {}, {}, {}

    def _count(self, samples: Sequence[TrainSample]) -> tuple[int, int]:
        """Loss tokens and sequences with any, over the samples of all ranks."""
        lengths = [len(sample.completion_ids) for sample in samples if sample.in_loss]
        totals = self._ranks.sum([float(sum(lengths)), float(len(lengths))])
        return int(totals[0]), int(totals[1])

    def _step(self, totals: UpdateTotals, count: tuple[int, int], *, lr: float) -> None:
        """Normalises what was accumulated and steps the weights."""
        with self._timeline.span("optimizer", "normalise, sum over ranks, step"):
            scale = 1 / count[1 if self._loss_config.needs_num_sequences else 0]
            for grad in self._optimizer.grads:
                grad.mul_(scale)
            for done in self._accumulation.done:
                if not done.work.is_idle:
                    totals.add(done.metrics, done.loss * scale, done.work.batch.num_tokens)
            grad_norm = self._optimizer.reduce_grads(self._ranks.group)
            self._refuse_non_finite(grad_norm)
            self._optimizer.step(lr=lr, grad_norm=grad_norm)
            totals.grad_norm += float(grad_norm)

    def _refuse_non_finite(self, grad_norm: Tensor) -> None:
        """Stops before the optimizer step and names the samples whose loss or gradient is bad."""
        done = self._accumulation.done
        is_finite = all(bool(torch.isfinite(x)) for x in (grad_norm, *(d.loss for d in done)))
        if not self._ranks.max([float(not is_finite)])[0]:
            return
        bad: set[int] = set()
        # Of a fully sharded model only the sum over ranks exists, so all of them are named with it.
        group = self._ranks.group if self._is_fully_sharded else None
        for item in done:
            work = item.work
            is_bad = work.is_any(not torch.isfinite(item.loss))
            is_found = is_bad
            if self._is_fully_sharded:
                is_found = bool(self._ranks.max([float(is_bad)])[0])
            if not is_found:  # on none of the ranks that compute together, so that all do it again
                self._optimizer.zero_grad()
                self._accumulate(work, item.mean_sequence_tokens)
                is_bad = work.is_any(not torch.isfinite(self._optimizer.reduce_grads(group)))
            if is_bad:
                bad |= set(work.batch.samples)
        everyone = sorted(set().union(*self._ranks.gather(bad)))
        raise TrainingStopped(
            f"the loss or gradient is not finite (gradient norm {float(grad_norm)}) in the "
            f"micro-batch with samples {everyone}; no weight was changed: lower optim.lr or look "
            "at these samples"
        )
