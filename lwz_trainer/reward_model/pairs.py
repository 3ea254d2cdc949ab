"""Preference pairs: read and checked row by row, and split by prompt."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwz_trainer.config.reward_model import PairDataConfig
from lwz_trainer.data.jsonl import jsonl_rows
from lwz_trainer.errors import UserError

__all__ = ["Pair", "load_pairs", "load_split", "split_by_prompt"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Args:
        prompt: the request.
        chosen: the answer that was preferred.
        rejected: the other one.
        margin: by how much, in units of the score; 0 where the row has none.
        source: where the pair comes from, for the report; "" where the row has none.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float
    source: str


def load_split(config: PairDataConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out ones."""
    pairs = load_pairs(Path(config.pairs))
    if not config.heldout:
        return split_by_prompt(pairs, config.heldout_frac, seed)
    heldout = load_pairs(Path(config.heldout))
    _refuse_leaks({pair.prompt for pair in pairs} & {pair.prompt for pair in heldout})
    return pairs, heldout


def load_pairs(path: Path) -> list[Pair]:
    """All rows of a JSONL file, in its order.

    Raises:
        UserError: naming the file and the line.
    """
    pairs = [_checked_pair(record, where) for _, where, record in jsonl_rows(path, str(path))]
    if not pairs:
        raise UserError(f"{path} is empty; expected rows with `prompt`, `chosen` and `rejected`")
    return pairs


def split_by_prompt(
    pairs: list[Pair], heldout_frac: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs); all pairs of a prompt are on one side.

    A prompt is held out by the hash of seed and prompt, so more rows move no prompt to the other
    side. The share is met on average; where it leaves a side empty, one prompt goes there.

    Raises:
        UserError: there is only one prompt.
    """
    hashes = {pair.prompt: _unit_hash(pair.prompt, seed) for pair in pairs}
    if len(hashes) < 2:
        raise UserError(
            "the pairs have one prompt, expected at least two, so that one can be held out; add "
            "prompts, or name a file in data.heldout"
        )
    ordered = sorted(hashes, key=lambda prompt: (hashes[prompt], prompt))
    num_heldout = sum(value < heldout_frac for value in hashes.values())
    heldout = set(ordered[: min(max(num_heldout, 1), len(ordered) - 1)])
    return (
        [pair for pair in pairs if pair.prompt not in heldout],
        [pair for pair in pairs if pair.prompt in heldout],
    )


def _refuse_leaks(prompts: set[str]) -> None:
    if prompts:
        first = " ".join(min(prompts).split())[:60]
        raise UserError(
            f"{len(prompts)} prompts stand in data.pairs and in data.heldout, such as '{first}': "
            "remove them from one of the files"
        )


def _unit_hash(prompt: str, seed: int) -> float:
    """In [0, 1), a function of prompt and seed."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _checked_pair(record: Any, where: str) -> Pair:
    if not isinstance(record, dict):
        raise UserError(
            f"{where} holds a {type(record).__name__}; expected an object with `prompt`, `chosen` "
            "and `rejected`"
        )
    texts = {name: _text(record, name, where) for name in ("prompt", "chosen", "rejected")}
    if texts["chosen"] == texts["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same text; remove the row")
    margin = record.get("margin")
    if margin is None:
        margin = 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"{where}: margin must be a finite number, got {margin!r}")
    if margin < 0:
        raise UserError(f"{where}: margin must be at least 0, got {margin}; swap the answers")
    source = record.get("source")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{where}: source must be a string, got {type(source).__name__}")
    return Pair(**texts, margin=float(margin), source=source or "")


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise UserError(
            f"{where} has no `{name}`; its fields are: {', '.join(map(str, record)) or 'none'}"
        )
    text = record[name]
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} must be a string, got {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{where}: {name} is empty; write a text or remove the row")
    return text
