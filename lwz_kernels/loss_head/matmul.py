"""The three matrix products of the loss head: logits, dhidden and dweight, accumulated in fp32.

On CUDA half-precision operands stay as they are and cuBLAS writes fp32. A CPU has no such product,
and logits rounded to bf16 are off by up to 0.06 at magnitude 16, so the operands are widened to
fp32 there. Where the CPU multiplies bf16 matrices in hardware, oneDNN may round these fp32 operands
back to bf16: exact for hidden states and weights, and for dlogits what CUDA does. With AVX512-BF16
the native linear layer makes fp32 logits of bf16 operands as they are.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lwz_kernels import native
from lwz_kernels.dtypes import wide_dtype

__all__ = ["HeadProducts", "has_native_bf16", "matmul_wide"]

# Of the head in fp32: fits a CPU's last cache beside what it is multiplied with.
_TILE_BYTES = 4 << 20
# Hidden states that the native product takes at a time: with more it is slower than oneDNN.
_NATIVE_ROWS = 128
_BF16_MATRIX_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and fp32 output (fp64 stays fp64)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    wide = wide_dtype(torch.promote_types(a.dtype, b.dtype))
    return torch.mm(a.to(wide), b.to(wide))


class HeadProducts:
    """Products with one head weight [V, D] and hidden states of its dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._wide = wide_dtype(weight.dtype)
        self._weight = weight
        # Widened a tile at a time, in cache: a copy of the whole head is larger than a chunk.
        self._widens = not weight.is_cuda and weight.dtype != self._wide
        self._tile_rows = max(1, _TILE_BYTES // (weight.shape[1] * self._wide.itemsize))
        self._bias_V = None if bias is None else bias.to(self._wide)
        self._narrow = weight.dtype
        self._allows_bf16 = not weight.is_cuda and weight.dtype == torch.bfloat16
        self._has_pairs = (
            self._allows_bf16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and native.supports_depth(weight.shape[1])
            and native.has_fastest_bf16()
        )

    @property
    def dlogits_dtype(self) -> torch.dtype:
        """What `dhidden` and `add_dweight` want: the weight's dtype on CUDA, fp32 on a CPU."""
        return self._wide if self._widens else self._weight.dtype

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """hidden @ weight.T + bias, [C, V] fp32."""
        if self._has_pairs and hidden_CD.dtype == self._narrow:
            logits_CV = self._logits_of_pairs(hidden_CD)
            return logits_CV if self._bias_V is None else logits_CV.add_(self._bias_V)
        with self._precision():
            if not self._widens:
                logits_CV = matmul_wide(hidden_CD, self._weight.t())
            else:
                wide_CD = hidden_CD.to(self._wide)
                logits_CV = wide_CD.new_empty(hidden_CD.shape[0], self._weight.shape[0])
                for tile, weight_ND in self._wide_tiles():
                    torch.mm(wide_CD, weight_ND.t(), out=logits_CV[:, tile])
        return logits_CV if self._bias_V is None else logits_CV.add_(self._bias_V)

    def dhidden(self, dlogits_CV: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        """dlogits @ weight, [C, D], rounded once to `out_dtype`."""
        if dlogits_CV.is_cuda and out_dtype == dlogits_CV.dtype:
            return torch.mm(dlogits_CV, self._weight)
        with self._precision():
            if not self._widens:
                return matmul_wide(dlogits_CV, self._weight).to(out_dtype)
            dhidden_CD = dlogits_CV.new_zeros(dlogits_CV.shape[0], self._weight.shape[1])
            for tile, weight_ND in self._wide_tiles():
                dhidden_CD.addmm_(dlogits_CV[:, tile], weight_ND)
            return dhidden_CD.to(out_dtype)

    def add_dweight(self, dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
        """dweight += dlogits.T @ hidden, in place, in the fp32 of `dweight_VD`."""
        if dlogits_CV.dtype in (torch.bfloat16, torch.float16):
            torch.addmm(
                dweight_VD,
                dlogits_CV.t(),
                hidden_CD.to(dlogits_CV.dtype),
                out_dtype=torch.float32,
                out=dweight_VD,
            )
            return
        with self._precision():
            dweight_VD.addmm_(dlogits_CV.t(), hidden_CD.to(self._wide))

    def _logits_of_pairs(self, hidden_CD: Tensor) -> Tensor:
        """hidden @ weight.T, [C, V] fp32; the bits of a row depend on that row alone."""
        logits_CV = hidden_CD.new_empty(
            hidden_CD.shape[0], self._weight.shape[0], dtype=torch.float32
        )
        parts = (x.split(_NATIVE_ROWS) for x in (hidden_CD.contiguous(), logits_CV))
        for rows, out in zip(*parts, strict=True):
            native.linear(rows, self._weight, None, out_dtype=torch.float32, out=out)
        return logits_CV

    def _wide_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Spans of the vocabulary and their rows of the head, widened."""
        for start in range(0, self._weight.shape[0], self._tile_rows):
            tile = slice(start, start + self._tile_rows)
            yield tile, self._weight[tile].to(self._wide)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Lets oneDNN use bf16 matrix instructions where the operands were bf16 to begin with."""
        if not (self._allows_bf16 and has_native_bf16()):
            yield
            return
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@functools.cache
def has_native_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 matrices."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BF16_MATRIX_CAPABILITIES)
