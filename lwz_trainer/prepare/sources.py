"""First user turns of conversations: WildChat-1M's and LMSYS-Chat-1M's layout, or `{"prompt"}`.

    {"conversation": [{"role", "content", ...}, ...], "language", "toxic", "redacted",
     "openai_moderation": [{"flagged", ...}, ...]}
    {"prompt": text, "length_range": [lo, hi] or null}

All fields but `conversation` or `prompt` may be missing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.errors import UserError

__all__ = ["SourceRow", "find_files", "read_rows"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The parts of a Parquet file that are read; assistant turns cannot be told from user turns before.
_COLUMNS = re.compile(
    r"prompt|language|toxic|redacted|length_range\..*|conversation\..*\.(?:role|content)"
    r"|openai_moderation\..*\.flagged"
)
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class SourceRow:
    """One row.

    Attributes:
        text: the first user turn, or the prompt; "" if there is none.
        where: names the row in errors and in the output.
        language: what the data set says, or "".
        is_flagged: marked as toxic or redacted, or flagged by moderation.
        length_range: the row's own, or None.
    """

    text: str
    where: str
    language: str = ""
    is_flagged: bool = False
    length_range: tuple[int, int] | None = None


def find_files(name: str, suffixes: tuple[str, ...] = (".parquet", ".jsonl")) -> list[Path]:
    """The files of an input, sorted: a file, a directory's, or those of a data set on the hub.

    Args:
        name: their path or hub id.
        suffixes: of the files that count.

    Raises:
        UserError: there are none.
    """
    path = Path(name).expanduser()
    wanted = " or ".join(suffixes)
    if path.is_file():
        if path.suffix not in suffixes:
            raise UserError(f"{name}: expected a {wanted} file, got '{path.suffix}'")
        return [path]
    if not path.exists() and _HUB_ID.fullmatch(name):
        path = _download(name, suffixes)
    if not path.is_dir():
        raise UserError(
            f"no input at {name}: expected a {wanted} file, a directory of them, or a hub id such "
            "as org/name; check the path"
        )
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    if not files:
        raise UserError(f"{name} holds no {wanted} file; check the path")
    return files


def read_rows(file: Path) -> Iterator[SourceRow]:
    """The rows of a file in order.

    Raises:
        UserError: naming the file and the line or row.
    """
    if file.suffix == ".parquet":
        records = _parquet_records(file)
    else:
        records = ((where, record) for _, where, record in jsonl_rows(file, str(file)))
    for where, record in records:
        yield _row(record, where)


def _download(repo_id: str, suffixes: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repo_id} is no local path, and downloading it from the hub failed "
            f"({type(error).__name__}); pass a local copy, or log in if its licence must be "
            "accepted"
        ) from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            leaves = [file.schema.column(index).path for index in range(len(file.schema))]
            columns = [leaf for leaf in leaves if _COLUMNS.fullmatch(leaf)]
            if not any(column.split(".")[0] in ("conversation", "prompt") for column in columns):
                raise UserError(
                    f"{path} has neither `conversation` nor `prompt`; its columns are: "
                    f"{', '.join(file.schema_arrow.names) or 'none'}"
                )
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pyarrow.ArrowInvalid, OSError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable parquet file ({problem})") from error


def _row(record: Any, where: str) -> SourceRow:
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}; expected an object")
    if record.get("conversation") is not None:
        text = _first_user_turn(record["conversation"], where)
    elif "prompt" in record:
        text = _checked_text(record["prompt"], where, "prompt")
    else:
        raise UserError(
            f"{where} has neither `conversation` nor `prompt`; its fields are: "
            f"{', '.join(map(str, record)) or 'none'}"
        )
    moderation = record.get("openai_moderation") or ()
    language = record.get("language")
    return SourceRow(
        text=text,
        where=where,
        language=language if isinstance(language, str) else "",
        is_flagged=bool(record.get("toxic"))
        or bool(record.get("redacted"))
        or any(isinstance(turn, dict) and bool(turn.get("flagged")) for turn in moderation),
        length_range=_checked_range(record.get("length_range"), where),
    )


def _first_user_turn(turns: Any, where: str) -> str:
    if not isinstance(turns, list):
        raise UserError(f"{where}: conversation must be a list, got {type(turns).__name__}")
    for turn in turns:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise UserError(
                f"{where}: each turn of a conversation must be an object with role and content, "
                f"got {str(turn)[:80]}"
            )
        if turn["role"] == "user":
            return _checked_text(turn["content"], where, "content")
    return ""


def _checked_text(text: Any, where: str, name: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} must be a string, got {type(text).__name__}")
    return text.strip()


def _checked_range(bounds: Any, where: str) -> tuple[int, int] | None:
    if bounds is None:
        return None
    # type() and not isinstance: JSON's true and false are ints to Python.
    is_pair = isinstance(bounds, list) and [type(bound) for bound in bounds] == [int, int]
    if not is_pair or not (bounds == [0, 0] or 0 <= bounds[0] < bounds[1]):
        raise UserError(
            f"{where}: length_range must be two integers [lo, hi] with 0 <= lo < hi, or [0, 0], "
            f"got {str(bounds)[:80]}"
        )
    return bounds[0], bounds[1]
