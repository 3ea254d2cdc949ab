"""What all tests share: one thread, a seed of their own, and no GPU tests without a GPU."""

import os
import random
import sys
import zlib
from collections.abc import Iterator

import pytest
import torch

# Triton looks at this when a kernel is defined, so it must be set before anything imports triton.
# Tests of compiled kernels without a GPU start a process without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # Two OpenMP programs on one machine slow each other down tenfold.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take minutes come first, so that no worker is left alone with one at the end.
    marked = {i.path for i in items if i.get_closest_marker("slow") or i.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in marked)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    if "tests.processes" in sys.modules:  # a collected file starts processes
        sys.modules["tests.processes"].start_fork_server()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seeds by the test's own name, so that its numbers do not depend on what ran before."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _restore_num_threads() -> Iterator[None]:
    """A test may change the number of threads; the next one starts with one again."""
    yield
    torch.set_num_threads(1)
