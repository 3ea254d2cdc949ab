"""K decode steps without a look from the host.

Everything that a step reads and writes is a tensor on the device: the last tokens, positions, page
tables, who is still writing, and what was drawn. On a GPU a step is one CUDA graph for each batch
size, with head, sampler and log-prob inside; the host looks after K steps, so a sequence that meets
a stop string has drawn up to K - 1 tokens that are thrown away. A sample does not depend on K.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.linear import wide_logits
from lwz_trainer.rollout.attend import DecodeAttend
from lwz_trainer.rollout.decode_pass import decode_pass
from lwz_trainer.rollout.kv_cache import PagedKVCache
from lwz_trainer.rollout.sampling import sample_tokens, uniforms_at

__all__ = ["Burst", "CudaGraphs", "DecodeRows", "graph_batch_size"]

Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class DecodeRows:
    """State of B sequences; a step changes it in place."""

    tokens_B: Tensor
    """int64, the token to be fed."""
    positions_B: Tensor
    """int64, where it goes: the number of tokens in the cache."""
    num_tokens_B: Tensor
    """int64, completion tokens drawn so far."""
    keys_B: Tensor
    """int64, `sample_keys`."""
    active_B: Tensor
    """bool; a row that is not writes nothing and attends to nothing."""
    page_table_BP: Tensor
    """int32, with pages for every position up to the end of the burst."""

    def first(self, batch: int) -> "DecodeRows":
        """Views of the first rows."""
        return DecodeRows(*(getattr(self, field.name)[:batch] for field in fields(self)))

    def to(self, device: torch.device) -> "DecodeRows":
        """A copy on a device."""
        return DecodeRows(*(getattr(self, field.name).to(device) for field in fields(self)))

    def copy_(self, other: "DecodeRows") -> None:
        """Takes over the rows and columns of `other`; rows after them become inactive."""
        batch = len(other.tokens_B)
        for field in fields(self):
            target, source = getattr(self, field.name)[:batch], getattr(other, field.name)
            if target.dim() > 1:
                target = target[:, : source.shape[1]]
            target.copy_(source, non_blocking=True)
        self.active_B[batch:] = False


def graph_batch_size(batch: int, most: int) -> int:
    """The smallest size with a graph that holds `batch` rows: powers of two, then every eighth."""
    size = 1
    while size < min(batch, 8):
        size *= 2
    if batch > 8:
        size = -(-batch // 8) * 8 if batch <= 64 else -(-batch // 32) * 32
    return min(size, most)


class CudaGraphs:
    """Records steps. Only one of them runs at a time and none keeps a value of its own for the
    next, so all use the same scratch memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Records `step` once and returns its replay; called with rows that are all inactive."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and makes workspaces, which a capture must not
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The default mode, "global", fails when any thread calls cudaMalloc meanwhile: that of an
        # interleaved update, or one that scores with a reward model. What they do is not recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


class Burst:
    """Runs decode steps on a cache that stays where it is.

    Args:
        model: its parameters are read at their addresses; an update in place is seen.
        cache: of the rollout.
        config: sampling, and the most tokens of a completion.
        eos_ids: tokens that end a sequence on the device.
        max_rows, max_pages: the largest batch and page table.
        max_steps: the longest burst.
        capture: makes a replay of a step; None runs every step from the host.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PagedKVCache,
        config: RolloutConfig,
        *,
        eos_ids: tuple[int, ...],
        max_rows: int,
        max_pages: int,
        max_steps: int,
        capture: Capture | None,
    ) -> None:
        self._model, self._cache, self._config = model, cache, config
        self._max_rows, self._capture = max_rows, capture
        device = model.head_weight.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        whole = torch.int64
        self._eos_ids = torch.tensor(eos_ids, dtype=whole, device=device)
        self._rows = DecodeRows(
            tokens_B=zeros(max_rows, dtype=whole),
            positions_B=zeros(max_rows, dtype=whole),
            num_tokens_B=zeros(max_rows, dtype=whole),
            keys_B=zeros(max_rows, dtype=whole),
            active_B=zeros(max_rows, dtype=torch.bool),
            page_table_BP=zeros(max_rows, max_pages, dtype=torch.int32),
        )
        self._step_number = zeros(1, dtype=whole)
        self._drawn_KB = zeros(max_steps, max_rows, dtype=whole)
        self._logprobs_KB = zeros(max_steps, max_rows, dtype=torch.float32)
        self._replays: dict[int, Callable[[], None]] = {}

    def run(self, rows: DecodeRows, num_steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """Draws up to `num_steps` tokens for every row.

        Args:
            rows: [B] and [B, P] on the CPU.
            num_steps: of this burst.

        Returns:
            tokens and log-probs, [steps][B]; those of a row count up to its end token or its last
            allowed token, after which it draws no more.
        """
        batch = len(rows.tokens_B)
        step: Callable[[], None]
        if self._capture is None:
            step = partial(self._step, rows.to(self._step_number.device))
        else:
            step = self._replay(batch, self._capture)
            self._rows.copy_(rows)
        self._step_number.zero_()
        for _ in range(num_steps):
            step()
        drawn, logprobs = self._drawn_KB[:num_steps, :batch], self._logprobs_KB[:num_steps, :batch]
        return drawn.tolist(), logprobs.tolist()

    def _replay(self, batch: int, capture: Capture) -> Callable[[], None]:
        size = graph_batch_size(batch, self._max_rows)
        if size not in self._replays:
            self._rows.active_B.zero_()
            self._step_number.zero_()
            self._replays[size] = capture(partial(self._step, self._rows.first(size)))
        return self._replays[size]

    def _step(self, rows: DecodeRows) -> None:
        """Feeds the last tokens, draws the next ones, and advances the rows that go on."""
        config, page_size = self._config, self._cache.page_size
        active_B, positions_B = rows.active_B, rows.positions_B
        column_B1 = (positions_B // page_size).clamp(max=rows.page_table_BP.shape[1] - 1)[:, None]
        pages_B = rows.page_table_BP.gather(1, column_B1).squeeze(1).long()
        slots_B = torch.where(active_B, pages_B * page_size + positions_B % page_size, -1)
        context_lens_B = torch.where(active_B, positions_B + 1, 0).int()
        attend = DecodeAttend(self._cache, rows.page_table_BP, context_lens_B, slots_B)
        hidden_BD = decode_pass(self._model, rows.tokens_B, positions_B, attend)
        drawn_B, logprobs_B = sample_tokens(
            wide_logits(hidden_BD, self._model.head_weight),
            uniforms_at(rows.keys_B, rows.num_tokens_B),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        batch = len(drawn_B)
        index = self._step_number.expand(1, batch)
        self._drawn_KB[:, :batch].scatter_(0, index, drawn_B[None])
        self._logprobs_KB[:, :batch].scatter_(0, index, logprobs_B[None])
        self._step_number += 1
        rows.tokens_B.copy_(drawn_B)
        positions_B += active_B
        rows.num_tokens_B.add_(active_B)
        is_end_B = (drawn_B[:, None] == self._eos_ids).any(1)
        active_B &= ~is_end_B & (rows.num_tokens_B < config.max_completion_tokens)
