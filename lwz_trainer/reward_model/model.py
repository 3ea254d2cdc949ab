"""A decoder with one scalar score, read at the last token of each packed sequence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwz_trainer.errors import UserError
from lwz_trainer.model.decoder import Decoder

__all__ = ["RewardModel", "choose_pad_token_id"]


class RewardModel(nn.Module):
    """score = w · h, h the last hidden state of a sequence's last token.

    w starts at 0, so every margin does: the first loss is ln 2, and the decoder is moved as soon as
    w is not 0. A language model's own head is dropped.

    Numerics: the product is fp32 whatever the parameters' type.

    Args:
        decoder: becomes part of this.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        decoder.lm_head = None
        self.decoder = decoder
        embed = decoder.embed
        self.score = nn.Parameter(
            torch.zeros(1, decoder.config.hidden, device=embed.device, dtype=embed.dtype)
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        **options: Any,
    ) -> Tensor:
        """Scores [N] fp32.

        Args:
            input_ids, position_ids: [T], as in `Decoder.forward`.
            last_index: [N], where each sequence's last token stands among the T.
            attend: mixes tokens.
            options: further ones of `Decoder.forward`.
        """
        hidden_TD = self.decoder(input_ids, position_ids, attend, **options)
        return (hidden_TD[last_index].float() @ self.score.float().T).squeeze(-1)


def choose_pad_token_id(tokenizer: Any, *, closing_ids: list[int], model_dir: Path) -> int:
    """The id that the exported model's batches are padded with.

    transformers reads a score at the last token that is not this one, so it must not be the token
    that every input ends with.

    Raises:
        UserError: the tokenizer has no other special token.
    """
    last = closing_ids[-1] if closing_ids else None
    preferred = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    others = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for token_id in (*preferred, *others):
        if token_id is not None and token_id != last:
            return int(token_id)
    raise UserError(
        f"the tokenizer in {model_dir} has no special token that inputs do not end with, expected "
        "one to pad with; add a pad token"
    )
