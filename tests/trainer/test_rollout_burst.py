"""Bursts of decode steps: the same samples whatever their length, batch padding or page supply."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lwz_trainer.rollout import RolloutEngine
from lwz_trainer.rollout.burst import Burst, DecodeRows, graph_batch_size
from lwz_trainer.rollout.kv_cache import PageAllocator, PagedKVCache
from lwz_trainer.rollout.scheduler import Scheduler
from lwz_trainer.rollout.sequence import Sample
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all


def record_at_once(step: Callable[[], None]) -> Callable[[], None]:
    """Stands for a graph: runs the step when it is captured, as a warm-up does, and replays it."""
    step()
    return step


def with_captures(engine: RolloutEngine) -> RolloutEngine:
    """Makes an engine on a CPU take the path of recorded steps."""
    engine._uses_graphs = True
    return engine


def key(samples: list[Sample]) -> list[Any]:
    return [(s.sample, s.completion_ids, s.logprobs, s.text, s.finish_reason) for s in samples]


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("captures", [False, True])
def test_generate_does_not_depend_on_the_burst(tmp_path: Path, steps: int, captures: bool) -> None:
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests(group_size=6)
    settings = {"temperature": 1.5, "max_completion_tokens": 21}
    plain = make_engine(model, tokenizer, **settings)
    expected, expected_stats = plain.generate(requests, seed=3, step=2, policy_version=2)
    # A stop string that some sample meets in the middle of a burst.
    stop = tokenizer.decode(expected[4].completion_ids[3:5])
    settings["stop"] = (stop,)
    expected = sample_all(make_engine(model, tokenizer, **settings), requests)
    assert {"stop", "length"} <= {sample.finish_reason for sample in expected}
    engine = make_engine(model, tokenizer, burst_steps=steps, **settings)
    if captures:
        with_captures(engine)
    with mock.patch("lwz_trainer.rollout.engine.CudaGraphs", return_value=record_at_once):
        ours, stats = engine.generate(requests, seed=3, step=2, policy_version=2)
    assert key(ours) == key(expected)
    assert stats.num_tokens == sum(len(sample.completion_ids) for sample in ours)
    assert stats.peak_kv_frac <= 1
    assert expected_stats.decode.num_steps <= 21


def test_stats_count_what_decoding_must_read(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests(group_size=3)
    engine = make_engine(model, tokenizer, max_completion_tokens=9)
    samples, stats = engine.generate(requests, seed=3, step=2, policy_version=2)
    # The first token of each comes from the prefill; token t + 1 sees the prompt and t tokens.
    decoded = [
        (len(sample.prompt_ids), t)
        for sample in samples
        for t in range(1, len(sample.completion_ids))
    ]
    assert stats.decode.num_rows == len(decoded) > 0
    assert stats.decode.num_steps == max(len(sample.completion_ids) for sample in samples) - 1
    sizes = model.config
    token_bytes = 2 * 4 * sizes.layers * sizes.kv_heads * sizes.head_dim
    weight_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    weight_bytes -= 0 if model.lm_head is None else 4 * model.embed.numel()
    assert stats.decode.num_bytes == stats.decode.num_steps * weight_bytes + token_bytes * sum(
        num_prompt + t for num_prompt, t in decoded
    )
    assert 0 < stats.decode.seconds <= stats.seconds


@pytest.mark.parametrize("captures", [False, True])
def test_generate_in_bursts_survives_preemption(tmp_path: Path, captures: bool) -> None:
    model, tokenizer = load_tiny(tmp_path)
    expected = sample_all(make_engine(model, tokenizer), make_requests())
    tight = make_engine(model, tokenizer, kv_cache_tokens=80, burst_steps=8)
    tight.expected_completion_tokens = 1.0  # too optimistic, so that the pool does run out
    if captures:
        with_captures(tight)
    with mock.patch("lwz_trainer.rollout.engine.CudaGraphs", return_value=record_at_once):
        samples, stats = tight.generate(make_requests(), seed=3, step=2, policy_version=2)
    assert stats.num_preemptions > 0
    assert [s.completion_ids for s in samples] == [s.completion_ids for s in expected]


def count_captures(captured: list[Any]) -> Any:
    """Patches what records steps; each recorded step is added to the list."""
    return mock.patch(
        "lwz_trainer.rollout.engine.CudaGraphs",
        return_value=lambda step: captured.append(step) or record_at_once(step),
    )


def test_generate_captures_one_step_for_each_batch_size(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = with_captures(make_engine(model, tokenizer, burst_steps=4, temperature=1.5))
    captured: list[Any] = []
    with count_captures(captured):
        _, stats = engine.generate(make_requests(), seed=3, step=2, policy_version=2)
    assert 1 <= len(captured) <= 5  # 1, 2, 4, 8, 16
    assert stats.decode.num_steps > len(captured)


def test_generate_keeps_what_it_recorded_on_a_held_cache(tmp_path: Path) -> None:
    """As long as nothing that a recorded step names has moved."""
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests()
    engine = with_captures(make_engine(model, tokenizer, burst_steps=4))
    plan = engine.plan_cache(longest_prompt=21, num_samples=16)
    memory = torch.full(plan.shape, torch.nan)
    allowed, captured = mock.Mock(), []
    with count_captures(captured):
        engine.hold_cache(plan, memory, allowed)
        for repeat in range(1, 3):
            expected = sample_all(make_engine(model, tokenizer), requests)
            assert key(sample_all(engine, requests)) == key(expected)
            assert allowed.call_count == repeat
            if repeat == 1:
                num_captured = len(captured)
            memory.fill_(torch.nan)  # another owner's bytes
            with torch.no_grad():  # in place, as the optimizer does
                model.layers[0].qkv_proj[0] += 3.0
        assert len(captured) == num_captured > 0
        weight = model.layers[0].qkv_proj
        weight.data = weight.data.clone()
        expected = sample_all(make_engine(model, tokenizer), requests)
        assert key(sample_all(engine, requests)) == key(expected)
        assert len(captured) == 2 * num_captured


def test_generate_refuses_to_sample_into_memory_that_others_have(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer)
    plan = engine.plan_cache(longest_prompt=21, num_samples=16)
    engine.hold_cache(plan, torch.zeros(plan.shape), mock.Mock(side_effect=ValueError("not now")))
    with pytest.raises(ValueError, match="not now"):
        sample_all(engine, make_requests())


def test_run_writes_nothing_for_rows_that_are_not_active(tmp_path: Path) -> None:
    """A recorded step of 8 rows with 5 sequences: the three other rows touch no page."""
    model, _ = load_tiny(tmp_path)
    config = model.config
    shape = (2, config.layers, 8, 4, config.kv_heads, config.head_dim)
    cache = PagedKVCache(torch.full(shape, 7.0))
    captured = []
    section = mock.Mock(temperature=1.0, top_p=1.0, top_k=0, max_completion_tokens=100)
    burst = Burst(
        model,
        cache,
        section,
        eos_ids=(),
        max_rows=8,
        max_pages=2,
        max_steps=2,
        capture=lambda step: captured.append(step) or record_at_once(step),
    )
    rows = DecodeRows(
        tokens_B=torch.arange(5),
        positions_B=torch.zeros(5, dtype=torch.int64),
        num_tokens_B=torch.ones(5, dtype=torch.int64),
        keys_B=torch.arange(5),
        active_B=torch.ones(5, dtype=torch.bool),
        page_table_BP=torch.arange(5, dtype=torch.int32)[:, None] + 1,
    )
    with torch.inference_mode():
        drawn, _ = burst.run(rows, 2)
    assert [len(row) for row in drawn] == [5, 5]
    assert len(captured) == 1
    untouched = [0, 6, 7]
    assert bool((cache.keys[:, untouched] == 7.0).all())
    assert bool((cache.keys[:, 1:6, :2] != 7.0).any(-1).all())
    assert bool((cache.keys[:, 1:6, 2:] == 7.0).all())


def test_graph_batch_size_is_the_smallest_that_holds_the_batch() -> None:
    sizes = [graph_batch_size(batch, 256) for batch in range(1, 257)]
    assert all(size >= batch for batch, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 20
    assert graph_batch_size(5, 6) == 6


@pytest.mark.parametrize(("num_pages", "expected"), [(20, 8), (6, 8), (5, 5), (4, 5), (3, 1)])
def test_make_room_takes_only_free_pages_for_later_steps(num_pages: int, expected: int) -> None:
    """Two prompts of 3 tokens, pages of 4: room for 1 token each in 2 pages, 5 in 4, 9 in 6."""
    allocator = PageAllocator(20)
    scheduler = Scheduler(
        make_requests([[1, 2, 3], [4, 5, 6]], group_size=1),
        allocator=allocator,
        page_size=4,
        max_num_seqs=2,
        max_completion_tokens=100,
        expected_completion_tokens=1.0,
    )
    _, fresh, _ = scheduler.admit()
    scheduler.release_prompts(fresh)
    for sequence in scheduler.running:
        sequence.tokens.append(1)
    allocator.allocate(20 - num_pages)  # someone else's
    steps = scheduler.make_room(8)
    assert steps == expected
    assert scheduler.num_preemptions == 0
    for sequence in scheduler.running:
        assert len(sequence.pages) * 4 >= sequence.num_cached + steps
