"""Reading a judge's reply: JSON objects, wherever they stand in the text after its thinking."""

import json
import re
from typing import Any

__all__ = ["json_object", "json_objects"]

_MARK = re.compile(r"[{}]|<think>")
# strict=False: models write line breaks into strings.
_DECODER = json.JSONDecoder(strict=False)


def json_objects(text: str) -> list[dict[str, Any]]:
    """The whole objects after the thinking, in order; none that stands inside a broken one.

    Raises:
        ValueError: the thinking has no end; what it holds are drafts.
    """
    answer = text.rpartition("</think>")[2]
    objects: list[dict[str, Any]] = []
    depth = 0  # of braces that are no whole object: sets in a sentence, an object that was cut
    place = 0
    while (mark := _MARK.search(answer, place)) is not None:
        place = mark.end()
        if mark.group() == "<think>":
            raise ValueError("the reply ends before its thinking does")
        if mark.group() == "}":
            depth = max(0, depth - 1)
            continue
        try:
            value, end = _DECODER.raw_decode(answer, mark.start())
        except (ValueError, RecursionError):
            depth += 1
            continue
        place = end
        if depth == 0:
            objects.append(value)
    return objects


def json_object(text: str) -> dict[str, Any]:
    """The one object in a reply; a repetition of it is no other.

    Raises:
        ValueError: there is none, or there are different ones, or as `json_objects`.
    """
    objects = json_objects(text)
    if not objects:
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    if any(other != objects[0] for other in objects):
        raise ValueError(f"expected one JSON object, got {len(objects)} that differ")
    return objects[0]
