"""Rows of a JSONL file, each with the words that name it in an error."""

import json
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable
from typing import Any

from lwz_trainer.errors import UserError

__all__ = ["jsonl_lines", "jsonl_rows", "parsed_line", "parsed_lines"]


def jsonl_rows(source: Traversable, name: str, *, start: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Non-empty lines as (number from 1, "NAME line N", value), read one by one.

    Args:
        source: a `pathlib.Path` or a resource of a package.
        name: what errors call it.
        start: so many lines are passed over unread.

    Raises:
        UserError: the file is not there, not UTF-8, or a line is not JSON.
    """
    for number, where, line in jsonl_lines(source, name, start=start):
        yield number, where, parsed_line(line, number, name)


def jsonl_lines(
    source: Traversable, name: str, *, start: int = 0
) -> Iterator[tuple[int, str, bytes]]:
    """As `jsonl_rows`, before `parsed_line`: for those who go on behind a bad line."""
    try:
        # Bytes, since lines end at "\n" alone: text has other ends that JSON strings may hold.
        with source.open("rb") as file:
            yield from _numbered(file, name, start=start)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; check the path") from error


def parsed_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str, Any]]:
    """As `jsonl_rows`, for lines that are at hand."""
    for number, where, line in _numbered(lines, name):
        yield number, where, parsed_line(line, number, name)


def parsed_line(line: bytes, number: int, name: str) -> Any:
    """The value of one line.

    Raises:
        UserError: it is not UTF-8 or not JSON.
    """
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
            f"{name} line {number} is not valid JSON ({error}); expected one object per line"
        ) from error


def _numbered(
    lines: Iterable[bytes], name: str, *, start: int = 0
) -> Iterator[tuple[int, str, bytes]]:
    for number, line in enumerate(lines, start=1):
        if number > start and line.strip():
            yield number, f"{name} line {number}", line
