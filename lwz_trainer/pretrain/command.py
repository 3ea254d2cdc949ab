"""The `pretrain` command line."""

from lwz_trainer.config.pretrain import PretrainConfig
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.train.command import split_dry_run

__all__ = ["pretrain_command"]


def pretrain_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--section.field=value …] [--dry-run [--ranks=N] [--device-gb=X]]`."""
    dry_run, rest = split_dry_run(argv, prog="lwz_trainer pretrain")
    config = parse_command_line(PretrainConfig, rest, prog="lwz_trainer pretrain")
    if dry_run is not None:
        from lwz_trainer.pretrain.forecast import forecast_pretrain
        from lwz_trainer.train.dry_run import print_dry_run

        print_dry_run(config, dry_run, forecast_pretrain)
        return
    from lwz_trainer.pretrain.loop import run_pretrain

    run_pretrain(config)
