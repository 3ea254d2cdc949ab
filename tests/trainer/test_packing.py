"""Packing: nothing lost, nothing padded, labels shifted once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_trainer.update.packing import TrainSample, pack_samples


def make_samples(lengths: list[tuple[int, list[int]]]) -> list[TrainSample]:
    """Groups given as (prompt length, completion lengths); every token id is unique."""
    samples, token = [], 0
    for group, (num_prompt, completions) in enumerate(lengths):
        prompt = list(range(token, token + num_prompt))
        token += num_prompt
        for length in completions:
            ids = list(range(token, token + length))
            token += length
            number = len(samples)
            samples.append(
                TrainSample(
                    group, number, prompt, ids, [-float(i) for i in ids], number + 1.0, True
                )
            )
    return samples


groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=5)),
    min_size=1,
    max_size=5,
)


@given(lengths=groups, budget=st.integers(1, 60), share=st.booleans())
@settings(max_examples=100, deadline=None)
def test_pack_samples_keeps_every_token_and_predicts_it_from_its_predecessor(
    lengths: list[tuple[int, list[int]]], budget: int, share: bool
) -> None:
    samples = make_samples(lengths)
    batches = pack_samples(samples, budget_tokens=budget, share_prompts=share)
    seen: list[int] = []
    for batch in batches:
        labels = batch.labels_R.tolist()
        bounds = batch.completion_cu_seqlens.tolist()
        predecessors = batch.input_ids_T[batch.row_index_R].tolist()
        positions = batch.position_ids_T[batch.row_index_R].tolist()
        for number, start, stop in zip(batch.samples, bounds, bounds[1:], strict=False):
            sample = samples[number]
            seen.append(number)
            assert labels[start:stop] == sample.completion_ids
            whole = sample.prompt_ids + sample.completion_ids
            first = len(sample.prompt_ids) - 1
            assert predecessors[start:stop] == whole[first:-1]
            assert positions[start:stop] == list(range(first, len(whole) - 1))
            assert batch.advantages_R[start:stop].tolist() == [sample.advantage] * (stop - start)
            assert batch.sampling_logprobs_R[start:stop].tolist() == sample.sampling_logprobs
        assert batch.cu_seqlens[-1] == len(batch.input_ids_T) == len(batch.position_ids_T)
        if len(batch.samples) > 1:
            assert batch.num_tokens <= budget
    assert sorted(seen) == list(range(len(samples)))


@given(lengths=groups)
@settings(max_examples=30, deadline=None)
def test_pack_samples_feeds_a_shared_prompt_once(lengths: list[tuple[int, list[int]]]) -> None:
    samples = make_samples(lengths)
    (batch,) = pack_samples(samples, budget_tokens=10_000, share_prompts=True)
    fed = sum(num_prompt + sum(c - 1 for c in completions) for num_prompt, completions in lengths)
    assert batch.num_tokens == fed
    assert batch.prefix_of is not None
    for sequence, prefix in enumerate(batch.prefix_of):
        start, stop = batch.cu_seqlens[sequence], batch.cu_seqlens[sequence + 1]
        first_position = int(batch.position_ids_T[start])
        if prefix < 0:
            assert first_position == 0
        else:
            assert batch.prefix_of[prefix] == -1
            assert first_position == batch.cu_seqlens[prefix + 1] - batch.cu_seqlens[prefix]
        expected = torch.arange(first_position, first_position + stop - start)
        assert torch.equal(batch.position_ids_T[start:stop], expected)


def test_pack_samples_fills_bins_without_exceeding_the_budget() -> None:
    samples = make_samples([(2, [5]), (2, [7]), (2, [3]), (2, [9])])  # 6, 8, 4, 10 tokens
    batches = pack_samples(samples, budget_tokens=14, share_prompts=False)
    assert [batch.num_tokens for batch in batches] == [14, 14]
