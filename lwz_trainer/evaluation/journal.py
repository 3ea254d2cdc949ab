"""A JSONL file that is appended to as results arrive, so that a killed run keeps them."""

import json
import os
from pathlib import Path
from typing import Any

from lwz_trainer.data.jsonl import parsed_lines
from lwz_trainer.errors import UserError

__all__ = ["Journal"]


class Journal:
    """Reads what an earlier run left and appends to it; made by the first `append`.

    A last line without its line break was torn by a kill: the first `append` cuts it off. Until
    then the file is as it was found, since a caller may find that it is none of its own.

    Attributes:
        records: all complete records, in order.

    Raises:
        UserError: the file cannot be read or written, or is no journal: a line is no JSON object,
            or the torn one does not begin as one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        _refuse_unwritable(path)
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; pass another path") from error
        self._num_bytes = content.rfind(b"\n") + 1
        self._is_torn = self._num_bytes < len(content)
        if self._is_torn and not content.startswith(b"{", self._num_bytes):
            raise UserError(f"{path} is no file of this program: pass another path, or remove it")
        for _, where, record in parsed_lines(content[: self._num_bytes].split(b"\n"), str(path)):
            if not isinstance(record, dict):
                raise UserError(f"{where} holds a {type(record).__name__}, expected an object")
            self.records.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line; the operating system has it when this returns."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._is_torn:
                file.truncate(self._num_bytes)
                self._is_torn = False
            file.write(line.encode("utf-8", errors="replace"))
        self.records.append(record)


def _refuse_unwritable(path: Path) -> None:
    """Before anything is paid for: the nearest thing on the way to the file that exists."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    is_in_place = existing.is_file() if existing == path else existing.is_dir()
    if not is_in_place or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {path}: {existing} is in the way; pass another path")
