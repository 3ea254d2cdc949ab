"""The `reward-model` command line."""

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.reward_model import RewardModelConfig
from lwz_trainer.errors import UserError

__all__ = ["reward_model_command"]


def reward_model_command(argv: list[str]) -> None:
    """`[CONFIG.yaml] [--section.field=value …]`."""
    config = parse_command_line(RewardModelConfig, argv, prog="lwz_trainer reward-model")
    if not config.data.pairs:
        raise UserError("no pairs to train on: set data.pairs to a JSONL file")
    from lwz_trainer.reward_model.loop import run_reward_model

    run_reward_model(config)
