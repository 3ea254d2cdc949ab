"""The benchmark of the loss head: its gate catches wrong heads, and its rows are whole."""

import csv
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report
from bench.loss_head.__main__ import main
from bench.loss_head.compare import COLUMNS, Machine, Plan, compare
from bench.loss_head.gate import judge
from bench.loss_head.measure import Setting, Worker, can_measure_memory
from bench.loss_head.problem import (
    CLIP_RATIO_HIGH,
    CLIP_RATIO_LOW,
    Problem,
    Shape,
    make_problem,
)
from bench.loss_head.process import Failure, ProviderProcess
from bench.loss_head.provider import CASES, Calls, Case, Logprobs, Provider, clipped_loss
from bench.loss_head.providers import PROVIDERS, floor
from bench.loss_head.tables import markdown_table
from lwz_kernels import native

CPU = torch.device("cpu")
SHAPE = Shape(tokens=64, width=32, vocab=700)
BY_NAME = {str(case): case for case in CASES}
FWD, FWD_BWD = BY_NAME["linear_logprobs/fwd"], BY_NAME["linear_logprobs/fwd_bwd"]


def problem(dtype: torch.dtype = torch.float32, shape: Shape = SHAPE) -> Problem:
    return make_problem(shape, dtype, CPU, with_old_logprobs=True)


def head(problem: Problem, temperature: float) -> torch.Tensor:
    logits = (problem.hidden @ problem.weight.T).float() / temperature
    return logits.log_softmax(-1).gather(1, problem.labels[:, None])[:, 0]


def right(problem: Problem) -> Logprobs:
    return head(problem, problem.temperature), None


# ---- wrong heads, each with a mistake that has been made before


def without_temperature(problem: Problem) -> Logprobs:
    return head(problem, 1.0), None


def with_temperature_twice(problem: Problem) -> Logprobs:
    return head(problem, problem.temperature**2), None


def without_weight_gradient(problem: Problem) -> Logprobs:
    weight = problem.weight.detach() + 1e-3 * problem.weight - 1e-3 * problem.weight.detach()
    return right(dataclasses.replace(problem, weight=weight))


def with_a_nan(problem: Problem) -> Logprobs:
    return right(problem)[0].index_fill(0, torch.tensor([3]), torch.nan), None


def with_entropy_of_logits(problem: Problem) -> Logprobs:
    logits = (problem.hidden @ problem.weight.T).float()
    return right(problem)[0], torch.distributions.Categorical(logits=logits).entropy()


def without_last_row(problem: Problem) -> Logprobs:
    return right(problem)[0][:-1], None


