"""A function of rows, a tile of rows at a time: its intermediate values never exist for all rows.

Tiled MLP of ALST (arXiv:2506.13996). Backward computes each tile again. Products add a tile's share
to their weight's `main_grad`; where there is none, shares are summed in fp32 (fp64 for fp64), then
rounded once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lwz_kernels.dtypes import wide_dtype
from lwz_trainer.model.main_grad import grad_dtype

__all__ = ["tiled_rows"]

RowFunction = Callable[..., Tensor]


def tiled_rows(
    function: RowFunction, x: Tensor, weights: tuple[Tensor, ...], *, tile_rows: int
) -> Tensor:
    """function(x, *weights), `tile_rows` rows of x at a time.

    Args:
        function: of [rows, D] and the weights to [rows, D], each row by itself.
        x: [T, D].
        weights: what else has a gradient.
        tile_rows: at least 1.

    Returns:
        [T, D], dtype of x.
    """
    if x.shape[0] <= tile_rows:
        return function(x, *weights)
    return _TiledRows.apply(function, tile_rows, x, *weights)


class _TiledRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, tile_rows: int, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        # The parameters themselves: a saved tensor may come back without its main_grad.
        ctx.weights = weights
        ctx.function, ctx.tile_rows = function, tile_rows
        out_TD = torch.empty_like(x)
        constants = [weight.detach() for weight in weights]
        # With gradients enabled, and none to record, it computes what it would without tiles.
        with torch.enable_grad():
            for x_RD, out_RD in zip(x.split(tile_rows), out_TD.split(tile_rows), strict=True):
                out_RD.copy_(function(x_RD.detach(), *constants))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wide = wide_dtype(x.dtype)
        needed = [i for i, weight in enumerate(ctx.weights) if weight.requires_grad]
        totals: list[Tensor | None] = [None] * len(ctx.weights)
        dx_TD = torch.empty_like(x)
        tiles = (tensor.split(ctx.tile_rows) for tensor in (x, dout, dx_TD))
        for x_RD, dout_RD, dx_RD in zip(*tiles, strict=True):
            leaf_RD = x_RD.detach().requires_grad_()
            with torch.enable_grad():
                out_RD = ctx.function(leaf_RD, *ctx.weights)
            wanted = [leaf_RD, *(ctx.weights[i] for i in needed)]
            dx, *found = torch.autograd.grad(out_RD, wanted, dout_RD, allow_unused=True)
            dx_RD.copy_(dx)
            for i, dweight in zip(needed, found, strict=True):
                total = totals[i]
                if dweight is not None:  # else it is in the weight's main_grad
                    totals[i] = (
                        dweight.to(wide, copy=True) if total is None else total.add_(dweight)
                    )
        dweights = (
            None if total is None else total.to(grad_dtype(weight))
            for total, weight in zip(totals, ctx.weights, strict=True)
        )
        return None, None, dx_TD, *dweights
