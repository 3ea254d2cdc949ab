"""One rollout batch to one or more optimizer steps, with one global normaliser each.

The loss of an update is a plain sum over tokens of all micro-batches and ranks: token weights carry
the counts, which are global and fixed before the first backward, so neither packing nor the number
of ranks changes the result beyond rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_kernels.linear_policy_loss import linear_policy_loss
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.sections import UpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.main_grad import main_grad
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.parallel import Ranks, Teams
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.packing import TrainSample
from lwz_trainer.update.sharding import place_packs
from lwz_trainer.update.work import Work, make_work

__all__ = ["PolicyUpdate", "UpdateMetrics"]

SUMS = (
    "num_tokens_sum",
    "clip_low_sum",
    "clip_high_sum",
    "ratio_sum",
    "kl_sum",
    "entropy_sum",
    "logprob_diff_sum",
    "prob_diff_sum",
    "importance_sum",
    "importance_sq_sum",
)
MAXIMA = ("ratio_max", "logprob_diff_max")


@dataclass(frozen=True)
class UpdateMetrics:
    """Means over the tokens with a gradient, of all updates of one rollout batch."""

    values: dict[str, float]
    num_packed_tokens: int
    num_updates: int


class PolicyUpdate:
    """Gradients and optimizer steps; owns no weights."""

    def __init__(
        self,
        model: Decoder,
        optimizer: FlatAdamW,
        ranks: Ranks,
        teams: Teams,
        config: UpdateConfig,
        loss_config: LossConfig,
        *,
        ref_model: Decoder | None,
        temperature: float,
        max_completion_tokens: int,
        section: ModelSection,
    ) -> None:
        assert (ref_model is not None) == (loss_config.kl_coef > 0), "a KL term needs its reference"
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._teams = teams
        self._config = config
        self._ref_model = ref_model
        self._temperature = temperature
        if loss_config.loss_type == "dr_grpo" and loss_config.max_completion_tokens is None:
            loss_config = replace(loss_config, max_completion_tokens=max_completion_tokens)
        self._loss_config = loss_config
        self._section = section
        self._offload = HostOffload(ranks.device) if section.offload_layers else None
        shares = config.share_prompts
        shares_prefixes = section.attention in ("triton", "torch", "reference")
        can_share = ranks.device.type == "cpu" or shares_prefixes
        self._share_prompts = can_share if shares is None else shares

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
            TrainingStopped: a loss or gradient is not finite; the weights were not touched.
        """
        config = self._config
        counts = [self._count(part) for part in self._split(samples, num_groups)]
        shared = self._teams.gather(samples)
        minibatches = [self._place(part) for part in self._split(shared, num_groups)]
        is_on_policy = config.num_minibatches * config.num_epochs == 1
        old = {} if is_on_policy else self._logprobs(self._model, minibatches)
        ref = {} if self._ref_model is None else self._logprobs(self._ref_model, minibatches)
        totals = _Totals()
        for _ in range(config.num_epochs):
            for works, count in zip(minibatches, counts, strict=True):
                self._update(works, count, old, ref, totals, lr=lr, on_microbatch=on_microbatch)
        return totals.reduce(self._ranks)

    def _split(self, samples: list[TrainSample], num_groups: int) -> Iterator[list[TrainSample]]:
        """Groups 0..n-1, n..2n-1, …: the same parts on every rank, some of them maybe empty."""
        per_part = num_groups // self._config.num_minibatches
        for part in range(self._config.num_minibatches):
            yield [sample for sample in samples if sample.group // per_part == part]

    def _place(self, samples: list[TrainSample]) -> list[Work]:
        """This rank's micro-batches of the samples of its team."""
        placed = place_packs(
            samples,
            self._teams.plan,
            budget_tokens=self._config.microbatch_tokens,
            share_prompts=self._share_prompts,
        )
        return [
            make_work(pack, self._teams, self._ranks.device, self._section.attention)
            for pack in placed[self._teams.place]
        ]

    def _hidden(self, model: Decoder, work: Work) -> Tensor:
        """Hidden states [R, D] of the positions that predict the completion tokens."""
        device = self._ranks.device
        hidden_TD = model(
            work.batch.input_ids_T.to(device),
            work.batch.position_ids_T.to(device),
            work.attend,
            checkpoint_layers=self._section.checkpoint_layers,
            offload=self._offload,
            mlp_tile_tokens=self._section.mlp_tile_tokens,
        )
        work.check_calls(model.config.layers)
        return hidden_TD[work.batch.row_index_R.to(device)]

    @torch.no_grad()
    def _logprobs(self, model: Decoder, minibatches: list[list[Work]]) -> dict[int, Tensor]:
        """Log-probs [R] of each micro-batch, by its identity, under a fixed model."""
        device = self._ranks.device
        return {
            id(work): linear_logprobs(
                self._hidden(model, work),
                model.head_weight,
                work.batch.labels_R.to(device),
                temperature=self._temperature,
                chunk_bytes=self._loss_config.chunk_bytes,
                impl=self._loss_config.impl,
            )[0]
            for works in minibatches
            for work in works
        }

    def _update(
        self,
        works: list[Work],
        counts: tuple[int, int],
        old: dict[int, Tensor],
        ref: dict[int, Tensor],
        totals: "_Totals",
        *,
        lr: float,
        on_microbatch: Callable[[int, int], None] | None,
    ) -> None:
        totals.num_updates += 1
        if counts[0] == 0:
            return
        self._optimizer.zero_grad()
        losses = []
        for done, work in enumerate(works, start=1):
            loss, metrics = self._accumulate(work, old, ref, counts)
            losses.append(loss)
            totals.add(metrics, loss, work.batch.num_tokens)
            if on_microbatch is not None:
                on_microbatch(done, len(works))
        grad_norm = self._optimizer.reduce_grads(self._ranks.group)
        self._refuse_non_finite(works, losses, grad_norm, old, ref, counts)
        self._optimizer.step(lr=lr, grad_norm=grad_norm)
        totals.grad_norm += float(grad_norm)

    def _accumulate(
        self, work: Work, old: dict[int, Tensor], ref: dict[int, Tensor], counts: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of a micro-batch's rows on this rank; their loss and metrics."""
        device, batch = self._ranks.device, work.batch
        # dW goes straight into the flat fp32 gradient; the oracle's autograd cannot do that.
        head_weight = self._model.head_weight
        is_oracle = self._loss_config.impl == "reference"
        shard_tokens_N = batch.sequence_loss_tokens_N
        loss, metrics = linear_policy_loss(
            self._hidden(self._model, work),
            head_weight,
            batch.labels_R.to(device),
            batch.advantages_R.to(device),
            batch.loss_mask_R.to(device),
            cu_seqlens=batch.completion_cu_seqlens.to(device),
            num_loss_tokens=counts[0],
            num_sequences=counts[1],
            sequence_loss_tokens=None if shard_tokens_N is None else shard_tokens_N.to(device),
            old_logprobs=old.get(id(work)),
            ref_logprobs=ref.get(id(work)),
            sampling_logprobs=batch.sampling_logprobs_R.to(device),
            temperature=self._temperature,
            sequence_group=work.group,
            weight_grad=None if is_oracle else main_grad(head_weight),
            config=self._loss_config,
            chunk_bytes=self._loss_config.chunk_bytes,
            impl=self._loss_config.impl,
        )
        loss.backward()
        work.check_calls(self._model.config.layers if self._section.checkpoint_layers else 0)
        return loss.detach(), metrics

    def _count(self, samples: Sequence[TrainSample]) -> tuple[int, int]:
        """Loss tokens and sequences with any, over the samples of all ranks."""
        lengths = [len(sample.completion_ids) for sample in samples if sample.in_loss]
        totals = self._ranks.sum([float(sum(lengths)), float(len(lengths))])
        return int(totals[0]), int(totals[1])

    def _refuse_non_finite(
        self,
        works: list[Work],
        losses: list[Tensor],
        grad_norm: Tensor,
        old: dict[int, Tensor],
        ref: dict[int, Tensor],
        counts: tuple[int, int],
    ) -> None:
        """Stops before the optimizer step and names the samples whose loss or gradient is bad."""
        is_finite = all(bool(torch.isfinite(value)) for value in (grad_norm, *losses))
        if not self._ranks.max([float(not is_finite)])[0]:
            return
        bad: set[int] = set()
        for work, loss in zip(works, losses, strict=True):
            is_bad = work.is_any(not torch.isfinite(loss))
            if not is_bad:  # on none of its ranks, so that all of them compute it again
                self._optimizer.zero_grad()
                self._accumulate(work, old, ref, counts)
                is_bad = work.is_any(not torch.isfinite(self._optimizer.grad_norm()))
            if is_bad:
                bad |= set(work.batch.samples)
        everyone = sorted(set().union(*self._ranks.gather(bad)))
        raise TrainingStopped(
            f"the loss or gradient is not finite (gradient norm {float(grad_norm)}) in the "
            f"micro-batch with samples {everyone}; no weight was changed: lower optim.lr or look "
            "at these samples"
        )


class _Totals:
    """Running sums on the device; read once, after the last update."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self.grad_norm = 0.0
        self.num_updates = 0
        self._num_packed_tokens = 0

    def add(self, metrics: dict[str, Tensor], loss: Tensor, num_tokens: int) -> None:
        self._losses.append(loss)
        self._num_packed_tokens += num_tokens
        for name in SUMS:
            if name in metrics:
                self._values[name] = self._values.get(name, 0.0) + metrics[name].double()
        for name in MAXIMA:
            if name in metrics:
                seen = self._values.get(name, metrics[name])
                self._values[name] = torch.maximum(seen, metrics[name])

    def reduce(self, ranks: Ranks) -> UpdateMetrics:
        """Means over the tokens with a gradient, of all ranks."""
        loss = float(sum(self._losses)) if self._losses else 0.0
        local = [float(self._values.get(name, 0.0)) for name in SUMS]
        sums = dict(zip((*SUMS, "loss"), ranks.sum([*local, loss]), strict=True))
        maxima = dict(
            zip(
                MAXIMA,
                ranks.max([float(self._values.get(name, 0.0)) for name in MAXIMA]),
                strict=True,
            )
        )
        values = {
            "loss": sums["loss"] / max(self.num_updates, 1),
            "grad_norm": self.grad_norm / max(self.num_updates, 1),
        }
        tokens = sums["num_tokens_sum"]
        if tokens > 0:  # else no token had a gradient, and there is nothing to take a mean of
            importance_sq = max(sums["importance_sq_sum"], 1e-30)
            values |= {
                "entropy": sums["entropy_sum"] / tokens,
                "clip_frac_low": sums["clip_low_sum"] / tokens,
                "clip_frac_high": sums["clip_high_sum"] / tokens,
                "ratio_mean": sums["ratio_sum"] / tokens,
                "ratio_max": maxima["ratio_max"],
                "sampler/logprob_diff_mean": sums["logprob_diff_sum"] / tokens,
                "sampler/logprob_diff_max": maxima["logprob_diff_max"],
                "sampler/prob_diff_mean": sums["prob_diff_sum"] / tokens,
                "sampler/ess_frac": sums["importance_sum"] ** 2 / (importance_sq * tokens),
            }
        if tokens > 0 and "kl_sum" in self._values:
            values["kl"] = sums["kl_sum"] / tokens
        packed = int(ranks.sum([float(self._num_packed_tokens)])[0])
        return UpdateMetrics(values, num_packed_tokens=packed, num_updates=self.num_updates)
