"""What the configurations of all commands that train have in common."""

from typing import Protocol

from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.sections import CheckpointConfig, LogConfig, OptimConfig

__all__ = ["RunConfig"]


class RunConfig(Protocol):
    """The settings of a run that do not depend on what is learned."""

    @property
    def output_dir(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def num_threads(self) -> int: ...

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def checkpoint(self) -> CheckpointConfig: ...

    @property
    def log(self) -> LogConfig: ...
