"""CPU time of `prepare` before any model is asked, on made-up conversations in WildChat's layout.

    python -m bench.prepare --csv bench/results/cpu/prepare.csv --rows 50000

A tenth of the requests are copies of an earlier one, a tenth are copies with one word replaced.
Processor time, not wall time: one thread, and other programs hardly change it.
"""

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import report
from lwz_trainer.config.prepare import DuplicatesConfig, RulesConfig
from lwz_trainer.data.length_range import explicit_length_range
from lwz_trainer.prepare.duplicates import near_duplicates, text_key
from lwz_trainer.prepare.rules import rule_against
from lwz_trainer.prepare.sources import SourceRow, read_rows

__all__ = ["main"]

COLUMNS = ("stage", "rows", "rows_left", "cpu_s", "us_per_row", "peak_gb", "device", "commit")
CHUNK_ROWS = 5000

Stage = Callable[[list[Any]], list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="file that gets the rows")
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversations.parquet"
        _write_conversations(file, options.rows)
        report.write_csv(options.csv, COLUMNS, _measure(file, options.rows))


def _measure(file: Path, num_rows: int) -> list[dict[str, Any]]:
    stages: dict[str, Stage] = {
        "read": lambda _: list(read_rows(file)),
        "rules": _follow_rules,
        "same words": lambda texts: list({text_key(text): text for text in texts}.values()),
        "near duplicates": _drop_near_duplicates,
        "explicit counts": lambda texts: [text for text in texts if explicit_length_range(text)],
    }
    rows: list[dict[str, Any]] = []
    left: list[Any] = []
    for name, run in stages.items():
        num_in = len(left) or num_rows
        before = time.process_time()
        left = run(left)
        cpu_s = time.process_time() - before
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        values = (name, num_in, len(left), f"{cpu_s:.2f}", f"{1e6 * cpu_s / num_in:.1f}")
        machine = (f"{peak_gb:.2f}", report.cpu_name(), report.commit())
        rows.append(dict(zip(COLUMNS, values + machine, strict=True)))
        print(*values, flush=True)
    return rows


def _follow_rules(rows: list[SourceRow]) -> list[str]:
    rules, languages = RulesConfig(), frozenset({"en", "zh"})
    return [row.text for row in rows if rule_against(row, rules, languages) is None]


def _drop_near_duplicates(texts: list[str]) -> list[str]:
    config = DuplicatesConfig()
    is_duplicate = near_duplicates(
        texts, threshold=config.threshold, shingle_size=config.shingle_size
    )
    return [text for text, repeats in zip(texts, is_duplicate, strict=True) if not repeats]


def _write_conversations(file: Path, num_rows: int) -> None:
    generator = random.Random(0)
    syllables = [first + last for first in "bdfgklmnprst" for last in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(8000)]
    texts: list[str] = []
    while len(texts) < num_rows:
        texts.append(_request(generator, words, texts))
    schema = pa.Table.from_pylist([_conversation(texts[0])]).schema
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, num_rows, CHUNK_ROWS):
            rows = [_conversation(text) for text in texts[start : start + CHUNK_ROWS]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _request(generator: random.Random, words: list[str], earlier: list[str]) -> str:
    """About 30 words in the median, as a new request or a copy of an earlier one."""
    kind = generator.random()
    if not earlier or kind >= 0.2:
        num_words = int(generator.lognormvariate(3.4, 0.8)) + 5
        return "Write a story about " + " ".join(generator.choices(words, k=num_words))
    copy = generator.choice(earlier).split()
    if kind >= 0.1:
        copy[generator.randrange(len(copy))] = generator.choice(words)
    return " ".join(copy)


def _conversation(text: str) -> dict[str, Any]:
    """Two exchanges; the answers, which are not used, are most of the file."""
    turns = [
        {"role": "user", "content": text, "toxic": False},
        {"role": "assistant", "content": "An answer. " * 150, "toxic": False},
    ]
    return {
        "conversation": turns * 2,
        "language": "English",
        "toxic": False,
        "redacted": False,
        "openai_moderation": [{"flagged": False, "scores": [0.1] * 5}] * 4,
    }


if __name__ == "__main__":
    main()
