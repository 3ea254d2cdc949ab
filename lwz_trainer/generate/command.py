"""The `generate` command line."""

from lwz_trainer.config.generate import GenerateCommandConfig
from lwz_trainer.config.reading import parse_command_line

__all__ = ["generate_command"]


def generate_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] --model DIR --prompt TEXT | --prompts FILE --output FILE`."""
    config = parse_command_line(GenerateCommandConfig, argv, prog="lwz_trainer generate")
    from lwz_trainer.generate.run import run_generate

    run_generate(config)
