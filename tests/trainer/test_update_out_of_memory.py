"""An update that runs out of memory: the same gradient in smaller parts, or a stop in words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_trainer.__main__ import main
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.sections import OptimConfig, UpdateConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.rollout.kv_cache import PagedKVCache
from lwz_trainer.update import policy_update
from lwz_trainer.update.optimizer import FlatAdamW
from tests.trainer.rollout_case import load_tiny
from tests.trainer.test_policy_update import (
    ALONE,
    NO_TEAMS,
    TEMPERATURE,
    flat_grad,
    run_update,
    train_samples,
)
from tests.trainer.test_rollout_engine import CPU_ERROR
from tests.trainer.test_train import final_weights
from tests.trainer.train_case import make_run_args


def out_of_memory_above(max_rows: int, original: Callable[..., Any], seen: list[int]) -> Callable:
    """The loss, which fails half-way where it has more rows: the head's gradient is already in."""

    def loss(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden))
        result = original(hidden, *args, **kwargs)
        if len(hidden) > max_rows:
            raise CPU_ERROR
        return result

    return loss


def patch_loss(monkeypatch: pytest.MonkeyPatch, max_rows: int) -> list[int]:
    seen: list[int] = []
    loss = out_of_memory_above(max_rows, policy_update.linear_policy_loss, seen)
    monkeypatch.setattr(policy_update, "linear_policy_loss", loss)
    return seen


CASES = {
    "on-policy": {},
    "off-policy": {"num_epochs": 2, "num_minibatches": 2},
    "KL": {"loss": LossConfig(kl_coef=0.1)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_that_does_not_fit_is_split(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    settings = CASES[name] | {"microbatch_tokens": 150}
    reference = load_tiny(tmp_path)[0] if name == "KL" else None
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    expected, optimizer = run_update(model, samples, ref_model=reference, **settings)
    grad = flat_grad(optimizer)
    other, _ = load_tiny(tmp_path)
    seen = patch_loss(monkeypatch, max_rows=80)
    result, optimizer = run_update(other, samples, ref_model=reference, **settings)
    assert max(seen) > 80
    assert "out of memory in a micro-batch of" in caplog.text
    found = flat_grad(optimizer)
    # After several updates the gradients start from weights that differ by rounding already.
    bound = (1e-2 if name == "off-policy" else 1e-5) * float(grad.abs().max())
    torch.testing.assert_close(found, grad, rtol=1e-3, atol=bound)
    for key in ("loss", "entropy", "ratio_max", "sampler/prob_diff_mean"):
        assert result.values[key] == pytest.approx(expected.values[key], rel=1e-3, abs=1e-5), key


def test_a_split_starts_over_without_what_the_failure_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two micro-batches fails; bit for bit what halves from the start give."""
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)[:8]
    first, second = samples[:4], samples[4:]

    def grad_of(model: Any, parts: list[list[Any]]) -> torch.Tensor:
        """One micro-batch a part, in this order."""
        optimizer = FlatAdamW(model, OptimConfig(lr=1e-3, max_grad_norm=0))
        update = policy_update.PolicyUpdate(
            model,
            optimizer,
            ALONE,
            NO_TEAMS,
            UpdateConfig(),
            LossConfig(),
            ref_model=None,
            temperature=TEMPERATURE,
            max_completion_tokens=24,
            section=ModelSection(attention="sdpa", checkpoint_layers=False),
        )
        update.begin()
        for part in parts:
            (work,) = update.plan(part)
            update.add(work)
        update.finish(lr=1e-3)
        return flat_grad(optimizer).clone()

    fed = [sample.num_fed for sample in second]
    half = min(range(1, 4), key=lambda count: abs(2 * sum(fed[:count]) - sum(fed)))
    expected = grad_of(load_tiny(tmp_path)[0], [first, second[:half], second[half:]])
    calls: list[int] = []
    original = policy_update.linear_policy_loss

    def fails_once(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(hidden))
        result = original(hidden, *args, **kwargs)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(policy_update, "linear_policy_loss", fails_once)
    assert torch.equal(grad_of(load_tiny(tmp_path)[0], [first, second]), expected)
    assert calls == [
        sum(len(s.completion_ids) for s in part)
        for part in (first, second, first, second[:half], second[half:])
    ]


def test_halves_that_do_not_fit_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    before = [p.clone() for p in model.parameters()]
    patch_loss(monkeypatch, max_rows=30)
    with pytest.raises(TrainingStopped, match=r"out of memory in the update.*microbatch_tokens"):
        run_update(model, samples)
    with pytest.raises(TrainingStopped, match="out of memory in the update"):
        run_update(
            model, [replace(samples[0], completion_ids=[7] * 31, sampling_logprobs=[-1.0] * 31)]
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("schedule", "max_rows"), [("sequential", 70), ("interleaved", 50)])
def test_train_goes_on_after_running_out_of_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, max_rows: int
) -> None:
    settings = {"num_steps": 2, "update.schedule": schedule}
    assert main(make_run_args(tmp_path, "roomy", **settings)) == 0
    seen = patch_loss(monkeypatch, max_rows=max_rows)
    assert main(make_run_args(tmp_path, "tight", **settings)) == 0
    assert max(seen) > max_rows
    weights = [final_weights(tmp_path / name) for name in ("roomy", "tight")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=3e-4)


def test_train_says_in_one_line_that_nothing_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_cache(self: PagedKVCache, memory: torch.Tensor) -> None:
        raise CPU_ERROR

    monkeypatch.setattr(PagedKVCache, "__init__", no_cache)
    assert main(make_run_args(tmp_path)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: out of memory where no smaller part can be tried")
