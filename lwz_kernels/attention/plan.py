"""Who attends to whom in a pack: host integers, checked once and shared by all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

__all__ = ["AttentionPlan"]


@dataclass(frozen=True)
class AttentionPlan:
    """Sequence boundaries of a pack and the prefix that each sequence may attend to as well.

    Args:
        cu_seqlens: N + 1 ascending token offsets, from 0 to T.
        prefix_of: N entries or None. Sequence i attends to all keys of sequence prefix_of[i], then
            causally to its own; -1 means its own only. A prefix has no prefix itself.

    Raises:
        ValueError: offsets that do not ascend from 0; a prefix that does not exist, is the sequence
            itself, or has a prefix.
    """

    cu_seqlens: Sequence[int]
    prefix_of: Sequence[int] | None = None
    _tensors: dict[tuple, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        offsets = tuple(int(offset) for offset in self.cu_seqlens)
        object.__setattr__(self, "cu_seqlens", offsets)
        if not offsets or offsets[0] != 0:
            raise ValueError(f"cu_seqlens: expected to start with 0, got {offsets[:1]}")
        if any(after < before for before, after in pairwise(offsets)):
            raise ValueError(f"cu_seqlens: expected ascending offsets, got {offsets}")
        if self.prefix_of is not None:
            prefixes = tuple(int(prefix) for prefix in self.prefix_of)
            _check_prefixes(prefixes, len(offsets) - 1)
            # A plan in which nobody has a prefix is the same as one without.
            has_prefix = any(prefix >= 0 for prefix in prefixes)
            object.__setattr__(self, "prefix_of", prefixes if has_prefix else None)

    @property
    def num_tokens(self) -> int:
        """T, the length of the pack."""
        return self.cu_seqlens[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each sequence."""
        return tuple(after - before for before, after in pairwise(self.cu_seqlens))

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, 0 in an empty pack."""
        return max(self.lengths, default=0)

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """`cu_seqlens` as an int32 tensor; made once per device."""
        key = ("cu_seqlens", device)
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)
        return self._tensors[key]

    def prefix_mask(self, q_len: int, prefix_len: int, device: torch.device) -> torch.Tensor:
        """[q_len, prefix_len + q_len] bool, true where query and key may meet; made once per size.

        Row i sees the whole prefix and its own keys up to i: causal, aligned at the bottom right.
        """
        key = ("mask", q_len, prefix_len, device)
        if key not in self._tensors:
            ones = torch.ones(q_len, prefix_len + q_len, dtype=torch.bool, device=device)
            self._tensors[key] = ones.tril_(prefix_len)
        return self._tensors[key]


def _check_prefixes(prefixes: tuple[int, ...], num_sequences: int) -> None:
    if len(prefixes) != num_sequences:
        raise ValueError(
            f"prefix_of: expected one entry per sequence ({num_sequences}), got {len(prefixes)}"
        )
    for i, prefix in enumerate(prefixes):
        if prefix < -1 or prefix >= num_sequences or prefix == i:
            raise ValueError(
                f"prefix_of[{i}] is {prefix}: expected -1 or another sequence below {num_sequences}"
            )
        if prefix >= 0 and prefixes[prefix] >= 0:
            raise ValueError(
                f"prefix_of[{i}] is {prefix}, which has a prefix itself: expected one level only"
            )
