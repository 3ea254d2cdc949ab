"""Decoder layers for one token each: the native ones against plain torch in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.decode_layers import DecodeLayer, can_run_native, decode_layers, reference
from lwz_kernels.decode_layers.op import decode_layers_op

needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
LEVELS = native.levels() if native.is_available() else ()
BF16, FP32 = torch.bfloat16, torch.float32
HIDDEN, FF, HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE = 48, 88, 6, 2, 16, 4
SCALARS = {"num_heads": HEADS, "norm_eps": 1e-5}


@pytest.fixture(autouse=True)
def _restore_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def _layer(dtype: torch.dtype, *, bias: bool, qk_norm: bool) -> DecodeLayer:
    qkv_size = (HEADS + 2 * KV_HEADS) * HEAD_SIZE

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) / columns**0.5).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + torch.randn(size) / 4).to(dtype)

    return DecodeLayer(
        attn_norm=norm(HIDDEN),
        qkv_proj=weight(qkv_size, HIDDEN),
        o_proj=weight(HIDDEN, HEADS * HEAD_SIZE),
        mlp_norm=norm(HIDDEN),
        gate_up_proj=weight(2 * FF, HIDDEN) * 2,
        down_proj=weight(HIDDEN, FF),
        qkv_bias=torch.randn(qkv_size).to(dtype) if bias else None,
        q_norm=norm(HEAD_SIZE) if qk_norm else None,
        k_norm=norm(HEAD_SIZE) if qk_norm else None,
    )


def _problem(
    context_lens: list[int],
    dtype: torch.dtype,
    *,
    num_layers: int = 2,
    bias: bool = False,
    qk_norm: bool = False,
) -> dict[str, Any]:
    """Pages in random order; a context of 0 is a row that is neither stored nor attends."""
    torch.manual_seed(len(context_lens))
    batch, most = len(context_lens), max(context_lens) // PAGE_SIZE + 2
    num_pages = batch * most
    page_table = torch.randperm(num_pages, dtype=torch.int32).view(batch, most)
    last = torch.tensor(context_lens) - 1
    pages = page_table.long().gather(1, (last.clamp(min=0) // PAGE_SIZE)[:, None])[:, 0]
    cache = (num_layers, num_pages, PAGE_SIZE, KV_HEADS, HEAD_SIZE)
    angles = torch.randn(batch, HEAD_SIZE // 2) * 3
    return {
        "x": torch.randn(batch, HIDDEN).to(dtype),
        "layers": [_layer(dtype, bias=bias, qk_norm=qk_norm) for _ in range(num_layers)],
        "k_caches": torch.randn(cache).to(dtype),
        "v_caches": torch.randn(cache).to(dtype),
        "cos": torch.cat((angles.cos(), angles.cos()), 1).to(dtype),
        "sin": torch.cat((-angles.sin(), angles.sin()), 1).to(dtype),
        "page_table": page_table,
        "context_lens": torch.tensor(context_lens, dtype=torch.int32),
        "slot_mapping": torch.where(last < 0, -1, pages * PAGE_SIZE + last % PAGE_SIZE),
    }


def _run(problem: dict[str, Any], run: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result and the caches that it left; the problem keeps its own."""
    caches = {name: problem[name].clone() for name in ("k_caches", "v_caches")}
    out = run(**(problem | caches), **SCALARS, **keywords)
    return out, caches["k_caches"], caches["v_caches"]


def _native(problem: dict[str, Any], level: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    layers = [layer.tensors() for layer in problem["layers"]]
    scale = HEAD_SIZE**-0.5
    return _run(
        problem | {"layers": layers}, native.decode_layers, softmax_scale=scale, level=level
    )


def _exact(problem: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in problem.items()
    }
    layers = [
        [None if tensor is None else tensor.double() for tensor in layer.tensors()]
        for layer in problem["layers"]
    ]
    scale = HEAD_SIZE**-0.5
    return _run(wide | {"layers": layers}, reference.decode_layers, softmax_scale=scale)


def _assert_as_good_as_reference(
    found: tuple[Tensor, ...], eager: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> None:
    """At most twice the error of plain torch in the same dtype, plus a few roundings in fp32."""
    for one, other, exact in zip(found, eager, truth, strict=True):
        allowed = 2 * (other.double() - exact).abs().max() + 3e-6 * exact.abs().max()
        assert (one.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_is_as_good_as_reference(
    level: str, dtype: torch.dtype, qk_norm: bool, bias: bool
) -> None:
    problem = _problem([5, 1, 0, 300, 17, 4, 8, 9, 2, 64, 3], dtype, bias=bias, qk_norm=qk_norm)
    eager = _run(problem, decode_layers, impl="reference")
    _assert_as_good_as_reference(_native(problem, level), eager, _exact(problem))


@needs_native
def test_auto_runs_native_and_changes_nothing_but_the_caches() -> None:
    problem = _problem([3, 7], FP32)
    before = problem["x"].clone()
    found = _run(problem, decode_layers)
    for one, other in zip(found, _native(problem), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(problem["x"], before)
    changed = (found[1] != problem["k_caches"]).any(dim=(0, 3, 4)).flatten().nonzero()[:, 0]
    assert sorted(changed.tolist()) == sorted(problem["slot_mapping"].tolist())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_native_row_ignores_the_other_rows_and_the_threads(level: str, dtype: torch.dtype) -> None:
    problem = _problem([5, 1, 300, 17, 4, 8, 9, 2, 64, 3, 31, 70, 2, 2, 9, 16, 6], dtype)
    torch.set_num_threads(1)
    whole, *_ = _native(problem, level)
    rows = ("x", "cos", "sin", "page_table", "context_lens", "slot_mapping")
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(_native(problem, level)[0], whole)
        for index in (0, 2, 16):
            alone = problem | {name: problem[name][index : index + 1] for name in rows}
            assert torch.equal(_native(alone, level)[0][0], whole[index])


@needs_native
def test_native_keeps_a_non_finite_row_to_itself() -> None:
    problem = _problem([5, 6, 7], FP32)
    whole, *_ = _native(problem)
    problem["x"][1, 3] = float("nan")
    out, *_ = _native(problem)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], whole[[0, 2]])


@needs_native
def test_native_silu_keeps_its_limits() -> None:
    """Gates so large that exp overflows or vanishes."""
    problem = _problem([2, 3], FP32, num_layers=1)
    layer = problem["layers"][0]
    layer.gate_up_proj[:FF].mul_(300.0)
    found, truth = _native(problem), _exact(problem)
    assert found[0].isfinite().all()
    _assert_as_good_as_reference(found, _run(problem, decode_layers, impl="reference"), truth)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["slot_mapping"].fill_(10**6), "slot_mapping is out of range"),
        (lambda p: p["page_table"].fill_(10**6), "page_table names a page that is out of range"),
        (lambda p: p["context_lens"].fill_(10**6), "context_lens is out of range"),
    ],
)
def test_out_of_range_is_refused(change: Any, message: str) -> None:
    problem = _problem([5, 6], FP32)
    change(problem)
    caches = problem["k_caches"].clone()
    with pytest.raises(ValueError, match=message):
        decode_layers(**problem, **SCALARS)
    assert torch.equal(problem["k_caches"], caches)


