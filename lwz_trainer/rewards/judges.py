"""What a chat model is asked about answers, for each of the sources that judge."""

import hashlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.endpoint import Endpoint
from lwz_trainer.evaluation.questions import pair_question, parse_pair
from lwz_trainer.rewards.answer import Answer
from lwz_trainer.rewards.questions import (
    checklist_question,
    criteria_question,
    parse_checklist,
    parse_criteria,
)

__all__ = ["ScoreCall", "judge_calls"]


@dataclass(frozen=True)
class ScoreCall:
    """How one answer is scored: a request, or a score that needs none."""

    ask: Callable[[Endpoint], Awaitable[float]] | None
    given: float = math.nan
    is_applicable: bool = True
    is_truncated: bool = False


def judge_calls(config: WritingRewardConfig) -> Callable[[Sequence[Answer]], list[ScoreCall]]:
    """What a judge is asked about each answer."""
    if config.source == "judge":
        return lambda answers: [_criteria_call(answer, config.criteria) for answer in answers]
    if config.source == "checklist":
        return lambda answers: [_checklist_call(answer) for answer in answers]
    if config.source == "references":
        return lambda answers: [_reference_call(answer) for answer in answers]
    return _pairwise_calls


def _criteria_call(answer: Answer, criteria: tuple[str, ...]) -> ScoreCall:
    if not answer.text:
        return ScoreCall(None, given=0.0)
    messages = criteria_question(answer.prompt, answer.text, criteria)
    return ScoreCall(
        lambda endpoint: endpoint.chat(
            messages, parse=lambda text: parse_criteria(text, len(criteria))
        )
    )


def _checklist_call(answer: Answer) -> ScoreCall:
    points = answer.checklist
    if not points:
        return ScoreCall(None, is_applicable=False)
    if not answer.text:
        return ScoreCall(None, given=0.0)
    messages = checklist_question(answer.prompt, answer.text, points)
    return ScoreCall(
        lambda endpoint: endpoint.chat(
            messages, parse=lambda text: parse_checklist(text, len(points))
        )
    )


def _reference_call(answer: Answer) -> ScoreCall:
    """1 for an answer better than its reference, 0.5 for one as good, 0 for a worse one."""
    if not answer.reference:
        return ScoreCall(None, is_applicable=False)
    if not answer.text:
        return ScoreCall(None, given=0.0)
    return _comparison(answer, answer.reference, {1: 1.0, 0: 0.5, -1: 0.0})


def _pairwise_calls(answers: Sequence[Answer]) -> list[ScoreCall]:
    """BRPO: each answer against one of its group, drawn at random (arXiv 2506.00103).

    1 for the better one of the two, −1 for the worse, 0 for a tie and for the one that was drawn.
    The draw is a function of the texts, so a resumed run makes the same. A group without two
    written answers has no comparison.
    """
    written: dict[tuple[int, str], list[str]] = {}
    for answer in answers:
        if answer.text:
            written.setdefault((answer.group, answer.prompt), []).append(answer.text)
    drawn: dict[tuple[int, str], str] = {}
    for (group, prompt), texts in written.items():
        if len(texts) > 1:
            number = _number_of(prompt, *sorted(texts))
            drawn[group, prompt] = sorted(texts)[number % len(texts)]
    calls = []
    for answer in answers:
        rival = drawn.get((answer.group, answer.prompt))
        if rival is None:
            calls.append(ScoreCall(None, is_applicable=False))
        elif not answer.text:
            calls.append(ScoreCall(None, given=-1.0))
        elif answer.text == rival:
            calls.append(ScoreCall(None, given=0.0))
        else:
            calls.append(_comparison(answer, rival, {1: 1.0, 0: 0.0, -1: -1.0}))
    return calls


def _comparison(answer: Answer, other: str, values: dict[int, float]) -> ScoreCall:
    """One question; which text stands first is drawn, since judges favour a place.

    Args:
        answer: of the policy.
        other: what it is compared with.
        values: score of an answer that is better (1), as good (0), worse (-1).
    """
    is_first = _number_of(answer.prompt, answer.text, other) % 2 == 0
    first, second = (answer.text, other) if is_first else (other, answer.text)
    messages = pair_question(answer.prompt, first, second)

    def parse(text: str) -> float:
        winner = parse_pair(text)["winner"]
        if winner == "tie":
            return values[0]
        return values[1 if (winner == "A") == is_first else -1]

    return ScoreCall(lambda endpoint: endpoint.chat(messages, parse=parse))


def _number_of(*texts: str) -> int:
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8])
