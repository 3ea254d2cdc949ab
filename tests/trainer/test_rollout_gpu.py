"""The engine on a GPU: recorded steps draw what steps from the host draw, after an update too."""

import threading
from pathlib import Path

import pytest
import torch

from lwz_trainer.rollout.burst import CudaGraphs
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_generate_with_graphs_draws_the_same_samples(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    model.to("cuda", torch.bfloat16)
    settings = {"max_completion_tokens": 40, "temperature": 1.2}
    plain = make_engine(model, tokenizer, cuda_graphs=False, burst_steps=1, **settings)
    graphs = make_engine(model, tokenizer, burst_steps=8, **settings)
    for _ in range(2):
        expected, ours = (sample_all(e, make_requests(group_size=6)) for e in (plain, graphs))
        assert [s.completion_ids for s in ours] == [s.completion_ids for s in expected]
        assert [s.logprobs for s in ours] == [s.logprobs for s in expected]
        with torch.no_grad():  # in place, as the optimizer does
            model.layers[0].qkv_proj[0] += 3.0


def test_graphs_are_recorded_while_another_thread_allocates() -> None:
    x = torch.zeros(1, device="cuda")
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        kept.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))  # a cudaMalloc

    def step() -> None:
        x.add_(1)
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()

    replay = CudaGraphs()(step)
    assert len(kept) == 3  # two warm-ups and the recording
    replay()
    assert x.item() == 3
