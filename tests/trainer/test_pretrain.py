"""Whole pretraining runs: what they write, that they resume bit for bit, and bad input."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwz_trainer.__main__ import main
from lwz_trainer.data.jsonl import jsonl_lines
from lwz_trainer.errors import UserError
from lwz_trainer.pretrain import rows
from tests.processes import Program
from tests.trainer.pretrain_case import make_pretrain_args
from tests.trainer.test_bad_input import assert_refused
from tests.trainer.test_train import final_weights, wait_for_new_step
from tests.trainer.train_case import read_metrics


def assert_same_runs(one: Path, other: Path) -> None:
    """Metrics and weights, bit for bit."""
    metrics = [read_metrics(run, without_clocks=True) for run in (one, other)]
    assert metrics[0] == metrics[1]
    weights = [final_weights(run) for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_pretrain_writes_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make_pretrain_args(tmp_path, **{"log.tensorboard": True})) == 0
    run_dir = tmp_path / "run"
    metrics = read_metrics(run_dir)
    assert [record["step"] for record in metrics] == list(range(7))
    assert [r["step"] for r in metrics if "held_out/long_loss" in r] == [0, 3, 6]
    assert metrics[6]["held_out/long_loss"] < metrics[0]["held_out/long_loss"] - 1
    assert all(record["tokens/step"] <= 6 * 128 for record in metrics[1:])
    shares = {name: metrics[6][f"data/{name}_tokens_frac"] for name in ("books", "long", "pairs")}
    assert shares == pytest.approx({"books": 0.5, "long": 0.4, "pairs": 0.1}, abs=0.05)
    assert metrics[1]["lr"] == pytest.approx(5e-4)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000006"
    assert "linear_logprobs" in json.loads((run_dir / "implementations.json").read_text())
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert "held_out/long_loss" in (run_dir / "report.html").read_text()
    assert not list(run_dir.rglob("*.partial"))
    out = capsys.readouterr().out
    assert "step 6/6  loss" in out
    assert "held out after step 6: long" in out
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final", local_files_only=True)
    ids = tokenizer((tmp_path / "texts" / "long.txt").read_text(), return_tensors="pt")["input_ids"]
    # 600 tokens hold four windows of 128, each beginning with the last token of the one before.
    losses = [
        float(model(input_ids=window, labels=window).loss.detach())
        for window in (ids[:, start : start + 129] for start in range(0, 512, 128))
    ]
    assert metrics[6]["held_out/long_loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_pretrain_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert main(make_pretrain_args(tmp_path, "whole")) == 0
    assert main(make_pretrain_args(tmp_path, "parts", **{"checkpoint.every": 1})) == 0
    # As a kill in the middle of step 6 leaves it: a torn line, a half-written checkpoint.
    parts = tmp_path / "parts"
    lines = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    (parts / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:30])
    (parts / "checkpoints" / "latest").write_text("step_000005")
    (parts / "checkpoints" / ".step_000006.partial").mkdir()
    (parts / "final" / "model.safetensors").write_bytes(b"of a step that is taken again")
    assert main(make_pretrain_args(tmp_path, "parts")) == 0
    assert_same_runs(tmp_path / "whole", parts)


@pytest.mark.slow
def test_pretrain_killed_resumes_to_the_same_run(tmp_path: Path) -> None:
    settings = {"num_steps": 8, "checkpoint.every": 1}
    assert main(make_pretrain_args(tmp_path, "whole", **settings)) == 0
    arguments = make_pretrain_args(tmp_path, "killed", **settings)
    for _ in range(2):
        process = Program("lwz_trainer", arguments)
        wait_for_new_step(tmp_path / "killed", process)
        process.kill()
        process.wait()
    assert main(arguments) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_pretrain_saves_and_leaves_on_a_signal(tmp_path: Path) -> None:
    arguments = make_pretrain_args(tmp_path, **{"num_steps": 500, "checkpoint.every": 0})
    process = Program("lwz_trainer", arguments)
    for _ in range(2):  # the first record is that of the held-out texts before any step
        wait_for_new_step(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM" in out
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last:06d}"


def test_pretrain_learns_only_answers_where_asked(tmp_path: Path) -> None:
    files = tmp_path / "texts"
    settings = {
        "num_steps": 1,
        "optim.warmup_steps": 0,
        "data.sources": [f"pairs={files / 'pairs.jsonl'}"],
        "data.weights": [1.0],
        "data.held_out": [],
    }
    tokens = {}
    for loss_on in ("all", "answer"):
        arguments = make_pretrain_args(tmp_path, loss_on, **settings, **{"data.loss_on": loss_on})
        assert main(arguments) == 0
        (record,) = read_metrics(tmp_path / loss_on)
        tokens[loss_on] = record["tokens/loss"]
        assert record["tokens/step"] == pytest.approx(tokens["all"])
    assert tokens["answer"] < tokens["all"] / 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data.sources": []}, "data.sources is empty"),
        ({"data.sources": ["books"]}, "data.sources takes NAME=PATH, got 'books'"),
        ({"data.sources": ["a=/nowhere.jsonl"]}, "no input at /nowhere.jsonl"),
        ({"data.weights": [1.0]}, "data.weights has 1 entries, data.sources 3"),
        ({"data.weights": [1.0, 0.0, 1.0]}, "data.weights must be above 0"),
        ({"data.context_tokens": 4096}, "the model's context is 512"),
        ({"data.template": "thinking"}, "unknown template 'thinking'"),
        ({"data.held_out_tokens": 3}, "data.held_out 'long' gives no window"),
        ({"optim.warmup_steps": 6}, "must be below num_steps"),
        ({"log.trace_steps": [1]}, "log.trace_steps writes the timeline of a rollout"),
        ({"model.path": "/nowhere"}, "no model at /nowhere"),
        ({"update.microbatch_tokens": 0}, "update.microbatch_tokens must be at least 1"),
    ],
)
def test_pretrain_refuses_impossible_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str
) -> None:
    if "data.sources" in settings:
        settings = settings | {"data.weights": []}
    assert_refused(make_pretrain_args(tmp_path, **settings), capsys, expected)
    assert not (tmp_path / "run").exists()


def test_pretrain_names_a_bad_line_before_it_writes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_pretrain_args(tmp_path)
    books = tmp_path / "texts" / "books.jsonl"
    books.write_text('{"text": "a"}\n{"text": 3}\n')
    assert_refused(arguments, capsys, "books.jsonl line 2: text must be a string, got int")
    assert not (tmp_path / "run").exists()


def test_pretrain_refuses_a_source_without_text_before_it_writes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_pretrain_args(tmp_path)
    (tmp_path / "texts" / "books.jsonl").write_text('{"text": " "}\n')
    assert_refused(arguments, capsys, "data source 'books' holds no text")
    assert not (tmp_path / "run").exists()


def one_source(path: Path) -> dict[str, Any]:
    settings = {"data.sources": [f"a={path}"], "data.weights": [], "data.held_out": []}
    return settings | {"data.batch_size": 1, "checkpoint.every": 0}


def test_pretrain_passes_over_bad_rows_and_counts_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": f"The sea was calm on day {day}."}) for day in range(80)]
    lines[70] = "{"
    lines[75] = json.dumps({"text": 3})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = one_source(tmp_path / "a.jsonl") | {"data.batch_size": 20, "num_steps": 3}
    assert main(make_pretrain_args(tmp_path, **settings)) == 0
    last = read_metrics(tmp_path / "run")[-1]
    assert last["data/a_epochs"] >= 1
    assert 0 <= last["data/a_rows_skipped"] - 2 * last["data/a_epochs"] <= 2
    assert "a.jsonl line 71 is not valid JSON" in caplog.text
    assert "a.jsonl line 76: text must be a string" in caplog.text


def test_pretrain_saves_before_it_leaves_with_a_file_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines_up_to_a_bad_block(
        source: Path, name: str, *, start: int = 0
    ) -> Iterator[tuple[int, str, bytes]]:
        for row in jsonl_lines(source, name, start=start):
            if row[0] > 100:
                raise UserError(f"cannot read {name}: Input/output error")
            yield row

    monkeypatch.setattr(rows, "jsonl_lines", lines_up_to_a_bad_block)
    lines = [json.dumps({"text": f"The sea was calm on day {day}."}) for day in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = make_pretrain_args(tmp_path, num_steps=60, **one_source(tmp_path / "a.jsonl"))
    assert_refused(arguments, capsys, "a.jsonl: Input/output error")
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert last > 0
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last:06d}"


def test_pretrain_refuses_a_source_whose_rows_all_lack_thinking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_pretrain_args(tmp_path, **{"data.template": "think"})
    expected = "'pairs' holds no text to learn from: ", "pairs.jsonl line 1 has no `thinking`"
    assert_refused(arguments, capsys, *expected)
    assert not (tmp_path / "run").exists()


def test_pretrain_refuses_to_go_on_with_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_pretrain_args(tmp_path, num_steps=3)) == 0
    arguments = make_pretrain_args(tmp_path, num_steps=6, **{"data.weights": [0.4, 0.5, 0.1]})
    assert_refused(arguments, capsys, "is of another run (data.weights differ)")
    with (tmp_path / "texts" / "books.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "One more day at sea."}))
    arguments = make_pretrain_args(tmp_path, num_steps=6, seed=1)
    assert_refused(arguments, capsys, "(names and sizes of data.sources, seed differ)")


def test_pretrain_dry_run_prints_config_and_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*make_pretrain_args(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "context_tokens: 128" in out
    assert "gradient of the head" in out
    assert "program and libraries" in out
    assert "KV cache" not in out
    assert "A step of 768 tokens takes about" in out
    assert not (tmp_path / "run").exists()
