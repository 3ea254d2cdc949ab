"""The engine: what it samples, that only the key decides it, and that pages are accounted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_kernels.linear_logprobs.reference import linear_logprobs_reference
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.rollout import RolloutInterrupted, Sample
from lwz_trainer.rollout import burst as burst_module
from lwz_trainer.rollout import decode_pass as decode_pass_module
from lwz_trainer.rollout import engine as engine_module
from tests.trainer.rollout_case import PROMPTS, load_tiny, make_engine, make_requests, sample_all
from tests.trainer.tiny import causal_attend


def forward_logprobs(model, sample: Sample, temperature: float) -> torch.Tensor:
    """Log-probs of a completion by one plain forward pass."""
    ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
    with torch.no_grad():
        hidden = model(ids[:-1], torch.arange(len(ids) - 1), causal_attend([len(ids) - 1]))
    start = len(sample.prompt_ids) - 1
    return linear_logprobs_reference(
        hidden[start:], model.head_weight, ids[start + 1 :], temperature=temperature
    )[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_generate_logprobs_are_those_of_a_plain_forward(
    tmp_path: Path, family: str, temperature: float
) -> None:
    model, tokenizer = load_tiny(tmp_path, family)
    engine = make_engine(model, tokenizer, temperature=temperature)
    for sample in sample_all(engine, make_requests()):
        expected = forward_logprobs(model, sample, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_generate_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    together = sample_all(make_engine(model, tokenizer), make_requests())
    one_by_one = sample_all(make_engine(model, tokenizer, max_num_seqs=1), make_requests())
    alone = [
        sample
        for request in reversed(make_requests())
        for sample in sample_all(make_engine(model, tokenizer), [request])
    ]
    ids = {sample.sample: sample.completion_ids for sample in together}
    assert ids == {sample.sample: sample.completion_ids for sample in one_by_one}
    assert ids == {sample.sample: sample.completion_ids for sample in alone}


def test_generate_depends_on_each_part_of_the_key(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer)
    base = [s.completion_ids for s in sample_all(engine, make_requests())]
    assert base == [s.completion_ids for s in sample_all(engine, make_requests())]
    assert base != [s.completion_ids for s in sample_all(engine, make_requests(), seed=4)]
    assert base != [s.completion_ids for s in sample_all(engine, make_requests(), step=3)]


def test_generate_members_of_a_group_are_distinct(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = sample_all(make_engine(model, tokenizer, temperature=1.0), make_requests())
    assert [sample.sample for sample in samples] == list(range(16))
    for group in range(4):
        completions = {tuple(s.completion_ids) for s in samples if s.group == group}
        assert len(completions) == 4


def test_generate_with_preemption_gives_the_same_samples(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    roomy = make_engine(model, tokenizer)
    tight = make_engine(model, tokenizer, kv_cache_tokens=80)
    tight.expected_completion_tokens = 1.0  # too optimistic, so that the pool does run out
    expected = sample_all(roomy, make_requests())
    samples, stats = tight.generate(make_requests(), seed=3, step=2, policy_version=2)
    assert stats.num_preemptions > 0
    assert [s.completion_ids for s in samples] == [s.completion_ids for s in expected]
    for ours, theirs in zip(samples, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_generate_admits_by_projected_length(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer, kv_cache_tokens=128)
    _, stats = engine.generate(make_requests(), seed=3, step=2, policy_version=2)
    assert stats.num_preemptions == 0


def test_generate_computes_a_prompt_once_for_its_group(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    _, stats = make_engine(model, tokenizer).generate(
        make_requests(), seed=3, step=2, policy_version=2
    )
    assert stats.num_prefill_tokens == sum(len(ids) for ids in PROMPTS)


def test_generate_sees_a_changed_weight_at_once(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer)
    before = sample_all(engine, make_requests())
    with torch.no_grad():
        model.layers[0].qkv_proj[0] += 3.0
    after = sample_all(engine, make_requests())
    assert [s.logprobs[0] for s in before] != [s.logprobs[0] for s in after]
    for sample in after:
        torch.testing.assert_close(
            torch.tensor(sample.logprobs), forward_logprobs(model, sample, 0.7), rtol=0, atol=1e-4
        )


def find_stop(samples: list[Sample], tokenizer) -> tuple[Sample, str, int]:
    """A sample, a string that starts inside one of its tokens and ends in a later one, its end."""
    for sample in samples:
        for start in range(2, len(sample.completion_ids) - 6):
            stop = tokenizer.decode(sample.completion_ids[start : start + 3])[1:]
            if len(stop) >= 3 and stop.isascii() and sample.text.count(stop) == 1:
                return sample, stop, start + 3
    raise AssertionError("no sample has three plain tokens in a row")


def test_generate_stops_at_a_string_across_tokens(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests(group_size=16)
    free = sample_all(make_engine(model, tokenizer, temperature=0.9), requests)
    donor, stop, end = find_stop(free, tokenizer)
    engine = make_engine(model, tokenizer, temperature=0.9, stop=(stop, "never written"))
    sample = sample_all(engine, requests)[donor.sample]
    assert sample.finish_reason == "stop"
    assert sample.stop_string == stop
    assert sample.completion_ids == donor.completion_ids[:end]
    assert sample.logprobs == pytest.approx(donor.logprobs[:end], abs=1e-4)
    assert donor.text.startswith(sample.text + stop)


def test_generate_ends_at_eos_and_at_the_length_limit(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer, temperature=2.0, max_completion_tokens=64)
    samples = sample_all(engine, make_requests(group_size=32))
    reasons = {sample.finish_reason for sample in samples}
    assert reasons == {"eos", "length"}
    for sample in samples:
        ends = sample.completion_ids[-1] == tokenizer.eos_token_id
        assert ends == (sample.finish_reason == "eos")
        assert tokenizer.eos_token_id not in sample.completion_ids[:-1]
        assert sample.is_truncated == (len(sample.completion_ids) == 64 and not ends)


def test_generate_can_be_interrupted(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    calls = iter([False, False, True])
    with pytest.raises(RolloutInterrupted):
        sample_all(make_engine(model, tokenizer), make_requests(), should_stop=lambda: next(calls))


def test_generate_refuses_a_cache_too_small_for_one_sequence(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    with pytest.raises(UserError, match=r"room for 32 tokens.*kv_cache_tokens"):
        sample_all(make_engine(model, tokenizer, kv_cache_tokens=32), make_requests())


def test_generate_hands_out_samples_as_they_end(tmp_path: Path) -> None:
    """Outside inference mode: the caller may compute gradients between two bursts."""
    model, tokenizer = load_tiny(tmp_path)
    bursts: list[list[int]] = []

    def on_burst(finished: list[Sample]) -> bool:
        bursts.append([sample.sample for sample in finished])
        assert not torch.is_inference_mode_enabled()
        return True

    engine = make_engine(model, tokenizer, temperature=2.0)
    requests = make_requests(group_size=16)
    samples = sample_all(engine, requests, on_burst=on_burst)
    assert sorted(number for burst in bursts for number in burst) == [s.sample for s in samples]
    assert len([burst for burst in bursts if burst]) > 2
    expected = sample_all(make_engine(model, tokenizer, temperature=2.0), requests)
    assert [s.completion_ids for s in samples] == [s.completion_ids for s in expected]


def test_generate_ends_early_when_told_and_releases_everything(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer, temperature=2.0, max_num_seqs=16)
    requests = make_requests(group_size=16)
    seen: list[Sample] = []

    def on_burst(finished: list[Sample]) -> bool:
        seen.extend(finished)
        return len(seen) < 5

    samples = sample_all(engine, requests, on_burst=on_burst)
    assert 5 <= len(samples) < 64
    everything = {s.sample: s for s in sample_all(engine, requests)}
    assert all(s.completion_ids == everything[s.sample].completion_ids for s in samples)


def fail_at(numbers: set[int], original: Callable[..., Any], error: Exception) -> Callable:
    """A function whose calls of these numbers, from 0, run out of memory."""
    calls = iter(range(10**9))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) in numbers:
            raise error
        return original(*args, **kwargs)

    return wrapped


CPU_ERROR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 16 bytes")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_ERROR])
@pytest.mark.parametrize("where", ["model", "sampling"])
def test_generate_makes_batches_smaller_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    model, tokenizer = load_tiny(tmp_path)
    expected = sample_all(make_engine(model, tokenizer), make_requests())
    numbers = {0, 1, 8, 9, 14}  # the prefill twice, then decode steps, two of them in a row
    if where == "model":
        monkeypatch.setattr(decode_pass_module, "_runs_native", lambda model: False)
        monkeypatch.setattr(model, "forward", fail_at(numbers, model.forward, error))
    else:
        draw = fail_at(numbers, engine_module.sample_tokens, error)
        for module in (engine_module, burst_module):
            monkeypatch.setattr(module, "sample_tokens", draw)
    engine = make_engine(model, tokenizer)
    samples, stats = engine.generate(make_requests(), seed=3, step=2, policy_version=2)
    assert stats.num_out_of_memory == len(numbers)
    assert stats.num_preemptions > 0
    assert [s.completion_ids for s in samples] == [s.completion_ids for s in expected]
    for ours, theirs in zip(samples, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_generate_stops_in_words_when_one_sequence_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_tiny(tmp_path)
    monkeypatch.setattr(model, "forward", fail_at(set(range(100)), model.forward, CPU_ERROR))
    with pytest.raises(TrainingStopped, match=r"out of memory in the prefill of 3 tokens"):
        sample_all(make_engine(model, tokenizer), make_requests())


def test_generate_takes_no_other_error_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_tiny(tmp_path)
    other = RuntimeError("shapes do not match")
    monkeypatch.setattr(model, "forward", fail_at({0}, model.forward, other))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sample_all(make_engine(model, tokenizer), make_requests())
