"""The tags of a completion: what is thinking, what is the answer, and how well formed it is.

Format of LongWriter-Zero (arXiv 2506.18841): exactly one <think>…</think>, then exactly one
<answer>…</answer>; with the direct prompt, <answer>…</answer> alone.
"""

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Completion", "parse_completion"]

_TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True)
class Completion:
    """A completion taken apart.

    Args:
        think: the thinking, "" where there is none; up to the end of the text if never closed.
        answer: the answer without white space around it, "" where there is none.
        answer_start: position of the answer's first character in the parsed text.
        structure: 0 to 1, how well formed the tags are.
        closed: whether the answer was finished, by its closing tag or by that stop string.
    """

    think: str
    answer: str
    answer_start: int
    structure: float
    closed: bool


def parse_completion(
    text: str,
    *,
    kind: Literal["think", "direct"],
    mode: Literal["strict", "graded"],
    stopped_at_answer: bool,
) -> Completion:
    """Finds thinking and answer in a completion and judges its tags.

    The answer is the text after the first <answer> that follows the first </think> (kind "direct":
    after the first <answer>), up to </answer>. A truncated answer is an answer too, so that length
    and quality can be judged, but its structure is not whole.

    `mode="strict"` gives 1 for exactly the right tags in the right order, a non-empty answer and
    nothing but white space outside the tags; else 0. `mode="graded"` gives an equal part of 1 for
    each of these pieces, up to the first one that is missing:

        1. thinking:  exactly one <think>, and after it exactly one </think> (kind "think" only)
        2. opening:   exactly one <answer>, after the thinking (kind "direct": and no think tags)
        3. content:   something is written in the answer
        4. closing:   exactly one </answer>, after <answer>
        5. tidiness:  nothing but white space outside the tags

    Each piece rests on those before it. So a policy climbs from one to the next, a tag written too
    early or twice takes away its piece and all later ones, and 1 means the same in both modes.

    Args:
        text: the tag that the template left open, if any, and everything the model wrote.
        kind: which of the two forms the template asks for.
        mode: how structure is graded.
        stopped_at_answer: the sampler ended the completion at the stop string </answer>. It may
            have left the tag off; then it is taken as written.
    """
    if kind not in ("think", "direct"):
        raise ValueError(f"kind must be 'think' or 'direct', got {kind!r}")
    if mode not in ("strict", "graded"):
        raise ValueError(f"mode must be 'strict' or 'graded', got {mode!r}")
    if stopped_at_answer and "</answer>" not in text:
        text += "</answer>"

    think, think_end = _find_think(text) if kind == "think" else ("", 0)
    answer_start, answer_end, closed = _find_answer(text, think_end)
    answer = text[answer_start:answer_end]
    leading_space = len(answer) - len(answer.lstrip())
    answer = answer.strip()

    pieces = _pieces(text, kind, has_answer=bool(answer))
    num_right = pieces.index(False) if False in pieces else len(pieces)
    structure = num_right / len(pieces)
    if mode == "strict":
        structure = float(structure == 1)
    return Completion(
        think=think.strip(),
        answer=answer,
        answer_start=answer_start + leading_space,
        structure=structure,
        closed=closed,
    )


def _find_think(text: str) -> tuple[str, int | None]:
    """The thinking, and the position after </think>, which is None if that tag is missing."""
    start = text.find("<think>")
    close = text.find("</think>")
    if close < 0:
        return ("" if start < 0 else text[start + len("<think>") :]), None
    think_start = start + len("<think>") if 0 <= start < close else 0
    return text[think_start:close], close + len("</think>")


def _find_answer(text: str, after: int | None) -> tuple[int, int, bool]:
    """Start and end of the answer's content and whether it is closed; an empty span for none."""
    opening = -1 if after is None else text.find("<answer>", after)
    if opening < 0:
        return len(text), len(text), False
    start = opening + len("<answer>")
    end = text.find("</answer>", start)
    return (start, len(text), False) if end < 0 else (start, end, True)


def _pieces(text: str, kind: Literal["think", "direct"], *, has_answer: bool) -> list[bool]:
    """The pieces of the graded form, in order."""
    tags = [match.group() for match in _TAG.finditer(text)]
    outside = re.sub(r"<answer>.*?</answer>", "", text, flags=re.DOTALL)
    if kind == "think":
        outside = re.sub(r"<think>.*?</think>", "", outside, count=1, flags=re.DOTALL)
        is_thought = _is_one_pair(tags, "think")
        is_opened = tags.count("<answer>") == 1 and tags[:3] == ["<think>", "</think>", "<answer>"]
        beginning = [is_thought, is_opened]
    else:
        is_opened = tags.count("<answer>") == 1 and tags[0] == "<answer>"
        beginning = [is_opened and "<think>" not in tags and "</think>" not in tags]
    return [*beginning, has_answer, _is_one_pair(tags, "answer"), not outside.strip()]


def _is_one_pair(tags: list[str], name: str) -> bool:
    """Whether a tag is opened exactly once and, after that, closed exactly once."""
    return [tag for tag in tags if tag in (f"<{name}>", f"</{name}>")] == [
        f"<{name}>",
        f"</{name}>",
    ]
