"""The engine on a GPU: recorded steps draw what steps from the host draw, after an update too."""

from pathlib import Path

import pytest
import torch

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
