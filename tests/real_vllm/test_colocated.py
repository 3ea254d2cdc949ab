"""The engine `vllm` on the real vLLM: one engine for all tests, as a process can have but one."""

from typing import Any

import pytest
import torch

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.rollout import RolloutInterrupted, Sample
from lwz_trainer.rollout.vllm import VllmEngine
from tests.real_vllm.case import TEMPERATURE, load_model, trainer_logprobs
from tests.trainer.rollout_case import make_requests

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

PROMPTS = [[5, 6, 7], list(range(10, 31))]
STOP = "e"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, VllmEngine]:
    model_dir, model, tokenizer = load_model(tmp_path_factory.mktemp("model"))
    config = RolloutConfig(
        group_size=4,
        max_completion_tokens=24,
        temperature=TEMPERATURE,
        stop=(STOP,),
        engine="vllm",
        vllm_eager=True,
    )
    engine = VllmEngine(
        model,
        tokenizer,
        model_dir,
        eos_ids=(tokenizer.eos_token_id,),
        config=config,
        memory_limit_bytes=1 << 28,
        is_launched=False,
    )
    engine.plan_cache(longest_prompt=21, num_samples=8)
    return model, engine


def sample_all(engine: VllmEngine, version: int, **settings: Any) -> list[Sample]:
    return engine.generate(
        make_requests(PROMPTS), seed=3, step=2, policy_version=version, **settings
    )[0]


def contents(samples: list[Sample]) -> list[list[int]]:
    return [sample.completion_ids for sample in samples]


def test_samples_carry_the_trainers_logprobs(policy: tuple[Decoder, VllmEngine]) -> None:
    model, engine = policy
    samples = sample_all(engine, version=0)
    assert [sample.sample for sample in samples] == list(range(8))
    assert len({tuple(tokens) for tokens in contents(samples)}) == 8
    for sample in samples:
        expected = trainer_logprobs(model, sample)
        assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)


def test_samples_are_keyed_by_seed_and_number(policy: tuple[Decoder, VllmEngine]) -> None:
    _, engine = policy
    everything = contents(sample_all(engine, version=0))
    second_group = engine.generate(make_requests(PROMPTS)[1:], seed=3, step=2, policy_version=0)[0]
    assert contents(second_group) == everything[4:]


def test_completions_end_where_the_own_engine_would_end_them(
    policy: tuple[Decoder, VllmEngine],
) -> None:
    _, engine = policy
    samples = sample_all(engine, version=0)
    reasons = {sample.finish_reason for sample in samples}
    assert "stop" in reasons
    for sample in samples:
        assert STOP not in sample.text
        assert (sample.stop_string == STOP) == (sample.finish_reason == "stop")
        if sample.finish_reason == "length":
            assert len(sample.completion_ids) == 24


@pytest.mark.parametrize("name", ["embed", "layers.0.qkv_proj", "layers.1.down_proj", "final_norm"])
def test_changing_a_weight_changes_the_next_rollout(
    policy: tuple[Decoder, VllmEngine], name: str
) -> None:
    """The embedding is the tied head as well."""
    model, engine = policy
    before = contents(sample_all(engine, version=0))
    parameter = dict(model.named_parameters())[name]
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(parameter.flip(0))
    changed = sample_all(engine, version=1)
    assert contents(changed) != before
    for sample in changed:
        expected = trainer_logprobs(model, sample)
        assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)
    with torch.no_grad():
        parameter.copy_(original)
    assert contents(sample_all(engine, version=0)) == before


def test_an_interrupted_rollout_leaves_a_usable_engine(
    policy: tuple[Decoder, VllmEngine],
) -> None:
    _, engine = policy
    everything = contents(sample_all(engine, version=0))
    calls = iter([False, False, True])
    with pytest.raises(RolloutInterrupted):
        sample_all(engine, version=0, should_stop=lambda: next(calls))
    assert contents(sample_all(engine, version=0)) == everything


def test_a_rollout_that_is_cut_short_keeps_what_has_ended(
    policy: tuple[Decoder, VllmEngine],
) -> None:
    _, engine = policy
    ended: list[Sample] = []

    def until_the_first(samples: list[Sample]) -> bool:
        ended.extend(samples)
        return not ended

    samples = sample_all(engine, version=0, on_burst=until_the_first)
    assert 0 < len(samples) < 8
    assert contents(samples) == contents(sorted(ended, key=lambda sample: sample.sample))
