"""Small benchmarks in the published formats, written for these tests, and a judge by rule."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lwz_trainer.endpoint import AnswerError, EndpointError
from lwz_trainer.evaluation.items import BANDS
from lwz_trainer.evaluation.judging import JudgeCall
from lwz_trainer.evaluation.questions import DIMENSIONS

__all__ = [
    "StubJudge",
    "arena_record",
    "longbench_record",
    "quality_reply",
    "write_jsonl",
    "writing_record",
]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def writing_record(index: int, domain: str, criteria: tuple[str, ...]) -> dict:
    checklist = [
        {
            "name": name,
            "criteria_description": f"How well {name} is met.",
            **{band: f"{name} at {band}." for band in BANDS},
        }
        for name in criteria
    ]
    return {
        "index": index,
        "domain1": domain,
        "domain2": f"{domain} papers",
        "query": f"Write a report of 100 words on subject {index}.",
        "checklist": checklist,
    }


def arena_record(idx: int, **other: Any) -> dict:
    return {
        "idx": idx,
        "question": f"Tell the story of harbour {idx}.",
        "type": "story",
        "length": 200,
        "baseline_response": {"old-a": f"Harbour {idx} by a.", "old-b": f"Harbour {idx} by b."},
        **other,
    }


def longbench_record(length: int, kind: str = "News Report") -> dict:
    return {"prompt": f"Report in {length} words.", "type": kind, "length": length}


def quality_reply(*scores: int) -> str:
    return json.dumps({"reason": "so", **dict(zip(DIMENSIONS, scores, strict=True))})


class StubJudge:
    """Replies by a function of the call; None is a failure. Counts what it was asked."""

    def __init__(self, reply: Callable[[JudgeCall], str | None], settings: str = "stub") -> None:
        self._reply = reply
        self.settings = settings
        self.asked: list[tuple[str, int, str]] = []

    def ask(
        self, calls: Iterable[JudgeCall]
    ) -> Iterator[tuple[JudgeCall, dict[str, Any] | EndpointError]]:
        for call in calls:
            self.asked.append(call.key)
            reply = self._reply(call)
            yield call, AnswerError("unreadable") if reply is None else call.parse(reply)
