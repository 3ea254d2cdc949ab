"""Reads a pretrained model: safetensors, tensor by tensor, straight into the fused parameters.

Only one checkpoint tensor is in memory beside the decoder at any time. Every name and shape is
checked, so a decoder that loads is the model that the directory describes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import Family, ModelConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.parameter_names import CheckpointSlice, checkpoint_slices
from lwz_trainer.model.source import resolve_model_dir

__all__ = [
    "load_decoder",
    "load_generation_config",
    "load_hf_config",
    "load_pretrained",
    "load_tokenizer",
    "resolve_eos_ids",
    "weights_digest",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_NAMES_IN_ERROR = 3
# Rows of each tensor, from its middle on, that tell two models of one architecture apart.
_DIGEST_ROWS = 4


def load_pretrained(
    path: str, *, dtype: torch.dtype, device: torch.device | str, is_empty: bool = False
) -> tuple[Decoder, PreTrainedTokenizerBase]:
    """The decoder and tokenizer of a model; deterministic.

    Args:
        path: as in `resolve_model_dir`.
        dtype: of the parameters; the checkpoint's values are rounded to it.
        device: of the parameters.
        is_empty: as in `load_decoder`.

    Raises:
        UserError: no such model, an architecture or setting that is not supported, damaged or
            mismatched files, or no token that ends a completion.
    """
    model_dir = resolve_model_dir(path)
    # The tokenizer first: its errors are cheaper to find than the weights are to read.
    tokenizer = load_tokenizer(model_dir)
    resolve_eos_ids(tokenizer, load_generation_config(model_dir))
    decoder = load_decoder(model_dir, dtype=dtype, device=device, is_empty=is_empty)
    if len(tokenizer) > decoder.config.vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} has {len(tokenizer)} tokens, expected at most the "
            f"model's vocab_size {decoder.config.vocab_size}; use the tokenizer of this model"
        )
    return decoder, tokenizer


def load_hf_config(model_dir: Path) -> PreTrainedConfig:
    """The directory's config.json as transformers understands it; supported families only."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{model_dir} is not a model directory: it has no config.json; pass a directory "
            "written by save_pretrained"
        )
    try:
        family = _read_json_object(path).get("model_type")
        # Before transformers parses the rest: it may not know the type at all.
        if family not in get_args(Family):
            raise UserError(
                f"unsupported model architecture {family!r} in {path}, expected one of "
                f"{', '.join(get_args(Family))}; choose a model of one of these families"
            )
        return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(
            f"cannot read {path}: {_one_line(error)}; restore the file from the original model"
        ) from error


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The directory's tokenizer."""
    # Without any of these transformers makes an empty tokenizer of the model's class.
    if not any((model_dir / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"{model_dir} has no tokenizer, expected one of {', '.join(_VOCABULARY_FILES)}; copy "
            "tokenizer.json and tokenizer_config.json from the original model"
        )
    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"cannot read the tokenizer in {model_dir}: {_one_line(error)}; copy tokenizer.json "
            "and tokenizer_config.json from the original model"
        ) from error


def load_generation_config(model_dir: Path) -> GenerationConfig | None:
    """The directory's generation_config.json, or None where there is none."""
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return None
    return GenerationConfig.from_dict(_read_json_object(path))


def resolve_eos_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> tuple[int, ...]:
    """All token ids that end a completion, ascending: the generation config's and the tokenizer's.

    Raises:
        UserError: there is none; a completion could not end.
    """
    listed = None if generation_config is None else generation_config.eos_token_id
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            "the model has no end-of-sequence token, expected an eos_token in "
            "tokenizer_config.json or an eos_token_id in generation_config.json; add one"
        )
    return tuple(sorted(int(token_id) for token_id in ids))


def load_decoder(
    model_dir: Path, *, dtype: torch.dtype, device: torch.device | str, is_empty: bool = False
) -> Decoder:
    """The decoder of a local directory in Hugging Face layout.

    Args:
        model_dir: with config.json and safetensors, in one file or in shards with an index.
        dtype: of the parameters.
        device: of the parameters.
        is_empty: read no weights, for a rank that is given them by another one.
    """
    config = ModelConfig.from_hf(load_hf_config(model_dir))
    if is_empty:
        return Decoder(config, device=device, dtype=dtype)
    wanted = {piece.name: piece for piece in checkpoint_slices(config)}
    files = _names_by_file(model_dir)
    _check_names(model_dir, wanted, {name for names in files.values() for name in names}, config)
    decoder = Decoder(config, device=device, dtype=dtype)
    parameters = dict(decoder.named_parameters())
    for file, names in files.items():
        _read_file(file, [wanted[name] for name in names if name in wanted], parameters)
    return decoder


