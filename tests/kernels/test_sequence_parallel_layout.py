"""Layouts of sequence parallelism: pure functions of document lengths and ranks."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.sequence_parallel.mixes import packed_mixes
from lwz_kernels.sequence_parallel import (
    SequenceLayout,
    make_layout,
    position_ids,
    shard_tokens,
    shift_labels,
    unshard_tokens,
)
from lwz_kernels.sequence_parallel.layout import CHUNKS_PER_RANK, Segment

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
WINDOWS = st.none() | st.integers(1, 30)
# P = 3 and 6 because nothing in a layout needs a power of two.
SCHEMES = st.one_of(
    st.tuples(st.sampled_from(["ulysses", "gather_kv", "ring"]), st.integers(1, 6), st.none()),
    st.sampled_from([("two_d", 4, 2), ("two_d", 6, 3), ("two_d", 4, 4), ("two_d", 4, 1)]),
)


def layout_of(lengths: list[int], scheme: tuple[str, int, int | None]) -> SequenceLayout:
    name, num_ranks, ulysses_ranks = scheme
    return make_layout(lengths, num_ranks, name, ulysses_ranks=ulysses_ranks)


def visible_keys(segments: list[Segment], window: int | None = None) -> dict[int, set[int]]:
    """query -> keys, by the rule of segment attention, written out."""
    seen: dict[int, set[int]] = {}
    for q_start, q_len, k_start, k_len in segments:
        for i in range(q_len):
            last = i + k_len - q_len
            first = 0 if window is None else max(0, last - window + 1)
            assert q_start + i not in seen
            seen[q_start + i] = {k_start + j for j in range(first, last + 1)}
            assert max(seen[q_start + i], default=0) < k_start + k_len
    return seen


def kv_shard_index(layout: SequenceLayout, kv_rank: int) -> list[int]:
    """The tokens of a KV rank: those of its Ulysses ranks, one after another."""
    first = kv_rank * layout.ulysses_ranks
    ranks = range(first, first + layout.ulysses_ranks)
    return [token for rank in ranks for token in layout.shard_index(rank)]


def keys_of_token(layout: SequenceLayout, token: int, window: int | None = None) -> set[int]:
    start = max(start for start in layout.cu_seqlens if start <= token)
    return set(range(start if window is None else max(start, token - window + 1), token + 1))


@given(LENGTHS, SCHEMES)
def test_make_layout_holds_every_token_once_in_equal_shards(
    lengths: list[int], scheme: tuple[str, int, int | None]
) -> None:
    layout = layout_of(lengths, scheme)
    shards = [layout.shard_index(rank) for rank in range(layout.num_ranks)]
    assert {len(shard) for shard in shards} == {layout.local_tokens}
    assert sorted(chain.from_iterable(shards)) == list(range(layout.padded_tokens))
    assert layout.num_tokens == sum(lengths)
    assert 0 <= layout.padded_tokens - layout.num_tokens < layout.num_ranks * CHUNKS_PER_RANK


@given(LENGTHS, SCHEMES)
def test_make_layout_pads_with_a_document_of_its_own(
    lengths: list[int], scheme: tuple[str, int, int | None]
) -> None:
    layout = layout_of(lengths, scheme)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert list(layout.cu_seqlens[: len(lengths) + 1]) == [0, *ends]
    assert layout.cu_seqlens[len(lengths) + 1 :] in ((), (layout.padded_tokens,))


@given(LENGTHS, SCHEMES)
def test_position_ids_count_within_documents(
    lengths: list[int], scheme: tuple[str, int, int | None]
) -> None:
    layout = layout_of(lengths, scheme)
    expected = [i for start, stop in pairwise(layout.cu_seqlens) for i in range(stop - start)]
    for rank in range(layout.num_ranks):
        found = position_ids(layout, rank, "cpu").tolist()
        assert found == [expected[token] for token in layout.shard_index(rank)]


@given(LENGTHS, SCHEMES.filter(lambda scheme: scheme[0] != "ring"))
def test_segments_show_each_query_its_document_so_far(
    lengths: list[int], scheme: tuple[str, int, int | None]
) -> None:
    layout = layout_of(lengths, scheme)
    for kv_rank in range(layout.kv_ranks):
        tokens = kv_shard_index(layout, kv_rank)
        seen = visible_keys(layout.segments(kv_rank))
        assert {tokens[i]: keys for i, keys in seen.items()} == {
            token: keys_of_token(layout, token) for token in tokens
        }


def test_segments_join_chunks_that_are_neighbours() -> None:
    layout = make_layout([32], 1, "gather_kv")
    assert layout.segments(0) == [(0, 32, 0, 32)]


@given(LENGTHS, st.integers(1, 6), WINDOWS)
def test_ring_segments_over_all_sources_show_each_query_its_document_so_far(
    lengths: list[int], num_ranks: int, window: int | None
) -> None:
    layout = make_layout(lengths, num_ranks, "ring")
    for rank in range(num_ranks):
        seen: dict[int, set[int]] = {token: set() for token in layout.shard_index(rank)}
        for source in range(num_ranks):
            local = None if window is None else layout.ring_window(rank, source, window)
            if local is not None and local < 1:
                continue
            for i, keys in visible_keys(layout.ring_segments(rank, source), local).items():
                seen[i * num_ranks + rank] |= {j * num_ranks + source for j in keys}
        assert seen == {token: keys_of_token(layout, token, window) for token in seen}


@given(LENGTHS, SCHEMES, WINDOWS)
def test_pairs_are_the_visible_keys_of_a_rank(
    lengths: list[int], scheme: tuple[str, int, int | None], window: int | None
) -> None:
    layout = layout_of(lengths, scheme)
    for kv_rank in range(layout.kv_ranks):
        tokens = kv_shard_index(layout, kv_rank)
        expected = sum(len(keys_of_token(layout, token, window)) for token in tokens)
        assert layout.pairs(kv_rank, window) == expected


def test_make_layout_assigns_every_rank_eight_chunks() -> None:
    layout = make_layout([100, 300, 60], 4, "gather_kv")
    assert [len(held) for held in layout.chunks] == [CHUNKS_PER_RANK] * 4


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("window_size", [None, 4096])
def test_gather_kv_imbalance_on_packed_mixes_is_at_most_5_percent(
    num_ranks: int, window_size: int | None
) -> None:
    for seed in range(10):
        for name, lengths in packed_mixes(seed=seed).items():
            layout = make_layout(lengths, num_ranks, "gather_kv", window_size=window_size)
            assert layout.imbalance(window_size) <= 1.05, (name, seed)


def zigzag_imbalance(lengths: list[int], num_ranks: int) -> float:
    """The same measure where rank r holds the chunks r and 2P - 1 - r of the stream."""
    base = make_layout(lengths, num_ranks, "gather_kv")
    chunks = tuple((rank, 2 * num_ranks - 1 - rank) for rank in range(num_ranks))
    size = base.padded_tokens // (2 * num_ranks)
    return SequenceLayout(
        "gather_kv", num_ranks, 1, base.num_tokens, base.cu_seqlens, size, chunks
    ).imbalance()


def test_gather_kv_balances_packs_that_zigzag_does_not() -> None:
    lengths = packed_mixes()["half"]
    assert zigzag_imbalance(lengths, 8) > 1.3
    assert zigzag_imbalance([65536], 8) == pytest.approx(1.0, abs=1e-3)
    assert make_layout(lengths, 8, "gather_kv").imbalance() <= 1.01


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ring_steps_are_balanced_on_packed_mixes(num_ranks: int) -> None:
    """A hop ends with its slowest rank, so the sum over hops of the maximum counts."""
    for name, lengths in packed_mixes().items():
        layout = make_layout(lengths, num_ranks, "ring")
        busiest = total = 0
        for hop in range(num_ranks):
            work = [
                segment_pairs(layout.ring_segments(rank, (rank - hop) % num_ranks))
                for rank in range(num_ranks)
            ]
            busiest += max(work)
            total += sum(work)
        assert busiest * num_ranks / total <= 1.05, name


def segment_pairs(segments: list[Segment]) -> int:
    total = 0
    for _, q_len, _, k_len in segments:
        seeing = min(q_len, k_len)  # the last `seeing` queries see k_len - seeing + 1, ... k_len
        total += seeing * k_len - seeing * (seeing - 1) // 2
    return total


@given(LENGTHS, SCHEMES)
@settings(max_examples=50)
def test_unshard_tokens_inverts_shard_tokens(
    lengths: list[int], scheme: tuple[str, int, int | None]
) -> None:
    layout = layout_of(lengths, scheme)
    whole = torch.arange(2 * layout.num_tokens).view(2, -1)
    shards = [
        shard_tokens(whole, layout, rank, pad_value=-100, dim=1) for rank in range(layout.num_ranks)
    ]
    assert torch.equal(unshard_tokens(shards, layout, dim=1), whole)
    padding = layout.padded_tokens - layout.num_tokens
    assert sum(int((shard == -100).sum()) for shard in shards) == 2 * padding


@pytest.mark.parametrize("scheme", ["ulysses", "gather_kv", "ring"])
def test_shift_labels_before_sharding_labels_the_last_token_of_a_shard(scheme: str) -> None:
    lengths = [5, 1, 10]
    input_ids = torch.arange(100, 116)
    expected = [101, 102, 103, 104, -100, -100, *range(107, 116), -100]
    labels = shift_labels(input_ids, lengths)
    assert labels.tolist() == expected
    layout = make_layout(lengths, 2, scheme)
    shards = [shard_tokens(labels, layout, rank, pad_value=-100) for rank in range(2)]
    assert unshard_tokens(shards, layout).tolist() == expected
    # Rolling inside the shards instead gives some token a label that is not its own.
    rolled = [shard_tokens(input_ids, layout, rank, pad_value=-100).roll(-1) for rank in range(2)]
    assert any(bool(((a != b) & (b != -100)).any()) for a, b in zip(rolled, shards, strict=True))


def test_shift_labels_refuses_a_shard() -> None:
    with pytest.raises(ValueError, match=r"expected input_ids of the whole pack, \[6\], got \[3\]"):
        shift_labels(torch.arange(3), [4, 2])


def test_shard_tokens_refuses_a_shard() -> None:
    layout = make_layout([4, 2], 2)
    with pytest.raises(ValueError, match=r"expected the 6 tokens of the whole pack along dim 0"):
        shard_tokens(torch.arange(3), layout, 0, pad_value=0)


def test_unshard_tokens_refuses_missing_shards() -> None:
    with pytest.raises(ValueError, match="expected 2 shards, got 1"):
        unshard_tokens([torch.arange(3)], make_layout([4, 2], 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "document_lengths must be one or more positive integers"),
        (([3, 0], 2), "document_lengths must be one or more positive integers"),
        (([3], 0), "num_ranks must be at least 1, got 0"),
        (([3], 2, "zigzag"), "scheme must be one of"),
        (([3], 4, "two_d"), "needs ulysses_ranks that divides num_ranks=4, got None"),
    ],
)
def test_make_layout_refuses_what_it_cannot_cut(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layout(*arguments)


def test_make_layout_refuses_arguments_that_a_scheme_does_not_read() -> None:
    with pytest.raises(ValueError, match="ulysses_ranks belongs to scheme 'two_d'"):
        make_layout([3], 4, "ring", ulysses_ranks=2)
    with pytest.raises(ValueError, match="window_size weighs the chunks of 'gather_kv'"):
        make_layout([3], 4, "ulysses", window_size=2)


def test_make_layout_of_a_million_tokens_is_plain_host_work() -> None:
    """Ring has one chunk per token: its tables must not walk over them."""
    layout = make_layout([700_000, 300_000], 8, "ring")
    assert layout.ring_segments(3, 5) == [(0, 87_500, 0, 87_499), (87_500, 37_500, 87_500, 37_499)]
    assert len(make_layout([700_000, 300_000], 8, "gather_kv").segments(0)) <= CHUNKS_PER_RANK + 1
