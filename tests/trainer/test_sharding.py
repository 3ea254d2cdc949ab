"""Teams, schemes and shards: pure functions of settings, heads and lengths."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lwz_kernels.sequence_parallel import make_layout
from lwz_trainer.config.parallel import ParallelConfig, SequencePlan, plan_sequence
from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError
from lwz_trainer.update.packing import MicroBatch, TrainSample, pack_samples
from lwz_trainer.update.sharding import document_lengths, place_packs, shard_microbatch

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=7)


def make_samples(lengths: list[tuple[int, int]]) -> list[TrainSample]:
    """Token ids count up, so that every token knows its successor."""
    samples = []
    start = 1
    for sample, (num_prompt, num_completion) in enumerate(lengths):
        ids = list(range(start, start + num_prompt + num_completion))
        start += len(ids)
        samples.append(
            TrainSample(
                group=sample // 2,
                sample=sample,
                prompt_ids=ids[:num_prompt],
                completion_ids=ids[num_prompt:],
                sampling_logprobs=[-float(i) for i in ids[num_prompt:]],
                advantage=float(sample),
                in_loss=sample % 3 != 2,
            )
        )
    return samples


def plan_of(size: int, smallest: int) -> SequencePlan:
    return SequencePlan(size, smallest, {})


@given(LENGTHS, st.sampled_from(["ulysses", "gather_kv", "ring"]), st.sampled_from([2, 4]))
def test_shard_microbatch_cuts_rows_beside_their_tokens(
    lengths: list[tuple[int, int]], scheme: str, num_ranks: int
) -> None:
    samples = make_samples(lengths)
    (batch,) = pack_samples(samples, budget_tokens=10_000, share_prompts=False)
    layout = make_layout(document_lengths(batch), num_ranks, scheme)
    found: dict[int, tuple[float, ...]] = {}
    counted = torch.zeros(len(samples), dtype=torch.long)
    for rank in range(num_ranks):
        shard = shard_microbatch(batch, layout, rank)
        assert shard.num_tokens == layout.local_tokens
        assert shard.completion_cu_seqlens[-1] == len(shard.labels_R)
        assert shard.sequence_loss_tokens_N.tolist() == [
            len(samples[i].completion_ids) * samples[i].in_loss for i in batch.samples
        ]
        lengths_N = shard.completion_cu_seqlens.diff()
        counted += lengths_N
        owner_R = torch.repeat_interleave(torch.tensor(batch.samples), lengths_N)
        assert torch.equal(shard.advantages_R, owner_R.float())
        # The row that predicts a label lies at the token before it, whatever rank holds the label.
        assert torch.equal(shard.input_ids_T[shard.row_index_R] + 1, shard.labels_R)
        for label, logprob, in_loss in zip(
            shard.labels_R.tolist(),
            shard.sampling_logprobs_R.tolist(),
            shard.loss_mask_R.tolist(),
            strict=True,
        ):
            assert label not in found
            found[label] = (logprob, in_loss)
    assert found == {
        label: (-label, sample.in_loss) for sample in samples for label in sample.completion_ids
    }
    assert counted.tolist() == [len(samples[i].completion_ids) for i in batch.samples]


def held_samples(batches: list[MicroBatch]) -> list[int]:
    return sorted(sample for batch in batches for sample in batch.samples)


@given(LENGTHS, st.sampled_from([(1, 1), (4, 4), (4, 1), (8, 1)]), st.integers(4, 40))
def test_place_packs_agrees_among_neighbours(
    lengths: list[tuple[int, int]], sizes: tuple[int, int], budget: int
) -> None:
    samples = make_samples(lengths)
    # Members of a group have one prompt.
    samples = [replace(s, prompt_ids=samples[2 * s.group].prompt_ids) for s in samples]
    plan = plan_of(*sizes)
    placed = place_packs(samples, plan, budget_tokens=budget, share_prompts=True)
    packs = {id(pack.batch): pack for place in placed for pack in place}
    assert held_samples([pack.batch for pack in packs.values()]) == [s.sample for s in samples]
    for place, mine in enumerate(placed):
        sizes_in_order = [pack.num_ranks for pack in mine]
        # Larger packs first: else neighbours would wait for each other in a circle.
        assert sizes_in_order == sorted(sizes_in_order, reverse=True)
        for pack in mine:
            first = place // pack.num_ranks * pack.num_ranks
            for peer in range(first, first + pack.num_ranks):
                others = [p.batch for p in placed[peer] if p.num_ranks == pack.num_ranks]
                own = [p.batch for p in mine if p.num_ranks == pack.num_ranks]
                assert [id(b) for b in others] == [id(b) for b in own]
            assert pack.num_ranks == 1 or pack.batch.prefix_of is None
            is_one = len(pack.batch.samples) == 1
            assert is_one or pack.batch.num_tokens <= pack.num_ranks * budget


def test_place_packs_takes_the_fewest_ranks_that_hold_a_sequence() -> None:
    samples = make_samples([(1, 10), (1, 20), (1, 40), (1, 400), (1, 9)])
    placed = place_packs(samples, plan_of(4, 1), budget_tokens=10, share_prompts=False)
    ranks_of = {s: pack.num_ranks for p in placed for pack in p for s in pack.batch.samples}
    assert ranks_of == {0: 1, 1: 2, 2: 4, 3: 4, 4: 1}
    fixed = place_packs(samples, plan_of(4, 4), budget_tokens=10, share_prompts=False)
    assert {pack.num_ranks for place in fixed for pack in place} == {4}


def test_place_packs_spreads_short_packs_over_the_team() -> None:
    samples = make_samples([(1, 10)] * 8)
    placed = place_packs(samples, plan_of(4, 1), budget_tokens=10, share_prompts=False)
    assert [len(place) for place in placed] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "per_node", "expected"),
    [
        (32, 8, 8, {2: ("ulysses", None), 4: ("ulysses", None), 8: ("ulysses", None)}),
        # Qwen2.5-7B: 28 heads do not divide by 8.
        (28, 4, 8, {2: ("ulysses", None), 4: ("ulysses", None), 8: ("two_d", 4)}),
        # Two ranks a node: heads are exchanged within it only.
        (32, 8, 2, {2: ("ulysses", None), 4: ("two_d", 2), 8: ("two_d", 2)}),
        (9, 3, 8, {2: ("gather_kv", None), 4: ("gather_kv", None), 8: ("gather_kv", None)}),
    ],
)
def test_plan_sequence_chooses_schemes_by_heads_and_node(
    heads: int, kv_heads: int, per_node: int, expected: dict
) -> None:
    config = ParallelConfig(sequence="auto")
    plan = plan_sequence(
        config, heads=heads, kv_heads=kv_heads, num_ranks=24, ranks_per_node=per_node
    )
    assert (plan.size, plan.smallest, plan.schemes) == (8, 1, expected)


def test_plan_sequence_auto_stops_where_a_named_scheme_does() -> None:
    config = ParallelConfig(sequence="auto", sequence_scheme="ulysses")
    plan = plan_sequence(config, heads=28, kv_heads=4, num_ranks=8, ranks_per_node=8)
    assert (plan.size, sorted(plan.schemes)) == (4, [2, 4])


@pytest.mark.parametrize(
    ("settings", "num_ranks", "message"),
    [
        ({"sequence": 4}, 6, "does not divide the 6 processes"),
        ({"sequence": 8, "sequence_scheme": "ulysses"}, 8, "cannot split 28 query and 4 key/value"),
        ({"sequence": 3}, 3, "must be 'auto' or a power of two, got 3"),
        ({"sequence": 0}, 1, "must be 'auto' or a power of two, got 0"),
        ({"sequence_scheme": "ring"}, 1, "parallel.sequence is 1: set that"),
        ({"timeout_s": 0}, 1, "parallel.timeout_s must be above 0"),
    ],
)
def test_plan_sequence_refuses_what_cannot_be(settings: dict, num_ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_sequence(
            ParallelConfig(**settings), heads=28, kv_heads=4, num_ranks=num_ranks, ranks_per_node=8
        )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--update.share_prompts=True", "share_prompts needs whole sequences"),
        ("--loss.impl=reference", "loss.impl reference holds whole sequences"),
        ("--model.attention=sdpa", "model.attention sdpa attends within one rank"),
    ],
)
def test_shared_sequences_refuse_settings_that_need_whole_ones(flag: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_command_line(TrainConfig, ["--parallel.sequence=2", flag], prog="train")
