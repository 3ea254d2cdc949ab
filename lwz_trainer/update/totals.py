"""Metrics of an update: sums on the device while it runs, means over all ranks at its end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lwz_trainer.parallel import Ranks

__all__ = ["UpdateMetrics", "UpdateTotals"]

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


class UpdateTotals:
    """Running sums on the device; read once, after the last update."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self.grad_norm = 0.0
        self.num_updates = 0
        self._num_packed_tokens = 0

    def add(self, metrics: dict[str, Tensor], loss: Tensor, num_tokens: int) -> None:
        """One micro-batch; its loss is already normalised."""
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
