"""LongBench-Write's English requests, shortened to what a small model can write."""

import json
import math
import re
from pathlib import Path
from typing import Any

from lwz_trainer.atomic_text import write_text_atomically
from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.data.length_range import explicit_length_range

SHORTEST, LONGEST = 30, 100
"""Words that the shortest and the longest request of the benchmark are scaled to."""


def scaled_words(length: int, shortest: int, longest: int) -> int:
    """SHORTEST to LONGEST by the logarithm of `length` between the other two, in tens."""
    place = math.log(length / shortest) / max(math.log(longest / shortest), 1e-9)
    return round((SHORTEST + (LONGEST - SHORTEST) * place) / 10) * 10


def scaled_request(prompt: str, length: int, words: int) -> str | None:
    """The request with `words` in place of `length`; None where it then names another length."""
    number = re.compile(rf"(?<![\d,.])(?:{length}|{length:,})(?![\d]|,\d)")
    scaled = number.sub(str(words), prompt)
    wanted = explicit_length_range(scaled)
    if wanted is None:
        return f"{scaled.rstrip()} Write about {words} words."
    return scaled if wanted[0] <= words <= wanted[1] else None


def write_scaled_requests(source: Path, target: Path) -> tuple[int, int]:
    """Writes the benchmark's format; the number of requests kept and dropped."""
    records = [record for _, _, record in jsonl_rows(source, str(source))]
    lengths = [record["length"] for record in records]
    rows: list[dict[str, Any]] = []
    for record in records:
        words = scaled_words(record["length"], min(lengths), max(lengths))
        prompt = scaled_request(record["prompt"], record["length"], words)
        if prompt is not None:
            rows.append({"prompt": prompt, "type": record["type"], "length": words})
    write_text_atomically(target, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows), len(records) - len(rows)
