"""The folder that shows a small reproduction's result, from a run made by hand."""

import json
from pathlib import Path

import pytest

from bench.reproduce_small import publish as module
from bench.reproduce_small.publish import difference, publish

SYSTEMS = ["pretrained_think", "pretrained_direct", "sft", "rl_think", "rl_direct"]
REQUEST = "Describe the quiet harbour"
DISTINCT = [first + second for first in "abcdefg" for second in "lmnrst"]
# 40 words are asked for: 40 give 100, 20 give 50, none 0.
WORDS = {
    "pretrained_think": (0, 20),
    "pretrained_direct": (20, 20),
    "sft": (40, 20),
    "rl_think": (40, 40),
    "rl_direct": (40, 40),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run of two requests."""
    out = tmp_path / "run"
    rows = [{"prompt": f"{REQUEST} {i}.", "type": "A", "length": 40} for i in range(2)]
    _write(out / "requests.jsonl", *rows)
    for name, words in WORDS.items():
        answers = [
            {"index": i, "response": " ".join(DISTINCT[:count])} for i, count in enumerate(words)
        ]
        _write(out / f"evaluate_{name}" / "responses" / f"{name}.jsonl", *answers)
    for name in ("pretrain", "sft", "reward_model", "rl_think", "rl_direct"):
        steps = [
            {
                "step": step,
                "loss": 3.0 - step,
                "held_out/plays_loss": 4.0 - step,
                "reward/length": step / 4,
                "reward/format": 0.5,
                "reward/writing": float(step),
                "words/answer_mean": 10.0 * step,
            }
            for step in (1, 2)
        ]
        _write(out / name / "metrics.jsonl", *steps)
        (out / name / "config.yaml").write_text(f"output_dir: {out / name}\n")
    report = {
        "num_pairs": 12,
        "accuracy": 0.95,
        "accuracy_matched_length": None,
        "num_matched_length": 0,
        "longer_is_better_accuracy": 0.7,
    }
    _write(out / "reward_model" / "report.json", report)
    _write(out / "seconds.json", {"texts": 30.0, "pretrain": 90.0})
    settings = {"pretrain_steps": 2, "sft_steps": 2, "rl_steps": 2, "num_pairs": 48}
    _write(out / "settings.json", settings | {"model": "smollm2-135m-instruct"})
    return out


def _write(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_publish_gathers_scores_curves_and_answers(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    publish(out, target, systems=SYSTEMS, num_requests=0)
    text = (target / "README.md").read_text()
    summary = json.loads((target / "summary.json").read_text())
    means = {name: row["length_score"][0] for name, row in summary["systems"].items()}
    assert means == {
        "pretrained_think": 25.0,
        "pretrained_direct": 50.0,
        "sft": 75.0,
        "rl_think": 100.0,
        "rl_direct": 100.0,
    }
    assert "| rl_think | 100.0 | 100.0 to 100.0 | 40 | 1.000 | 0.000 | 0 |" in text
    assert "| pretrained_think | 25.0 | 0.0 to 50.0 | 10 | 0.000 | 0.000 | 1 |" in text
    assert "- rl_think and sft are not told apart: +25.0 (+0.0 to +50.0) points of S_l." in text
    assert "- rl_direct is better than pretrained_direct: +50.0 (+50.0 to +50.0)" in text
    assert "| rl_think | 0.25 → 0.50 | 0.50 → 0.50 | 1.00 → 2.00 | 10.00 → 20.00 |" in text
    assert "right in 0.950, at matched length in n/a of 0; “the longer is better” in 0.700" in text
    assert "3.000 before pretraining, 2.000 after it" in text
    assert "30 requests" not in text
    assert "2 requests. 2 minutes on" in text
    for page in ("rl.html", "pretraining.html", "reward_model.html", "evaluation/report.html"):
        assert (target / page).read_text().startswith("<!doctype html>")
    answers = (target / "evaluation" / "responses" / "sft.jsonl").read_text()
    assert answers == (out / "evaluate_sft" / "responses" / "sft.jsonl").read_text()


def test_publish_names_neither_requests_nor_folders(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    publish(out, target, systems=SYSTEMS, num_requests=0)
    files = [path for path in target.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        text = path.read_text()
        assert REQUEST not in text, path
        assert str(tmp_path) not in text, path
    assert (target / "sft" / "config.yaml").read_text() == "output_dir: run/sft\n"


def test_publish_replaces_its_own_folder_and_no_other(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "published"
    publish(out, target, systems=SYSTEMS, num_requests=0)
    (target / "old.txt").touch()
    publish(out, target, systems=SYSTEMS, num_requests=1)
    assert not (target / "old.txt").exists()
    assert json.loads((target / "summary.json").read_text())["num_requests"] == 1
    with pytest.raises(SystemExit, match="was not written by this program"):
        publish(out, out, systems=SYSTEMS, num_requests=0)
    assert (out / "requests.jsonl").exists()
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="bytes, expected at most 1000"):
        publish(out, target, systems=SYSTEMS, num_requests=0)


def test_difference_is_paired() -> None:
    mean, low, high = difference([10.0, 60.0, 90.0], [5.0, 55.0, 85.0])
    assert (mean, low, high) == (5.0, 5.0, 5.0)
    mean, low, high = difference([10.0, 0.0] * 30, [0.0, 0.0] * 30)
    assert mean == 5.0
    # The standard error of 60 values of spread 5 is 0.65.
    assert low == pytest.approx(5 - 1.96 * 0.645, abs=0.2)
    assert high == pytest.approx(5 + 1.96 * 0.645, abs=0.2)
