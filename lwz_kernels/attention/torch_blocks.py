"""attention in plain torch, on any device: one segment and one block of queries at a time.

No Tq x Tk matrix is held, and keys and values are not repeated for the heads that share them.
Products and sums are fp32 (fp64 for fp64); natural log; one order of sums, so deterministic.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lwz_kernels.attention.segments import Segment
from lwz_kernels.dtypes import wide_dtype

__all__ = ["attention_bwd_blocks", "attention_fwd_blocks"]

# Scores of one block over all heads, in elements: 16 MiB in fp32.
MAX_BLOCK_SCORES = 2**22
MAX_BLOCK_Q = 512


class Block(NamedTuple):
    """Queries that are worked on together, and the keys that any of them sees."""

    queries: slice
    prefix: slice
    keys: slice
    last_key: int
    """Place among the keys, those of the prefix first, of the last that the first query sees."""

    def gather(self, x: Tensor) -> Tensor:
        """Its keys' rows of [Tk, ...]; a view where the block has no keys of a prefix."""
        if self.prefix.start == self.prefix.stop:
            return x[self.keys]
        return torch.cat((x[self.prefix], x[self.keys]))

    def scatter_add(self, x: Tensor, rows: Tensor) -> None:
        """Adds to its keys' rows of x."""
        num_prefix = self.prefix.stop - self.prefix.start
        x[self.prefix] += rows[:num_prefix]
        x[self.keys] += rows[num_prefix:]


def attention_fwd_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Segment],
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, K] in the dtype of q and lse [H, Tq]."""
    wide = wide_dtype(q.dtype)
    num_tokens, num_heads, _ = q.shape
    out_THK = q.new_zeros(q.shape)
    lse_HT = q.new_full((num_heads, num_tokens), float("-inf"), dtype=wide)
    for block in _blocks(segments, num_heads, window_size):
        k_JTK, v_JTK = (block.gather(x).transpose(0, 1).to(wide) for x in (k, v))
        q_JRK = _to_rows(q[block.queries], k.shape[1], wide)
        scores_JRT = _scores(q_JRK, k_JTK, block, softmax_scale, window_size)
        lse_JR = torch.logsumexp(scores_JRT, -1)
        probs_JRT = scores_JRT.sub_(lse_JR[..., None]).exp_()
        out_THK[block.queries] = _from_rows(probs_JRT @ v_JTK, num_heads)
        lse_HT[:, block.queries] = _from_rows(lse_JR[..., None], num_heads).squeeze(-1).t()
    return out_THK, lse_HT


def attention_bwd_blocks(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    segments: Sequence[Segment],
    softmax_scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in fp32 or fp64, from p = exp(s − lse) and ds = p · (dp − delta).

    lse is +inf, not −inf, for a query whose softmax saw nothing.
    """
    wide = wide_dtype(q.dtype)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    dq_THK = q.new_zeros(q.shape, dtype=wide)
    dk_TJK, dv_TJK = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    for block in _blocks(segments, num_heads, window_size):
        k_JTK, v_JTK = (block.gather(x).transpose(0, 1).to(wide) for x in (k, v))
        q_JRK, dout_JRK = (_to_rows(x[block.queries], num_kv_heads, wide) for x in (q, dout))
        lse_JR1, delta_JR1 = (
            _to_rows(x[block.queries, :, None], num_kv_heads, wide) for x in (lse.t(), delta.t())
        )
        scores_JRT = _scores(q_JRK, k_JTK, block, softmax_scale, window_size)
        probs_JRT = scores_JRT.sub_(lse_JR1).exp_()
        block.scatter_add(dv_TJK, (probs_JRT.transpose(1, 2) @ dout_JRK).transpose(0, 1))
        dscores_JRT = (dout_JRK @ v_JTK.transpose(1, 2)).sub_(delta_JR1)
        dscores_JRT.mul_(probs_JRT).mul_(softmax_scale)
        dq_THK[block.queries] = _from_rows(dscores_JRT @ k_JTK, num_heads)
        block.scatter_add(dk_TJK, (dscores_JRT.transpose(1, 2) @ q_JRK).transpose(0, 1))
    return dq_THK, dk_TJK, dv_TJK


def _blocks(
    segments: Sequence[Segment], num_heads: int, window_size: int | None
) -> Iterator[Block]:
    """All blocks in which every query sees a key."""
    for row in segments:
        num_keys = row.prefix_len + row.k_len
        visible = num_keys if window_size is None else min(num_keys, window_size + MAX_BLOCK_Q)
        block_q = max(1, min(MAX_BLOCK_Q, MAX_BLOCK_SCORES // (num_heads * max(1, visible))))
        for i in range(max(0, -row.shift), row.q_len, block_q):
            end = min(i + block_q, row.q_len)
            first_key = 0 if window_size is None else max(0, i + row.shift - window_size + 1)
            end_key = end + row.shift
            yield Block(
                queries=slice(row.q_start + i, row.q_start + end),
                prefix=slice(
                    row.prefix_start + min(first_key, row.prefix_len),
                    row.prefix_start + min(end_key, row.prefix_len),
                ),
                keys=slice(
                    row.k_start + max(0, first_key - row.prefix_len),
                    row.k_start + max(0, end_key - row.prefix_len),
                ),
                last_key=i + row.shift - first_key,
            )


def _scores(
    q_JRK: Tensor, k_JTK: Tensor, block: Block, softmax_scale: float, window_size: int | None
) -> Tensor:
    """scale · q kᵀ, −inf where a query does not see a key."""
    scores_JRT = (q_JRK @ k_JTK.transpose(1, 2)).mul_(softmax_scale)
    num_queries = block.queries.stop - block.queries.start
    num_keys = k_JTK.shape[1]
    last_key_B1 = block.last_key + torch.arange(num_queries, device=q_JRK.device)[:, None]
    key_T = torch.arange(num_keys, device=q_JRK.device)
    hidden_BT = key_T > last_key_B1
    if window_size is not None:
        hidden_BT |= key_T <= last_key_B1 - window_size
    scores_JBGT = scores_JRT.view(scores_JRT.shape[0], num_queries, -1, num_keys)
    scores_JBGT.masked_fill_(hidden_BT[:, None, :], float("-inf"))
    return scores_JRT


def _to_rows(x_BHK: Tensor, num_kv_heads: int, wide: torch.dtype) -> Tensor:
    """[B, H, K] to [J, B · H / J, K]: the heads that share keys are rows of one product."""
    num_queries, num_heads, size = x_BHK.shape
    x_BJGK = x_BHK.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, size)
    return x_BJGK.to(wide).transpose(0, 1).reshape(num_kv_heads, -1, size)


def _from_rows(x_JRK: Tensor, num_heads: int) -> Tensor:
    """The inverse of `_to_rows`."""
    num_kv_heads, _, size = x_JRK.shape
    x_JBGK = x_JRK.view(num_kv_heads, -1, num_heads // num_kv_heads, size)
    return x_JBGK.transpose(0, 1).reshape(-1, num_heads, size)
