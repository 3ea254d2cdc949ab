"""Reads `samples/step_*.parquet` and shapes one step for the page: groups, and their members.

Texts are stored once: a prompt in its group, thinking and answer in the member, and of the
completion only what stands outside of them. Offsets count UTF-16 units, as JavaScript strings do.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SampleFile", "find_sample_files", "read_sample_step"]

GROUP_COLUMNS = (
    "prompt_row",
    "prompt",
    "prompt_text",
    "length_range",
    "language",
    "num_prompt_tokens",
)
MEMBER_COLUMNS = (
    "think",
    "answer",
    "num_completion_tokens",
    "finish_reason",
    "stop_string",
    "truncated",
    "words_think",
    "words_answer",
    "structure",
    "redundancy",
    "advantage",
    "logprob_mean",
    "logprob_min",
    "policy_version",
)
REWARD_PREFIXES = {"reward_": "raw", "normalized_": "normalized", "weighted_": "weighted"}
PROFILE_BINS = 64
NUM_LEAST_LIKELY = 6
LIST_LEAF = re.compile(r"^completion_ids\.")


@dataclass(frozen=True)
class SampleFile:
    """One step's samples on disk, measured without reading them."""

    step: int
    path: Path
    num_samples: int
    num_tokens: int


def find_sample_files(run_dir: Path) -> tuple[list[SampleFile], list[str]]:
    """The readable sample files in step order, and a note for each that cannot be read."""
    files: list[SampleFile] = []
    notes: list[str] = []
    for path in sorted((run_dir / "samples").glob("step_*.parquet")):
        match = re.fullmatch(r"step_(\d+)", path.stem)
        if match is None:
            continue
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            notes.append(f"samples/{path.name} cannot be read and was left out: {error}")
            continue
        files.append(
            SampleFile(int(match[1]), path, metadata.num_rows, _num_completion_tokens(metadata))
        )
    return sorted(files, key=lambda file: file.step), notes


def _num_completion_tokens(metadata: Any) -> int:
    """From the footer alone: a list column's value count is the number of its elements."""
    row_groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(j) for group in row_groups for j in range(group.num_columns))
    return sum(c.num_values for c in columns if LIST_LEAF.match(c.path_in_schema))


def read_sample_step(file: SampleFile, *, with_tokens: bool) -> dict[str, Any]:
    """One step as the page gets it.

    Args:
        file: from `find_sample_files`.
        with_tokens: include every token's id and log-probability; the profile and the least likely
            tokens are included always.

    Returns:
        `{"step", "groups": [{"group", prompt columns, "members": [...]}]}`; a column that is not
        in the file is not in the record.
    """
    names = [n for n in pq.read_schema(file.path).names if n not in {"prompt_ids", "step"}]
    rows = pq.read_table(file.path, columns=names).to_pylist()
    groups: dict[Any, dict[str, Any]] = {}
    for row in rows:
        number = row.get("group", 0)
        if number not in groups:
            prompt = {name: row[name] for name in GROUP_COLUMNS if name in row}
            groups[number] = {"group": number, **prompt, "members": []}
        members = groups[number]["members"]
        member = {"member": row.get("member", len(members))}
        members.append(member | _shape_member(row, with_tokens=with_tokens))
    return {"step": file.step, "groups": [groups[number] for number in sorted(groups)]}


def _shape_member(row: dict[str, Any], *, with_tokens: bool) -> dict[str, Any]:
    member = {name: _finite(row[name]) for name in MEMBER_COLUMNS if name in row}
    member["rewards"] = _reward_parts(row)
    answer = row.get("answer") or ""
    if row.get("repeated_spans"):
        member["repeated_spans"] = _utf16_spans(answer, row["repeated_spans"])
    if row.get("completion") is not None:
        member["outline"] = _completion_outline(row["completion"], row.get("think"), answer)
    if row.get("sampling_logprobs"):
        member |= _token_statistics(row["sampling_logprobs"], row.get("completion_ids"))
        if with_tokens:
            member["logprobs"] = [_finite(round(p, 3)) for p in row["sampling_logprobs"]]
    if with_tokens and row.get("completion_ids"):
        member["ids"] = row["completion_ids"]
    return member


def _finite(value: Any) -> Any:
    """Floats with six digits; None for a value that is not a number (a reward that failed)."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _reward_parts(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for column, value in row.items():
        for prefix, part in REWARD_PREFIXES.items():
            if column.startswith(prefix):
                parts.setdefault(column.removeprefix(prefix), {})[part] = _finite(value)
    return parts


def _utf16_spans(text: str, spans: Iterable[list[int]]) -> list[list[int]]:
    """Code-point offsets → UTF-16 offsets; they differ after each character beyond U+FFFF."""
    offsets = np.zeros(len(text) + 1, dtype=np.int64)
    offsets[1:] = np.cumsum([2 if ord(char) > 0xFFFF else 1 for char in text], dtype=np.int64)
    return [[int(offsets[min(i, len(text))]) for i in span] for span in spans]


def _completion_outline(completion: str, think: str | None, answer: str) -> str:
    """The completion with its two texts replaced by a sign, so that stray text and tags show."""
    for text, sign in ((think or "", "[thinking]"), (answer, "[answer]")):
        if text.strip():
            completion = completion.replace(text.strip(), sign, 1)
    return completion


def _token_statistics(logprobs: list[float], ids: list[int] | None) -> dict[str, Any]:
    """Mean log-probability along the completion, and the least likely tokens with their places."""
    logprobs_N = np.asarray(logprobs, dtype=np.float64)
    bins = np.array_split(logprobs_N, min(PROFILE_BINS, len(logprobs_N)))
    least = np.argsort(logprobs_N, kind="stable")[:NUM_LEAST_LIKELY]
    return {
        "logprob_profile": [_finite(round(float(b.mean()), 3)) for b in bins],
        "least_likely": [
            [int(i), ids[i] if ids and i < len(ids) else None, _finite(float(logprobs_N[i]))]
            for i in least
        ],
    }
