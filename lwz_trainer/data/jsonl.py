"""Rows of a JSONL file, each with the words that name it in an error."""

import json
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from typing import Any

from lwz_trainer.errors import UserError

__all__ = ["jsonl_rows"]


def jsonl_rows(source: Traversable, name: str) -> Iterator[tuple[int, str, Any]]:
    """Non-empty lines as (number from 1, "NAME line N", value).

    Args:
        source: a `pathlib.Path` or a resource of a package.
        name: what errors call it.

    Raises:
        UserError: the file is not there, not UTF-8, or a line is not JSON.
    """
    try:
        # utf-8-sig: some editors put a byte order mark first, which json refuses. Lines are split
        # at "\n" alone, as str.splitlines() also cuts at U+2028, which JSON strings may hold.
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; check the path") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where} is not valid JSON ({error}); expected one object per line"
            ) from error
        yield number, where, record
