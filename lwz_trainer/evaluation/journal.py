"""A JSONL file that is appended to as results arrive, so that a killed run keeps them."""

import json
from pathlib import Path
from typing import Any

from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.errors import UserError

__all__ = ["Journal"]


class Journal:
    """Reads what an earlier run left and appends to it; made by the first `append`.

    A last line without its line break was torn by a kill: it is cut off.

    Attributes:
        records: all complete records, in order.

    Raises:
        UserError: a complete line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        self._cut_torn_line()
        for _, where, record in jsonl_rows(path, str(path)):
            if not isinstance(record, dict):
                raise UserError(f"{where} holds a {type(record).__name__}, expected an object")
            self.records.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line; the operating system has it when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode("utf-8", errors="replace"))
        self.records.append(record)

    def _cut_torn_line(self) -> None:
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with self.path.open("r+b") as file:
                file.truncate(complete)
