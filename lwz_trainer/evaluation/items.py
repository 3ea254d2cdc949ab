"""Benchmark records and response files, read from the formats that their authors publish.

WritingBench (arXiv 2503.05244), Arena-Write (with LongWriter-Zero, arXiv 2506.18841) and
LongBench-Write (with LongWriter, arXiv 2408.07055) differ in their records; an `Item` is what
generating, judging and reading need of any of them.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.errors import UserError

__all__ = [
    "BANDS",
    "Benchmark",
    "Criterion",
    "Item",
    "Requirement",
    "load_items",
    "load_requirement",
    "load_responses",
]

Benchmark = Literal["writingbench", "arena-write", "longbench-write"]

BANDS = ("1-2", "3-4", "5-6", "7-8", "9-10")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Criterion:
    """One criterion of WritingBench: what is judged, and what each band of scores means."""

    name: str
    description: str
    bands: Mapping[str, str]


@dataclass(frozen=True)
class Item:
    """One task of a benchmark.

    Attributes:
        index: its number in response files. LongBench-Write has none, so there it is the row,
            counted from 0.
        prompt: the request.
        group: WritingBench's `domain1`, else `type`.
        subgroup: WritingBench's `domain2`, else "".
        target: required number of words; None where the record names none.
        criteria: of WritingBench.
        baselines: of Arena-Write: name to text.
    """

    index: int
    prompt: str
    group: str
    subgroup: str = ""
    target: int | None = None
    criteria: tuple[Criterion, ...] = ()
    baselines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """A subset of WritingBench for one requirement (style, format or length).

    Attributes:
        name: of the requirement.
        indices: items of the subset, for R.
        criteria: (index, criterion) pairs that test the requirement, for C.
    """

    name: str
    indices: tuple[int, ...]
    criteria: tuple[tuple[int, str], ...]


def load_items(benchmark: Benchmark, path: Path) -> list[Item]:
    """All tasks of a benchmark's JSONL file, in its order.

    Raises:
        UserError: naming file and line; also for an index that occurs twice.
    """
    parse = _PARSERS[benchmark]
    items: list[Item] = []
    lines: dict[int, str] = {}
    for _, where, record in jsonl_rows(path, str(path)):
        item = parse(_Fields(record, where, row=len(items)))
        if item.index in lines:
            raise UserError(
                f"{where}: index {item.index} stands in {lines[item.index]} already; expected "
                "each task once"
            )
        lines[item.index] = where
        items.append(item)
    if not items:
        raise UserError(f"{path} is empty; expected {benchmark} records, one JSON object per line")
    return _without_empty_baselines(items, path) if benchmark == "arena-write" else items


def load_requirement(name: str, subset: Path, criteria: Path, items: list[Item]) -> Requirement:
    """A requirement's two files: its subset, and the same records with its criteria only.

    Raises:
        UserError: naming the file, where a record is not one of `items` or a criterion is not one
            of its item's.
    """
    in_subset, restricted = (
        _load_part(path, {item.index: item for item in items}) for path in (subset, criteria)
    )
    return Requirement(
        name,
        tuple(item.index for item in in_subset),
        tuple((item.index, criterion.name) for item in restricted for criterion in item.criteria),
    )


def _load_part(path: Path, known: Mapping[int, Item]) -> list[Item]:
    """Records that are all parts of known ones."""
    part = load_items("writingbench", path)
    for item in part:
        if item.index not in known:
            raise UserError(
                f"{path}: index {item.index} is not in the benchmark file; pass the files of "
                "one version of WritingBench"
            )
        names = {criterion.name for criterion in known[item.index].criteria}
        strangers = [c.name for c in item.criteria if c.name not in names]
        if strangers:
            raise UserError(
                f"{path}: index {item.index} has the criterion {strangers[0]!r}, which the "
                "benchmark file does not have; pass the files of one version of WritingBench"
            )
    return part


def load_responses(path: Path, items: list[Item]) -> dict[int, str]:
    """A response file, `{"index": int, "response": str}` a line, by index.

    A line that repeats an earlier one word for word counts once: scripts that resume write their
    last item twice. Other keys are left alone.

    Raises:
        UserError: naming file and line; also for two different responses to one item.
    """
    known = {item.index for item in items}
    responses: dict[int, str] = {}
    lines: dict[int, str] = {}
    for _, where, record in jsonl_rows(path, str(path)):
        fields = _Fields(record, where)
        index, text = fields.integer("index"), fields.text("response", may_be_empty=True)
        if index not in known:
            raise UserError(
                f"{where}: index {index} is no task of this benchmark; expected one of "
                f"{min(known)} to {max(known)}"
            )
        if responses.get(index, text) != text:
            raise UserError(
                f"{where}: index {index} has another response in {lines[index]}; keep one of them"
            )
        if index in responses:
            _logger.warning("%s repeats %s word for word and counts once", where, lines[index])
        responses[index] = text
        lines.setdefault(index, where)
    if not responses:
        raise UserError(f"{path} is empty; expected one index and response per line")
    return responses


def _without_empty_baselines(items: list[Item], path: Path) -> list[Item]:
    """A win over a text that is not there says nothing."""
    kept = [
        dataclasses.replace(
            item, baselines={name: text for name, text in item.baselines.items() if text.strip()}
        )
        for item in items
    ]
    num_empty = sum(len(item.baselines) for item in items) - sum(len(k.baselines) for k in kept)
    num_bare = sum(not item.baselines for item in kept)
    if num_empty or num_bare:
        _logger.warning(
            "%s: %d empty baseline texts are left out; %d of %d tasks have no baseline, so their "
            "answers are compared with nothing",
            path,
            num_empty,
            num_bare,
            len(kept),
        )
    return kept


class _Fields:
    """One record's fields, each checked where it is read; `row` counts records from 0."""

    def __init__(self, record: Any, where: str, *, row: int = 0) -> None:
        if not isinstance(record, dict):
            raise UserError(f"{where} holds a {type(record).__name__}, expected an object")
        self._record = record
        self.where = where
        self.row = row

    def _get(self, name: str) -> Any:
        if name not in self._record:
            present = ", ".join(self._record) or "none"
            raise UserError(f"{self.where} has no `{name}`; its fields are: {present}")
        return self._record[name]

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not (value.strip() or may_be_empty):
            raise UserError(f"{self.where}: {name} must be a text, got {_short(value)}")
        return value

    def integer(self, name: str) -> int:
        value = self._get(name)
        if type(value) is not int:  # JSON's true is an int to Python
            raise UserError(f"{self.where}: {name} must be an integer, got {_short(value)}")
        return value

    def word_count(self, name: str) -> int:
        value = self.integer(name)
        if value <= 0:
            raise UserError(f"{self.where}: {name} must be above 0, got {value}")
        return value

    def has(self, name: str) -> bool:
        return self._record.get(name) is not None

    def children(self, name: str) -> list["_Fields"]:
        value = self._get(name)
        if not isinstance(value, list) or not value:
            raise UserError(f"{self.where}: {name} must be a list of objects, got {_short(value)}")
        return [_Fields(child, f"{self.where}, {name}[{i}]") for i, child in enumerate(value)]

    def texts_by_name(self, name: str) -> dict[str, str]:
        """{name: text}, or a list of {"model" or "name", "response"}; texts may be empty."""
        value = self._get(name)
        if value in (None, "", [], {}):
            return {}
        if isinstance(value, dict):
            fields = _Fields(value, f"{self.where}, {name}")
            pairs = [(key, fields.text(key, may_be_empty=True)) for key in value]
        else:
            pairs = [
                (
                    child.text("model" if child.has("model") else "name"),
                    child.text("response", may_be_empty=True),
                )
                for child in self.children(name)
            ]
        texts = dict(pairs)
        if len(texts) < len(pairs):
            raise UserError(f"{self.where}: {name} must hold texts of different names")
        return texts


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _writingbench_item(fields: _Fields) -> Item:
    criteria = tuple(
        Criterion(
            name=child.text("name"),
            description=child.text("criteria_description"),
            bands={band: child.text(band) for band in BANDS},
        )
        for child in fields.children("checklist")
    )
    if len({criterion.name for criterion in criteria}) < len(criteria):
        raise UserError(f"{fields.where}: checklist has two criteria of one name")
    return Item(
        index=fields.integer("index"),
        prompt=fields.text("query"),
        group=fields.text("domain1"),
        subgroup=fields.text("domain2"),
        criteria=criteria,
    )


def _arena_item(fields: _Fields) -> Item:
    return Item(
        index=fields.integer("idx"),
        prompt=fields.text("question"),
        group=fields.text("type"),
        target=fields.word_count("length") if fields.has("length") else None,
        baselines=fields.texts_by_name("baseline_response"),
    )


def _longbench_item(fields: _Fields) -> Item:
    return Item(
        index=fields.row,
        prompt=fields.text("prompt"),
        group=fields.text("type"),
        target=fields.word_count("length"),
    )


_PARSERS: dict[str, Callable[[_Fields], Item]] = {
    "writingbench": _writingbench_item,
    "arena-write": _arena_item,
    "longbench-write": _longbench_item,
}
