"""Sequence-parallel attention over gloo: out, lse, dq, dk, dv are those of one process.

Starting processes costs more than the checks, so each number of ranks starts once, runs every
check, and notes the outcome of each; one test reads each note.
"""

import json
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.sequence_parallel import (
    SequenceLayout,
    SequenceParallel,
    all_gather,
    all_to_all,
    make_layout,
    make_sequence_groups,
    make_two_d_groups,
    position_ids,
    reduce_scatter,
    ring_shift,
    shard_tokens,
    shift_labels,
    unshard_tokens,
)
from lwz_kernels.sequence_parallel.ring import merge_attention
from lwz_kernels.sequence_parallel.ulysses import _sum_copies
from tests.processes import start_ranks

RANKS = (2, 4)
SIZE = 4  # K
NAMES = ("out", "lse", "dq", "dk", "dv")


class Ranks:
    """This process's groups, made once: sizes 1, 2, ..., P, and nodes of every such size."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.rank = dist.get_rank()
        self.groups = make_sequence_groups(num_ranks)
        self.two_d = {size: make_two_d_groups(size, num_ranks) for size in self.groups}
        self.world = self.groups[num_ranks]

    def parallel(self, layout: SequenceLayout) -> SequenceParallel:
        ulysses, kv = self.two_d[layout.ulysses_ranks] if layout.scheme == "two_d" else (None, None)
        if layout.scheme == "ulysses":
            ulysses = self.groups[layout.num_ranks]
        elif layout.scheme != "two_d":
            kv = self.groups[layout.num_ranks]
        return SequenceParallel(layout, "cpu", ulysses_group=ulysses, kv_group=kv)

    def layout(self, lengths: list[int], scheme: str) -> SequenceLayout:
        ulysses_ranks = int(scheme[-1]) if scheme.startswith("two_d") else None
        name = scheme.split(":")[0]
        return make_layout(lengths, self.num_ranks, name, ulysses_ranks=ulysses_ranks)

    def whole(self, shard: Tensor, layout: SequenceLayout, dim: int = 0) -> Tensor:
        """The pack from the shards of all ranks, on every rank."""
        shards = [torch.empty_like(shard.contiguous()) for _ in range(self.num_ranks)]
        dist.all_gather(shards, shard.detach().contiguous())
        return unshard_tokens(shards, layout, dim=dim)


def make_inputs(
    lengths: list[int], heads: int, kv_heads: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """q, k, v and the gradients of out and lse, equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = {
        "q": (tokens, heads, SIZE),
        "k": (tokens, kv_heads, SIZE),
        "v": (tokens, kv_heads, SIZE),
        "dout": (tokens, heads, SIZE),
        "dlse": (heads, tokens),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    if dtype == torch.bfloat16:
        inputs["dlse"] = inputs["dlse"].float()
    return inputs


def attend_alone(
    inputs: dict[str, Tensor], lengths: list[int], window: int | None, impl: str
) -> dict[str, Tensor]:
    q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
    table = SegmentTable.from_cu_seqlens([0, *torch.tensor(lengths).cumsum(0).tolist()])
    out, lse = attention(q, k, v, segments=table, window_size=window, impl=impl)
    torch.autograd.backward((out, lse), (inputs["dout"], inputs["dlse"]))
    return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def attend_together(
    ranks: Ranks,
    layout: SequenceLayout,
    inputs: dict[str, Tensor],
    window: int | None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    parallel = ranks.parallel(layout)
    own = {
        name: shard_tokens(x, layout, ranks.rank, pad_value=0, dim=1 if name == "dlse" else 0)
        for name, x in inputs.items()
    }
    q, k, v = (own[name].requires_grad_() for name in "qkv")
    out, lse = parallel.attention(q, k, v, window_size=window, need_lse=True, impl=impl)
    torch.autograd.backward((out, lse), (own["dout"], own["dlse"]))
    parallel.check_calls(1)
    assert parallel.rank == ranks.rank
    assert out.dtype == inputs["q"].dtype
    assert lse.dtype == inputs["dlse"].dtype
    local = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: ranks.whole(x, layout, int(name == "lse")) for name, x in local.items()}


def packings(num_ranks: int) -> list[list[int]]:
    generator = random.Random(num_ranks)
    drawn = [[generator.randint(1, 30) for _ in range(generator.randint(2, 6))] for _ in range(2)]
    # Documents of one token, one document over all ranks, fewer tokens than ranks, even shards.
    return [*drawn, [1, 1, 1, 1, 1], [1, 61, 1], [1], [16, 16]]


def schemes(num_ranks: int) -> list[str]:
    return ["ulysses", "gather_kv", "ring", "two_d:2" if num_ranks == 4 else "two_d:1"]


def exact_cases(num_ranks: int) -> Iterator[tuple[str, list[int], int, int, int | None]]:
    """(scheme, lengths, H, J, window); heads that Ulysses cannot split come last."""
    for scheme in schemes(num_ranks):
        for lengths in packings(num_ranks):
            yield scheme, lengths, 4, 2, None
        lengths = [1, 23, 38]
        for kv_heads in (1, 4, 8):  # J < P, J = P, J > P
            yield scheme, lengths, 8, kv_heads, None
        for window in (1, 5, 100):
            yield scheme, lengths, 4, 2, window
    for scheme in ("gather_kv", "ring"):
        yield scheme, [1, 23, 38], 3, 3, None
        yield scheme, [1, 23, 38], 6, 2, 5


def largest_error(found: Tensor, expected: Tensor) -> float:
    scale = max(1.0, float(expected.abs().max()))
    return float((found.double() - expected.double()).abs().max()) / scale


def check_fp64(ranks: Ranks) -> None:
    for case in exact_cases(ranks.num_ranks):
        assert_exact(ranks, torch.float64, 1e-12, *case)


def check_fp32(ranks: Ranks) -> None:
    for case in list(exact_cases(ranks.num_ranks))[::4]:
        assert_exact(ranks, torch.float32, 1e-5, *case)


def assert_exact(
    ranks: Ranks,
    dtype: torch.dtype,
    tolerance: float,
    scheme: str,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    inputs = make_inputs(lengths, heads, kv_heads, dtype)
    doubles = {name: x.double() for name, x in inputs.items()}
    expected = attend_alone(doubles, lengths, window, "reference")
    found = attend_together(ranks, ranks.layout(lengths, scheme), inputs, window)
    for name in NAMES:
        error = largest_error(found[name], expected[name])
        assert error <= tolerance, (scheme, lengths, heads, kv_heads, window, name, error)


def check_bf16(ranks: Ranks) -> None:
    """Splitting a pack may not lose much more than the same local attention loses in bf16."""
    lengths = [70, 1, 120]
    for scheme in schemes(ranks.num_ranks):
        inputs = make_inputs(lengths, 8, 2, torch.bfloat16)
        doubles = {name: x.double() for name, x in inputs.items()}
        expected = attend_alone(doubles, lengths, None, "reference")
        alone = attend_alone(inputs, lengths, None, "torch")
        found = attend_together(ranks, ranks.layout(lengths, scheme), inputs, None, "torch")
        for name in NAMES:
            together_error = relative_error(found[name], expected[name])
            alone_error = relative_error(alone[name], expected[name])
            assert together_error <= 1.5 * alone_error + 2e-3, (scheme, name, together_error)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@contextmanager
def spied_collectives() -> Iterator[dict[str, mock.Mock]]:
    names = (
        *("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"),
        *("batch_isend_irecv", "all_reduce"),
    )
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            for name in names
        }


def check_collectives(ranks: Ranks) -> None:
    """Their number depends on the scheme alone, never on what a rank's queries see."""
    hops = ranks.num_ranks
    expected = {
        "ulysses": ({"all_to_all_single": 2}, {"all_to_all_single": 2}),
        "gather_kv": (
            {"all_gather_into_tensor": 2},
            {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2},
        ),
        "ring": ({"batch_isend_irecv": hops - 1}, {"batch_isend_irecv": 2 * hops - 1}),
    }
    for lengths in ([1], [61, 1, 1, 1], [5] * 12):
        for scheme, (forward, backward) in expected.items():
            layout = ranks.layout(lengths, scheme)
            shape = (layout.local_tokens, 4, SIZE)
            q = torch.randn(shape, requires_grad=True)
            k, v = (torch.randn(shape)[:, :2].requires_grad_() for _ in range(2))
            with spied_collectives() as spies:
                out, lse = ranks.parallel(layout).attention(q, k, v)
            assert lse is None
            assert {name: spy.call_count for name, spy in spies.items() if spy.called} == forward
            with spied_collectives() as spies:
                out.sum().backward()
            assert {name: spy.call_count for name, spy in spies.items() if spy.called} == backward


def check_key_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    for scheme, name in (("gather_kv", "reduce_scatter_tensor"), ("ring", "batch_isend_irecv")):
        layout = ranks.layout([50, 14], scheme)
        shape = (layout.local_tokens, 2, SIZE)
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out, _ = ranks.parallel(layout).attention(q, k, v)
        with spied_collectives() as spies:
            out.sum().backward()
        sent = [call.args[0] for call in spies[name].call_args_list]
        dtypes = [x.dtype if isinstance(x, Tensor) else x[0].tensor.dtype for x in sent]
        # In the ring the bf16 keys and values travel on between their gradients.
        keys = ranks.num_ranks - 1 if scheme == "ring" else 0
        assert dtypes.count(torch.bfloat16) == keys, (scheme, dtypes)
        assert dtypes.count(torch.float32) == len(dtypes) - keys > 0, (scheme, dtypes)
        assert (q.grad.dtype, k.grad.dtype, v.grad.dtype) == (torch.bfloat16,) * 3


def check_adjoints(ranks: Ranks) -> None:
    """⟨y, A x⟩ = ⟨Aᵀ y, x⟩ with both sides summed over ranks, and A against its definition."""
    rank, num_ranks, group = ranks.rank, ranks.num_ranks, ranks.world
    rows = torch.arange(num_ranks, dtype=torch.float64)
    value = 10.0 * rank + rows
    assert all_to_all(value, group).tolist() == (10.0 * rows + rank).tolist()
    assert all_gather(value[0], group).tolist() == (10.0 * rows).tolist()
    assert reduce_scatter(value, group) == 10.0 * rows.sum() + num_ranks * rank
    assert ring_shift(value[0], group) == 10.0 * ((rank - 1) % num_ranks)
    assert ring_shift(value[0], group, -1) == 10.0 * ((rank + 1) % num_ranks)
    torch.manual_seed(rank)
    for function in (all_to_all, all_gather, reduce_scatter, ring_shift):
        x = torch.randn(num_ranks, 3, dtype=torch.float64, requires_grad=True)
        out = function(x, group)
        y = torch.randn_like(out)
        out.backward(y)
        sides = torch.stack(((out * y).sum(), (x.grad * x).sum())).detach()
        dist.all_reduce(sides)
        torch.testing.assert_close(sides[0], sides[1])


def check_sums_are_rounded_once(ranks: Ranks) -> None:
    """In bf16 and with more than two ranks, sums of rounded sums differ."""
    generator = torch.Generator().manual_seed(0)
    shape = (ranks.num_ranks, ranks.num_ranks, 500)
    rows = torch.randn(shape, generator=generator).bfloat16()  # by rank that has and rank that gets
    expected = rows.double().sum(0)[ranks.rank].bfloat16()
    x = torch.zeros(500, dtype=torch.bfloat16, requires_grad=True)
    all_gather(x, ranks.world).backward(rows[ranks.rank])
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    found = reduce_scatter(rows[ranks.rank], ranks.world)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_strided_input(ranks: Ranks) -> None:
    """gloo's all-to-all into a buffer with the strides of a transposed view gives wrong data."""
    base = 100.0 * ranks.rank + torch.arange(5.0 * ranks.num_ranks).view(5, ranks.num_ranks)
    found = all_to_all(base.t(), ranks.world)
    expected = 100.0 * torch.arange(ranks.num_ranks)[:, None] + (
        torch.arange(5.0) * ranks.num_ranks + ranks.rank
    )
    assert torch.equal(found, expected)
    gathered = all_gather(base.t(), ranks.world)
    assert torch.equal(gathered[ranks.rank], base.t())


class Model(torch.nn.Module):
    """Two layers of attention whose local part is a callable."""

    def __init__(self, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        width, self.heads, self.kv_heads = 12, heads, kv_heads
        self.tokens = torch.nn.Embedding(11, width)
        self.positions = torch.nn.Embedding(64, width)
        rows = (heads + 2 * kv_heads) * SIZE
        self.qkv = torch.nn.ModuleList([torch.nn.Linear(width, rows) for _ in range(2)])
        self.output = torch.nn.ModuleList([torch.nn.Linear(heads * SIZE, width) for _ in range(2)])
        self.double()

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Callable) -> Tensor:
        hidden = self.tokens(input_ids) + self.positions(positions)
        for qkv, output in zip(self.qkv, self.output, strict=True):
            q, k, v = (
                qkv(hidden)
                .unflatten(1, (-1, SIZE))
                .split((self.heads, self.kv_heads, self.kv_heads), 1)
            )
            hidden = hidden + output(attention(q, k, v)[0].flatten(1))
        return hidden @ self.tokens.weight.t()


def check_training_step(ranks: Ranks) -> None:
    """Loss, gradients and their norm, with labels shifted on the pack and a detached count.

    One parallel object serves two models with different numbers of KV heads.
    """
    lengths = [1, 20, 33, 7]
    input_ids = torch.arange(sum(lengths)) * 7 % 11
    labels = shift_labels(input_ids, lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    table = SegmentTable.from_cu_seqlens([0, *torch.tensor(lengths).cumsum(0).tolist()])
    for scheme in schemes(ranks.num_ranks):
        layout = ranks.layout(lengths, scheme)
        parallel = ranks.parallel(layout)
        for kv_heads in (2, 4):
            alone, together = Model(kv_heads=kv_heads), Model(kv_heads=kv_heads)
            expected = F.cross_entropy(
                alone(input_ids, positions, lambda q, k, v: attention(q, k, v, segments=table)),
                labels,
            )
            expected.backward()

            own_ids = shard_tokens(input_ids, layout, ranks.rank, pad_value=0)
            own_labels = shard_tokens(labels, layout, ranks.rank, pad_value=-100)
            num_loss_tokens = (own_labels != -100).sum()
            dist.all_reduce(num_loss_tokens)
            logits = together(own_ids, position_ids(layout, ranks.rank, "cpu"), parallel.attention)
            loss = F.cross_entropy(logits, own_labels, reduction="sum") / num_loss_tokens
            with spied_collectives() as spies:
                loss.backward()
            assert not spies["all_reduce"].called, "a collective of the loss is differentiated"
            parallel.check_calls(2)

            total = loss.detach().clone()
            dist.all_reduce(total)
            assert abs(float(total - expected.detach())) <= 1e-12, scheme
            squares = {"alone": 0.0, "together": 0.0}
            for (name, a), b in zip(alone.named_parameters(), together.parameters(), strict=True):
                dist.all_reduce(b.grad)
                assert largest_error(b.grad, a.grad) <= 1e-12, (scheme, name)
                squares["alone"] += float(a.grad.square().sum())
                squares["together"] += float(b.grad.square().sum())
            assert squares["together"] == pytest.approx(squares["alone"], rel=1e-12), scheme


def check_fewer_ranks(ranks: Ranks) -> None:
    """Groups of every power of two, and a pack that takes fewer ranks than there are."""
    assert sorted(ranks.groups) == [size for size in (1, 2, 4) if size <= ranks.num_ranks]
    for size, group in ranks.groups.items():
        first = ranks.rank // size * size
        assert dist.get_process_group_ranks(group) == list(range(first, first + size))
        ulysses, kv = ranks.two_d[size]
        assert dist.get_process_group_ranks(ulysses) == list(range(first, first + size))
        place = ranks.rank % size
        assert dist.get_process_group_ranks(kv) == list(range(place, ranks.num_ranks, size))
        lengths = [9, 6]
        inputs = make_inputs(lengths, 4, 2, torch.float64)
        expected = attend_alone(inputs, lengths, None, "reference")
        for scheme in ("ulysses", "gather_kv", "ring"):
            layout = make_layout(lengths, size, scheme)
            parallel = ranks.parallel(layout)
            q, k, v = (
                shard_tokens(inputs[name], layout, parallel.rank, pad_value=0) for name in "qkv"
            )
            found, _ = parallel.attention(q, k, v)
            own = shard_tokens(expected["out"], layout, parallel.rank, pad_value=0)
            index = torch.tensor(layout.shard_index(parallel.rank))
            real = index < layout.num_tokens
            assert largest_error(found[real], own[real]) <= 1e-12, (size, scheme)


def check_errors(ranks: Ranks) -> None:
    num_ranks, world = ranks.num_ranks, ranks.world
    layout = make_layout([8 * num_ranks], num_ranks)
    parallel = ranks.parallel(layout)
    odd = torch.randn(8, 3 * num_ranks, SIZE)
    with pytest.raises(ValueError, match=r"use scheme 'gather_kv'"):
        parallel.attention(odd, odd[:, :3], odd[:, :3])
    with pytest.raises(ValueError, match=r"expected the 8 tokens of this rank's shard"):
        parallel.attention(odd[:5], odd[:5], odd[:5])
    with pytest.raises(RuntimeError, match=r"ran 0 times, expected 2"):
        parallel.check_calls(2)
    with pytest.raises(ValueError, match="scheme 'ulysses' needs ulysses_group"):
        SequenceParallel(layout, "cpu")
    with pytest.raises(ValueError, match="scheme 'ulysses' does not use kv_group"):
        SequenceParallel(layout, "cpu", ulysses_group=world, kv_group=world)
    with pytest.raises(ValueError, match=f"layout is for {num_ranks} ranks, got 1"):
        SequenceParallel(layout, "cpu", ulysses_group=ranks.groups[1])
    ring = ranks.parallel(make_layout([8 * num_ranks], num_ranks, "ring"))
    with pytest.raises(ValueError, match="expected window_size >= 1"):
        ring.attention(odd, odd, odd, window_size=0)
    with pytest.raises(ValueError, match=r"expected one row for each of \d ranks"):
        all_to_all(odd[: num_ranks + 1], world)
    with pytest.raises(ValueError, match=r"expected one row for each of \d ranks"):
        reduce_scatter(odd[: num_ranks + 1], world)
    with pytest.raises(ValueError, match="largest must be a power of two"):
        make_sequence_groups(3)
    with pytest.raises(ValueError, match="ulysses_ranks must divide"):
        make_two_d_groups(3, num_ranks)
    with pytest.raises(ValueError, match="num_ranks must divide"):
        make_two_d_groups(1, 3)


CHECKS: list[Callable[[Ranks], None]] = [
    check_fp64,
    check_fp32,
    check_bf16,
    check_collectives,
    check_key_gradients_are_summed_in_fp32,
    check_adjoints,
    check_sums_are_rounded_once,
    check_strided_input,
    check_training_step,
    check_fewer_ranks,
    check_errors,
]


def _rank_main(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    notes: dict[str, str] = {}
    try:
        ranks = Ranks(num_ranks)
        for check in CHECKS:
            check(ranks)
            notes[check.__name__] = "passed"
        dist.barrier()  # a rank that leaves early takes its connections with it
    except BaseException:
        notes[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
        raise
    finally:
        (Path(folder) / f"notes{rank}.json").write_text(json.dumps(notes))
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=RANKS, ids=lambda num_ranks: f"P{num_ranks}")
def notes(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """By rank, what came of each check."""
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(_rank_main, (request.param, folder), request.param)
        for process in context.processes:
            process.join(200)
            if process.is_alive():
                process.kill()
        files = [Path(folder) / f"notes{rank}.json" for rank in range(request.param)]
        return [json.loads(f.read_text()) if f.exists() else {} for f in files]


@pytest.mark.dist
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_sequence_parallel_over_ranks(
    notes: list[dict[str, str]], check: Callable[[Ranks], None]
) -> None:
    found = [note.get(check.__name__, "did not run") for note in notes]
    assert found == ["passed"] * len(notes), "\n".join(found)


def test_merge_attention_is_the_softmax_of_both_parts() -> None:
    inputs = make_inputs([6], 2, 2, torch.float64)
    # Stripes of even and of odd keys; query 0 sees no odd key, as in the ring.
    q, k, v = (inputs[name] for name in "qkv")
    even = attention(q[::2], k[::2], v[::2], segments=SegmentTable([(0, 3, 0, 3)], 3, 3))
    odd = attention(q[::2], k[1::2], v[1::2], segments=SegmentTable([(0, 3, 0, 2)], 3, 3))
    alone = attention(q, k, v, segments=SegmentTable.from_cu_seqlens([0, 6]))
    out, lse = merge_attention(even[0].clone(), even[1], *odd)
    torch.testing.assert_close(out, alone[0][::2])
    torch.testing.assert_close(lse, alone[1][:, ::2])


def test_merge_attention_of_nothing_and_nothing_is_nothing() -> None:
    out, lse = torch.zeros(1, 1, SIZE), torch.full((1, 1), float("-inf"))
    merged, merged_lse = merge_attention(out.clone(), lse, out, lse)
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_merge_attention_starts_from_nothing_exactly() -> None:
    part, part_lse = torch.randn(1, 1, SIZE), torch.randn(1, 1)
    merged, merged_lse = merge_attention(
        torch.zeros(1, 1, SIZE), torch.full((1, 1), float("-inf")), part, part_lse
    )
    assert torch.equal(merged, part)
    assert torch.equal(merged_lse, part_lse)


def test_gradients_of_a_copied_key_head_are_rounded_once() -> None:
    """32 ranks that share a KV head: a sum in bf16 loses most of what the last ones add."""
    x = torch.rand(32, 1, 1, 64).to(torch.bfloat16)
    exact = x.double().sum(0)
    assert torch.equal(_sum_copies(x, 1)[:, 0], exact.to(torch.bfloat16)[:, 0])
