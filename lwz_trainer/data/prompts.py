"""Writing requests: the bundled sets, the user's files, and the order in which training sees them.

A request may carry the range of words (Chinese: characters) that a good answer has. The range
[0, 0] marks a request that cannot be fulfilled; such rows are dropped and counted (LongWriter-Zero,
arXiv 2506.18841).
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.errors import UserError

__all__ = [
    "BUNDLED_PROMPTS",
    "Prompt",
    "has_utf8",
    "load_prompts",
    "prompt_language",
    "prompt_order",
    "replacement_index",
]

BUNDLED_PROMPTS = ("writing", "demo")

_COLUMNS = ("prompt", "length_range", "checklist", "references")
_CJK = re.compile(r"[\u4e00-\u9fff]")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One writing request.

    Args:
        prompt: the request, word for word.
        length_range: fewest and most words (Chinese: characters) of a good answer; None if unknown.
        language: "zh" if the request holds a character in U+4E00..U+9FFF, else "en".
        row: its line in the JSONL file or its row in the parquet file, counted from 1.
        checklist: points that a good answer meets, for a reward with source "checklist".
        references: answers of rising quality, for a reward with source "references".
    """

    prompt: str
    length_range: tuple[int, int] | None
    language: str
    row: int
    checklist: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


def load_prompts(path_or_name: str) -> list[Prompt]:
    """Read writing requests in file order.

    Args:
        path_or_name: "writing" or "demo" for a bundled set, else the path of a .jsonl or .parquet
            file with the column `prompt` (str) and, if wanted, `length_range` ([lo, hi] integers,
            0 <= lo < hi, or null), `checklist` and `references` (lists of texts, or null). Other
            columns are left alone.
    Returns:
        The requests, without the rows whose range is [0, 0]; a warning tells how many those were.
    Raises:
        UserError: naming the file and the line or row.
    """
    if path_or_name in BUNDLED_PROMPTS:
        bundled = resources.files("lwz_trainer.data") / "bundled" / f"{path_or_name}.jsonl"
        rows = jsonl_rows(bundled, path_or_name)
    else:
        rows = _file_rows(Path(path_or_name))

    prompts: list[Prompt] = []
    num_rows = 0
    for row, where, record in rows:
        num_rows += 1
        prompt = _checked_prompt(record, row, where)
        if prompt is not None:
            prompts.append(prompt)

    if num_rows == 0:
        raise UserError(f"{path_or_name} is empty; expected at least one row with a `prompt`")
    if not prompts:
        raise UserError(
            f"{path_or_name}: every row ({num_rows}) has the length_range [0, 0], which says"
            " that it cannot be fulfilled; expected at least one other row"
        )
    if len(prompts) < num_rows:
        _logger.warning(
            "%s: dropped %d of %d rows, whose length_range is [0, 0]",
            path_or_name,
            num_rows - len(prompts),
            num_rows,
        )
    return prompts


def prompt_order(num_prompts: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of the prompts at the absolute positions start .. start + count - 1.

    Position p is in epoch e = p // num_prompts, and each epoch is a permutation of all prompts that
    depends on (seed, e) alone: a resumed run, or one with another batch size, sees the same order.

    Args:
        num_prompts: size of the prompt list, at least 1.
        seed: the run's data seed, at least 0.
        start: first position, counted from the beginning of training.
        count: how many indices.
    Raises:
        ValueError: if a number is out of its range.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
    if seed < 0 or start < 0 or count < 0:
        raise ValueError(
            f"seed, start and count must not be negative, got {seed}, {start} and {count}"
        )
    order: list[int] = []
    position, end = start, start + count
    while position < end:
        epoch, offset = divmod(position, num_prompts)
        # spawn_key keeps the two numbers apart: a seed above 2**32 cannot run into an epoch.
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
        permutation = np.random.default_rng(sequence).permutation(num_prompts)
        taken = permutation[offset : offset + end - position].tolist()
        order.extend(taken)
        position += len(taken)
    return order


def replacement_index(
    num_prompts: int, seed: int, *, step: int, group: int, attempt: int, taken: set[int]
) -> int:
    """Index of a prompt for a group of a step whose own has taught nothing.

    It depends on the arguments alone, and is one of those that are not taken if there are any.
    """
    free = sorted(set(range(num_prompts)) - taken) or list(range(num_prompts))
    # Three numbers: no epoch of `prompt_order` has this key.
    sequence = np.random.SeedSequence(seed, spawn_key=(step, group, attempt))
    return free[int(np.random.default_rng(sequence).integers(len(free)))]


def _file_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Rows of the user's file as (number from 1, "FILE line N", record)."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"cannot read prompts from {str(path)!r}; expected a .jsonl or .parquet file or one of"
            f" the bundled sets: {', '.join(BUNDLED_PROMPTS)}"
        )
    if not path.is_file():
        raise UserError(f"no such prompt file: {path}; check the path")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return jsonl_rows(path, str(path))


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    # Here and not above: it takes a quarter of a second, and most files are JSONL.
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
    with file:
        present = file.schema_arrow.names
        if "prompt" not in present:
            raise UserError(
                f"{path} has no column `prompt`; its columns are: {', '.join(present) or 'none'}"
            )
        columns = [name for name in _COLUMNS if name in present]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield number, f"{path} row {number}", record


def _checked_prompt(record: Any, row: int, where: str) -> Prompt | None:
    """The record as a Prompt, or None for the range [0, 0]."""
    if not isinstance(record, dict):
        raise UserError(
            f"{where} holds a {type(record).__name__}; expected an object with a `prompt`"
        )
    if "prompt" not in record:
        raise UserError(
            f"{where} has no `prompt`; its fields are: {', '.join(map(str, record)) or 'none'}"
        )
    text = record["prompt"]
    if not isinstance(text, str):
        raise UserError(f"{where}: prompt must be a string, got {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{where}: prompt is empty; write a request or remove the row")
    if not has_utf8(text):
        raise UserError(f"{where}: prompt holds half of a surrogate pair; remove that character")

    length_range = record.get("length_range")
    lists = {name: _texts(record, name, where) for name in ("checklist", "references")}
    if length_range is None:
        return Prompt(text, None, prompt_language(text), row, **lists)
    # type() and not isinstance: JSON's true and false are ints to Python.
    if (
        not isinstance(length_range, list)
        or len(length_range) != 2
        or any(type(bound) is not int for bound in length_range)
    ):
        raise UserError(
            f"{where}: length_range must be two integers [lo, hi], got {length_range!r}"
        )
    low, high = length_range
    if (low, high) == (0, 0):
        return None
    if low < 0 or high <= low:
        raise UserError(
            f"{where}: length_range must have 0 <= lo < hi, got [{low}, {high}]"
            " ([0, 0] marks a request to drop)"
        )
    return Prompt(text, (low, high), prompt_language(text), row, **lists)


def _texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of texts that a record may have."""
    texts = record.get(name)
    if texts is None:
        return ()
    if not isinstance(texts, list) or any(
        not isinstance(text, str) or not text.strip() for text in texts
    ):
        raise UserError(f"{where}: {name} must be a list of texts, none of them empty")
    if not all(map(has_utf8, texts)):
        raise UserError(f"{where}: {name} holds half of a surrogate pair; remove that character")
    return tuple(texts)


def has_utf8(text: str) -> bool:
    """False for half of a surrogate pair, which JSON and command lines may hold, no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_language(text: str) -> str:
    """As in `Prompt.language`."""
    return "zh" if _CJK.search(text) else "en"
