"""Splitting and rotating a fused projection: torch against the formula, Triton interpreted."""

import doctest
import logging
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels import dispatch
from lwz_kernels.qkv_rope import api, op, qkv_rope
from lwz_kernels.qkv_rope.kernels import qkv_rope_bwd_triton, qkv_rope_fwd_triton
from lwz_kernels.qkv_rope.op import qkv_rope_op
from lwz_kernels.qkv_rope.torch_rotation import qkv_rope_bwd_torch
from tests.kernels.loss_case import assert_as_good_as_eager

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="fp64 and CPU tensors are for the interpreter",
)
triton_interpreted = pytest.param("triton", marks=[pytest.mark.interpret, needs_interpreter])


def make_case(
    num_tokens: int,
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype = FP64,
    *,
    num_positions: int | None = None,
) -> dict[str, Any]:
    """Arguments of qkv_rope; with `num_positions`, a table and random rows of it."""
    rows = num_tokens if num_positions is None else num_positions
    angles = 6 * torch.rand(rows, head_size // 2, dtype=FP64)
    positions = None if num_positions is None else torch.randint(0, rows, (num_tokens,))
    width = (heads[0] + 2 * heads[1]) * head_size
    return {
        "qkv": torch.randn(num_tokens, width, dtype=FP64).to(dtype),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "position_ids": positions,
    }


def run(case: dict[str, Any], impl: str, upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """q, k, v and dqkv, by autograd."""
    qkv = case["qkv"].clone().requires_grad_()
    outputs = qkv_rope(**{**case, "qkv": qkv}, impl=impl)
    (dqkv,) = torch.autograd.grad(outputs, qkv, upstream)
    return *outputs, dqkv


def upstream_of(case: dict[str, Any]) -> list[Tensor]:
    qkv, half = case["qkv"], case["cos"].shape[1]
    heads = (case["num_heads"], case["num_kv_heads"], case["num_kv_heads"])
    return [torch.randn(len(qkv), h, 2 * half, dtype=FP64).to(qkv) for h in heads]


@pytest.fixture
def _triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_triton_obstacle", lambda _: "")


def assert_equals_reference(case: dict[str, Any], impl: str) -> None:
    upstream = upstream_of(case)
    ours, truths = run(case, impl, upstream), run(case, "reference", upstream)
    for mine, truth in zip(ours, truths, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("_triton_on_cpu")
@pytest.mark.parametrize("num_positions", [None, 11])
@pytest.mark.parametrize("head_size", [2, 80, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3)], ids=str)
@pytest.mark.parametrize("impl", ["torch", triton_interpreted])
def test_qkv_rope_is_exact(
    impl: str, heads: tuple[int, int], head_size: int, num_positions: int | None
) -> None:
    """More heads than an interpreted program takes (128 numbers of each half), and fewer."""
    case = make_case(3, heads, head_size, num_positions=num_positions)
    assert_equals_reference(case, impl)


@pytest.mark.usefixtures("_triton_on_cpu")
@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("impl", ["torch", triton_interpreted])
def test_qkv_rope_equals_reference_anywhere(impl: str, data: st.DataObject) -> None:
    case = make_case(
        data.draw(st.integers(0, 4)),
        (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))),
        2 * data.draw(st.integers(1, 40)),
        num_positions=data.draw(st.none() | st.integers(1, 5)),
    )
    assert_equals_reference(case, impl)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_torch_is_as_good_as_the_formula(dtype: torch.dtype) -> None:
    case = make_case(40, (4, 2), 64, dtype)
    upstream = upstream_of(case)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in case.items()}
    truths = run(wide, "reference", [x.double() for x in upstream])
    eager, ours = run(case, "reference", upstream), run(case, "torch", upstream)
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert mine.dtype == dtype
        assert_as_good_as_eager(mine, theirs, truth)


@pytest.mark.interpret
@needs_interpreter
def test_triton_takes_tables_wider_than_the_projection() -> None:
    """fp32 tables of an fp16 model: computed in fp32, rounded once."""
    case = make_case(5, (2, 1), 16, FP32)
    case["qkv"] = case["qkv"].half()
    tables = (case["cos"], case["sin"], None)
    wide = [x.double() for x in (case["qkv"], *tables[:2])]
    truths = qkv_rope(*wide, num_heads=2, num_kv_heads=1, impl="reference")
    ours = qkv_rope_fwd_triton(case["qkv"], *tables, 2, 1)
    for mine, truth in zip(ours, truths, strict=True):
        assert mine.dtype == FP16
        torch.testing.assert_close(mine.double(), truth, rtol=2**-11 + 1e-6, atol=1e-7)


@pytest.mark.interpret
@needs_interpreter
def test_triton_reads_strides_and_int32_positions() -> None:
    case = make_case(3, (3, 1), 24, num_positions=4)
    positions = case["position_ids"]
    expected = qkv_rope(**case, impl="torch")
    qkv = torch.cat((case["qkv"], torch.ones(3, 7, dtype=FP64)), 1)[:, :-7]
    cos = torch.cat((case["cos"], case["cos"]), 1)[:, :12]
    scattered = case["qkv"].t().contiguous().t()
    for x in (qkv, scattered):
        ours = qkv_rope_fwd_triton(x, cos, case["sin"].t().contiguous().t(), positions.int(), 3, 1)
        for mine, truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, truth)
    gradients = [torch.randn_like(x) for x in expected]
    strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in gradients]
    tables = (cos, case["sin"], positions)
    torch.testing.assert_close(
        qkv_rope_bwd_triton(*strided, *tables), qkv_rope_bwd_torch(*gradients, *tables)
    )


