"""Loading and batching that the reward model and the sentence encoder share."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from lwz_trainer.errors import UserError

__all__ = [
    "forecast_model_bytes",
    "input_limit",
    "load_model",
    "load_tokenizer",
    "pad_token_id",
    "padded_batch",
]


def load_tokenizer(path: str, setting: str) -> Any:
    """The tokenizer at `path`.

    Args:
        path: Hugging Face directory or hub id.
        setting: name of the config field that holds `path`, for the error.
    Raises:
        UserError: if there is none.
    """
    return _load(AutoTokenizer, path, setting)


def load_model(
    auto_class: Any, path: str, setting: str, *, dtype: torch.dtype | str, unread: str
) -> Any:
    """The model at `path`, with all its weights, ready for inference.

    Args:
        auto_class: a transformers Auto class.
        path: Hugging Face directory or hub id.
        setting: name of the config field that holds `path`, for the error.
        dtype: of the weights.
        unread: parameters with this in their name may be missing; "" for none.
    Raises:
        UserError: if there is none, or if weights are missing, which transformers would fill at
            random: a language model has no reward head.
    """
    model, info = _load(auto_class, path, setting, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if not (unread and unread in name))
    if missing:
        raise UserError(
            f"{setting}: '{path}' lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]}; name a model that was trained for this use"
        )
    return model.eval().requires_grad_(False)


def forecast_model_bytes(
    auto_class: Any, path: str, setting: str, *, dtype: torch.dtype | None
) -> int:
    """Bytes of the weights at `path`, from its configuration alone.

    Args:
        auto_class: a transformers Auto class.
        path: Hugging Face directory or hub id.
        setting: name of the config field that holds `path`, for the error.
        dtype: of the weights; None: the one that they were saved in.
    Raises:
        UserError: if there is none.
    """
    config = _load(AutoConfig, path, setting)
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype or config.dtype or torch.float32)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def input_limit(model: Any, tokenizer: Any) -> int:
    """Most tokens that both the model's positions and its tokenizer allow."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def pad_token_id(model: Any, tokenizer: Any, *, avoid: int | None) -> int:
    """The id to pad with.

    A decoder with a classification head reads its score at the last token that is not
    `model.config.pad_token_id`, so the model's own pad token comes first. Where none is set,
    another special token serves, but never `avoid`, the token that every input ends with.
    """
    configured = [model.config.pad_token_id, tokenizer.pad_token_id]
    stand_ins = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    candidates = [i for i in configured if i is not None]
    candidates += [i for i in stand_ins if i is not None and i != avoid]
    if not candidates:
        raise UserError(
            f"{model.config.name_or_path}: no token can serve for padding; set pad_token_id in its "
            "config.json"
        )
    return candidates[0]


def padded_batch(
    encodings: list[dict[str, list[int]]], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Input tensors [B, L], padded on the right.

    Args:
        encodings: `input_ids` of each text and, where the tokenizer gives them, `token_type_ids`.
        pad_id: fills up `input_ids`; the mask is 0 there.
        device: of the result.
    """
    lengths = [len(encoding["input_ids"]) for encoding in encodings]
    max_len = max(lengths)
    batch = {
        "input_ids": [
            encoding["input_ids"] + [pad_id] * (max_len - length)
            for encoding, length in zip(encodings, lengths, strict=True)
        ],
        "attention_mask": [[1] * length + [0] * (max_len - length) for length in lengths],
    }
    if "token_type_ids" in encodings[0]:
        batch["token_type_ids"] = [
            encoding["token_type_ids"] + [0] * (max_len - length)
            for encoding, length in zip(encodings, lengths, strict=True)
        ]
    return {name: torch.tensor(rows, device=device) for name, rows in batch.items()}


def _load(auto_class: Any, path: str, setting: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{setting}: cannot load '{path}' ({reason}); expected a Hugging Face directory or hub "
            "id with weights and tokenizer"
        ) from error
