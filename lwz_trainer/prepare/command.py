"""The `prepare` command line."""

from lwz_trainer.config.prepare import PrepareConfig
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.errors import TrainingStopped

__all__ = ["prepare_command"]


def prepare_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--inputs …] [--section.field=value …]`."""
    config = parse_command_line(PrepareConfig, argv, prog="lwz_trainer prepare")
    from lwz_trainer.prepare.pipeline import run_prepare

    try:
        run_prepare(config)
    except KeyboardInterrupt as error:
        raise TrainingStopped("interrupted; the same command goes on") from error
