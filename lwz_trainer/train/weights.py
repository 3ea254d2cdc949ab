"""The weights of a run: what the update trains, its optimizer, and what is read whole.

Both are one model, stepped in place, unless `parallel.shard_parameters` spreads the trained one
over the ranks: then what the rollout or the export reads is a copy that is gathered when needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypedDict, TypeVar

import torch
from torch import nn

from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.run import RunConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.parallel import Ranks
from lwz_trainer.update.buffers import Buffers
from lwz_trainer.update.fully_sharded import WholeCopy, shard_model
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.sharded_adamw import ShardedAdamW

__all__ = ["TrainedWeights", "loading_place"]

M = TypeVar("M", bound=nn.Module)


def _is_spread(config: ParallelConfig, ranks: Ranks) -> bool:
    """Whether parameters lie on all ranks; one process alone has nobody to share with."""
    return config.shard_parameters and ranks.group is not None


class LoadingPlace(TypedDict):
    """Arguments of `load_decoder`."""

    device: torch.device
    is_empty: bool


def loading_place(config: ParallelConfig, ranks: Ranks) -> LoadingPlace:
    """Where a model without rollouts is loaded: if it is spread, on the main rank's host alone."""
    if _is_spread(config, ranks):
        return {"device": torch.device("cpu"), "is_empty": not ranks.is_main}
    return {"device": ranks.device, "is_empty": False}


class TrainedWeights(Generic[M]):
    """A model as it is trained, and as it is read.

    Args:
        model: whole; read inside `whole`, and only there if it is a copy. Where it is spread, the
            values of the main rank count.
        config: of the run.
        ranks: all of them make theirs together.
        grads, state: where gradients and optimizer state lie, see `FlatAdamW`. The gradients of
            parameters that are spread over the ranks are autograd's.
    """

    def __init__(
        self,
        model: M,
        config: RunConfig,
        ranks: Ranks,
        *,
        grads: Buffers | None = None,
        state: Buffers | None = None,
    ) -> None:
        self.dtype = next(model.parameters()).dtype
        self._is_main = ranks.is_main
        self._model = model
        self._mesh = ranks.mesh() if _is_spread(config.parallel, ranks) else None
        self.trained = self.spread(model, trainable=True)
        self.optimizer: FlatAdamW | ShardedAdamW
        self._copy: WholeCopy | None = None
        if self._mesh is not None:
            self._copy = WholeCopy(model, self.trained)
            self._copy.release()
            self.optimizer = ShardedAdamW(self.trained, config.optim, state=state)
        else:
            shard_group = ranks.group if config.parallel.shard_optimizer else None
            self.optimizer = FlatAdamW(model, config.optim, shard_group, grads=grads, state=state)
        self._addresses = self._present_addresses()

    def spread(self, model: M, *, trainable: bool) -> M:
        """The model over all ranks where the run shards parameters, else the model itself."""
        if self._mesh is None:
            return model.requires_grad_(trainable)
        return shard_model(model, self._mesh, trainable=trainable)

    @contextmanager
    def whole(self, *, on_all_ranks: bool = True) -> Iterator[None]:
        """Inside, the model holds the present weights, of all ranks or of the main one.

        All ranks enter it together.
        """
        if self._copy is None:
            # The optimizer works in place: one copy of the weights, at fixed addresses.
            if self._addresses != self._present_addresses():
                raise TrainingStopped("a parameter moved: what reads the model would see old ones")
            yield
            return
        self._copy.gather(keeps=on_all_ranks or self._is_main)
        try:
            yield
        finally:
            self._copy.release()

    def _present_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]
