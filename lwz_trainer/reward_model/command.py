"""The `reward-model` command line."""

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.errors import UserError
from lwz_trainer.train.command import split_dry_run

__all__ = ["reward_model_command"]


def reward_model_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--section.field=value …] [--dry-run [--ranks=N] [--device-gb=X]]`."""
    dry_run, rest = split_dry_run(argv, prog="lwz_trainer reward-model")
    config = parse_command_line(RewardModelConfig, rest, prog="lwz_trainer reward-model")
    if not config.data.pairs:
        raise UserError("no pairs to train on: set data.pairs to a JSONL file")
    if dry_run is not None:
        from lwz_trainer.reward_model.forecast import forecast_reward_model
        from lwz_trainer.train.dry_run import print_dry_run

        print_dry_run(config, dry_run, forecast_reward_model)
        return
    from lwz_trainer.reward_model.loop import run_reward_model

    run_reward_model(config)
