"""The engine `vllm_server` on a real `vllm serve`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.config.vllm_server import VllmServerConfig
from lwz_trainer.rollout.vllm import VllmServerEngine
from tests.real_vllm.case import TEMPERATURE, load_model, trainer_logprobs
from tests.real_vllm.serving import START_S, served
from tests.trainer.rollout_case import make_requests

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")


@pytest.fixture
def base_url(tmp_path: Path) -> Iterator[str]:
    model_dir, _, _ = load_model(tmp_path)
    options = ["--served-model-name", "policy", "--dtype", "float32", "--max-model-len", "64"]
    options += ["--logprobs-mode", "processed_logprobs"]
    with served(model_dir, tmp_path / "server.log", *options, VLLM_SERVER_DEV_MODE="1") as url:
        yield f"{url}/v1"


@pytest.mark.timeout(START_S + 300)
def test_a_server_samples_from_the_weights_that_are_pushed(
    base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _, model, tokenizer = load_model(tmp_path)
    (tmp_path / "weights").mkdir()
    config = RolloutConfig(
        group_size=4,
        max_completion_tokens=16,
        temperature=TEMPERATURE,
        stop=("e",),
        engine="vllm_server",
        server=VllmServerConfig(
            base_url=base_url, model="policy", weights_dir=str(tmp_path / "weights")
        ),
    )
    engine = VllmServerEngine(
        model, tokenizer, eos_ids=(tokenizer.eos_token_id,), config=config, ranks=None
    )
    engine.plan_cache(longest_prompt=21, num_samples=8)
    requests = make_requests([[5, 6, 7], list(range(10, 31))])
    rollouts = []
    for version in range(2):
        samples, _ = engine.generate(requests, seed=3, step=2, policy_version=version)
        for sample in samples:
            expected = trainer_logprobs(model, sample)
            assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)
        rollouts.append([sample.completion_ids for sample in samples])
        with torch.no_grad():
            model.embed.copy_(model.embed.flip(0))
    assert rollouts[0] != rollouts[1]
