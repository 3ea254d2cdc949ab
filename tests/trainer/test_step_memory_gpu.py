"""Steps in phase memory on a GPU: what was recorded in the first one is replayed in the second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_kernels.memory import is_available
from lwz_trainer.rollout.burst import CudaGraphs
from tests.trainer.rollout_case import sample_all
from tests.trainer.test_step_memory import REQUESTS, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("parks", [False, True])
def test_two_steps_replay_the_same_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parks: bool
) -> None:
    if not is_available("cuda"):
        pytest.skip("this driver has no virtual memory management")
    captured: list[Any] = []
    record = CudaGraphs.__call__

    def count(self: CudaGraphs, step: Callable[[], None]) -> Callable[[], None]:
        captured.append(step)
        return record(self, step)

    case = Case(tmp_path, device="cuda", dtype=torch.bfloat16, offload_optimizer=parks)
    plain = Case(
        tmp_path, device="cuda", dtype=torch.bfloat16, memory="plain", offload_optimizer=False
    )
    case.memory.enter_rollout()
    address = case.engine._held.cache.keys.data_ptr()
    num_captured = None
    for step in range(2):
        plain.memory.enter_rollout()
        expected = sample_all(plain.engine, REQUESTS)
        with monkeypatch.context() as patched:
            patched.setattr(CudaGraphs, "__call__", count)
            ours = sample_all(case.engine, REQUESTS)
        assert [s.completion_ids for s in ours] == [s.completion_ids for s in expected]
        assert [s.logprobs for s in ours] == [s.logprobs for s in expected]
        assert num_captured in (None, len(captured))
        num_captured = len(captured)
        for each in (case, plain):
            each.memory.enter_update()
            each.step(step)
        scratch = torch.full((1 << 26,), 7.0, device="cuda")  # of the pages that were the cache's
        case.memory.enter_rollout()
        del scratch
        assert case.engine._held.cache.keys.data_ptr() == address
    assert num_captured
    assert case.memory.peak_gb() > 0
