"""The matrix product of the decoder on CPUs with and without bf16 instructions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.skinny_linear import AUTO_MAX_ROWS, skinny_linear
from lwz_trainer.model import linear as linear_module
from lwz_trainer.model.linear import (
    default_dtype,
    embedding,
    has_native_bf16,
    linear,
    resolve_dtype,
    wide_logits,
)
from lwz_trainer.model.main_grad import attach_main_grad, grad_buffer

ROWS, IN, OUT = 40, 48, 24


@pytest.fixture(params=[False, True], ids=["emulated-bf16", "native-bf16"])
def native_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(linear_module, "has_native_bf16", lambda: request.param)
    return request.param


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, ROWS // 2, IN), (OUT, IN), (OUT,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def outcome(dtype: torch.dtype, *, wide: bool) -> list[Tensor]:
    """Output and the three gradients; `wide` computes the truth in fp64."""
    leaves = inputs(dtype)
    x, weight, bias = (leaf.detach().double().requires_grad_() for leaf in leaves)
    if not wide:
        x, weight, bias = leaves
    out = linear(x, weight, bias)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
    out.backward(dout.to(dtype).to(out.dtype))
    grads = (x.grad, weight.grad, bias.grad)
    return [out.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_values_and_gradients_are_right_to_the_last_rounding(dtype: torch.dtype) -> None:
    got, truth = outcome(dtype, wide=False), outcome(dtype, wide=True)
    assert len(got) == len(truth) == 4
    for ours, exact in zip(got, truth, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).norm() / exact.norm()
        # One rounding to the output's type, after sums of 48 terms in fp32.
        assert error < torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps


def test_linear_without_native_bf16_keeps_no_fp32_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "has_native_bf16", lambda: False)
    saved: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = linear(*inputs(torch.bfloat16))
    assert out.grad_fn.upcasts  # type: ignore[union-attr]
    assert saved == [torch.bfloat16] * 3  # x, weight and bias


def test_linear_of_few_rows_reads_bf16_weights_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "has_native_bf16", lambda: False)
    x, weight, bias = inputs(torch.bfloat16)
    assert not linear(x[:1, :2], weight, bias).grad_fn.upcasts  # type: ignore[union-attr]


@pytest.fixture
def skinny_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of the skinny kernel."""
    calls: list[int] = []

    def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.shape[0])
        return skinny_linear(x, *args, **kwargs)

    monkeypatch.setattr(linear_module, "skinny_linear", record)
    return calls


