"""The linear layer for few rows: every implementation and instruction set against the oracle."""

import doctest
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels import dispatch, native
from lwz_kernels.skinny_linear import AUTO_MAX_ROWS, api, reference, skinny_linear
from lwz_kernels.skinny_linear.op import skinny_linear_op

needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
LEVELS = native.levels() if native.is_available() else ()
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(FP32, FP32, FP32), (BF16, BF16, BF16), (BF16, BF16, FP32), (FP32, BF16, FP32)]


@pytest.fixture(autouse=True)
def _restore_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def _problem(
    rows: int, columns: int, depth: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    return x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)


def _assert_as_good_as_reference(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """At most twice the error of plain torch in the same dtypes, plus the floor of fp32 sums.

    The floor is eight roundings of the size of the sum of magnitudes' root mean square: what
    another order of summation costs where torch happens to be exact.
    """
    wide_bias = None if bias is None else bias.double()
    truth = reference.skinny_linear(x.double(), weight.double(), wide_bias, out_dtype=torch.float64)
    eager = reference.skinny_linear(x, weight, bias, out_dtype=out.dtype)
    floor = 8 * torch.finfo(FP32).eps * x.shape[1] ** 0.5
    error = (out.double() - truth).abs().max().item()
    assert error <= 2 * (eager.double() - truth).abs().max().item() + floor


# Rows around one, two, three and more vectors of 8 and of 16 lanes, and around a register tile.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 24, 25, 33, 40, 49, 64, 65, 100])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_is_as_good_as_reference(
    level: str, dtypes: tuple[torch.dtype, ...], rows: int
) -> None:
    x, weight, bias = _problem(rows, 53, 264, *dtypes[:2])
    out = native.linear(x, weight, bias, out_dtype=dtypes[2], level=level)
    assert out.dtype == dtypes[2]
    _assert_as_good_as_reference(out, x, weight, bias)


# Columns around a tile (4, 6, 8) and a chunk (24, 48); depths around a block (64), four of them and
# a pass (2,048).
@pytest.mark.parametrize("columns", [1, 2, 5, 7, 8, 24, 25, 49, 150, 401])
@pytest.mark.parametrize("rows", [3, 12, 20, 30])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_handles_any_number_of_columns(
    level: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    x, weight, bias = _problem(rows, columns, 40, dtype, dtype)
    out = native.linear(x, weight, bias, out_dtype=dtype, level=level)
    _assert_as_good_as_reference(out, x, weight, bias)


@pytest.mark.parametrize(
    "depth", [8, 16, 56, 64, 72, 248, 256, 264, 512, 520, 2048, 2056, 4104, 16384]
)
@pytest.mark.parametrize("rows", [5, 18, 35])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_handles_any_depth(level: str, dtype: torch.dtype, rows: int, depth: int) -> None:
    x, weight, _ = _problem(rows, 27, depth, dtype, dtype)
    out = native.linear(x, weight, None, out_dtype=dtype, level=level)
    _assert_as_good_as_reference(out, x, weight, None)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_row_ignores_the_other_rows_and_the_threads(level: str, dtype: torch.dtype) -> None:
    """Sampling log-probabilities must not depend on which requests run together."""
    x, weight, bias = _problem(67, 331, 1536, dtype, dtype)
    rows = [native.linear(r[None], weight, bias, out_dtype=dtype, level=level) for r in x]
    alone = torch.cat(rows)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for count in (1, 2, 8, 15, 16, 24, 31, 40, 64, 67):
            out = native.linear(x[-count:], weight, bias, out_dtype=dtype, level=level)
            assert torch.equal(out, alone[-count:])
    other_company = x.flip(0).contiguous()
    out = native.linear(other_company, weight, bias, out_dtype=dtype, level=level)
    assert torch.equal(out.flip(0), alone)


@pytest.mark.parametrize("level", LEVELS)
def test_native_writes_and_reads_only_what_it_was_given(level: str) -> None:
    x, weight, bias = _problem(11, 29, 72, FP32, FP32)
    padded_x = torch.full((13, 72), float("nan"))
    padded_x[1:12] = x
    padded_weight = torch.full((31, 72), float("nan"))
    padded_weight[1:30] = weight
    out = native.linear(padded_x[1:12], padded_weight[1:30], bias, out_dtype=FP32, level=level)
    assert torch.equal(out, native.linear(x, weight, bias, out_dtype=FP32, level=level))


@pytest.mark.parametrize("level", LEVELS)
def test_native_rounds_to_bf16_as_torch_does(level: str) -> None:
    # Halfway cases (1 + 2^-8 goes down, 1 + 3 * 2^-8 up), NaN, infinity, large, subnormal.
    values = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, float("nan"), float("inf"), 3.0e38, 1e-40]
    weight = torch.zeros(len(values), 8)
    weight[:, 0] = torch.tensor(values)
    x = torch.zeros(3, 8)
    x[:, 0] = 1.0
    out = native.linear(x, weight, None, out_dtype=BF16, level=level)
    expected = weight[:, 0].to(BF16).expand(3, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_native_keeps_a_non_finite_row_to_itself() -> None:
    x, weight, bias = _problem(9, 30, 64, FP32, FP32)
    x[4, 7] = float("nan")
    out = skinny_linear(x, weight, bias, impl="native")
    assert out[4].isnan().all()
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 120),
    steps=st.integers(1, 40),
    has_bias=st.booleans(),
    dtypes=st.sampled_from(DTYPES),
)
@example(rows=1, columns=58, steps=30, has_bias=False, dtypes=(FP32, FP32, FP32))
def test_skinny_linear_auto_agrees_with_reference(
    rows: int, columns: int, steps: int, has_bias: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    x, weight, bias = _problem(rows, columns, 8 * steps, *dtypes[:2])
    out = skinny_linear(x, weight, bias if has_bias else None, out_dtype=dtypes[2])
    assert out.shape == (rows, columns)
    if out.numel() > 0:
        _assert_as_good_as_reference(out, x, weight, bias if has_bias else None)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), "torch", "reference"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_skinny_linear_impls_follow_one_contract(
    impl: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    x, weight, bias = _problem(5, 12, 48, *dtypes[:2])
    strided_x = torch.stack([x, x], dim=2)[:, :, 0]
    out = skinny_linear(strided_x, weight, bias, out_dtype=dtypes[2], impl=impl)
    assert out.dtype == dtypes[2]
    _assert_as_good_as_reference(out, x, weight, bias)
    default = skinny_linear(x, weight, impl=impl)
    assert default.dtype == x.dtype
    _assert_as_good_as_reference(default, x, weight, None)


def test_skinny_linear_auto_serves_what_native_cannot() -> None:
    x, weight, bias = _problem(5, 12, 44, FP32, FP32)
    expected = F.linear(x, weight, bias)
    assert torch.equal(skinny_linear(x, weight, bias), expected)
    wide_x, tall_weight, _ = _problem(5, 12, 48, FP32, FP32)
    transposed = tall_weight.t().contiguous().t()
    assert torch.equal(skinny_linear(wide_x, transposed), F.linear(wide_x, transposed))


@needs_native
@pytest.mark.parametrize(
    ("rows", "chosen"), [(1, "native"), (AUTO_MAX_ROWS, "native"), (AUTO_MAX_ROWS + 1, "torch")]
)
def test_skinny_linear_auto_says_what_it_chose(
    rows: int, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch._log.cache_clear()
    x, weight, _ = _problem(rows, 12, 48, FP32, FP32)
    with caplog.at_level(logging.INFO, logger="lwz_kernels"):
        skinny_linear(x, weight)
        skinny_linear(x, weight)
    assert [f"impl={chosen}" in message for message in caplog.messages] == [True]


def test_skinny_linear_auto_without_the_library_runs_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "not built here"))
    x, weight, bias = _problem(5, 12, 48, FP32, FP32)
    assert torch.equal(skinny_linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match="impl='native' is not available: not built here"):
        skinny_linear(x, weight, bias, impl="native")


