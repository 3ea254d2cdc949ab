"""The `view` command line."""

import argparse
from pathlib import Path

from lwz_trainer.view.page import write_page

__all__ = ["view_command"]


def view_command(argv: list[str]) -> None:
    """`RUN [RUN …] [--out FILE]`."""
    parser = argparse.ArgumentParser(
        prog="lwz_trainer view", description="Writes one self-contained HTML page."
    )
    parser.add_argument("run", nargs="+", type=Path, help="run directory; several are overlaid")
    parser.add_argument("--out", type=Path, help="default: report.html in the first run")
    parser.add_argument(
        "--max-sample-steps", type=int, default=40, help="steps whose samples are embedded"
    )
    args = parser.parse_args(argv)
    print(write_page(args.run, args.out, max_sample_steps=args.max_sample_steps))