@pytest.mark.parametrize("rows", [1, AUTO_MAX_ROWS, AUTO_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ours_is_fastest", [False, True])
def test_linear_without_gradients_uses_the_skinny_kernel_for_few_rows(
    native_bf16: bool,
    ours_is_fastest: bool,
    skinny_rows: list[int],
    dtype: torch.dtype,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "has_fastest_bf16", lambda: ours_is_fastest)
    _, weight, bias = inputs(dtype)
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        out = linear(x[None], weight, bias)
    is_left_to_torch = rows > AUTO_MAX_ROWS or (
        dtype == torch.bfloat16 and native_bf16 and not ours_is_fastest
    )
    assert skinny_rows == ([] if is_left_to_torch else [rows])
    assert out.shape == (1, rows, OUT)
    exact = x.double() @ weight.double().T + bias.double()
    error = (out[0].double() - exact).norm() / exact.norm()
    assert error < torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps


def test_linear_with_gradients_never_uses_the_skinny_kernel(skinny_rows: list[int]) -> None:
    x, weight, bias = inputs(torch.float32)
    linear(x[:1, :2], weight, bias).sum().backward()
    assert skinny_rows == []
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_logits_are_fp32_with_and_without_gradients(
    skinny_rows: list[int], dtype: torch.dtype
) -> None:
    x, weight, _ = inputs(dtype)
    hidden, head = x[0].detach(), weight.detach()
    exact = hidden.double() @ head.double().T
    with_gradients = wide_logits(hidden, head)
    assert skinny_rows == []
    with torch.no_grad():
        without = wide_logits(hidden, head)
    assert skinny_rows == [ROWS // 2]
    for logits in (with_gradients, without):
        assert logits.dtype == torch.float32
        assert (logits.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.usefixtures("native_bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_adds_to_an_attached_gradient_in_fp32(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype)
    total = torch.ones(OUT, IN)
    attach_main_grad(weight, total)
    douts = [torch.randn(ROWS, OUT).to(dtype) for _ in range(3)]
    for dout in douts:
        linear(x.reshape(ROWS, IN), weight, bias).backward(dout)
    assert weight.grad is None
    exact = 1 + sum(dout.double() for dout in douts).T @ x.detach().double().reshape(ROWS, IN)
    # A bf16 product is rounded once where the CPU multiplies bf16; the sum of them is not.
    rounding = torch.finfo(dtype).eps if linear_module.has_native_bf16() else 0
    error = (total.double() - exact).norm() / exact.norm()
    assert error < rounding + 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_adds_repeated_tokens_to_an_attached_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 4).to(dtype).requires_grad_()
    input_ids = torch.tensor([3, 0, 3, 3, 6])
    dout = torch.randn(5, 4).to(dtype)
    embedding(input_ids, weight).backward(dout)
    assert weight.grad is not None
    expected = torch.zeros(7, 4).index_add_(0, input_ids, dout.float())
    torch.testing.assert_close(weight.grad.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    plain, weight.grad = weight.grad, None
    total = torch.ones(7, 4)
    attach_main_grad(weight, total)
    embedding(input_ids, weight).backward(dout)
    assert weight.grad is None
    assert plain.dtype == dtype
    torch.testing.assert_close(total, expected + 1)


@pytest.mark.usefixtures("native_bf16")
def test_gradients_asked_for_in_fp32_are_not_rounded_to_bf16() -> None:
    """torch's `grad_dtype`, as a sharded parameter sets it: sums over passes stay fp32."""
    x, weight, bias = inputs(torch.bfloat16)
    for parameter in (weight, bias):
        parameter.grad_dtype = torch.float32
    douts = [torch.randn(ROWS, OUT).bfloat16() for _ in range(3)]
    for dout in douts:
        linear(x.reshape(ROWS, IN), weight, bias).backward(dout)
    exact = sum(dout.double() for dout in douts).T @ x.detach().double().reshape(ROWS, IN)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    rounding = torch.finfo(torch.bfloat16).eps if linear_module.has_native_bf16() else 0
    error = (weight.grad.double() - exact).norm() / exact.norm()
    assert error < rounding + 8 * torch.finfo(torch.float32).eps

    table = torch.randn(7, 4).bfloat16().requires_grad_()
    table.grad_dtype = torch.float32
    input_ids, dout = torch.tensor([3, 0, 3, 3, 6]), torch.randn(5, 4).bfloat16()
    embedding(input_ids, table).backward(dout)
    expected = torch.zeros(7, 4).index_add_(0, input_ids, dout.float())
    torch.testing.assert_close(table.grad, expected)


def test_grad_buffer_is_the_attached_gradient_or_zeros_for_autograd_to_add_to() -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = torch.float32
    buffer = grad_buffer(weight)
    assert buffer.dtype == torch.float32
    assert buffer is weight.grad is grad_buffer(weight)
    buffer.fill_(2)
    linear(torch.ones(1, 2, dtype=torch.bfloat16), weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 2), 3.0))
    total = torch.zeros(3, 2)
    attach_main_grad(weight, total)
    assert grad_buffer(weight) is total


@pytest.mark.usefixtures("native_bf16")
def test_linear_accepts_zero_rows() -> None:
    _, weight, bias = inputs(torch.bfloat16)
    assert linear(torch.empty(0, IN, dtype=torch.bfloat16), weight, bias).shape == (0, OUT)


def test_default_dtype_is_bf16_only_where_it_is_fast(native_bf16: bool) -> None:
    assert default_dtype("cuda") == torch.bfloat16
    assert default_dtype("cpu") == (torch.bfloat16 if native_bf16 else torch.float32)


@pytest.mark.usefixtures("native_bf16")
def test_resolve_dtype_follows_the_device_only_for_auto() -> None:
    assert resolve_dtype("bf16", "cpu") == torch.bfloat16
    assert resolve_dtype("fp32", "cuda") == torch.float32
    assert resolve_dtype("auto", "cpu") == default_dtype("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, False),
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
    ],
)
def test_has_native_bf16_reads_the_cpu_capabilities(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    has_native_bf16.cache_clear()
    try:
        assert has_native_bf16() is expected
    finally:
        has_native_bf16.cache_clear()


@pytest.mark.parametrize(
    ("levels", "capabilities", "expected"),
    [
        (("generic", "avx2", "avx512"), {"avx512_bf16": True}, False),
        (("generic", "avx2", "avx512", "avx512_bf16"), {"avx512_bf16": True}, True),
        (("generic", "avx2", "avx512", "avx512_bf16"), {"amx_bf16": True}, False),
    ],
)
def test_native_bf16_is_the_fastest_with_pairs_and_without_tiles(
    levels: tuple[str, ...],
    capabilities: dict[str, bool],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "is_available", lambda: True)
    monkeypatch.setattr(native, "levels", lambda: levels)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    native.has_fastest_bf16.cache_clear()
    try:
        assert native.has_fastest_bf16() is expected
    finally:
        native.has_fastest_bf16.cache_clear()
