"""Takes guards out of the code, one at a time, and sees that a test fails.

    python -m tests.guards [--only NAME ...] [--csv docs/guards.csv]

A name's test is run twice: as the code is, where it must pass, and without the guard. Exit code 1
where one of the two is otherwise. No file of the project changes.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.guards.list import GUARDS, Guard

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(__file__).with_name("site")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GUARDS, default=list(GUARDS), metavar="NAME")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    passed: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for name in args.only:
        guard = GUARDS[name]
        if guard.test not in passed:
            failed, passed[guard.test] = run_tests(guard.test)
            assert not failed, f"{guard.test} fails as the code is"
        failed, _ = run_tests(guard.test, guard)
        rows.append(
            {
                "name": name,
                "pitfall": guard.pitfall,
                "test": guard.test,
                "passed_with_guard": passed[guard.test],
                "failed_without": failed,
            }
        )
        print(f"{name}: {failed} failed without the guard", flush=True)
        if args.csv:
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    bad = [row["name"] for row in rows if not (row["passed_with_guard"] and row["failed_without"])]
    if bad:
        print(f"no test notices: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


def run_tests(test: str, without: Guard | None = None) -> tuple[int, int]:
    """Failed and passed tests of a node, or of all whose names begin like it."""
    file, _, function = test.partition("::")
    environment = dict(os.environ)
    if without is not None:
        mutation = {
            "module": without.module,
            "guard": without.guard,
            "without": without.without,
        }
        environment["LWZ_GUARD"] = json.dumps(mutation)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(SITE), *filter(None, [environment.get("PYTHONPATH")])]
        )
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, file, "-k", function], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    failed = sum(line.startswith(("FAILED ", "ERROR ")) for line in lines)
    passed = sum(line.startswith("PASSED ") for line in lines)
    if done.returncode not in (0, 1) or not failed + passed:
        raise RuntimeError(f"pytest did not run {test}:\n{done.stdout[-2000:]}{done.stderr}")
    return failed, passed


if __name__ == "__main__":
    sys.exit(main())
