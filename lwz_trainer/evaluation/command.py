"""The `eval` command line."""

from typing import get_args

from lwz_trainer.config.evaluation import EvalConfig
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.evaluation.items import Benchmark
from lwz_trainer.evaluation.run import run_evaluation

__all__ = ["eval_command"]


def eval_command(argv: list[str]) -> None:
    """`BENCHMARK [CONFIG.yaml] [--section.field=value …]`."""
    names = get_args(Benchmark)
    benchmark = next((name for name in names if argv and name == argv[0]), None)
    if benchmark is None and not (argv and argv[0] in ("-h", "--help")):
        got = f"got '{argv[0]}'" if argv else "got nothing"
        raise UserError(f"eval needs a benchmark first: expected {', '.join(names)}, {got}")
    prog = f"lwz_trainer eval {benchmark or 'BENCHMARK'}"
    config = parse_command_line(EvalConfig, argv[1:] if benchmark else argv, prog=prog)
    assert benchmark is not None, "--help has left the program"
    try:
        summary = run_evaluation(benchmark, config)
    except KeyboardInterrupt as error:
        raise TrainingStopped("interrupted; the same command goes on") from error
    if summary.num_failures:
        print(f"{summary.num_failures} calls failed; the same command asks them again")
    print(summary.report)
