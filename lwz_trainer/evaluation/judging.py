"""Judge calls of a benchmark: which there are, how they are run, and what they said.

Every judgment is a line of `judgments.jsonl` as soon as it arrives. A call that failed has no line:
it is missing, never 0, and the same command asks again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from lwz_trainer.digest import short_digest
from lwz_trainer.endpoint import BlockingEndpoint, EndpointError, Message
from lwz_trainer.errors import UserError
from lwz_trainer.evaluation.items import Benchmark, Item
from lwz_trainer.evaluation.journal import Journal
from lwz_trainer.evaluation.questions import (
    DIMENSIONS,
    criterion_question,
    pair_question,
    parse_criterion,
    parse_pair,
    parse_quality,
    quality_question,
)

__all__ = [
    "EndpointJudge",
    "Judge",
    "JudgeCall",
    "JudgingResult",
    "judge_all",
    "judge_calls",
    "quality_call",
]


@dataclass(frozen=True)
class JudgeCall:
    """One question to the judge.

    Attributes:
        system: whose answer it is about.
        index: of the item.
        part: the criterion; "quality"; or "BASELINE/first" and "BASELINE/second", which say
            where the system's answer stands.
        question: makes the messages; not made before they are sent, as each holds the answer.
        parse: reads the reply, ValueError if it cannot.
        given: the judgment of an answer that is not there, which needs no judge.
    """

    system: str
    index: int
    part: str
    question: Callable[[], list[Message]]
    parse: Callable[[str], dict[str, Any]]
    given: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        return self.system, self.index, self.part


class Judge(Protocol):
    """Answers calls in any order, each with its judgment or with why there is none."""

    settings: str
    """Model and sampling; judgments under other settings are not reused."""

    def ask(
        self, calls: Iterable[JudgeCall]
    ) -> Iterator[tuple[JudgeCall, dict[str, Any] | EndpointError]]: ...


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint.

    Args:
        endpoint: open for as long as this is used.
        settings: as in `Judge`.
    """

    def __init__(self, endpoint: BlockingEndpoint, settings: str) -> None:
        self._endpoint = endpoint
        self.settings = settings

    def ask(
        self, calls: Iterable[JudgeCall]
    ) -> Iterator[tuple[JudgeCall, dict[str, Any] | EndpointError]]:
        return self._endpoint.map(
            calls, lambda endpoint, call: endpoint.chat(call.question(), parse=call.parse)
        )


@dataclass(frozen=True)
class JudgingResult:
    """All judgments by (system, index, part), and the failures in words."""

    judgments: dict[tuple[str, int, str], Mapping[str, Any]]
    failures: list[str]


def judge_calls(
    benchmark: Benchmark, items: list[Item], systems: Mapping[str, Mapping[int, str]]
) -> list[JudgeCall]:
    """Every call of a benchmark.

    Args:
        benchmark: which.
        items: its tasks.
        systems: name to {index: answer without thinking}; items without an answer are left out.
    """
    calls: list[JudgeCall] = []
    for system, answers in systems.items():
        for item in items:
            if item.index in answers:
                calls += _item_calls(benchmark, item, system, answers[item.index])
    return calls


def judge_all(
    calls: list[JudgeCall],
    judge: Judge,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> JudgingResult:
    """Asks what the journal does not hold yet.

    Args:
        calls: no two with one key.
        judge: who is asked.
        journal: judgments of earlier runs are taken from it, new ones are appended.
        on_progress: gets the number of calls that are done and of all calls.

    Raises:
        EndpointDown: from the judge; what has been judged is in the journal.
        UserError: the journal is damaged.
    """
    judgments: dict[tuple[str, int, str], Mapping[str, Any]] = {
        call.key: call.given for call in calls if call.given is not None
    }
    recorded = _recorded(journal)
    open_calls: list[JudgeCall] = []
    for call in calls:
        if call.given is not None:
            continue
        known = recorded.get((*call.key, _digest(call, judge.settings)))
        if known is None:
            open_calls.append(call)
        else:
            judgments[call.key] = known
    failures: dict[tuple[str, int, str], str] = {}
    on_progress(len(judgments), len(calls))
    for call, outcome in judge.ask(open_calls):
        if isinstance(outcome, EndpointError):
            failures[call.key] = f"{call.system}, index {call.index}, {call.part}: {outcome}"
        else:
            system, index, part = call.key
            journal.append(
                {
                    "system": system,
                    "index": index,
                    "part": part,
                    "digest": _digest(call, judge.settings),
                    "judgment": outcome,
                }
            )
            judgments[call.key] = outcome
        on_progress(len(judgments) + len(failures), len(calls))
    in_order = [failures[call.key] for call in open_calls if call.key in failures]
    return JudgingResult(judgments, in_order)


def quality_call(system: str, item: Item, answer: str) -> JudgeCall:
    """LongBench-Write's question; an empty answer has the lowest score in each dimension."""
    given = None if answer else {**dict.fromkeys(DIMENSIONS, 1), "reason": _NO_ANSWER}
    question = partial(quality_question, item.prompt, answer)
    return JudgeCall(system, item.index, "quality", question, parse_quality, given)


_NO_ANSWER = "no answer"


def _item_calls(benchmark: Benchmark, item: Item, system: str, answer: str) -> list[JudgeCall]:
    if benchmark == "longbench-write":
        return [quality_call(system, item, answer)]
    if benchmark == "writingbench":
        given = None if answer else {"score": 1, "reason": _NO_ANSWER}
        return [
            JudgeCall(
                system,
                item.index,
                criterion.name,
                partial(criterion_question, item.prompt, answer, criterion),
                parse_criterion,
                given,
            )
            for criterion in item.criteria
        ]
    return [
        call
        for baseline, text in item.baselines.items()
        for call in _pair_calls(item, system, answer, baseline, text)
    ]


def _pair_calls(item: Item, system: str, answer: str, baseline: str, text: str) -> list[JudgeCall]:
    """Both orders; an empty answer loses."""
    orders = (("first", answer, text, "B"), ("second", text, answer, "A"))
    return [
        JudgeCall(
            system,
            item.index,
            f"{baseline}/{place}",
            partial(pair_question, item.prompt, first, second),
            parse_pair,
            None if answer else {"winner": loss, "reason": _NO_ANSWER},
        )
        for place, first, second, loss in orders
    ]


def _recorded(journal: Journal) -> dict[tuple[str, int, str, str], Mapping[str, Any]]:
    """Judgments by key and digest: an item that stands there twice still counts once."""
    try:
        return {
            (record["system"], record["index"], record["part"], record["digest"]): record[
                "judgment"
            ]
            for record in journal.records
        }
    except KeyError as error:
        raise UserError(
            f"{journal.path}: a line has no {error}; remove the file, and the answer cache "
            "gives the judgments again"
        ) from error


def _digest(call: JudgeCall, settings: str) -> str:
    """Of everything that a judgment depends on."""
    return short_digest([settings, call.question()])
