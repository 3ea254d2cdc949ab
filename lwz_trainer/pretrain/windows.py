"""Token sequences of at most one context, and how a step's are dealt to ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lwz_trainer.update.packing import TrainSample

__all__ = ["Window", "as_train_sample", "cut_document", "cut_reply", "deal_windows"]


@dataclass(frozen=True, eq=False)
class Window:
    """A sequence whose last token is predicted and never fed."""

    source: int
    where: str
    """Names the row in errors."""
    ids: NDArray[np.int32]
    num_given: int
    """First tokens that are not predicted; at least 1."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are fed."""
        return len(self.ids) - 1

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) - self.num_given


def cut_document(
    source: int, where: str, ids: Sequence[int], *, context_tokens: int
) -> list[Window]:
    """Windows of a document in order; each starts with the token that the one before it ends with.

    So every token but the document's first is predicted exactly once.
    """
    tokens = np.asarray(ids, dtype=np.int32)
    return [
        Window(source, where, tokens[start : start + context_tokens + 1], 1)
        for start in range(0, len(tokens) - 1, context_tokens)
    ]


def cut_reply(
    source: int,
    where: str,
    prompt_ids: Sequence[int],
    reply_ids: Sequence[int],
    *,
    context_tokens: int,
    learns_prompt: bool,
) -> Window:
    """The window of a prompt and its reply, whose end is cut off where it passes the context.

    The prompt is not empty and leaves room for a token of the reply to be predicted.
    """
    assert 0 < len(prompt_ids) <= context_tokens, "the reader passes over such a row"
    tokens = np.asarray([*prompt_ids, *reply_ids][: context_tokens + 1], dtype=np.int32)
    return Window(source, where, tokens, 1 if learns_prompt else len(prompt_ids))


def as_train_sample(window: Window, number: int) -> TrainSample:
    """The window as packing knows sequences: what is given, then what is predicted."""
    ids = window.ids.tolist()
    num_predicted = window.num_loss_tokens
    return TrainSample(
        group=number,
        sample=number,
        prompt_ids=ids[: window.num_given],
        completion_ids=ids[window.num_given :],
        sampling_logprobs=[0.0] * num_predicted,
        advantage=0.0,
        in_loss=True,
    )


def deal_windows(windows: Sequence[Window], num_shares: int) -> list[list[int]]:
    """Indices of the windows of each share: the longest first, to the share with fewest tokens.

    A pure function of its arguments, so that all ranks deal alike.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for index in sorted(range(len(windows)), key=lambda i: (-windows[i].num_tokens, i)):
        share = min(range(num_shares), key=lambda s: (tokens[s], s))
        shares[share].append(index)
        tokens[share] += windows[index].num_tokens
    return shares
