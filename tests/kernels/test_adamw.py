"""One step of AdamW: every implementation and instruction set against fp64 and against torch's."""

import doctest
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.adamw import adamw_, api, join_halves, split_halves, torch_step
from lwz_kernels.adamw.factors import Factors
from lwz_kernels.adamw.kernels import adamw_triton_

BF16, FP32 = torch.bfloat16, torch.float32
LEVELS = native.levels() if native.is_available() else ()
NO_STEP = {"lr": 0.0, "weight_decay": 0.0}
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="CPU tensors are for the interpreter",
)
IMPLS = [
    "torch",
    *(pytest.param(f"native {level}", marks=needs_native) for level in LEVELS),
    pytest.param("triton", marks=[pytest.mark.interpret, needs_interpreter]),
]


def _case(size: int, moments: torch.dtype, *, is_split: bool) -> dict[str, Tensor | None]:
    """State in the middle of training: magnitudes of the gradient over ten decades."""
    torch.manual_seed(size)
    master = torch.randn(size)
    scale = 10.0 ** torch.empty(size).uniform_(-8, 2)
    upper, lower = split_halves(master)
    return {
        "weights": upper if is_split else master,
        "lower": lower if is_split else None,
        "grad": scale * torch.randn(size),
        "exp_avg": (scale * torch.randn(size) / 4).to(moments),
        "exp_avg_sq": (scale * torch.rand(size)).square().to(moments),
    }


def _master(case: dict[str, Tensor | None]) -> Tensor:
    weights, lower = case["weights"], case["lower"]
    assert weights is not None
    return weights if lower is None else join_halves(weights, lower)


def _copy(case: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.clone() for name, value in case.items()}


def _run(case: dict[str, Tensor | None], impl: str, *, step: int = 3) -> dict[str, Tensor | None]:
    """The case after one step, with half of its gradient."""
    after = _copy(case)
    by = Factors.of_step(step, grad_scale=0.5, **SETTINGS)
    name, _, level = impl.partition(" ")
    if name == "native":
        native.adamw_(*_ordered(after), **vars(by), level=level)
    elif name == "triton":
        adamw_triton_(*_ordered(after), by)
    else:
        adamw_(**after, step=step, grad_scale=0.5, impl=impl, **SETTINGS)
    return after


