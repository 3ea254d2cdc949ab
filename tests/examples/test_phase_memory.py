"""The phase memory example: who holds what, step after step."""

import importlib
import sys
from pathlib import Path

import pytest

from lwz_kernels.memory import is_available, unavailable_reason

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(not is_available(), reason=unavailable_reason())
def test_phase_memory_example_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("phase_memory", None)
    example = importlib.import_module("phase_memory")
    mib = example.MIB
    expected = {
        "rollout": {"rollout": 8 * mib, "update": 0},
        "update": {"rollout": 2 * mib, "update": 6 * mib},
    }
    assert example.train(2) == [expected, expected]
