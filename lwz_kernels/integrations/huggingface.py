"""attention as an implementation of transformers, under a name of its own.

The mask function turns what transformers knows (padding, packed position ids, cache, window) into a
SegmentTable once per forward pass, with one wait for the device; all layers share it. What a table
cannot say is refused. transformers is imported by `register_attention`, not by this module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lwz_kernels.attention import SegmentTable, attention
from lwz_kernels.sequence_parallel import SequenceParallel

__all__ = ["HuggingFaceAttention", "PackedMask", "register_attention"]

# Arguments of transformers' attention functions that change its result in a way that is not ours.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "output_attentions", "head_mask")


@dataclass(frozen=True)
class PackedMask:
    """What the layers get in place of a mask tensor."""

    table: SegmentTable
    window_size: int | None


class HuggingFaceAttention:
    """A registered implementation; counts its calls.

    Attributes:
        name: for `attn_implementation=`.
        impl: as in `attention`.
        calls: attention calls since the last `check_calls`.
    """

    def __init__(self, name: str, impl: str) -> None:
        self.name, self.impl = name, impl
        self.calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: PackedMask | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        sequence_parallel: SequenceParallel | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' interface: query [B, H, L, K] to out [B, L, H, K].

        With `model(..., sequence_parallel=...)` every layer attends over the shards of all ranks.

        Raises:
            NotImplementedError: dropout, attention that is not causal, a mask of four dimensions,
                or an argument of `UNSUPPORTED`.
        """
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        given = {name: kwargs.get(name) for name in UNSUPPORTED}
        refused = [name for name, x in given.items() if x is not None and x is not False]
        if dropout or not is_causal or refused:
            raise NotImplementedError(
                f"{self.name}: expected causal attention without dropout, got dropout={dropout}, "
                f"is_causal={is_causal}, {', '.join(refused) or 'no other arguments'}; "
                "use attn_implementation='sdpa'"
            )
        if isinstance(attention_mask, Tensor):
            raise NotImplementedError(
                f"{self.name}: got a mask tensor {[*attention_mask.shape]}; pass a padding mask "
                "[B, L], or packed position_ids without a mask"
            )
        batch_size, _, q_len, _ = query.shape
        mask = attention_mask or PackedMask(_rows(batch_size, q_len, key.shape[2]), None)
        window_size = sliding_window if mask.window_size is None else mask.window_size
        q_THK, k_TJK, v_TJK = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {
            "softmax_scale": scaling,
            "window_size": window_size,
            "impl": self.impl,
        }
        if sequence_parallel is None:
            out_THK, _ = attention(q_THK, k_TJK, v_TJK, segments=mask.table, **options)
        else:
            out_THK, _ = sequence_parallel.attention(q_THK, k_TJK, v_TJK, **options)
        self.calls += 1
        return out_THK.unflatten(0, (batch_size, q_len)), None

    def check_calls(self, expected: int) -> None:
        """Raises if the layers did not call this `expected` times since the last check.

        Recomputed activations count again, so call it between forward and backward.

        Raises:
            RuntimeError: another number of calls.
        """
        calls, self.calls = self.calls, 0
        if calls != expected:
            raise RuntimeError(
                f"{self.name} ran {calls} times, expected {expected}: load the model "
                f"with attn_implementation={self.name!r}, and look for layers that attend otherwise"
            )


def register_attention(name: str = "lwz", *, impl: str = "auto") -> HuggingFaceAttention:
    """Makes `attn_implementation=name` of transformers run `attention`.

    Args:
        name: not taken yet; no other implementation is ever replaced.
        impl: as in `attention`.

    Returns:
        What was registered, with its count of calls. The same again for the same arguments.

    Raises:
        ValueError: a name that is taken, by another library or with another impl.
        ImportError: transformers is not installed.

    Example:
        lwz = register_attention()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lwz")
        loss = model(input_ids, position_ids=packed, labels=labels, use_cache=False).loss
        lwz.check_calls(model.config.num_hidden_layers)
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    known = AttentionInterface().get(name)
    if isinstance(known, HuggingFaceAttention) and known.impl == impl:
        return known
    if known is not None or name in AttentionMaskInterface() or name == "eager":
        raise ValueError(f"register_attention: {name!r} is taken in transformers; choose another")
    registered = HuggingFaceAttention(name, impl)
    AttentionInterface.register(name, registered)
    AttentionMaskInterface.register(name, packed_mask)
    return registered


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PackedMask:
    """transformers' interface of a mask function: which keys each row's queries see, as segments.

    A query that does not see the token before it begins a document. Padding takes part in nothing.

    Raises:
        NotImplementedError: a query that sees keys behind it, a mask of the caller's own, or
            padding inside a row.
    """
    del kwargs  # dtype, config and permission to skip the mask, for implementations with tensors
    if use_vmap:
        raise NotImplementedError("lwz attention: masks other than causal ones are not supported")
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    starts: list[list[int]] = [[] for _ in range(batch_size)]
    if mask_function is not None and q_length > 1:
        row = torch.arange(batch_size, device=device)[:, None]
        after = torch.arange(q_offset + 1, q_offset + q_length, device=device)[None, :]
        sees_before = mask_function(row, 0, after, after - 1).expand(batch_size, -1)
        sees_behind = mask_function(row, 0, after - 1, after).any()
        if sees_behind.item():
            raise NotImplementedError("lwz attention: a query that sees keys behind it")
        for i, token in (~sees_before).nonzero().tolist():
            starts[i].append(token + 1)
    kept = [(0, kv_length)] * batch_size
    if attention_mask is not None:
        kept = _kept_ranges(attention_mask[:, kv_offset : kv_offset + kv_length])
    segments = []
    for i in range(batch_size):
        bounds = [0, *starts[i], q_length]
        for first, end in pairwise(bounds):
            # Keys of a row are counted from kv_offset on; the first document may be in the cache.
            position = q_offset - kv_offset
            k_start = max(kept[i][0], position + first if first else 0)
            k_end = min(kept[i][1], position + end)
            q_start = max(position + first, k_start)
            if q_start < k_end:
                segments.append(
                    (
                        i * q_length + q_start - position,
                        k_end - q_start,
                        i * kv_length + k_start,
                        k_end - k_start,
                    )
                )
    table = SegmentTable(segments, batch_size * q_length, batch_size * kv_length)
    return PackedMask(table, local_size)


def _kept_ranges(keep_BT: Tensor) -> list[tuple[int, int]]:
    """The keys of each row that are no padding."""
    keep_BT = keep_BT.to(torch.int64)
    first_B = keep_BT.argmax(1)
    count_B = keep_BT.sum(1)
    last_B = keep_BT.shape[1] - 1 - keep_BT.flip(1).argmax(1)
    ranges = []
    for first, count, last in torch.stack((first_B, count_B, last_B), 1).tolist():
        if count not in (0, last - first + 1):
            raise NotImplementedError(
                "lwz attention: expected padding at the ends of rows only, got some between tokens"
            )
        ranges.append((first, first + count))
    return ranges


def _rows(batch_size: int, q_len: int, k_len: int) -> SegmentTable:
    """Each row one document, whose last query sees its last key."""
    rows = [(i * q_len, q_len, i * k_len, k_len) for i in range(batch_size)]
    return SegmentTable(rows, batch_size * q_len, batch_size * k_len)
