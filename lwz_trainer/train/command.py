"""The `train` command line."""

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig

__all__ = ["train_command"]


def train_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--section.field=value …] [--dry-run]`."""
    is_dry_run = "--dry-run" in argv
    config = parse_command_line(
        TrainConfig,
        [argument for argument in argv if argument != "--dry-run"],
        prog="lwz_trainer train",
    )
    if is_dry_run:
        from lwz_trainer.train.forecast import print_forecast

        print_forecast(config)
        return
    from lwz_trainer.train.loop import run_train

    run_train(config)
