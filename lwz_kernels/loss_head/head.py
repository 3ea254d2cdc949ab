"""One language-model head and how its rows are worked through: what every loss-head operator runs.

Numerics: operands keep their dtype, logits and row statistics are fp32 (fp64 for fp64 input), dW is
accumulated over chunks in fp32, dH is rounded once. The same code computes log-probs with and
without gradients, so a ratio of the two is exactly 1.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lwz_kernels.dtypes import wide_dtype
from lwz_kernels.loss_head.chunks import balanced_slices
from lwz_kernels.loss_head.matmul import HeadProducts
from lwz_kernels.loss_head.rows import RowPass, finish_statistics
from lwz_kernels.loss_head.vocab_parallel import vocab_shard

__all__ = ["ChunkStatistics", "HeadGradients", "LossHead"]


@dataclass
class ChunkStatistics:
    """What the forward pass of a chunk leaves: its logits, to be overwritten, and three rows.

    Not to be kept from one chunk to the next: two chunks of logits would exist at a time.
    """

    logits_CV: Tensor
    labels_C: Tensor
    temperature_C: Tensor
    logprobs_C: Tensor
    entropy_C: Tensor
    lse_C: Tensor


@dataclass
class HeadGradients:
    """Gradients of one call; None where nobody asked."""

    dhidden_TD: Tensor | None
    dweight_VD: Tensor | None
    dbias_V: Tensor | None


class LossHead:
    """Weight, bias and row passes of one head, or of this rank's shard of it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rows: RowPass,
        *,
        chunk_bytes: int,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._weight = weight
        self._bias = bias
        self.rows = rows
        self.products = HeadProducts(weight, bias)
        self._chunk_bytes = chunk_bytes
        self._has_written = False
        self.wide = wide_dtype(weight.dtype)
        is_sharded = tp_group is not None and dist.get_world_size(tp_group) > 1
        self._shard = vocab_shard(weight, tp_group) if tp_group and is_sharded else None

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold other parts of the vocabulary."""
        return self._shard is not None

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head, over all shards."""
        return self._weight.shape[0] if self._shard is None else self._shard.vocab_size

    def for_each_chunk(self, num_rows: int, work: Callable[[slice], None]) -> None:
        """Calls `work` with every chunk of `num_rows` rows; what it holds is gone before the next.

        Out of memory before any gradient was written halves the chunk and begins again. Never
        after: the caller's buffer would hold a part of the gradient twice. Never on shards of a
        vocabulary: the other ranks would wait in a collective of the old size.
        """
        largest = self._weight.shape[0] if self._shard is None else self._shard.largest
        row_bytes = largest * self.wide.itemsize
        while True:
            try:
                for chunk in balanced_slices(num_rows, row_bytes, self._chunk_bytes):
                    work(chunk)
                return
            except torch.OutOfMemoryError:
                if self._has_written or self.is_sharded or self._chunk_bytes <= row_bytes:
                    raise
            # Outside of the handler, whose traceback keeps the failed attempt's tensors alive.
            self._chunk_bytes //= 2
            logging.getLogger("lwz_kernels").warning(
                "loss head: out of memory, trying chunks of %d MB", self._chunk_bytes // 1_000_000
            )

    def statistics(
        self, hidden_CD: Tensor, labels_C: Tensor, temperature_C: Tensor
    ) -> ChunkStatistics:
        """Logits of one chunk and its log-probs, entropies and log-sum-exps."""
        logits_CV = self.products.logits(hidden_CD)
        if self._shard is not None:  # counted from its first row; others' labels fall outside
            labels_C = labels_C - self._shard.start
        partials_4C = self.rows.statistics(logits_CV, labels_C, temperature_C)
        if self._shard is not None:
            partials_4C = self._shard.merge(partials_4C)
        logprobs_C, entropy_C, lse_C = finish_statistics(partials_4C)
        return ChunkStatistics(logits_CV, labels_C, temperature_C, logprobs_C, entropy_C, lse_C)

    def score(self, hidden_CD: Tensor, labels_C: Tensor, temperature_C: Tensor) -> Tensor:
        """logprobs, entropy and lse of one chunk, [3, C]; its logits are gone on return."""
        stats = self.statistics(hidden_CD, labels_C, temperature_C)
        return torch.stack([stats.logprobs_C, stats.entropy_C, stats.lse_C])

    def new_gradients(
        self, hidden_TD: Tensor, needs: tuple[bool, bool, bool], weight_grad: Tensor | None = None
    ) -> HeadGradients:
        """Buffers for (dhidden, dweight, dbias); dweight may be the caller's own, added to."""
        dweight_VD = weight_grad
        if needs[1] and dweight_VD is None:
            dweight_VD = torch.zeros_like(self._weight, dtype=self.wide)
        dbias_V = None
        if needs[2] and self._bias is not None:
            dbias_V = torch.zeros_like(self._bias, dtype=self.wide)
        return HeadGradients(
            torch.empty_like(hidden_TD) if needs[0] else None,
            dweight_VD if needs[1] else None,
            dbias_V,
        )

    def add_gradients(
        self,
        gradients: HeadGradients,
        chunk: slice,
        hidden_CD: Tensor,
        stats: ChunkStatistics,
        dlogprobs_C: Tensor,
        dentropy_C: Tensor | None = None,
        dlse_C: Tensor | None = None,
    ) -> None:
        """Consumes the logits of `stats`: writes dhidden[chunk], adds to dweight and dbias."""
        dlogits_CV = self.rows.write_dlogits_(
            stats.logits_CV,
            stats.labels_C,
            stats.temperature_C,
            stats.lse_C,
            stats.entropy_C,
            dlogprobs_C,
            dentropy_C,
            dlse_C,
            out_dtype=self.products.dlogits_dtype,
        )
        self.add_products(gradients, chunk, hidden_CD, dlogits_CV)

    def add_products(
        self, gradients: HeadGradients, chunk: slice, hidden_CD: Tensor, dlogits_CV: Tensor
    ) -> None:
        """dhidden, dweight and dbias of a chunk whose dlogits are known."""
        self._has_written = True
        if gradients.dhidden_TD is not None:
            if self._shard is None:
                dhidden_CD = self.products.dhidden(dlogits_CV, out_dtype=hidden_CD.dtype)
            else:
                partial_CD = self.products.dhidden(dlogits_CV, out_dtype=self.wide)
                dhidden_CD = self._shard.sum(partial_CD)
            gradients.dhidden_TD[chunk] = dhidden_CD
        if gradients.dweight_VD is not None:
            self.products.add_dweight(gradients.dweight_VD, dlogits_CV, hidden_CD)
        if gradients.dbias_V is not None:
            gradients.dbias_V += dlogits_CV.sum(0, dtype=self.wide)
