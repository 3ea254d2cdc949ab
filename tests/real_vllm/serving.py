"""A real `vllm serve` on this machine's CPU, for as long as a test needs it."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["START_S", "num_requests_done", "served"]

START_S = 600
_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "NO_PROXY": "127.0.0.1",
}


@contextmanager
def served(model_dir: Path, log: Path, *options: str, **environment: str) -> Iterator[str]:
    """The server's address without `/v1`, once it is up.

    Args:
        model_dir: what is served.
        log: file for what the server prints.
        options: of `vllm serve`.
        environment: further variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | _CPU | environment, stdout=file, stderr=file
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not _is_up(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def num_requests_done(url: str) -> int:
    """Requests that the server has answered, by its own count."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    counts = re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert counts, "the server counts its requests"
    return int(sum(map(float, counts)))


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
