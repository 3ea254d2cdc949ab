"""Bradley–Terry gradients and held-out scores of preference pairs.

The loss of a step is Σ −ln σ(r_chosen − r_rejected − margin) / pairs of the step over all ranks, so
neither packing nor the number of ranks changes it beyond rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lwz_kernels.attention import SegmentTable
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.reward_model import PairUpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.parallel import Ranks
from lwz_trainer.reward_model.batches import EncodedPair, PairBatch, empty_batch, pack_pairs
from lwz_trainer.reward_model.model import RewardModel
from lwz_trainer.update.fully_sharded import num_idle_passes, reshard
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.sharded_adamw import ShardedAdamW
from lwz_trainer.update.work import PackedAttend, can_share_prompts

__all__ = ["PairMetrics", "PairUpdate", "bradley_terry_loss"]

MEANS = ("loss", "accuracy", "margin", "reward/chosen", "reward/rejected", "truncated_frac")
"""Metrics of a step, means over its pairs."""


@dataclass(frozen=True)
class PairMetrics:
    """Means over the pairs of a step, of all ranks, before its update."""

    values: dict[str, float]
    num_packed_tokens: int


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """−ln σ(chosen − rejected − margin), elementwise (Bradley and Terry 1952; arXiv 2307.09288)."""
    return -F.logsigmoid(chosen - rejected - margin)


class PairUpdate:
    """Scores and optimizer steps; owns no weights."""

    def __init__(
        self,
        model: RewardModel,
        optimizer: FlatAdamW | ShardedAdamW,
        ranks: Ranks,
        config: PairUpdateConfig,
        section: ModelSection,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._config = config
        self._section = section
        self._offload = HostOffload(ranks.device) if section.offload_layers else None
        can_share = can_share_prompts(ranks.device, section.attention)
        self._share_prompts = can_share if config.share_prompts is None else config.share_prompts

    def step(
        self,
        pairs: Sequence[EncodedPair],
        *,
        num_pairs: int,
        lr: float,
        on_microbatch: Callable[[int, int], None] | None = None,
    ) -> PairMetrics:
        """One optimizer step.

        Args:
            pairs: this rank's.
            num_pairs: of the step, over all ranks.
            lr: of the step.
            on_microbatch: called with (micro-batches done, in all).

        Raises:
            TrainingStopped: the loss or gradient is not finite; the weights were not touched.
        """
        self._optimizer.zero_grad()
        batches = self._pack(pairs)
        totals = torch.zeros(5, dtype=torch.float64, device=self._ranks.device)
        for done, batch in enumerate(batches, start=1):
            chosen, rejected = self._scores(batch)
            loss = bradley_terry_loss(chosen, rejected, self._margins(pairs, batch)).sum()
            (loss / num_pairs).backward()
            with torch.no_grad():
                margin = chosen - rejected
                is_right = (margin > 0).sum() + (margin == 0).sum() / 2
                parts = [loss, is_right, margin.sum(), chosen.sum(), rejected.sum()]
                totals += torch.stack([part.double() for part in parts])
            if on_microbatch is not None:
                on_microbatch(done, len(batches))
        grad_norm = self._optimizer.reduce_grads(self._ranks.group)
        num_truncated = float(sum(pair.is_truncated for pair in pairs))
        num_packed = float(sum(batch.packed.num_tokens for batch in batches if batch.pairs))
        sums = self._ranks.sum([*totals.tolist(), num_truncated, num_packed])
        norm = float(grad_norm)
        if not all(torch.isfinite(torch.tensor([norm, sums[0]]))):
            raise TrainingStopped(
                f"the loss ({sums[0] / num_pairs}) or gradient (norm {norm}) is not finite; no "
                "weight was changed: lower optim.lr or look at the pairs of this step"
            )
        self._optimizer.step(lr=lr, grad_norm=grad_norm)
        values = {name: total / num_pairs for name, total in zip(MEANS, sums[:-1], strict=True)}
        return PairMetrics(values | {"grad_norm": norm}, int(sums[-1]))

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[EncodedPair]) -> list[tuple[float, float]]:
        """(chosen, rejected) scores of this rank's pairs, in order."""
        scores = [(0.0, 0.0)] * len(pairs)
        for batch in self._pack(pairs):
            chosen, rejected = (part.tolist() for part in self._scores(batch))
            reshard(self._model)
            for index, one, other in zip(batch.pairs, chosen, rejected, strict=True):
                scores[index] = (one, other)
        return scores

    def _pack(self, pairs: Sequence[EncodedPair]) -> list[PairBatch]:
        """As many on every rank where each pass is a collective, that of a fully sharded model."""
        batches = pack_pairs(
            pairs,
            budget_tokens=self._config.microbatch_tokens,
            share_prompts=self._share_prompts,
        )
        num_idle = num_idle_passes(self._model, self._ranks, len(batches))
        return batches + [empty_batch() for _ in range(num_idle)]

    def _scores(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores [P] of the chosen and of the rejected answers."""
        device, packed = self._ranks.device, batch.packed
        table = SegmentTable.from_cu_seqlens(packed.cu_seqlens, packed.prefix_of)
        scores_N = self._model(
            packed.input_ids_T.to(device),
            packed.position_ids_T.to(device),
            batch.last_index_N.to(device),
            PackedAttend(table, self._section.attention),
            checkpoint_layers=self._section.checkpoint_layers,
            offload=self._offload,
            mlp_tile_tokens=self._section.mlp_tile_tokens,
        )
        return scores_N[0::2], scores_N[1::2]

    def _margins(self, pairs: Sequence[EncodedPair], batch: PairBatch) -> Tensor:
        margins = [pairs[index].pair.margin for index in batch.pairs]
        if not self._config.use_margin:
            margins = [0.0] * len(margins)
        return torch.tensor(margins, device=self._ranks.device)
