"""Tiled feed-forward and offloaded layer inputs: the same numbers, in less memory."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.linear import linear
from lwz_trainer.model.main_grad import attach_main_grad
from lwz_trainer.model.offload import HostOffload
from lwz_trainer.model.tiling import tiled_rows
from tests.trainer.rollout_case import load_tiny
from tests.trainer.tiny import causal_attend

TOKENS, WIDTH, FF = 96, 8, 64


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of tensors that operators made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._seen:
            return
        self._seen.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.live -= size


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + torch.nn.functional.silu(x @ up.t()) @ down.t()


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((TOKENS, WIDTH), (FF, WIDTH), (WIDTH, FF))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("tile_rows", [1, 7, 32, 95, 96, 1000])
def test_tiled_rows_is_the_function(tile_rows: int) -> None:
    x, *weights = make_inputs(torch.float64)
    dout = torch.randn_like(x)
    expected = torch.autograd.grad(mlp(x, *weights), (x, *weights), dout)
    out = tiled_rows(mlp, x, tuple(weights), tile_rows=tile_rows)
    torch.testing.assert_close(out, mlp(x, *weights), rtol=0, atol=1e-13)
    found = torch.autograd.grad(out, (x, *weights), dout)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_tiled_rows_leaves_out_gradients_that_nobody_needs() -> None:
    x, up, down = make_inputs(torch.float64)
    up.requires_grad_(False)
    tiled_rows(mlp, x, (up, down), tile_rows=10).sum().backward()
    assert up.grad is None
    found = down.grad.clone()
    down.grad = None
    mlp(x, up, down).sum().backward()
    torch.testing.assert_close(found, down.grad)


def test_tiled_rows_sums_weight_gradients_in_fp32() -> None:
    """96 tiles of one row: sums in bf16 would lose what is small beside them."""
    x, *weights = make_inputs(torch.bfloat16)
    dout = torch.randn_like(x)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    truth = torch.autograd.grad(mlp(*wide), wide[1:], dout.double())
    whole = torch.autograd.grad(mlp(x, *weights), weights, dout)
    tiled = torch.autograd.grad(tiled_rows(mlp, x, tuple(weights), tile_rows=1), weights, dout)
    for ours, plain, exact in zip(tiled, whole, truth, strict=True):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_tiled_rows_of_products_adds_to_main_grad() -> None:
    """A norm gets its gradient from autograd, products add to theirs, as under the optimizer."""
    norm, up, down = torch.rand(WIDTH), torch.randn(FF, WIDTH), torch.randn(WIDTH, FF)
    parameters = [torch.nn.Parameter(t) for t in (norm, up, down)]
    totals = [torch.ones_like(t) for t in parameters]
    for parameter, total in zip(parameters[1:], totals[1:], strict=True):
        attach_main_grad(parameter, total)

    def run(x: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x + linear(torch.nn.functional.silu(linear(x * norm, up)), down)

    x, dout = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    plain = [t.detach().double().requires_grad_() for t in parameters]
    exact = torch.autograd.grad(run(x.double(), *plain), plain, dout.double())
    tiled_rows(run, x, tuple(parameters), tile_rows=10).backward(dout)
    found = [parameters[0].grad, *(total - 1 for total in totals[1:])]
    assert [parameter.grad is None for parameter in parameters] == [False, True, True]
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * theirs.abs().max())


def test_tiled_rows_never_holds_the_intermediate_values_of_all_rows() -> None:
    peaks = []
    for tile_rows in (TOKENS, 8):
        x, *weights = make_inputs(torch.float32)
        with LiveBytes() as bytes_of:
            tiled_rows(mlp, x, tuple(weights), tile_rows=tile_rows).sum().backward()
        peaks.append(bytes_of.peak)
    row_bytes = TOKENS * FF * 4
    assert peaks[0] > 2 * row_bytes  # else this test measures nothing
    # What remains: a tile's values, two gradients of both weights, [T, D] a few times.
    assert peaks[1] < peaks[0] - row_bytes


def hidden_of(decoder: Decoder, **options: Any) -> Tensor:
    ids = torch.arange(24) % 50 + 5
    return decoder(ids, torch.arange(24), causal_attend([24]), checkpoint_layers=True, **options)


def test_host_offload_parks_exactly_the_input_of_each_layer(tmp_path: Path) -> None:
    decoder, _ = load_tiny(tmp_path)
    offload = HostOffload(torch.device("cpu"))
    parked: list[Tensor] = []
    original = offload._park
    offload._park = lambda x: parked.append(x.detach().clone()) or original(x)
    inputs: list[Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    hidden = hidden_of(decoder, offload=offload)
    real = [x for x in parked if x.numel()]
    assert len(real) == len(inputs) == len(decoder.layers)
    assert all(torch.equal(a, b) for a, b in zip(real, inputs, strict=True))
    hidden.sum().backward()


def test_host_offload_uses_its_buffers_again(tmp_path: Path) -> None:
    decoder, _ = load_tiny(tmp_path)
    offload = HostOffload(torch.device("cpu"))
    addresses = []
    for _ in range(3):
        hidden_of(decoder, offload=offload).sum().backward()
        addresses.append(sorted(buffer.data_ptr() for buffer in offload._free))
    assert len(addresses[0]) == len(decoder.layers)
    assert addresses[0] == addresses[1] == addresses[2]


def test_host_offload_frees_the_layer_inputs(tmp_path: Path) -> None:
    """A tensor that a layer was given is gone as soon as the next layer has its own."""
    decoder, _ = load_tiny(tmp_path)
    alive: list[weakref.ref] = []
    still: list[int] = []

    def note(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        still.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(args[0]))

    for layer in decoder.layers:
        layer.register_forward_pre_hook(note)
    hidden = hidden_of(decoder, offload=HostOffload(torch.device("cpu")))
    assert max(still) <= 1
    assert sum(ref() is not None for ref in alive) <= 1
    hidden.sum().backward()