WRONG = {
    without_temperature: {"logprobs", "dhidden", "dweight"},
    with_temperature_twice: {"logprobs", "dhidden", "dweight"},
    without_weight_gradient: {"dweight"},
    with_a_nan: {"logprobs"},
    with_entropy_of_logits: {"entropy"},
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda call: call.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_judge_fails_a_wrong_head(wrong: Any, dtype: torch.dtype) -> None:
    assert judge(Calls(logprobs=right), FWD_BWD, problem(dtype)).passed
    verdict = judge(Calls(logprobs=wrong), FWD_BWD, problem(dtype))
    assert not verdict.passed
    assert verdict.output in WRONG[wrong]


def test_judge_fails_logprobs_rounded_to_bf16() -> None:
    def rounded(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        logprobs = (logits / temperature).log_softmax(-1)
        return logprobs.gather(1, labels[:, None])[:, 0]

    case, calls = BY_NAME["logprobs_from_logits/fwd"], Calls(logprobs_from_logits=rounded)
    assert judge(calls, case, problem(torch.float32)).passed
    assert not judge(calls, case, problem(torch.bfloat16)).passed


def test_judge_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"logprobs has shape \(63,\), expected \(64,\)"):
        judge(Calls(logprobs=without_last_row), FWD, problem())


def test_judge_fails_a_loss_without_old_logprobs() -> None:
    def loss(problem: Problem) -> torch.Tensor:
        return clipped_loss(right(problem)[0], dataclasses.replace(problem, old_logprobs=None))

    calls = Calls(policy_loss=loss)
    assert judge(calls, BY_NAME["linear_policy_loss/on_policy"], problem()).passed
    assert not judge(calls, BY_NAME["linear_policy_loss/off_policy"], problem()).passed


def test_judge_fails_a_wrong_loss_with_right_gradients() -> None:
    def loss(problem: Problem) -> torch.Tensor:
        return clipped_loss(right(problem)[0], problem) + 1.0

    verdict = judge(Calls(policy_loss=loss), BY_NAME["linear_policy_loss/off_policy"], problem())
    assert not verdict.passed
    assert verdict.output == "loss"


def test_judge_fails_a_gradient_that_overwrites_half_of_the_buffer() -> None:
    def loss_into(problem: Problem, weight_grad: torch.Tensor) -> torch.Tensor:
        weight = problem.weight.detach().requires_grad_()
        loss = clipped_loss(right(dataclasses.replace(problem, weight=weight))[0], problem)
        (dweight,) = torch.autograd.grad(loss, (weight,), retain_graph=True)
        weight_grad[: len(weight) // 2] = dweight[: len(weight) // 2]
        return loss

    verdict = judge(Calls(policy_loss_into=loss_into), BY_NAME[POLICY_CASE], problem())
    assert not verdict.passed
    assert verdict.output == "dweight"


POLICY_CASE = "linear_policy_loss/on_policy"
OURS = ("lwz_torch", "lwz_native", "lwz_native_weight_grad")


@pytest.mark.parametrize("name", ["eager", "linear_cross_entropy", *OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_judge_passes_the_heads_that_run_here(name: str, dtype: torch.dtype) -> None:
    if "native" in name and not native.is_available():
        pytest.skip(native.unavailable_reason())
    try:
        calls = PROVIDERS[name].load()
    except ImportError as error:
        pytest.skip(str(error))
    cases = [case for case in CASES if calls.supports(case)]
    assert cases
    for case in cases:
        verdict = judge(calls, case, problem(dtype))
        assert verdict.passed, f"{case}: {verdict}"


# ---- the problem


def test_make_problem_is_peaked_and_clips_on_both_sides() -> None:
    case = problem(shape=Shape(512, 32, 5000))
    logprobs = head(case, case.temperature)
    assert 0.3 < logprobs.exp().mean() < 0.8
    assert case.old_logprobs is not None
    ratio = torch.exp(logprobs - case.old_logprobs)
    for bound in (1 - CLIP_RATIO_LOW, 1 + CLIP_RATIO_HIGH):
        assert 0.1 < (ratio < bound).float().mean() < 0.9
        # Rounding to bf16 (errors to about 0.03 nats) cannot carry a token across a bound.
        assert (ratio / bound).log().abs().min() > 0.1


def test_make_problem_is_the_same_every_time() -> None:
    first, second = vars(problem()), vars(problem())
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(torch.equal(first[name], second[name]) for name in tensors)


def test_make_problem_refuses_ragged_sequences() -> None:
    with pytest.raises(ValueError, match="tokens must be a multiple of 8"):
        make_problem(Shape(60, 32, 700), torch.float32, CPU, with_old_logprobs=False)


def test_half_zero_silences_half_of_the_tokens() -> None:
    zeros = problem().for_mode("half_zero").advantages == 0
    assert zeros.sum() == SHAPE.tokens // 2
    assert not (problem().advantages == 0).any()


# ---- measuring


def setting() -> Setting:
    return Setting(SHAPE, torch.float32, "cpu", num_threads=1, with_old_logprobs=True)


@pytest.mark.skipif(not can_measure_memory("cpu"), reason="no resettable high-water mark here")
def test_memory_sees_the_peak_and_the_results() -> None:
    def allocate(problem: Problem) -> Logprobs:
        torch.ones(64 * 2**20, dtype=torch.uint8)  # gone again before the call ends
        return right(problem)

    memory = Worker(setting(), Calls(logprobs=allocate)).memory(FWD)
    assert 60 < memory.extra / 2**20 < 90
    assert memory.results == 4 * SHAPE.tokens
    without = Worker(setting(), Calls(logprobs=right)).memory(FWD)
    assert without.extra < 30 * 2**20


def test_floor_multiplies_the_active_share() -> None:
    meta = problem(torch.bfloat16).to(torch.device("meta"))
    floor.PROVIDERS["floor"].load().matmuls(meta, 1.5)  # type: ignore[misc]
    assert meta.scratch["logits"].shape == (SHAPE.tokens // 2, SHAPE.vocab)
    assert meta.scratch["logits"].dtype == meta.scratch["dweight"].dtype == torch.float32
    assert meta.scratch["dhidden"].shape == (SHAPE.tokens // 2, SHAPE.width)


@pytest.mark.gpu
def test_worker_checks_times_and_measures_on_a_gpu() -> None:
    shape = Shape(tokens=128, width=64, vocab=1024)
    on_gpu = Setting(shape, torch.bfloat16, "cuda", num_threads=1, with_old_logprobs=True)
    for name in ("floor", "eager", "lwz_triton", "lwz_triton_weight_grad"):
        calls = PROVIDERS[name].load()
        worker = Worker(on_gpu, calls)
        for case in (case for case in CASES if calls.supports(case)):
            verdict = worker.answer("check", case)
            assert verdict is None if name == "floor" else verdict.passed, (name, case, verdict)
            assert min(worker.answer("time", case, 0.0, 0.0)) > 0
            memory = worker.answer("memory", case)
            assert memory.extra >= memory.results


def load_wrong() -> Calls:
    return Calls(logprobs=without_temperature)


def load_right() -> Calls:
    return Calls(logprobs=right)


def load_dying() -> Calls:
    def die(problem: Problem) -> Logprobs:
        os._exit(3)

    return Calls(logprobs=die)


def load_missing() -> Calls:
    raise ModuleNotFoundError("No module named 'a_peer'")


def load_sleeping() -> Calls:
    time.sleep(600)
    return Calls()


def provider(load: Any) -> Provider:
    return Provider(None, ("cpu",), load)


def test_compare_times_right_heads_and_gives_reasons_for_the_others() -> None:
    providers = {
        "right": provider(load_right),
        "wrong": provider(load_wrong),
        "dying": provider(load_dying),
        "missing": provider(load_missing),
    }
    plan = Plan(rounds=2, warm_up_s=0.0, seconds=0.0, timeout_s=120)
    batches = compare(providers, setting(), [FWD], plan, Machine("cpu", 1, "c0ffee"))
    rows = {row["provider"]: row for batch in batches for row in batch}
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "dying": "error",
        "missing": "missing",
    }
    assert rows["right"]["num_samples"] == 2
    assert "logprobs: error" in rows["wrong"]["reason"]
    assert "median_ms" not in rows["wrong"]
    assert rows["dying"]["reason"] == "the process ended with code 3"
    assert rows["missing"]["reason"] == "No module named 'a_peer'"
    assert all(set(row) <= set(COLUMNS) for row in rows.values())


def test_provider_process_times_out() -> None:
    process = ProviderProcess("sleeping", provider(load_sleeping), setting(), timeout_s=0.5)
    process.start()
    try:
        assert not process.supports(FWD)
        assert process.failure == Failure("timeout", "no answer within 0 s")
    finally:
        process.stop()


def test_main_measures_small_shapes_from_gate_to_table(tmp_path: Path) -> None:
    out = tmp_path / "loss_head.csv"
    arguments = ["--preset", "cpu-small", "--csv", str(out), "--commit", "c0ffee", "--threads", "1"]
    arguments += ["--providers", "lwz_torch", "eager", "--modes", "fwd", "off_policy"]
    main(arguments)
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert reader.fieldnames == list(COLUMNS)
    assert {(row["op"], row["mode"], row["provider"]) for row in rows} == {
        (case.op, case.mode, name)
        for case in CASES
        if case.mode in ("fwd", "off_policy")
        for name in ("lwz_torch", "eager")
    }
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error_vs_eager"]) <= 2
        assert (row["tokens"], row["width"], row["vocab"]) == ("64", "64", "1000")
        assert (row["commit"], row["dtype"], row["threads"]) == ("c0ffee", "float32", "1")
        assert row["floor_tflop"] if row["op"].startswith("linear") else row["floor_gb"]
        assert bool(row["extra_mib"]) == can_measure_memory("cpu")
    # The same file read again: nothing is measured, the table shows its numbers.
    table = markdown_table(rows)
    assert all(f"| {row['provider']} |" in table for row in rows)
    assert table.count("**`linear_policy_loss` off_policy**") == 1
    pytest.importorskip("matplotlib")
    main(["--csv", str(out), "--plot", str(tmp_path / "plot.svg")])
    assert "lwz_torch" in (tmp_path / "plot.svg").read_text()
    assert out.read_text().count("\n") == len(rows) + 1


def test_main_refuses_a_gpu_preset_without_one(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--preset gpu needs a CUDA device"):
        main(["--preset", "gpu", "--csv", str(tmp_path / "x.csv")])


def test_quantiles_of_one_sample_are_that_sample() -> None:
    assert report.quantiles([2.5]) == (2.5, 2.5, 2.5)
    assert report.quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_every_case_has_an_identity_of_its_own() -> None:
    assert len(BY_NAME) == len(CASES)
    assert len({Case(case.op, case.mode, 0) for case in CASES}) == len(CASES)
