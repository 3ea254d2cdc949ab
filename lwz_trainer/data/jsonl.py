"""Rows of a JSONL file, each with the words that name it in an error."""

import json
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable
from typing import Any

from lwz_trainer.errors import UserError

__all__ = ["jsonl_rows", "parsed_lines"]


def jsonl_rows(source: Traversable, name: str, *, start: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Non-empty lines as (number from 1, "NAME line N", value), read one by one.

    Args:
        source: a `pathlib.Path` or a resource of a package.
        name: what errors call it.
        start: so many lines are passed over unread.

    Raises:
        UserError: the file is not there, not UTF-8, or a line is not JSON.
    """
    try:
        # Bytes, since lines end at "\n" alone: text has other ends that JSON strings may hold.
        with source.open("rb") as file:
            yield from parsed_lines(file, name, start=start)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; check the path") from error


def parsed_lines(
    lines: Iterable[bytes], name: str, *, start: int = 0
) -> Iterator[tuple[int, str, Any]]:
    """As `jsonl_rows`, for lines that are at hand."""
    for number, line in enumerate(lines, start=1):
        if number > start and line.strip():
            where = f"{name} line {number}"
            yield number, where, _parsed(line, number, name, where)


def _parsed(line: bytes, number: int, name: str, where: str) -> Any:
    try:
        # Some editors put a byte order mark first, which json refuses.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 (line {number}: {error}); save it as UTF-8"
        ) from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{where} is not valid JSON ({error}); expected one object per line"
        ) from error
