"""The vLLM server engine against a server that has vLLM's interface, and that goes wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.config.vllm_server import VllmServerConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.rollout import Request, RolloutInterrupted, Sample
from lwz_trainer.rollout.vllm import VllmServerEngine
from lwz_trainer.rollout.vllm.record import sample_seed
from tests.trainer.fault_server import Reply
from tests.trainer.rollout_case import load_tiny, make_requests
from tests.trainer.train_case import make_run_args, read_metrics, run_cli
from tests.trainer.vllm_case import FakeVllm


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make_engine(
    tmp_path: Path, fake: FakeVllm, **settings: Any
) -> tuple[Decoder, VllmServerEngine]:
    """A policy with weights of its own, and its engine."""
    model, tokenizer = load_tiny(tmp_path)
    with torch.no_grad():
        model.embed.mul_(1.1)
    (tmp_path / "weights").mkdir(exist_ok=True)
    server = VllmServerConfig(
        base_url=fake.server.base_url, model="policy", weights_dir=str(tmp_path / "weights")
    )
    defaults: dict[str, Any] = {
        "group_size": 4,
        "max_completion_tokens": 12,
        "temperature": 0.7,
        "stop": (),
        "engine": "vllm_server",
        "server": server,
    }
    config = RolloutConfig(**(defaults | settings))
    engine = VllmServerEngine(
        model, tokenizer, eos_ids=(tokenizer.eos_token_id,), config=config, ranks=None
    )
    return model, engine


def make_fake(tmp_path: Path, **settings: Any) -> FakeVllm:
    load_tiny(tmp_path)
    return FakeVllm(tmp_path / "tiny-llama", **settings)


def sample_all(engine: VllmServerEngine, version: int = 0, **settings: Any) -> list[Sample]:
    requests = make_requests([[5, 6, 7], list(range(10, 31))])
    return engine.generate(requests, seed=3, step=2, policy_version=version, **settings)[0]


def contents(samples: list[Sample]) -> list[tuple[int, int, list[int]]]:
    return [(sample.group, sample.sample, sample.completion_ids) for sample in samples]


def test_samples_come_from_the_pushed_weights_in_order(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        model, engine = make_engine(tmp_path, fake)
        samples = sample_all(engine, version=5)
    assert [sample.sample for sample in samples] == list(range(8))
    assert [sample.group for sample in samples] == [0] * 4 + [1] * 4
    assert len({tuple(sample.completion_ids) for sample in samples}) == 8
    assert all(sample.policy_version == 5 for sample in samples)
    assert all(len(sample.logprobs) == len(sample.completion_ids) for sample in samples)
    for ours, theirs in zip(model.parameters(), fake.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert fake.events == ["reload", "reset", "label"]
    assert fake.label.endswith("-5")
    assert not list((tmp_path / "weights").iterdir())


def test_samples_do_not_depend_on_how_many_are_under_way(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        many = sample_all(make_engine(tmp_path, fake)[1])
        one = sample_all(make_engine(tmp_path, fake, max_num_seqs=1)[1])
    assert contents(many) == contents(one)


def test_seeds_differ_in_each_of_their_parts() -> None:
    seeds = {sample_seed(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1))}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_weights_are_pushed_for_each_new_version_only(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        model, engine = make_engine(tmp_path, fake)
        before = sample_all(engine, version=0)
        assert contents(sample_all(engine, version=0)) == contents(before)
        with torch.no_grad():
            model.layers[0].down_proj.mul_(2.0)
        after = sample_all(engine, version=1)
    assert contents(after) != contents(before)
    assert fake.events == ["reload", "reset", "label"] * 2


def test_a_server_that_was_restarted_is_given_the_weights_again(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        sample_all(engine)
        fake.label = "default"
        sample_all(engine)
    assert fake.events == ["reload", "reset", "label"] * 2


def test_weights_that_change_during_the_rollout_stop_the_run(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)

    def push_again(samples: list[Sample]) -> bool:
        fake.label = "another-run-7"
        return True

    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        with pytest.raises(TrainingStopped, match="holds weights 'another-run-7', expected"):
            sample_all(engine, on_burst=push_again)


def test_a_server_that_keeps_old_weights_stops_the_run(tmp_path: Path) -> None:
    def ignore(path: str, body: dict[str, Any]) -> Reply | None:
        return Reply('{"results": [null]}') if path == "/collective_rpc" else None

    fake = make_fake(tmp_path, override=ignore)
    with fake.server:
        model, engine = make_engine(tmp_path, fake)
        with torch.no_grad():
            model.embed.copy_(model.embed.flip(0))
        with pytest.raises(TrainingStopped, match="log-probs are off by"):
            sample_all(engine)


def test_logprobs_from_before_the_temperature_stop_the_run(tmp_path: Path) -> None:
    fake = make_fake(tmp_path, has_processed_logprobs=False)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        with pytest.raises(TrainingStopped, match="--logprobs-mode processed_logprobs"):
            sample_all(engine)


def test_pages_of_old_weights_that_stay_stop_the_run(tmp_path: Path) -> None:
    def refuse(path: str, body: dict[str, Any]) -> Reply | None:
        return Reply('{"success": false}') if path == "/reset_prefix_cache" else None

    fake = make_fake(tmp_path, override=refuse)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        with pytest.raises(TrainingStopped, match="did not drop the pages of the old weights"):
            sample_all(engine)


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    refused: list[str] = []

    def refuse_once(path: str, body: dict[str, Any]) -> Reply | None:
        if path == "/v1/completions" and len(refused) < 2:
            refused.append(path)
            return Reply("", status=503, headers={"Retry-After": "0"})
        return None

    fake = make_fake(tmp_path, override=refuse_once)
    with fake.server:
        assert len(sample_all(make_engine(tmp_path, fake)[1])) == 8
    assert len(refused) == 2


def test_a_refused_completion_stops_the_run(tmp_path: Path) -> None:
    def refuse(path: str, body: dict[str, Any]) -> Reply | None:
        is_rollout = path == "/v1/completions" and body["temperature"] == 0.7
        return Reply("too long", status=400) if is_rollout else None

    fake = make_fake(tmp_path, override=refuse)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        with pytest.raises(TrainingStopped, match=r"the vLLM server failed: .*too long"):
            sample_all(engine)


def test_a_completion_that_did_not_end_stops_the_run(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)

        def cut(path: str, body: dict[str, Any]) -> Reply | None:
            if path == "/v1/completions" and body["temperature"] == 0.7:
                body["max_tokens"] = 3
            return None

        fake.override = cut
        with pytest.raises(TrainingStopped, match="a completion of 3 tokens and 3 log-probs"):
            sample_all(engine)


def test_rollout_is_interrupted_and_cut_short(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        _, engine = make_engine(tmp_path, fake, max_num_seqs=1)
        with pytest.raises(RolloutInterrupted):
            sample_all(engine, should_stop=lambda: True)
        samples = sample_all(engine, on_burst=lambda samples: False)
        assert len(samples) == 1


def test_plan_cache_refuses_a_server_that_takes_no_weights(tmp_path: Path) -> None:
    def no_dev_mode(path: str, body: dict[str, Any]) -> Reply | None:
        return Reply("not found", status=404)

    fake = make_fake(tmp_path, override=no_dev_mode)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
            engine.plan_cache(longest_prompt=8, num_samples=8)


def test_plan_cache_refuses_a_missing_directory(tmp_path: Path) -> None:
    fake = make_fake(tmp_path)
    with fake.server:
        _, engine = make_engine(tmp_path, fake)
        engine.plan_cache(longest_prompt=8, num_samples=8)
        (tmp_path / "weights").rmdir()
        with pytest.raises(UserError, match=r"weights_dir .* is no directory"):
            engine.plan_cache(longest_prompt=8, num_samples=8)


@pytest.mark.parametrize("name", ["base_url", "model", "weights_dir"])
def test_config_refuses_a_server_without(name: str) -> None:
    settings = {"base_url": "http://localhost:1/v1", "model": "m", "weights_dir": "w"}
    del settings[name]
    with pytest.raises(UserError, match=rf"needs rollout\.server\.{name}"):
        RolloutConfig(engine="vllm_server", server=VllmServerConfig(**settings))


def test_config_refuses_an_unknown_engine() -> None:
    with pytest.raises(UserError, match="must be own, vllm or vllm_server"):
        RolloutConfig(engine="sglang")  # type: ignore[arg-type]


def test_requests_name_every_setting_of_the_sampler(tmp_path: Path) -> None:
    """A server fills what is missing from the model's generation_config.json."""
    fake = make_fake(tmp_path)
    with fake.server:
        _, engine = make_engine(tmp_path, fake, top_p=0.9, top_k=40, stop=("</answer>",))
        engine.generate([Request(0, [5, 6, 7], [0])], seed=1, step=0, policy_version=0)
        body = fake.server.bodies[-2]
    assert fake.server.paths[-2:] == ["/v1/completions", "/weight_info"]
    assert body["prompt"] == [5, 6, 7]
    assert body["seed"] == sample_seed(1, 0, 0)
    expected = {
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["</answer>"],
        "stop_token_ids": [1],
        "skip_special_tokens": False,
    }
    assert {name: body[name] for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_training_with_a_server(tmp_path: Path, processes: int) -> None:
    """Two steps: the second rollout is sampled from the weights that the first update left."""
    fake = make_fake(tmp_path)
    (tmp_path / "weights").mkdir()
    settings = {
        "num_steps": 2,
        "rollout.engine": "vllm_server",
        "rollout.server.base_url": fake.server.base_url,
        "rollout.server.model": "policy",
        "rollout.server.weights_dir": tmp_path / "weights",
    }
    with fake.server:
        result = run_cli(
            make_run_args(tmp_path, **settings),
            processes=processes,
            env={"NO_PROXY": "127.0.0.1"},
        )
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "run")
    assert fake.events == ["reload", "reset", "label"] * 2
    assert all(record["sampler/prob_diff_mean"] < 1e-5 for record in records)
    assert [record["policy_version"] for record in records] == [1, 2]
    assert records[0]["rollout/preemptions"] is None


def test_engine_vllm_needs_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lwz_trainer.rollout.making import make_engine as make_any

    model, tokenizer = load_tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = make_any(
        model, tokenizer, tmp_path / "tiny-llama", RolloutConfig(engine="vllm", stop=())
    )
    with pytest.raises(UserError, match="needs vLLM, which cannot be imported"):
        engine.plan_cache(longest_prompt=8, num_samples=8)
