"""Sentence embeddings from any transformer encoder, in process."""

import numpy as np
import torch
from transformers import AutoModel

from lwz_trainer.errors import UserError
from lwz_trainer.rewards.parking import ParkedModel
from lwz_trainer.rewards.pretrained import (
    input_limit,
    load_model,
    load_tokenizer,
    pad_token_id,
    padded_batch,
)

__all__ = ["SentenceEncoder"]

_BATCH_SIZE = 32


class SentenceEncoder:
    """Mean of the last hidden states over a text's tokens, in fp32.

    Texts longer than the model's limit count with their beginning only.

    Args:
        path: Hugging Face directory or hub id of a model that `AutoModel` can load.
        device: where the model runs.
    Raises:
        UserError: if there is no such model, or it is not whole.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(path, "rewards.format.encoder")
        model = load_model(
            AutoModel, path, "rewards.format.encoder", dtype=torch.float32, unread="pooler"
        )
        if model.config.is_encoder_decoder:
            raise UserError(
                f"rewards.format.encoder: {path} is an encoder-decoder model, expected an encoder; "
                "name a sentence encoder"
            )
        self.model = model
        self.parked = ParkedModel(model, self.device)
        self.pad_token_id = pad_token_id(model, self.tokenizer, avoid=None)
        self.max_tokens = input_limit(model, self.tokenizer)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings [N, D] of the texts, not normalised."""
        encodings = [
            dict(self.tokenizer(text, truncation=True, max_length=self.max_tokens))
            for text in texts
        ]
        by_length = sorted(range(len(texts)), key=lambda i: len(encodings[i]["input_ids"]))
        embeddings_ND = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        with self.parked.on_device():
            for start in range(0, len(texts), _BATCH_SIZE):
                indices = by_length[start : start + _BATCH_SIZE]
                batch = padded_batch(
                    [encodings[i] for i in indices], self.pad_token_id, self.device
                )
                with torch.inference_mode():
                    hidden_BLD = self.model(**batch).last_hidden_state
                mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
                num_tokens_B1 = mask_BL1.sum(dim=1).clamp(min=1)
                embeddings_BD = (hidden_BLD * mask_BL1).sum(dim=1) / num_tokens_B1
                embeddings_ND[indices] = embeddings_BD.cpu().numpy()
        return embeddings_ND
