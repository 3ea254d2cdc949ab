"""`python -m lwz_trainer COMMAND`, or `torchrun … -m lwz_trainer COMMAND` on several devices."""

import errno
import logging
import os
import sys

from lwz_trainer.errors import TrainingStopped, UserError

USAGE = """usage: python -m lwz_trainer COMMAND …   (or torchrun -m lwz_trainer train …)

commands:
  train [CONFIG.yaml] [--section.field=value …] [--dry-run]   train a model by GRPO
  pretrain [CONFIG.yaml] [--data.sources NAME=FILE …]         train on texts, or on prompts and
                                                              answers (fine-tuning); --dry-run
  generate --model DIR --prompt TEXT [--field=value …]        write one piece on the terminal, or a
                                                              file of them (--prompts, --output)
  eval BENCHMARK [CONFIG.yaml] [--field=value …]              writingbench, arena-write or
                                                              longbench-write: answer and judge
  prepare [CONFIG.yaml] --inputs FILE … [--field=value …]     chat logs to writing requests with
                                                              word ranges
  reward-model [CONFIG.yaml] [--section.field=value …]        train a reward model on pairs;
                                                              --dry-run
  view RUN [RUN …] [--out FILE]                               write an HTML page of runs

`COMMAND --help` lists its options."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; its exit code: 0, 1 for a run that had to stop, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _run(argv[0], argv[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except TrainingStopped as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"the disk is full{where}: free space; the same command goes on", 2)
    return 0


def _run(command: str, argv: list[str]) -> None:
    """Imports what the command needs and nothing else."""
    if command == "train":
        from lwz_trainer.train.command import train_command

        train_command(argv)
    elif command == "pretrain":
        from lwz_trainer.pretrain.command import pretrain_command

        pretrain_command(argv)
    elif command == "generate":
        from lwz_trainer.generate.command import generate_command

        generate_command(argv)
    elif command == "eval":
        from lwz_trainer.evaluation.command import eval_command

        eval_command(argv)
    elif command == "prepare":
        from lwz_trainer.prepare.command import prepare_command

        prepare_command(argv)
    elif command == "reward-model":
        from lwz_trainer.reward_model.command import reward_model_command

        reward_model_command(argv)
    elif command == "view":
        from lwz_trainer.view.command import view_command

        view_command(argv)
    else:
        raise UserError(
            f"unknown command '{command}': expected train, pretrain, reward-model, generate, eval, "
            "prepare or view; see --help"
        )


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
