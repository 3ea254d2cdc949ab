"""Norm and gated activation that keep their inputs: torch's values, and right gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lwz_trainer.model.elementwise import rms_norm, silu_gate
from lwz_trainer.model.main_grad import attach_main_grad
from tests.kernels.loss_case import assert_as_good_as_eager

EPS = 1e-5


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _torch_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (lambda x, weight: rms_norm(x, weight, EPS), _torch_norm, [(7, 24), (24,)]),
    "norm of heads": (lambda x, w: rms_norm(x, w, EPS), _torch_norm, [(5, 3, 8), (8,)]),
    "gate": (silu_gate, _torch_gate, [(7, 24)]),
}


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = CASES[name][2]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    assert torch.autograd.gradcheck(CASES[name][0], _inputs(name, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_are_torchs_and_gradients_no_worse(name: str, dtype: torch.dtype) -> None:
    ours, theirs, _ = CASES[name]
    inputs = _inputs(name, dtype)
    out, expected = ours(*inputs), theirs(*inputs)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = torch.autograd.grad(theirs(*wide), wide, dout.double())
    eager = torch.autograd.grad(expected, inputs, dout)
    found = torch.autograd.grad(out, inputs, dout)
    for gradients in zip(found, eager, truth, strict=True):
        assert_as_good_as_eager(*gradients)


@pytest.mark.parametrize("name", CASES)
def test_only_the_inputs_are_kept(name: str) -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    inputs = _inputs(name, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        CASES[name][0](*inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs}


def test_norm_adds_to_main_grad_in_fp32() -> None:
    """So that many micro-batches lose nothing to bf16."""
    x, weight = _inputs("norm", torch.bfloat16)
    total = torch.full((24,), 100.0)
    attach_main_grad(weight, total)
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is None
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    (_, truth) = torch.autograd.grad(_torch_norm(*wide).sum(), wide)
    torch.testing.assert_close(total, (100 + truth).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str) -> None:
    inputs = _inputs(name, torch.float64)
    out = CASES[name][0](*inputs)
    dout = torch.ones_like(out, requires_grad=True)
    gradients = torch.autograd.grad(out, inputs, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()