def test_skinny_linear_passes_opcheck() -> None:
    x, weight, bias = _problem(3, 5, 16, BF16, BF16)
    impls = ["torch", "native"] if native.is_available() else ["torch"]
    for impl in impls:
        torch.library.opcheck(skinny_linear_op, (x, weight, bias, FP32, impl))
        torch.library.opcheck(skinny_linear_op, (x, weight, None, BF16, impl))


def test_skinny_linear_refuses_what_it_cannot_do() -> None:
    x, weight, bias = _problem(3, 5, 16, FP32, FP32)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        skinny_linear(x, weight, impl="fast")
    with pytest.raises(ValueError, match=r"expected x \[M, K\] and weight \[N, K\]"):
        skinny_linear(x, weight[:, :8])
    with pytest.raises(ValueError, match=r"expected x \[M, K\]"):
        skinny_linear(x[None], weight)
    with pytest.raises(ValueError, match=r"expected bias \[5\] torch.float32"):
        skinny_linear(x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"expected bias \[5\] torch.float32"):
        skinny_linear(x, weight, bias.to(BF16))
    with pytest.raises(TypeError, match="expected x and weight fp32"):
        skinny_linear(x.to(BF16), weight)
    with pytest.raises(TypeError, match=r"got torch.float32, torch.float32 and torch.bfloat16"):
        skinny_linear(x, weight, out_dtype=BF16)
    with pytest.raises(TypeError, match="expected x and weight fp32"):
        skinny_linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="expected all tensors on cpu"):
        skinny_linear(x, weight.to("meta"))
    with pytest.raises(RuntimeError, match="has no backward"):
        skinny_linear(x, weight.requires_grad_())


@needs_native
def test_skinny_linear_by_name_never_falls_back() -> None:
    x, weight, _ = _problem(3, 5, 16, FP32, FP32)
    with pytest.raises(NotImplementedError, match=r"multiple of 8, got K = 12 on cpu"):
        skinny_linear(x[:, :12], weight[:, :12].contiguous(), impl="native")
    with pytest.raises(NotImplementedError, match=r"weight strides \[16, 1\]"):
        skinny_linear(x[:, :8], weight[:, :8], impl="native")
    with pytest.raises(ValueError, match="the inner size must be a multiple of 8"):
        native.linear(x[:, :12].contiguous(), weight, None, out_dtype=FP32)


@needs_native
def test_native_refuses_an_instruction_set_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "LEVELS", (*native.LEVELS, "future"))
    x, weight, _ = _problem(3, 5, 16, FP32, FP32)
    with pytest.raises(ValueError, match="lacks the requested instruction set"):
        native.linear(x, weight, None, out_dtype=FP32, level="future")


def test_skinny_linear_example_runs() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 0
    assert result.failed == 0
