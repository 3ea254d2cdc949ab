"""The weights of a run: what the update trains, its optimizer, and what the rollout reads.

Both are one model, stepped in place, unless `parallel.shard_parameters` spreads the trained one
over the ranks: then the rollout's is a copy that is gathered each time it is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.parallel import Ranks
from lwz_trainer.update.fully_sharded import WholeCopy, shard_decoder
from lwz_trainer.update.optimizer import FlatAdamW
from lwz_trainer.update.sharded_adamw import ShardedAdamW

__all__ = ["PolicyWeights"]


class PolicyWeights:
    """The policy, trained and sampled.

    Args:
        model: whole; the rollout reads it inside `whole`, and only there if it is a copy.
        config: of the run.
        ranks: all of them make theirs together.
    """

    def __init__(self, model: Decoder, config: TrainConfig, ranks: Ranks) -> None:
        self._mesh = None
        if config.parallel.shard_parameters and ranks.group is not None:
            self._mesh = ranks.mesh()
        self._model = model
        self.trained = self.spread(model, trainable=True)
        self.optimizer: FlatAdamW | ShardedAdamW
        self._copy: WholeCopy | None = None
        if self._mesh is not None:
            self._copy = WholeCopy(model, self.trained)
            self._copy.release()
            self.optimizer = ShardedAdamW(self.trained, config.optim)
        else:
            shard_group = ranks.group if config.parallel.shard_optimizer else None
            self.optimizer = FlatAdamW(model, config.optim, shard_group)
        self._addresses = self._present_addresses()

    def spread(self, model: Decoder, *, trainable: bool) -> Decoder:
        """The model over all ranks where the run shards parameters, else the model itself."""
        if self._mesh is None:
            return model.requires_grad_(trainable)
        return shard_decoder(model, self._mesh, trainable=trainable)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model holds the present weights; all ranks enter it together."""
        if self._copy is None:
            # The optimizer works in place: one copy of the weights, at fixed addresses.
            if self._addresses != self._present_addresses():
                raise TrainingStopped("a parameter moved: the engine would sample from old weights")
            yield
            return
        self._copy.gather()
        try:
            yield
        finally:
            self._copy.release()

    def _present_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]
