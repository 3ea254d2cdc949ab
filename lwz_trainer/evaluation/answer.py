"""What of a response is the piece; only this is judged and counted, never the thinking."""

import re

__all__ = ["final_answer"]

_TAG = re.compile(r"</?(?:think|answer)>")


def final_answer(response: str) -> str:
    """The answer of a response of any model, without white space around it; "" if there is none.

    Thinking ends at its closing tag whatever follows it (no blank line is needed), or at the end
    if generation was cut in it; it begins with the response where a template opened the tag. What
    is left of the response is the answer, or the inside of <answer> where that tag is; the closing
    tag may be missing, as stop strings leave it off. Tags inside <answer> are part of it.
    """
    before, rest = "", response
    while (tag := _TAG.search(rest)) is not None and tag.group().endswith("think>"):
        if tag.group() == "<think>":
            before += rest[: tag.start()]
            rest = rest[tag.end() :].partition("</think>")[2]
        else:
            before, rest = "", rest[tag.end() :]
    _, opening, inside = rest.partition("<answer>")
    return (inside if opening else before + rest).partition("</answer>")[0].strip()
