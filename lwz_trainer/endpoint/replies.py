"""Reading a judge's reply: one JSON object, wherever it stands in the text."""

import json
import re
from typing import Any

__all__ = ["json_object"]

_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def json_object(text: str) -> dict[str, Any]:
    """The one object in a reply, with or without a code fence or a sentence around it.

    Raises:
        ValueError: there is none after the thinking, or it is not JSON.
    """
    match = _OBJECT.search(text.rpartition("</think>")[2])
    if match is None:
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    # strict=False: models write line breaks into strings. JSONDecodeError is a ValueError.
    reply = json.loads(match.group(), strict=False)
    assert isinstance(reply, dict), "the match starts with a brace"
    return reply
