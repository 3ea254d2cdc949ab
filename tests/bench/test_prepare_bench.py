"""The benchmark of `prepare` runs, and its document shows the committed rows."""

import csv
import sys
from pathlib import Path

import pytest

from bench import prepare
from tests.trainer.train_case import ROOT

RESULTS = ROOT / "bench" / "results" / "cpu" / "prepare.csv"


def test_prepare_bench_finds_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "prepare.csv"
    monkeypatch.setattr(sys, "argv", ["prepare", "--csv", str(out), "--rows", "300"])
    prepare.main()
    with out.open(newline="") as file:
        left = {row["stage"]: int(row["rows_left"]) for row in csv.DictReader(file)}
    assert left["read"] == 300
    assert 240 < left["same words"] < 290
    assert 0 < left["same words"] - left["near duplicates"] < 60


def test_the_document_shows_the_committed_rows() -> None:
    document = (ROOT / "docs" / "prepare.md").read_text(encoding="utf-8")
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        cells = (row["stage"], row["rows"], row["rows_left"], row["us_per_row"])
        assert f"| {' | '.join(cells)} |" in document
