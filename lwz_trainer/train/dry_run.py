"""`--dry-run`: the resolved configuration and what a step will need, on the terminal.

`--ranks N --device-gb X` ask for N ranks of X GB each instead of those that are here.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from rich.console import Console

from lwz_trainer.config.reading import dump_config
from lwz_trainer.config.run import RunConfig
from lwz_trainer.parallel import local_world_size, start_ranks
from lwz_trainer.train.command import DryRun
from lwz_trainer.train.forecast import MemoryForecast, gpu_memory_bytes, print_memory
from lwz_trainer.train.step_forecast import Target

__all__ = ["print_dry_run"]

C = TypeVar("C", bound=RunConfig)


def print_dry_run(
    config: C, asked: DryRun, forecast: Callable[[C, Target], tuple[MemoryForecast, str]]
) -> None:
    """Prints the configuration, memory by phase, and time of a step.

    Args:
        config: of the run.
        asked: which ranks to forecast for, 8 on a node, and how large their GPUs are.
        forecast: memory of a rank, and the time of a step in words.
    """
    ranks = start_ranks(
        device=config.device,
        num_threads=config.num_threads,
        timeout_s=config.parallel.timeout_s,
    )
    local = local_world_size() if asked.num_ranks is None else min(asked.num_ranks, 8)
    target = Target(
        device=ranks.device if asked.device_gb is None else torch.device("cuda"),
        num_ranks=asked.num_ranks or ranks.world_size,
        ranks_per_node=local,
        here=ranks.device,
        device_bytes=gpu_memory_bytes(ranks.device, asked.device_gb),
    )
    memory, time_of_a_step = forecast(config, target)
    ranks.close()
    if not ranks.is_main:
        return
    console = Console(highlight=False)
    console.print(dump_config(config), markup=False)
    print_memory(console, memory, device_bytes=target.device_bytes, num_ranks=target.num_ranks)
    console.print(time_of_a_step)
