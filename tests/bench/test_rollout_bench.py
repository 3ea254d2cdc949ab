"""The rollout benchmark: a row for each provider, and no time for one that fails the gate."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from bench.rollout.__main__ import COLUMNS, _rows, _Turns, main
from bench.rollout.gate import Gate
from bench.rollout.workload import Answer, Workload
from tests.trainer.tiny import make_tiny_model


def run_bench(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    model, out = make_tiny_model(tmp_path), tmp_path / "out.csv"
    arguments = ["--preset", "cpu-small", "--threads", "1", "--dtypes", "fp32"]
    main([*arguments, "--model", str(model), "--csv", str(out), *options])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rollout_bench_writes_a_row_for_each_provider(tmp_path: Path) -> None:
    ours, theirs, missing = run_bench(tmp_path, "--providers", "lwz", "transformers", "vllm_eager")
    assert tuple(ours) == COLUMNS
    for row in (ours, theirs):
        assert row["status"] == "ok", row["reason"]
        assert (row["batch"], row["new_tokens"], row["rounds"]) == ("8", "8", "1")
        assert 0 < float(row["logprob_error"]) < 1e-5
    assert ours["lwz_ratio"] == "1.00"
    expected = float(ours["tokens_per_s"]) / float(theirs["tokens_per_s"])
    assert float(theirs["lwz_ratio"]) == pytest.approx(expected, rel=0.05)
    assert (missing["status"], missing["tokens_per_s"]) == ("missing", "")


@pytest.mark.slow
def test_rollout_bench_says_why_a_provider_failed(tmp_path: Path) -> None:
    (row,) = run_bench(tmp_path, "--providers", "vllm_eager", "--vllm-python", "/bin/false")
    assert (row["status"], row["reason"]) == ("error", "error: nothing on stderr")


def test_rollout_bench_does_not_call_ok_what_had_no_turn() -> None:
    workload = Workload("model", "fp32", [[5]], group_size=1, num_tokens=1, seed=0, threads=1)
    (row,) = _rows({("lwz", "fp32"): _Turns()}, workload)
    assert (row["status"], row["rounds"]) == ("not run", 0)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gate, Workload, Answer]:
    """A gate, a workload, and an answer to it that passes."""
    model = str(make_tiny_model(tmp_path_factory.mktemp("model")))
    gate = Gate(model)
    workload = Workload(
        model=model,
        dtype="fp32",
        prompts=[[5, 6, 7], [8, 9]],
        group_size=2,
        num_tokens=3,
        seed=0,
        threads=1,
    )
    tokens = [[10, 11, 12 + index] for index in range(4)]
    logprobs = [
        gate._logprobs(torch.float64, prompt, row).tolist()
        for prompt, row in zip(workload.sample_prompts, tokens, strict=True)
    ]
    return gate, workload, Answer(tokens, logprobs, start_s=1.0, seconds=1.0, version="1")


def test_gate_takes_the_models_logprobs(judged: tuple[Gate, Workload, Answer]) -> None:
    gate, workload, answer = judged
    assert gate.check(workload, answer) == (0.0, "")


def test_gate_refuses_other_logprobs(judged: tuple[Gate, Workload, Answer]) -> None:
    gate, workload, answer = judged
    off = [[value + 1e-3 for value in row] for row in answer.logprobs]
    error, reason = gate.check(workload, dataclasses.replace(answer, logprobs=off))
    assert error == pytest.approx(1e-3, rel=1e-3)
    assert "log-probs are off by 1.00e-03" in reason


def test_gate_refuses_short_and_equal_completions(
    judged: tuple[Gate, Workload, Answer],
) -> None:
    gate, workload, answer = judged
    short = dataclasses.replace(answer, tokens=[row[:2] for row in answer.tokens])
    assert gate.check(workload, short)[1] == "4 completions of [2, 3] tokens"
    equal = dataclasses.replace(answer, tokens=[answer.tokens[0]] * 4)
    assert gate.check(workload, equal)[1] == "some completions are equal"
