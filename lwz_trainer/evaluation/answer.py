"""What of a response is the piece; only this is judged and counted, never the thinking."""

import re

__all__ = ["final_answer"]

_TAG = re.compile(r"</?(?:think|answer)>")


def final_answer(response: str) -> str:
    """The answer of a response of any model, without white space around it; "" if there is none.

    Thinking ends at its closing tag whatever follows it (no blank line is needed) and is never
    closed if generation was cut in it, so then there is no answer. What follows is the answer, or
    the inside of <answer> where that tag is; the closing tag may be missing, as stop strings leave
    it off. A response without tags is the answer itself.
    """
    rest = response
    while rest.lstrip().startswith("<think>") or _first_tag(rest) == "</think>":
        _, closing, rest = rest.partition("</think>")
        if not closing:
            return ""
    _, opening, inside = rest.partition("<answer>")
    return (inside if opening else rest).partition("</answer>")[0].strip()


def _first_tag(text: str) -> str:
    match = _TAG.search(text)
    return match.group() if match else ""
