"""The `train` command line."""

import argparse
from dataclasses import dataclass

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError

__all__ = ["DryRun", "split_dry_run", "train_command"]


@dataclass(frozen=True)
class DryRun:
    """A forecast for these ranks instead of a run; None: for those that are here."""

    num_ranks: int | None
    device_gb: float | None


def train_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--section.field=value …] [--dry-run [--ranks=N] [--device-gb=X]]`."""
    dry_run, rest = split_dry_run(argv, prog="lwz_trainer train")
    config = parse_command_line(TrainConfig, rest, prog="lwz_trainer train")
    if dry_run is not None:
        from lwz_trainer.train.dry_run import print_dry_run
        from lwz_trainer.train.step_forecast import forecast_train

        print_dry_run(config, dry_run, forecast_train)
        return
    from lwz_trainer.train.loop import run_train

    run_train(config)


def split_dry_run(argv: list[str], *, prog: str) -> tuple[DryRun | None, list[str]]:
    """What `--dry-run [--ranks=N] [--device-gb=X]` asks for, if there, and the other arguments."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device-gb", type=float)
    asked, rest = parser.parse_known_args(argv)
    if not asked.dry_run and (asked.ranks is not None or asked.device_gb is not None):
        raise UserError("--ranks and --device-gb belong to --dry-run: add that, or use torchrun")
    for name, value in (("--ranks", asked.ranks), ("--device-gb", asked.device_gb)):
        if value is not None and value <= 0:
            raise UserError(f"{name} must be above 0, got {value}")
    return DryRun(asked.ranks, asked.device_gb) if asked.dry_run else None, rest
