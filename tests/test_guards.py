"""The list of guards fits the code; `python -m tests.guards` takes them out one by one."""

import importlib.util
from pathlib import Path

import pytest

from tests.guards.__main__ import ROOT, run_tests
from tests.guards.list import GUARDS


@pytest.mark.parametrize("name", GUARDS)
def test_guard_is_in_the_code_once_and_its_test_exists(name: str) -> None:
    guard = GUARDS[name]
    spec = importlib.util.find_spec(guard.module)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).read_text().count(guard.guard) == 1
    file, _, function = guard.test.partition("::")
    assert f"def {function}" in (ROOT / file).read_text()


def test_a_guard_that_is_taken_out_is_noticed() -> None:
    failed, _ = run_tests(GUARDS["merge_of_nothing"].test, GUARDS["merge_of_nothing"])
    assert failed == 1
