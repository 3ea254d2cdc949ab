"""The reward model that `reward-model` saves has the scores from vLLM that it has here."""

from pathlib import Path
from typing import get_args

import pytest

from lwz_trainer.__main__ import main
from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.endpoint import RewardRoute
from lwz_trainer.rewards.answer import Answer
from lwz_trainer.rewards.sources import make_source
from tests.real_vllm.serving import START_S, served
from tests.trainer.test_reward_model import WORDS, make_args
from tests.trainer.tiny import make_tiny_model

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

ANSWERS = [
    Answer(prompt=f"Write about ship {n}.", text=text)
    for n, text in enumerate([" ".join(WORDS), "no no no.", "One long letter.\n\nA calm day."])
]


@pytest.mark.timeout(START_S + 300)
def test_a_trained_reward_model_has_the_same_scores_from_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # A head of vLLM's on a CPU has 32 numbers or more.
    make_tiny_model(tmp_path, hidden_size=128, intermediate_size=256)
    assert main(make_args(tmp_path)) == 0
    final = tmp_path / "run" / "final"
    here = make_source(
        "rewards.writing", WritingRewardConfig(weight=1.0, model=str(final)), "cpu", None
    ).score(ANSWERS)
    assert max(here.scores) - min(here.scores) > 0.1
    options = ["--runner", "pooling", "--served-model-name", "reward"]
    options += ["--dtype", "float32", "--max-model-len", "256"]
    with served(final, tmp_path / "server.log", *options) as url:
        endpoint = EndpointConfig(base_url=f"{url}/v1", model="reward")
        for route in get_args(RewardRoute):
            # "score" joins the two texts by a template of the server's own.
            is_ours = route != "score"
            config = WritingRewardConfig(
                weight=1.0, source=route, model=str(final) if is_ours else "", endpoint=endpoint
            )
            source = make_source("rewards.writing", config, "cpu", None)
            there = source.score(ANSWERS)
            source.close()
            assert there.failures == [], route
            if is_ours:
                assert there.scores == pytest.approx(here.scores, abs=1e-3), route
