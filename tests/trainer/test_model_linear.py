"""The matrix product of the decoder on CPUs with and without bf16 instructions."""

import pytest
import torch
from torch import Tensor

from lwz_kernels.skinny_linear import AUTO_MAX_ROWS, skinny_linear
from lwz_trainer.model import linear as linear_module
from lwz_trainer.model.linear import (
    default_dtype,
    has_native_bf16,
    linear,
    resolve_dtype,
    wide_logits,
)

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
    assert type(out.grad_fn).__name__ == "_Fp32LinearBackward"
    assert saved == [torch.bfloat16, torch.bfloat16]


def test_linear_of_few_rows_reads_bf16_weights_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "has_native_bf16", lambda: False)
    x, weight, bias = inputs(torch.bfloat16)
    assert type(linear(x[:1, :2], weight, bias).grad_fn).__name__ != "_Fp32LinearBackward"


@pytest.fixture
def skinny_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of the skinny kernel."""
    calls: list[int] = []

    def record(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.shape[0])
        return skinny_linear(x, weight, bias)

    monkeypatch.setattr(linear_module, "skinny_linear", record)
    return calls


@pytest.mark.parametrize("rows", [1, AUTO_MAX_ROWS, AUTO_MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_without_gradients_uses_the_skinny_kernel_for_few_rows(
    native_bf16: bool, skinny_rows: list[int], dtype: torch.dtype, rows: int
) -> None:
    _, weight, bias = inputs(dtype)
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        out = linear(x[None], weight, bias)
    is_left_to_torch = rows > AUTO_MAX_ROWS or (native_bf16 and dtype == torch.bfloat16)
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
    hidden, head = x[0].detach(), weight.detach().float()
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