def weights_digest(model_dir: Path) -> str:
    """Of every tensor's name, type, shape and middle rows, wherever and in how many files they lie.

    Training moves all weights, so a few rows tell two models apart, and the whole is not read.
    """
    parts: list[str] = []
    for file, names in _names_by_file(model_dir).items():
        try:
            with safe_open(file, framework="pt") as shard:
                for name in names:
                    rows = shard.get_slice(name)
                    shape = rows.get_shape()
                    some = rows[shape[0] // 2 : shape[0] // 2 + _DIGEST_ROWS]
                    values = some.contiguous().view(torch.uint8).numpy().tobytes()
                    digest = hashlib.sha256(values).hexdigest()
                    parts.append(f"{name} {rows.get_dtype()} {shape} {digest}")
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]


def _names_by_file(model_dir: Path) -> dict[Path, list[str]]:
    """Which tensors to take from which safetensors file."""
    index = model_dir / _INDEX
    if index.is_file():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map; restore it from the original model")
        files: dict[Path, list[str]] = {}
        for name, file_name in weight_map.items():
            files.setdefault(model_dir / str(file_name), []).append(name)
        if missing := sorted(file.name for file in files if not file.is_file()):
            raise UserError(
                f"{model_dir} has no {_some(missing)}, which {_INDEX} lists; copy the missing "
                "shards from the original model"
            )
        return files
    single = model_dir / _SINGLE
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return {single: list(file.keys())}
        except (SafetensorError, OSError) as error:
            raise _damaged(single, error) from error
    raise UserError(
        f"{model_dir} has neither {_SINGLE} nor {_INDEX}; pass a directory with safetensors "
        "(other weight formats are not read)"
    )


def _check_names(
    model_dir: Path, wanted: dict[str, CheckpointSlice], got: set[str], config: ModelConfig
) -> None:
    # Old checkpoints store the rotary frequencies, and some tied ones a second copy of the head.
    ignorable = {name for name in got if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignorable.add("lm_head.weight")
    missing = sorted(wanted.keys() - got)
    unexpected = sorted(got - wanted.keys() - ignorable)
    if missing or unexpected:
        raise UserError(
            f"the tensors in {model_dir} do not fit its config.json: missing {_some(missing)}, "
            f"unexpected {_some(unexpected)}; use weights and config.json of the same model"
        )


def _read_file(
    file: Path, pieces: list[CheckpointSlice], parameters: dict[str, torch.nn.Parameter]
) -> None:
    try:
        with safe_open(file, framework="pt") as shard, torch.no_grad():
            stored_names = set(shard.keys())
            for piece in pieces:
                if piece.name not in stored_names:
                    raise UserError(
                        f"{file} has no tensor {piece.name}, which {_INDEX} says it holds; copy "
                        "the shard from the original model again"
                    )
                rows = parameters[piece.parameter][piece.start : piece.stop]
                shape = tuple(shard.get_slice(piece.name).get_shape())
                if shape != tuple(rows.shape):
                    raise UserError(
                        f"{piece.name} in {file} has shape {shape}, expected {tuple(rows.shape)} "
                        "from config.json; use weights and config.json of the same model"
                    )
                tensor = shard.get_tensor(piece.name)
                if not tensor.is_floating_point():
                    raise UserError(
                        f"{piece.name} in {file} has type {tensor.dtype}, expected a float type; "
                        "use unquantised weights"
                    )
                rows.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException) -> UserError:
    return UserError(
        f"{file} is damaged or incomplete ({_one_line(error)}); copy it from the original model "
        "again"
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {_one_line(error)}; restore the file from the original model"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = len(names) - _MAX_NAMES_IN_ERROR
    shown = ", ".join(names[:_MAX_NAMES_IN_ERROR])
    return f"{shown} and {more} more" if more > 0 else shown


def _one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