@pytest.mark.usefixtures("_triton_on_cpu")
@pytest.mark.parametrize("impl", ["torch", triton_interpreted])
def test_operators_pass_opcheck_and_gradcheck(impl: str) -> None:
    case = make_case(2, (2, 1), 4, num_positions=5)
    qkv = case["qkv"].requires_grad_()
    arguments = (qkv, case["cos"], case["sin"], case["position_ids"], 2, 1, impl)
    torch.library.opcheck(qkv_rope_op, arguments)
    torch.autograd.gradcheck(lambda x: qkv_rope_op(x, *arguments[1:]), qkv)


def test_an_unused_output_adds_no_gradient() -> None:
    case = make_case(3, (2, 1), 8)
    gradients = []
    for impl in ("torch", "reference"):
        qkv = case["qkv"].clone().requires_grad_()
        k = qkv_rope(**{**case, "qkv": qkv}, impl=impl)[1]
        gradients.append(torch.autograd.grad(k.square().sum(), qkv)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_qkv_rope_compiles_to_one_graph(impl: str) -> None:
    case = make_case(5, (2, 1), 8)
    qkv = case.pop("qkv").requires_grad_()

    def total(qkv: Tensor) -> Tensor:
        q, k, v = qkv_rope(qkv, **case, impl=impl)
        return (q.sum(-1) * k.sum(-1) * v.sum(-1)).sum()

    (expected,) = torch.autograd.grad(total(qkv), qkv)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(qkv), qkv)[0], expected)


def test_scores_depend_on_distance_alone() -> None:
    """q · k after rotation is a function of the difference of positions: what RoPE is for."""
    frequencies = torch.rand(8, dtype=FP64)
    angles = torch.arange(20, dtype=FP64)[:, None] * frequencies
    row = torch.randn(1, 3 * 16, dtype=FP64)

    def score(query_at: int, key_at: int) -> Tensor:
        positions = torch.tensor([query_at, key_at])
        q, k, _ = qkv_rope(
            row.expand(2, -1),
            angles.cos(),
            angles.sin(),
            num_heads=1,
            num_kv_heads=1,
            position_ids=positions,
        )
        return (q[0] * k[1]).sum()

    torch.testing.assert_close(score(3, 1), score(17, 15))
    assert not torch.allclose(score(3, 1), score(1, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_auto_says_once_that_it_takes_torch(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log.cache_clear()
    case = make_case(2, (1, 1), 4)
    with caplog.at_level(logging.INFO, logger="lwz_kernels"):
        for _ in range(2):
            qkv_rope(**case)
    assert [record.getMessage() for record in caplog.records] == [
        "qkv_rope: impl=torch (triton needs CUDA tensors, got cpu)"
    ]
    with pytest.raises(NotImplementedError, match="'triton' needs CUDA tensors, got cpu; use"):
        qkv_rope(**case, impl="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "heads >= 1, got 0 and 1"),
        ({"qkv": torch.zeros(3, 4, 8)}, ValueError, r"qkv \[T, 4 \* K\]"),
        ({"qkv": torch.zeros(3, 4 * 7)}, ValueError, "even K for 2"),
        ({"qkv": torch.zeros(3, 0)}, ValueError, "even K for 2"),
        ({"cos": torch.zeros(3, 8)}, ValueError, r"cos and sin \[P, 4\], got \[3, 8\]"),
        ({"sin": torch.zeros(2, 4)}, ValueError, r"cos and sin \[P, 4\]"),
        ({"sin": torch.zeros(3, 4).half()}, TypeError, "cos and sin of one dtype"),
        ({"qkv": torch.zeros(3, 32).int()}, TypeError, "floating point"),
        ({"qkv": torch.zeros(3, 32, device="meta")}, ValueError, "qkv is on meta"),
        ({"qkv": torch.zeros(2, 32)}, ValueError, "each of 2 tokens, got 3; pass position_ids"),
        ({"position_ids": torch.zeros(3)}, TypeError, "int32 or int64, got torch.float32"),
        ({"position_ids": torch.zeros(2).long()}, ValueError, r"position_ids \[3\] on cpu"),
        ({"position_ids": torch.tensor([0, 1, 3])}, ValueError, "< 3, the rows .* got 0 to 3"),
        ({"position_ids": torch.tensor([0, 1, -1])}, ValueError, "got -1 to 1"),
        ({"cos": torch.zeros(3, 4).requires_grad_()}, RuntimeError, "get no gradient"),
        ({"impl": "fast"}, ValueError, "'fast', expected auto, triton, torch or reference"),
    ],
)
def test_qkv_rope_refuses(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "qkv": torch.zeros(3, 32),
        "cos": torch.zeros(3, 4),
        "sin": torch.zeros(3, 4),
        "num_heads": 2,
        "num_kv_heads": 1,
    }
    with pytest.raises(error, match=message):
        qkv_rope(**{**arguments, **changes})


def test_qkv_rope_example_holds() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("heads", "head_size"), [((28, 4), 128), ((9, 3), 64), ((32, 8), 80)])
def test_triton_is_as_good_as_the_formula(
    heads: tuple[int, int], head_size: int, dtype: torch.dtype
) -> None:
    case = make_case(777, heads, head_size, dtype, num_positions=1000)
    case = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.items()}
    upstream = [x.cuda() for x in upstream_of(case)]
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.items()
    }
    truths = run(wide, "reference", [x.double() for x in upstream])
    eager, ours = run(case, "reference", upstream), run(case, "triton", upstream)
    for mine, theirs, truth in zip(ours, eager, truths, strict=True):
        assert_as_good_as_eager(mine, theirs, truth)
