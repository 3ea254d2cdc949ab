"""Writes a decoder as a Hugging Face directory that transformers and inference servers load.

As the language model that it is or, with a score head, as a model for sequence classification.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import Family, ModelConfig
from lwz_trainer.model.atomic_directory import atomic_directory
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_hf_config
from lwz_trainer.model.parameter_names import CheckpointSlice, checkpoint_slices

__all__ = ["ScoreHead", "save_pretrained", "write_weights"]

MAX_SHARD_BYTES = 5_000_000_000

_GENERATION_CONFIG = "generation_config.json"
_CLASS_PREFIXES: dict[Family, str] = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class ScoreHead:
    """What makes a decoder a sequence classifier with one label.

    Args:
        weight: [1, D].
        pad_token_id: a score is read at the last token that is not this one.
    """

    weight: Tensor
    pad_token_id: int


def save_pretrained(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    source: Path | PreTrainedConfig,
    out_dir: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    score_head: ScoreHead | None = None,
) -> None:
    """Writes config.json, safetensors, tokenizer and chat template; the directory appears whole.

    Args:
        decoder: its parameters are written in their own type; a tied head is not written.
        tokenizer: written with its chat template.
        source: the directory that the model was loaded from (its generation_config.json is copied
            too), or a transformers configuration.
        out_dir: must not exist, or be empty.
        max_shard_bytes: safetensors files stay at or below this size, unless one tensor is larger.
            At most one shard is copied in memory at a time.
        score_head: written in place of the language model's head, as a model for sequence
            classification.

    Raises:
        UserError: `out_dir` has content or cannot be written, or `source` describes another model.
    """
    hf_config = source if isinstance(source, PreTrainedConfig) else load_hf_config(source)
    if ModelConfig.from_hf(hf_config) != decoder.config:
        raise UserError(
            f"the configuration given for the export to {out_dir} describes another model than "
            "the weights; pass the directory that the model was loaded from"
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(
            f"cannot export to {out_dir}: it exists, expected a new or empty directory; choose "
            "another path or remove it"
        )
    try:
        with atomic_directory(out_dir) as partial:
            write_weights(decoder, partial, max_shard_bytes=max_shard_bytes, score_head=score_head)
            _write_config(decoder, hf_config, partial, score_head)
            tokenizer.save_pretrained(partial)
            if (
                score_head is None
                and isinstance(source, Path)
                and (source / _GENERATION_CONFIG).is_file()
            ):
                shutil.copyfile(source / _GENERATION_CONFIG, partial / _GENERATION_CONFIG)
    except OSError as error:
        raise UserError(
            f"cannot export to {out_dir}: {error}; choose a writable path with enough room"
        ) from error


def _write_config(
    decoder: Decoder, hf_config: PreTrainedConfig, out_dir: Path, score_head: ScoreHead | None
) -> None:
    written = type(hf_config).from_dict(hf_config.to_dict())
    prefix = _CLASS_PREFIXES[decoder.config.family]
    if score_head is None:
        written.architectures = [f"{prefix}ForCausalLM"]
    else:
        written.architectures = [f"{prefix}ForSequenceClassification"]
        written.num_labels = 1
        written.pad_token_id = score_head.pad_token_id
    written.dtype = decoder.embed.dtype
    written.save_pretrained(out_dir)


def write_weights(
    decoder: Decoder,
    out_dir: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    names_tied_head: bool = False,
    score_head: ScoreHead | None = None,
) -> None:
    """The safetensors files of `save_pretrained`, and their index if there are several.

    Args:
        decoder: the weights.
        out_dir: an empty directory.
        max_shard_bytes, score_head: as in `save_pretrained`.
        names_tied_head: as in `checkpoint_slices`.
    """
    parameters: dict[str, Tensor] = dict(decoder.named_parameters())
    pieces = checkpoint_slices(decoder.config, names_tied_head=names_tied_head)
    if score_head is not None:
        pieces = [piece for piece in pieces if piece.parameter != "lm_head"]
        pieces.append(CheckpointSlice("score.weight", "score", 0, 1))
        parameters["score"] = score_head.weight

    def rows(piece: CheckpointSlice) -> Tensor:
        return parameters[piece.parameter].detach()[piece.start : piece.stop]

    shards = list(_shards(pieces, rows, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        # Copies, because safetensors refuses the views of one storage that fused rows are.
        tensors = {
            piece.name: rows(piece).to("cpu", copy=True, memory_format=torch.contiguous_format)
            for piece in shard
        }
        save_file(tensors, out_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        total_size = sum(rows(piece).nbytes for piece in pieces)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (out_dir / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(
    pieces: list[CheckpointSlice], rows: Callable[[CheckpointSlice], Tensor], max_shard_bytes: int
) -> Iterator[list[CheckpointSlice]]:
    """Consecutive pieces, as many to a shard as fit; at least one."""
    shard: list[CheckpointSlice] = []
    num_bytes = 0
    for piece in pieces:
        piece_bytes = rows(piece).nbytes
        if shard and num_bytes + piece_bytes > max_shard_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(piece)
        num_bytes += piece_bytes
    yield shard
