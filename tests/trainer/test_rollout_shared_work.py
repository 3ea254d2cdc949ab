"""Samples that several ranks may draw: each is drawn once, and is what it would be anywhere."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lwz_trainer.config.reading import parse_command_line
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rollout import Request
from lwz_trainer.rollout.shared_work import SharedWork
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all
from tests.trainer.test_train import final_weights
from tests.trainer.train_case import make_run_args, read_metrics, run_cli


def split(requests: list[Request]) -> tuple[list[Request], list[Request]]:
    """Two ranks' shares, which meet in the middle of the second group."""
    early = Request(requests[1].group, requests[1].prompt_ids, requests[1].samples[:2])
    late = Request(requests[1].group, requests[1].prompt_ids, requests[1].samples[2:])
    return [requests[0], early], [late, *requests[2:]]


def test_claim_next_gives_every_sample_to_one_rank() -> None:
    mine, theirs = split(make_requests())
    store = dist.HashStore()
    here = SharedWork(store, "step 0", mine, [theirs])
    there = SharedWork(store, "step 0", theirs, [mine])
    first = [here.claim_next()[1] for _ in range(7)]
    assert first == [0, 1, 2, 3, 4, 5, 15]  # its own in order, then the others' from their end
    assert here.num_left(3) == 3
    rest = []
    while (found := there.claim_next()) is not None:
        rest.append(found[1])
    assert rest == list(range(6, 15))
    assert here.claim_next() is None
    again = SharedWork(store, "step 1", mine, [theirs])
    assert again.claim_next()[1] == 0


@pytest.mark.parametrize("settings", [{"max_num_seqs": 3}, {"kv_cache_tokens": 96}], ids=str)
def test_generate_draws_what_others_left_and_nothing_twice(
    tmp_path: Path, settings: dict[str, int]
) -> None:
    """One engine ends while the other has not begun, then the other way round half-way."""
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests()
    expected = {s.sample: s for s in sample_all(make_engine(model, tokenizer), requests)}
    mine, theirs = split(requests)
    store = dist.HashStore()
    for name in ("alone", "shared"):
        here = SharedWork(store, name, mine, [theirs])
        there = SharedWork(store, name, theirs, [mine])
        taken = [] if name == "alone" else [there.claim_next()[1] for _ in range(7)]
        drawn = sample_all(make_engine(model, tokenizer, **settings), here)
        assert [sample.sample for sample in drawn] == [n for n in range(16) if n not in taken]
        assert all(sample == expected[sample.sample] for sample in drawn)
        assert sample_all(make_engine(model, tokenizer, **settings), there) == []


@pytest.mark.dist
def test_train_with_shared_work_is_the_same_run(tmp_path: Path) -> None:
    """One sequence at a time on each rank, of very different lengths: some are handed over."""
    settings = {"num_steps": 2, "rollout.max_num_seqs": 1, "rollout.max_completion_tokens": 200}
    runs, handed = [], []
    for name, shares in (("plain", False), ("shared", True)):
        arguments = make_run_args(tmp_path, name, **settings, **{"rollout.share_work": shares})
        result = run_cli(arguments, processes=2)
        assert result.returncode == 0, result.stderr[-2000:]
        metrics = read_metrics(tmp_path / name, without_clocks=True)
        handed.append(sum(step["rollout/handed_samples"] for step in metrics))
        # Who drew what decides which prompts were computed where, and nothing else.
        runs.append([{k: v for k, v in m.items() if "rollout/" not in k} for m in metrics])
    assert handed[0] == 0
    assert handed[1] > 0
    assert runs[0] == runs[1]
    weights = [final_weights(tmp_path / name) for name in ("plain", "shared")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout.max_replacements=1"], "completes groups when all ranks have drawn"),
        (["--rollout.enough_groups_frac=0.5"], "completes groups when all ranks have drawn"),
        (["--update.schedule=interleaved"], "completes them at the end"),
    ],
)
def test_shared_work_refuses_what_needs_groups_early(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_command_line(TrainConfig, ["--rollout.share_work=True", *flags], prog="train")
