"""Tiny pretraining runs: a random model, a few texts, real files."""

import json
from pathlib import Path
from typing import Any

from tests.trainer.tiny import make_tiny_model
from tests.trainer.train_case import ROOT

__all__ = ["ANSWER_ONLY", "make_pretrain_args", "write_texts"]

ANSWER_ONLY = ROOT / "tests" / "trainer" / "answer_only.txt"


def write_texts(folder: Path) -> dict[str, Path]:
    """Documents, one long text, and prompts with answers."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"books": folder / "books.jsonl", "long": folder / "long.txt"}
    files["pairs"] = folder / "pairs.jsonl"
    if not files["books"].exists():
        books = [{"text": f"The sea was calm on day {i}. " * (1 + i % 7)} for i in range(40)]
        pairs = [{"prompt": f"Write {i} words.", "answer": f"The {i} seas."} for i in range(9)]
        _write_rows(files["books"], books)
        _write_rows(files["pairs"], pairs)
        files["long"].write_text("Once there was a writer who wrote long letters. " * 80)
    return files


def make_pretrain_args(tmp_path: Path, name: str = "run", **settings: Any) -> list[str]:
    """Arguments of a run of six short steps; `settings` override by dotted name."""
    model = tmp_path / "tiny-llama"
    if not model.exists():
        make_tiny_model(tmp_path)
    files = write_texts(tmp_path / "texts")
    defaults: dict[str, Any] = {
        "output_dir": tmp_path / name,
        "num_steps": 6,
        "num_threads": 1,
        "model.path": model,
        "model.dtype": "fp32",
        "data.sources": [f"{name}={path}" for name, path in files.items()],
        "data.weights": [0.5, 0.4, 0.1],
        "data.held_out": [f"long={files['long']}"],
        "data.held_out_every": 3,
        "data.held_out_tokens": 600,
        "data.template": ANSWER_ONLY,
        "data.context_tokens": 128,
        "data.batch_size": 6,
        "data.shuffle_windows": 8,
        "update.microbatch_tokens": 256,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 2,
        "optim.schedule": "cosine",
        "checkpoint.every": 2,
        "log.tensorboard": False,
    }
    arguments = ["pretrain"]
    for key, value in (defaults | settings).items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *map(str, values)]
    return arguments


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))