def _torch_step_in_fp64(case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The third step of torch.optim.AdamW from the same state."""
    parameter = torch.nn.Parameter(_master(case).double())
    parameter.grad = 0.5 * case["grad"].double()
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    optimizer = torch.optim.AdamW(
        [parameter], lr=SETTINGS["lr"], betas=betas, eps=SETTINGS["eps"], weight_decay=0.1
    )
    moments = {name: case[name].double() for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.tensor(2.0), **moments}
    optimizer.step()
    return {"weights": parameter.detach(), **optimizer.state[parameter]}


def _ordered(case: dict[str, Tensor | None]) -> list[Tensor | None]:
    return [case[name] for name in ("weights", "lower", "grad", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 100, 4099])
@pytest.mark.parametrize("is_split", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("moments", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_step_is_that_of_fp64(impl: str, moments: torch.dtype, *, is_split: bool, size: int):
    case = _case(size, moments, is_split=is_split)
    truth = _torch_step_in_fp64(case)
    after = _run(case, impl)
    ulp = 2**-7 if impl == "triton" else 2**-8  # the interpreter cuts where a GPU rounds
    rtol = ulp if moments == BF16 else 1e-6
    # A sum of both signs: its error is relative to what was added up.
    floor = 1e-6 * (case["exp_avg"].double().abs() + case["grad"].double().abs())
    wrong = (after["exp_avg"].double() - truth["exp_avg"]).abs() - floor
    assert (wrong <= rtol * truth["exp_avg"].abs()).all()
    torch.testing.assert_close(after["exp_avg_sq"].double(), truth["exp_avg_sq"], rtol=rtol, atol=0)
    torch.testing.assert_close(_master(after).double(), truth["weights"], rtol=1e-6, atol=1e-6)
    assert torch.equal(after["grad"], case["grad"])


def test_split_halves_loses_no_bit_and_rounds_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64)
    edges = torch.tensor([0.0, -0.0, 1.0, 1e-40, -1e-40, 3.38e38]).view(torch.int32)
    ties = (torch.arange(-50, 50, dtype=torch.int64) << 16) + 0x8000
    master = torch.cat([bits.to(torch.int32), edges, ties.to(torch.int32)]).view(torch.float32)
    master = master[master.isfinite() & (master.abs() < 3.38e38)]
    upper, lower = split_halves(master)
    assert torch.equal(join_halves(upper, lower).view(torch.int32), master.view(torch.int32))
    nearest = master.to(torch.bfloat16)
    is_tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(upper[~is_tie].view(torch.int16), nearest[~is_tie].view(torch.int16))
    assert is_tie.sum() >= 50


@pytest.mark.parametrize("impl", IMPLS)
def test_twenty_steps_are_those_of_torch(impl: str) -> None:
    """torch.optim.AdamW on fp32 weights; the step count and both corrections too."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(1003))
    upper, lower = split_halves(parameter.detach().clone())
    moments = {"exp_avg": torch.zeros(1003), "exp_avg_sq": torch.zeros(1003)}
    state = {"weights": upper, "lower": lower, "grad": torch.zeros(1003), **moments}
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    expected = torch.optim.AdamW(
        [parameter], lr=SETTINGS["lr"], betas=betas, eps=1e-8, weight_decay=0.1
    )
    for step in range(1, 21):
        grad = torch.randn(1003)
        parameter.grad = 0.5 * grad
        expected.step()
        state = _run({**state, "grad": grad}, impl, step=step)
    torch.testing.assert_close(_master(state), parameter.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS[:-1])
def test_bf16_moments_round_to_nearest_and_the_master_sees_them_unrounded(impl: str) -> None:
    case = _case(500, BF16, is_split=True)
    wide = _copy(case)
    for name in ("exp_avg", "exp_avg_sq"):
        wide[name] = case[name].float()
    narrow, wide = _run(case, impl), _run(wide, impl)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(narrow[name], wide[name].to(BF16))
    assert torch.equal(_master(narrow), _master(wide))


@pytest.mark.parametrize("is_split", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("moments", [FP32, BF16], ids=str)
def test_spans_of_torch_give_the_bits_of_one(
    monkeypatch: pytest.MonkeyPatch, moments: torch.dtype, *, is_split: bool
) -> None:
    case = _case(200, moments, is_split=is_split)
    whole = _run(case, "torch")
    monkeypatch.setattr(torch_step, "SPAN", 64)
    parts = _run(case, "torch")
    assert torch.equal(_master(whole), _master(parts))
    assert torch.equal(whole["exp_avg_sq"], parts["exp_avg_sq"])


@needs_native
@given(st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("level", LEVELS)
def test_native_bits_depend_on_the_element_alone(level: str, data: st.DataObject) -> None:
    """Neither on its place in a vector, nor on threads: what a rank of several holds is a part."""
    size = data.draw(st.integers(1, 200))
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    moments = data.draw(st.sampled_from([FP32, BF16]))
    is_split = data.draw(st.booleans())
    case = _case(size, moments, is_split=is_split)
    part = {name: None if t is None else t[start:stop].clone() for name, t in case.items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        whole = _run(case, f"native {level}")
        torch.set_num_threads(1)
        alone = _run(part, f"native {level}")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(_master(whole)[start:stop], _master(alone))
    assert torch.equal(whole["exp_avg"][start:stop], alone["exp_avg"])
    assert torch.equal(whole["exp_avg_sq"][start:stop], alone["exp_avg_sq"])


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_native_halves_are_those_of_split_halves(level: str) -> None:
    """Ties, negative numbers and subnormal ones: a step of 0 changes no bit of a master."""
    bits = torch.randint(-(2**31), 2**31 - 1, (10_000,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-50, 50) << 16).to(torch.int32) + 0x8000
    master = torch.cat([bits, ties]).view(FP32)
    master = master[master.isfinite() & (master.abs() < 3.38e38)]
    upper, lower = split_halves(master)
    zeros = [torch.zeros_like(master) for _ in range(3)]
    by = Factors.of_step(1, grad_scale=1.0, **SETTINGS | NO_STEP)
    native.adamw_(upper, lower, *zeros, **vars(by), level=level)
    same_upper, same_lower = split_halves(master)
    assert torch.equal(upper.view(torch.int16), same_upper.view(torch.int16))
    assert torch.equal(lower, same_lower)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_that_is_not_a_number_stays_visible(impl: str) -> None:
    case = _case(40, FP32, is_split=True)
    case["grad"][3] = float("nan")
    after = _run(case, impl)
    assert after["exp_avg"].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad": torch.zeros(3)}, ValueError, "one length"),
        ({"grad": torch.zeros(8)[::2]}, ValueError, "contiguous"),
        ({"step": 0}, ValueError, "step >= 1"),
        ({"impl": "cuda"}, ValueError, "unknown impl 'cuda'"),
        ({"impl": "triton"}, NotImplementedError, "needs CUDA tensors"),
        ({"weights": torch.zeros(4)}, TypeError, "fp32 weights, or bf16"),
        ({"lower": None}, TypeError, "fp32 weights, or bf16"),
        ({"grad": torch.zeros(4, dtype=BF16)}, TypeError, "fp32 gradient"),
        ({"exp_avg": torch.zeros(4, dtype=BF16)}, TypeError, "both moments"),
        ({"exp_avg": torch.zeros(4, device="meta")}, ValueError, "on cpu"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    case = _case(4, FP32, is_split=True)
    with pytest.raises(error, match=message):
        adamw_(**{**case, "step": 1, "lr": 0.1} | changes)


def test_native_is_refused_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler")
    case = _case(4, FP32, is_split=True)
    with pytest.raises(RuntimeError, match="no compiler"):
        adamw_(**case, step=1, lr=0.1, impl="native")
    adamw_(**case, step=1, lr=0.1)  # "auto" takes torch


def test_docstring_example() -> None:
    assert doctest.testmod(api).attempted == 4
