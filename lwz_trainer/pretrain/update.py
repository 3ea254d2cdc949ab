"""Cross-entropy of packed windows: gradients and one optimizer step, or a measurement.

loss = −Σ log p(token) / N over all predicted tokens of the batch; N is counted over all ranks
before the first backward, so neither packing nor the number of ranks changes it beyond rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_kernels.linear_logprobs import linear_logprobs
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.pretrain import PretrainUpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.parallel import Ranks, Teams
from lwz_trainer.pretrain.windows import Window, as_train_sample, deal_windows
from lwz_trainer.update.fully_sharded import num_idle_passes, reshard
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.sharded_adamw import ShardedAdamW
from lwz_trainer.update.sharding import place_packs
from lwz_trainer.update.work import Work, make_idle_work, make_work

__all__ = ["CrossEntropyUpdate", "SourceLosses", "StepLoss"]


@dataclass(frozen=True)
class SourceLosses:
    """−log p summed over the tokens of each source, and how many those are; of all ranks."""

    sums: list[float]
    counts: list[int]

    @property
    def mean(self) -> float:
        """Nats a token, over all sources."""
        return sum(self.sums) / sum(self.counts)

    def by_source(self, names: Sequence[str]) -> dict[str, float]:
        """Nats a token of each source that has tokens here; `names` are those of all sources."""
        return {
            names[source]: self.sums[source] / count
            for source, count in enumerate(self.counts)
            if count
        }


@dataclass(frozen=True)
class StepLoss:
    """What one optimizer step saw, before it changed the weights."""

    losses: SourceLosses
    grad_norm: float


class CrossEntropyUpdate:
    """Gradients and optimizer steps; owns no weights.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        ranks: all of them.
        teams: those that may share a pack.
        config: budgets and the loss's implementation.
        section: how the forward pass is computed.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: FlatAdamW | ShardedAdamW,
        ranks: Ranks,
        teams: Teams,
        config: PretrainUpdateConfig,
        section: ModelSection,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._teams = teams
        self._config = config
        self._section = section
        self._offload = HostOffload(ranks.device) if section.offload_layers else None

    def run(
        self,
        windows: Sequence[Window],
        *,
        lr: float,
        on_microbatch: Callable[[int, int], None] | None = None,
    ) -> StepLoss:
        """One optimizer step on a batch.

        Args:
            windows: of the whole batch; the same on every rank.
            lr: of this step.
            on_microbatch: called with (micro-batches done, in all) of this rank.

        Raises:
            TrainingStopped: a loss or gradient is not finite; the weights were not touched.
        """
        num_loss_tokens = sum(window.num_loss_tokens for window in windows)
        works = self._works(windows)
        sums_S = self._no_losses(windows)
        self._optimizer.zero_grad()
        bad: list[str] = []
        for done, work in enumerate(works, start=1):
            logprobs_R = self._logprobs(work)
            loss = -logprobs_R.sum() / num_loss_tokens
            loss.backward()
            work.check_calls(self._model.config.layers if self._section.checkpoint_layers else 0)
            self._add_losses(sums_S, work, windows, logprobs_R.detach())
            if not torch.isfinite(loss):
                bad += [windows[number].where for number in work.batch.samples]
            if on_microbatch is not None:
                on_microbatch(done, len(works))
        grad_norm = self._optimizer.reduce_grads(self._ranks.group)
        self._refuse_non_finite(float(grad_norm), bad)
        self._optimizer.step(lr=lr, grad_norm=grad_norm)
        return StepLoss(self._reduce(sums_S, windows), float(grad_norm))

    @torch.no_grad()
    def measure(self, windows: Sequence[Window]) -> SourceLosses:
        """The losses alone, of windows that are the same on every rank."""
        sums_S = self._no_losses(windows)
        for work in self._works(windows):
            self._add_losses(sums_S, work, windows, self._logprobs(work))
            reshard(self._model)
        return self._reduce(sums_S, windows)

    def _works(self, windows: Sequence[Window]) -> list[Work]:
        """This rank's micro-batches: its team's share, packed, and its place in each pack.

        As many on every rank where each pass is a collective, that of a fully sharded model.
        """
        plan = self._teams.plan
        shares = deal_windows(windows, self._ranks.world_size // plan.size)
        mine = shares[self._ranks.rank // plan.size]
        placed = place_packs(
            [as_train_sample(windows[number], number) for number in mine],
            plan,
            budget_tokens=self._config.microbatch_tokens,
            share_prompts=False,
        )
        device, impl = self._ranks.device, self._section.attention
        works = [make_work(pack, self._teams, device, impl) for pack in placed[self._teams.place]]
        num_idle = num_idle_passes(self._model, self._ranks, len(works))
        return works + [make_idle_work(device, impl) for _ in range(num_idle)]

    def _logprobs(self, work: Work) -> Tensor:
        """[R] log-prob of each predicted token that this rank holds."""
        return linear_logprobs(
            work.hidden(self._model, self._section, self._offload),
            self._model.head_weight,
            work.batch.labels_R.to(self._ranks.device),
            chunk_bytes=self._config.chunk_mb * 1_000_000 or None,
            impl=self._config.loss_impl,
        )[0]

    def _no_losses(self, windows: Sequence[Window]) -> Tensor:
        num_sources = 1 + max(window.source for window in windows)
        return torch.zeros(num_sources, dtype=torch.float64, device=self._ranks.device)

    def _add_losses(
        self, sums: Tensor, work: Work, windows: Sequence[Window], logprobs: Tensor
    ) -> None:
        """Adds −log p [R] of a micro-batch to the sums [S] of its sources."""
        sources = [windows[number].source for number in work.batch.samples]
        lengths_N = work.batch.completion_cu_seqlens.diff()
        source_R = torch.tensor(sources, dtype=torch.long).repeat_interleave(lengths_N)
        sums.index_add_(0, source_R.to(sums.device), -logprobs.double())

    def _reduce(self, sums: Tensor, windows: Sequence[Window]) -> SourceLosses:
        counts = [0] * len(sums)
        for window in windows:
            counts[window.source] += window.num_loss_tokens
        return SourceLosses(self._ranks.sum(sums.tolist()), counts)

    def _refuse_non_finite(self, grad_norm: float, bad: list[str]) -> None:
        is_finite = not bad and torch.isfinite(torch.tensor(grad_norm))
        if not self._ranks.max([float(not is_finite)])[0]:
            return
        rows = sorted(set().union(*self._ranks.gather(set(bad))))
        which = f"the loss of a pack with {', '.join(rows[:5])}" if rows else "the gradient"
        raise TrainingStopped(
            f"{which} is not finite (gradient norm {grad_norm}); no weight was changed: lower "
            "optim.lr or look at these rows"
        )
