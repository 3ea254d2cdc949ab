"""The beginning and the end of a run's process: its ranks, its signals, and how it leaves."""

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lwz_trainer.config.run import RunConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.out_of_memory import is_out_of_memory
from lwz_trainer.parallel import Ranks, start_ranks
from lwz_trainer.train.signals import StopSignal

__all__ = ["started_ranks"]


@contextmanager
def started_ranks(config: RunConfig) -> Iterator[tuple[Ranks, StopSignal]]:
    """This process among its peers, and what SIGTERM or SIGINT asked of it.

    An error in the block is told to the other ranks before it leaves the process.

    Raises:
        TrainingStopped: in place of an error that says that memory did not suffice.
    """
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
        yield ranks, stop
    except BaseException as error:
        ranks.abandon(error)
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingStopped(
            f"out of memory where no smaller part can be tried ({reason}): lower "
            "rollout.kv_cache_tokens or update.microbatch_tokens"
        ) from error
    ranks.close()
