"""GGUF files, converted once to a Hugging Face directory in the user's cache.

The weights are unpacked to bf16. The cache entry is named after the file's content, so a replaced
file is converted again and a moved one is not.
"""

import errno
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import torch

from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.atomic_directory import atomic_directory

__all__ = ["cache_directory", "convert_gguf", "file_sha256"]

_MAGIC = b"GGUF"

# What transformers raises for a file that is cut short, or of a kind that it does not convert.
_UNREADABLE = (
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)


def cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/longwriter-zero`, or `~/.cache/...`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "longwriter-zero"


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_gguf(path: Path, sha256: str | None = None) -> Path:
    """The Hugging Face directory that holds the model of a GGUF file.

    Args:
        path: the `.gguf` file.
        sha256: its digest where the caller has it already, else computed.

    Returns:
        A complete directory in the cache; converted now if it was not there.

    Raises:
        UserError: not a readable GGUF file, an unsupported architecture, or no room in the cache.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(
                f"{path} is not a GGUF file (expected it to start with {_MAGIC.decode()}); "
                "download it again"
            )
    target = cache_directory() / f"{path.stem}-{(sha256 or file_sha256(path))[:16]}"
    if target.is_dir():
        return target
    try:
        with atomic_directory(target) as partial:
            _convert(path, partial)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.is_dir():
            return target  # another process finished the same conversion first
        raise UserError(
            f"cannot keep the converted model in {target}: {error}; set XDG_CACHE_HOME to a "
            "directory with room for it"
        ) from error
    return target


def _convert(path: Path, out_dir: Path) -> None:
    # Imported here: transformers' model classes take seconds to import, and a cached or native
    # model needs none of them.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **source)
        ModelConfig.from_hf(config)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.bfloat16, **_dequantize_option(), **source
        )
    except ImportError as error:
        raise UserError(
            f"cannot read {path}: {_first_line(error)}; install the missing package"
        ) from error
    except _UNREADABLE as error:
        raise UserError(
            f"transformers cannot read {path}: {_first_line(error)}; check that the file is "
            "complete, or pass a directory with safetensors"
        ) from error
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _dequantize_option() -> dict[str, Any]:
    """Asks for plain weights; transformers without `GgufConfig` has no other way to load GGUF."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
