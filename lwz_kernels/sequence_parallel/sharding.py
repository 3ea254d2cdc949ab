"""Per-token tensors of a pack to and from shards; labels are shifted before, never after.

A shard's last token has its label on another rank. Rolling labels within shards makes one label
per rank wrong and shows only as slow regression, so `shift_labels` works on whole packs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lwz_kernels.sequence_parallel.layout import SequenceLayout

__all__ = ["position_ids", "shard_tokens", "shift_labels", "unshard_tokens"]


def shift_labels(
    input_ids: Tensor, document_lengths: Sequence[int], *, ignore_index: int = -100
) -> Tensor:
    """The next token of the same document, `ignore_index` at the end of each: [T] to [T].

    Raises:
        ValueError: `input_ids` is not one dimension of as many tokens as the documents have.
    """
    if input_ids.shape != (sum(document_lengths),):
        raise ValueError(
            f"expected input_ids of the whole pack, [{sum(document_lengths)}], "
            f"got {[*input_ids.shape]}; shift before sharding"
        )
    last = torch.tensor(list(document_lengths), device=input_ids.device).cumsum(0) - 1
    return input_ids.roll(-1).index_fill(0, last, ignore_index)


def shard_tokens(
    x: Tensor, layout: SequenceLayout, rank: int, *, pad_value: float, dim: int = 0
) -> Tensor:
    """The tokens of `rank` along `dim`; padding is filled with `pad_value`. Differentiable.

    Raises:
        ValueError: `x` does not have the tokens of the whole pack along `dim`.
    """
    if x.shape[dim] != layout.num_tokens:
        raise ValueError(
            f"expected the {layout.num_tokens} tokens of the whole pack along dim {dim}, "
            f"got {[*x.shape]}"
        )
    shape = list(x.shape)
    shape[dim] = layout.padded_tokens - layout.num_tokens
    padded = torch.cat((x, x.new_full(shape, pad_value)), dim)
    return padded.index_select(dim, torch.tensor(layout.shard_index(rank), device=x.device))


def unshard_tokens(shards: Sequence[Tensor], layout: SequenceLayout, *, dim: int = 0) -> Tensor:
    """The whole pack from the shards of all ranks in order, without padding.

    Raises:
        ValueError: not one shard per rank.
    """
    if len(shards) != layout.num_ranks:
        raise ValueError(f"expected {layout.num_ranks} shards, got {len(shards)}")
    held = [token for rank in range(layout.num_ranks) for token in layout.shard_index(rank)]
    place = torch.tensor(held).argsort()[: layout.num_tokens]
    whole = torch.cat(tuple(shards), dim)
    return whole.index_select(dim, place.to(whole.device))


def position_ids(layout: SequenceLayout, rank: int, device: torch.device | str) -> Tensor:
    """[n] int64: position within its document of each token of `rank`, for RoPE."""
    return torch.tensor(layout.position_ids(rank), device=device)
