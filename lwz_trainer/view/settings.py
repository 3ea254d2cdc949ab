"""Reads a run's `config.yaml` as flat, dotted settings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lwz_trainer.errors import UserError

__all__ = ["read_settings"]


def read_settings(run_dir: Path) -> dict[str, str]:
    """`{"rollout.temperature": "0.8", ...}` in the order of the file; empty without a file.

    Raises:
        UserError: the file is not YAML, or not a mapping.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is broken: expected YAML, got {reason}; repair or remove this file"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is broken: expected a mapping, got {type(config).__name__}; "
            "repair or remove this file"
        )
    return dict(_flatten(config, ""))


def _flatten(config: dict[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, str):
            yield name, value
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)