def test_refuses_what_it_cannot_do() -> None:
    problem = _problem([5, 6], FP32)

    def call(impl: str = "auto", **changes: Any) -> None:
        decode_layers(**(problem | changes), **SCALARS, impl=impl)

    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        call("fast")
    with pytest.raises(ValueError, match=r"expected x \[B, D\] and two caches"):
        call(x=problem["x"][None])
    with pytest.raises(ValueError, match="expected caches of 1 layers"):
        call(layers=problem["layers"][:1])
    with pytest.raises(ValueError, match=r"expected cos and sin \[2, 16\]"):
        call(cos=problem["cos"][:, :8])
    with pytest.raises(ValueError, match=r"expected slot_mapping|context_lens and slot_mapping"):
        call(slot_mapping=problem["slot_mapping"][:1])
    with pytest.raises(TypeError, match="slot_mapping int64"):
        call(slot_mapping=problem["slot_mapping"].int())
    with pytest.raises(TypeError, match="expected one floating point dtype"):
        call(x=problem["x"].bfloat16())
    with pytest.raises(ValueError, match="expected contiguous weights"):
        call(k_caches=problem["k_caches"].transpose(3, 4).contiguous().transpose(3, 4))
    layer = problem["layers"][0]
    wrong = DecodeLayer(*layer.tensors()[:8], k_norm=torch.ones(HEAD_SIZE))
    with pytest.raises(ValueError, match="expected q_norm and k_norm, or neither"):
        call(layers=[wrong, wrong])
    wrong = DecodeLayer(layer.attn_norm[:8], *layer.tensors()[1:])
    with pytest.raises(ValueError, match=r"expected attn_norm \[48\], got \[8\]"):
        call(layers=[wrong, wrong])
    narrow = layer.tensors()
    narrow[4], narrow[5] = layer.gate_up_proj[:16], layer.down_proj[:, :8].contiguous()
    with pytest.raises(ValueError, match=r"expected gate_up_proj \[176, 48\], got \[16, 48\]"):
        call(layers=[layer, DecodeLayer(*narrow)])
    with pytest.raises(RuntimeError, match="has no backward"):
        call(x=problem["x"].clone().requires_grad_())
    wide = {name: problem[name].double() for name in ("x", "k_caches", "v_caches", "cos", "sin")}
    layers = [
        DecodeLayer(*(t if t is None else t.double() for t in layer.tensors()))
        for layer in problem["layers"]
    ]
    with pytest.raises(NotImplementedError, match=r"needs bfloat16 or float32, got torch.float64"):
        call("native", **wide, layers=layers)
    cpu = torch.device("cpu")
    assert not can_run_native(cpu, FP32, hidden=44, ff=88, head_size=16)
    assert not can_run_native(cpu, FP32, hidden=48, ff=88, head_size=12)
    assert not can_run_native(torch.device("meta"), FP32, hidden=48, ff=88, head_size=16)


def test_auto_without_the_library_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem([5, 6], FP32)
    expected, *_ = _run(problem, decode_layers, impl="reference")
    monkeypatch.setattr(native, "_load", lambda: (None, "not built here"))
    assert torch.equal(_run(problem, decode_layers)[0], expected)
    with pytest.raises(NotImplementedError, match="is not available: not built here"):
        decode_layers(**problem, **SCALARS, impl="native")


@needs_native
def test_passes_opcheck() -> None:
    problem = _problem([5, 6], FP32, qk_norm=True)
    weights = [tensor for layer in problem.pop("layers") for tensor in layer.tensors()]
    x = problem.pop("x")
    for impl in ("native", "reference"):
        arguments = (x, weights, *problem.values(), HEADS, 1e-5, 0.25, impl)
        torch.library.opcheck(decode_layers_op, arguments)
