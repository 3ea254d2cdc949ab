"""Answers on disk: a run that is killed and started again pays for no answer twice.

An answer is committed the moment it arrives. What a kill can cost are requests under way, whose
answers never arrived. If none of the answers to a question could be read they are forgotten at the
end of the run, and the next run gets others. The file holds requests and answers, never headers,
so no API key.
"""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from lwz_trainer.errors import UserError

__all__ = ["AnswerCache"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    answer TEXT NOT NULL,
    time TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) WITHOUT ROWID
"""


class AnswerCache:
    """JSON answers by the whole JSON request; several processes may share the file.

    A file that is not there is made when it is first used: what fails before that leaves nothing.

    Args:
        path: the SQLite file; it and its directory are made if they are missing.

    Raises:
        UserError: the file is something else, or, at its first use, cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = self._open() if path.exists() else None
        self._forgotten: set[str] = set()

    def get(self, request: dict[str, Any]) -> Any | None:
        """The answer to an equal request, or None."""
        key = _key(_canonical(request))
        row = self._execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, request: dict[str, Any], answer: Any) -> None:
        """Stores an answer; it is on disk when this returns."""
        text = _canonical(request)
        self._execute(
            "INSERT OR REPLACE INTO answers (key, request, answer) VALUES (?, ?, ?)",
            (_key(text), text, json.dumps(answer)),
        )

    def forget(self, request: dict[str, Any]) -> None:
        """Takes an answer off the disk when this is closed: a kill before that forgets nothing."""
        self._forgotten.add(_key(_canonical(request)))

    def close(self) -> None:
        """Takes what is forgotten off the disk and ends the connection."""
        for key in self._forgotten:
            self._execute("DELETE FROM answers WHERE key = ?", (key,))
        self._forgotten.clear()
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One thread at a time uses it, but not always the one that opened it.
            connection = sqlite3.connect(
                self._path, isolation_level=None, timeout=60, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            # In WAL mode this survives a killed process; only a power cut may lose the last ones.
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"cannot open the answer cache {self._path} ({error}): pass a path that can be "
                "written, or remove the file"
            ) from error
        return connection

    def _execute(self, statement: str, values: tuple[str, ...]) -> sqlite3.Cursor:
        if self._connection is None:
            self._connection = self._open()
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise UserError(
                f"the answer cache {self._path} failed ({error}): free space on its disk, or "
                "remove the file if it is damaged; the same command goes on"
            ) from error


def _canonical(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


def _key(canonical_request: str) -> str:
    return hashlib.sha256(canonical_request.encode()).hexdigest()
