"""Times the loss heads against their peers, after a check of values and gradients.

    python -m bench.loss_head --preset cpu --csv bench/results/cpu/loss_head.csv
    python -m bench.loss_head --preset gpu --csv OUT.csv --plot OUT.svg
    python -m bench.loss_head --csv OUT.csv --plot OUT.svg --table

The last form measures nothing: it draws and tabulates what the file holds. `bench/README.md` has
the protocol and the meaning of every column.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.loss_head.compare import COLUMNS, Machine, Plan, compare
from bench.loss_head.measure import Setting
from bench.loss_head.presets import DTYPES, PRESETS, Preset
from bench.loss_head.problem import Shape
from bench.loss_head.provider import CASES, Case
from bench.loss_head.providers import PROVIDERS
from bench.loss_head.tables import markdown_table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.preset is not None:
        _measure(options)
    rows = _read(options.csv)
    if options.table:
        print(markdown_table(rows))
    if options.plot is not None:
        from bench.loss_head.plots import plot

        plot(rows, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss_head", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--csv", type=Path, required=True, help="file with the rows")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="measure; without it, only read")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--ops", nargs="+", choices=sorted({case.op for case in CASES}))
    parser.add_argument("--modes", nargs="+", choices=sorted({case.mode for case in CASES}))
    parser.add_argument("--providers", nargs="+", choices=tuple(PROVIDERS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="T,D,V")
    parser.add_argument("--rounds", type=int, help="turns of each provider")
    parser.add_argument("--seconds", type=float, help="timed in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--plot", type=Path, help="file for a plot (.svg, .png); needs matplotlib")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown")
    return parser


def _shape(text: str) -> Shape:
    try:
        tokens, width, vocab = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected T,D,V as in 4096,576,49152, got {text!r}"
        ) from None
    return Shape(tokens, width, vocab)


def _measure(options: argparse.Namespace) -> None:
    preset = PRESETS[options.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {options.preset} needs a CUDA device, and there is none")
    names = options.providers or tuple(PROVIDERS)
    providers = {
        name: PROVIDERS[name] for name in names if preset.device in PROVIDERS[name].devices
    }
    cases = [case for case in CASES if _is_wanted(case, options)]
    plan = Plan(
        rounds=options.rounds or preset.rounds,
        warm_up_s=preset.warm_up_s,
        seconds=options.seconds or preset.seconds,
        timeout_s=options.timeout,
    )
    machine = Machine(preset.device, options.threads, options.commit or report.commit())
    rows = _read(options.csv) if options.append and options.csv.exists() else []
    for setting in _settings(options, preset, cases):
        print(f"{setting.shape} {setting.dtype}", flush=True)
        for new_rows in compare(providers, setting, cases, plan, machine):
            rows += new_rows
            # After every case, so that a run that is cut short keeps what it measured.
            report.write_csv(options.csv, COLUMNS, rows)
            _print(new_rows)
    if preset.note:
        print(preset.note)


def _is_wanted(case: Case, options: argparse.Namespace) -> bool:
    is_op = not options.ops or case.op in options.ops
    return is_op and (not options.modes or case.mode in options.modes)


def _settings(options: argparse.Namespace, preset: Preset, cases: Sequence[Case]) -> list[Setting]:
    return [
        Setting(
            shape,
            DTYPES[dtype],
            preset.device,
            options.threads,
            with_old_logprobs=any(case.mode == "off_policy" for case in cases),
        )
        for shape in options.shapes or preset.shapes
        for dtype in options.dtypes or preset.dtypes
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        case = f"{row.get('op', '')}/{row.get('mode', '')}" if row.get("op") else "start"
        line = f"  {case:32} {row['provider']:27} {row['status']:13}"
        if row["status"] == "ok":
            line += f" {float(row['median_ms']):10.3f} ms"
            line += f" {row.get('extra_mib', ''):>9} MiB" if row.get("extra_mib") else ""
            line += f"  floor {row['floor_frac']}" if row.get("floor_frac") else ""
        print(line, row["reason"], flush=True)


if __name__ == "__main__":
    main()
