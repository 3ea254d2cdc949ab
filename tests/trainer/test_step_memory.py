"""Pages that take turns: who holds what in each phase, what survives, and what is refused."""

import logging
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lwz_kernels.memory import PhaseMemoryError
from lwz_trainer.__main__ import main
from lwz_trainer.config.sections import OptimConfig, RolloutConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped, UserError
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.parallel import Ranks
from lwz_trainer.rollout import RolloutEngine
from lwz_trainer.train import step_memory
from lwz_trainer.train.step_memory import StepMemory
from lwz_trainer.update.buffers import ParkedBuffers, TorchBuffers
from lwz_trainer.update.optimizer import FlatAdamW
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all
from tests.trainer.test_policy_update import ALONE
from tests.trainer.test_train import assert_same_runs
from tests.trainer.train_case import IN_PHASES, make_run_args, read_metrics

CPU = torch.device("cpu")
LONGEST_PROMPT = 21
REQUESTS = make_requests(group_size=1)[:2]
"""Two of the 64 samples that the cache, which is larger than what the update has, is made for."""


class Case:
    """A tiny model with everything that takes turns, as the trainer makes it."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        schedule: str = "sequential",
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = load_tiny(tmp_path)
        self.model.to(device, dtype)
        self.engine = make_engine(self.model, self.tokenizer)
        ranks = Ranks(rank=0, world_size=1, device=self.model.embed.device, group=None)
        config = TrainConfig(
            rollout=RolloutConfig(
                **({"memory": "phase", "group_size": 16, "offload_optimizer": True} | settings)
            ),
            update=UpdateConfig(schedule=schedule),  # type: ignore[arg-type]
        )
        self.memory = StepMemory(
            config, self.model, self.engine, ranks, longest_prompt=LONGEST_PROMPT
        )
        self.optimizer = FlatAdamW(
            self.model, OptimConfig(lr=1e-2), grads=self.memory.grads, state=self.memory.state
        )
        self.wanted = self.engine.plan_cache(longest_prompt=LONGEST_PROMPT, num_samples=64)

    @property
    def pages(self) -> Any:
        return self.memory._turns.memory

    def held_gb(self, phase: str) -> dict[str, float]:
        """Per owner, from the metrics."""
        metrics = self.memory.metrics(ALONE)
        names = ("kv_cache", "gradients", "optimizer")
        return {name: metrics[f"memory/{phase}_{name}_gb"] for name in names}

    def step(self, seed: int) -> None:
        """An update whose gradient is drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        self.optimizer.zero_grad()
        for grad in self.optimizer.grads:
            grad.copy_(torch.randn(grad.shape, generator=generator))
        self.optimizer.step(lr=1e-2, grad_norm=self.optimizer.grad_norm())
        self.memory.end_update()


def state_of(model: Decoder, optimizer: FlatAdamW) -> list[torch.Tensor]:
    return [*(p.detach().clone() for p in model.parameters())] + [
        value.clone() for value in optimizer.state_dict().values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ledger_names_who_holds_what_in_each_phase(tmp_path: Path, dtype: torch.dtype) -> None:
    case = Case(tmp_path, dtype=dtype)
    count = sum(p.numel() for p in case.model.parameters())
    # Moments, and where there is no master its lower half.
    state = count * (8 if dtype == torch.float32 else 10)
    page = case.pages.page_bytes
    for phase, enter, owned in (
        ("rollout", case.memory.enter_rollout, {"kv_cache": case.wanted.num_bytes}),
        ("update", case.memory.enter_update, {"gradients": 4 * count, "optimizer": state}),
    ):
        enter()
        for owner, held in case.held_gb(phase).items():
            expected = owned.get(owner, 0)
            assert expected <= round(held * 1e9) <= expected + (expected > 0) * (page + 4096), owner
        stats = case.pages.stats()
        assert stats.physical_bytes == stats.mapped_bytes  # what nobody holds is the device's
    metrics = case.memory.metrics(ALONE)
    assert metrics["memory/to_rollout_s"] > 0
    assert metrics["memory/to_update_s"] > 0
    assert metrics["memory/update_driver_free_gb"] > 0
    assert metrics["memory/update_torch_reserved_gb"] == 0


def test_metrics_of_several_ranks_are_the_largest_and_each(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.memory.enter_rollout()

    def gather(mine: dict[str, float]) -> list[dict[str, float]]:
        return [mine, {name: value + 1 for name, value in mine.items()}]

    ranks: Any = SimpleNamespace(gather=gather)
    own, merged = case.memory.metrics(ALONE), case.memory.metrics(ranks)
    each = merged.pop("memory/ranks")
    assert each == gather(own)
    smallest = "memory/rollout_driver_free_gb"
    assert merged == each[1] | {smallest: each[0][smallest]}


def test_optimizer_in_turns_steps_like_one_of_its_own(tmp_path: Path) -> None:
    """bf16, so that lower halves wait on the host too."""
    case = Case(tmp_path, dtype=torch.bfloat16)
    plain = Case(tmp_path, dtype=torch.bfloat16, memory="plain", offload_optimizer=None)
    assert plain.memory.state is None
    addresses = {grad.data_ptr() for grad in case.optimizer.grads}
    for step in range(3):
        case.memory.enter_rollout()
        sampled = sample_all(case.engine, REQUESTS, step=step)
        assert [s.completion_ids for s in sampled] == [
            s.completion_ids for s in sample_all(plain.engine, REQUESTS, step=step)
        ]
        case.memory.enter_update()
        case.step(step)
        plain.step(step)
        if step == 1:  # a checkpoint, and a rollout that was interrupted before another one
            case.memory.enter_rollout()
            case.memory.enter_update()
        both = [state_of(c.model, c.optimizer) for c in (case, plain)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert {grad.data_ptr() for grad in case.optimizer.grads} == addresses


def test_gradients_of_an_interleaved_step_stay(tmp_path: Path) -> None:
    case = Case(tmp_path, schedule="interleaved")
    case.memory.enter_rollout()
    case.optimizer.zero_grad()
    for grad in case.optimizer.grads:
        grad.fill_(3.0)
    sample_all(case.engine, REQUESTS)
    in_rollout = case.held_gb("rollout")
    assert in_rollout["gradients"] > 0
    assert in_rollout["optimizer"] == 0
    case.memory.enter_update()
    assert case.held_gb("update")["kv_cache"] == 0
    assert all(bool((grad == 3.0).all()) for grad in case.optimizer.grads)


def test_wrong_phase_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.memory.enter_rollout()
    with pytest.raises(PhaseMemoryError, match=r"needs the phase 'update'.*in 'rollout'"):
        case.optimizer.zero_grad()
    with pytest.raises(AssertionError, match="the optimizer's state is on the host"):
        case.optimizer.step(lr=1.0, grad_norm=torch.ones(()))
    case.memory.enter_update()
    with pytest.raises(PhaseMemoryError, match=r"needs the phase 'rollout'.*in 'update'"):
        sample_all(case.engine, REQUESTS)


def test_failed_mapping_leaves_the_update_its_memory(tmp_path: Path) -> None:
    """The kernel refuses new pages in the middle of the switch to the rollout."""
    case = Case(tmp_path)
    case.step(0)
    before = state_of(case.model, case.optimizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (case.wanted.num_bytes // 2, hard))
    try:
        with pytest.raises(TrainingStopped, match=r"the rollout did not get its memory.*File too"):
            case.memory.enter_rollout()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert case.pages.stats().num_rollbacks == 1
    case.memory.enter_update()
    assert all(
        torch.equal(a, b) for a, b in zip(before, state_of(case.model, case.optimizer), strict=True)
    )
    case.memory.enter_rollout()
    assert sample_all(case.engine, REQUESTS)


def take_pages_from(case: Case) -> None:
    """Somebody else now holds all that neither phase has and the cache wants."""
    stats = case.pages.stats()
    other = case.pages.reserve("other", case.pages.capacity_bytes)
    other.map(0, stats.capacity_bytes - stats.physical_bytes)


def test_cache_shrinks_where_its_memory_is_not_there_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path)
    roomy = make_engine(case.model, case.tokenizer)
    expected = sample_all(roomy, REQUESTS)
    case.memory.enter_rollout()
    address = case.engine._held.cache.keys.data_ptr()
    case.memory.enter_update()
    take_pages_from(case)
    monkeypatch.setattr(step_memory, "free_memory", lambda device: 0)
    with caplog.at_level(logging.WARNING):
        case.memory.enter_rollout()
    assert "of KV cache cannot be mapped any more" in caplog.text
    assert case.engine._held.plan.num_bytes < case.wanted.num_bytes
    assert case.engine._held.cache.keys.data_ptr() == address
    ours = sample_all(case.engine, REQUESTS)
    assert [s.completion_ids for s in ours] == [s.completion_ids for s in expected]


def test_cache_of_a_size_that_was_asked_for_does_not_shrink(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.engine._config = RolloutConfig(kv_cache_tokens=4096, page_size=8)
    case.memory.enter_rollout()
    case.memory.enter_update()
    take_pages_from(case)
    with pytest.raises(TrainingStopped, match=r"over capacity.*lower rollout.kv_cache_tokens"):
        case.memory.enter_rollout()


def test_parked_buffers_keep_their_content_in_plain_memory() -> None:
    parked = ParkedBuffers(TorchBuffers(CPU), CPU)
    one, other = parked.zeros(5, torch.float32), parked.zeros(7, torch.int16)
    hosts = set()
    for value in (3, 4):
        parked.wait()
        one.fill_(value)
        other.fill_(-value)
        if value == 3:  # the next one leaves without notice
            parked.save()
        parked.release()
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        hosts |= {host.data_ptr() for host in parked._host}
        parked.restore()
        assert one.tolist() == [value] * 5
        assert other.tolist() == [-value] * 7
    assert len(hosts) == 2


def test_auto_stays_plain_on_a_cpu(tmp_path: Path) -> None:
    case = Case(tmp_path, memory="auto", offload_optimizer=None)
    assert case.memory.description == "memory: plain; optimizer state on the device"
    assert set(case.memory.metrics(ALONE)) == {"memory/to_rollout_s", "memory/to_update_s"}


def test_phase_where_it_does_not_work_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_memory, "unavailable_reason", lambda device: "no such driver")
    with pytest.raises(UserError, match=r"rollout.memory phase does not work .*no such driver"):
        Case(tmp_path)
    with pytest.raises(UserError, match=r"rollout.memory must be auto, phase or plain"):
        RolloutConfig(memory="virtual")  # type: ignore[arg-type]
    section = RolloutConfig()
    cuda = torch.device("cuda")
    assert step_memory._uses_phases(section, cuda) == (False, " (no such driver)")
    monkeypatch.setattr(step_memory, "unavailable_reason", lambda device: "")
    assert step_memory._uses_phases(section, cuda) == (True, "")


def test_interleaved_run_in_turns_is_the_run_in_plain_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "num_steps": 2,
        "model.dtype": "bf16",
        "update.schedule": "interleaved",
        "update.deterministic": True,
        "log.tensorboard": False,
    }
    assert main(make_run_args(tmp_path, "plain", **settings)) == 0
    held, hold = [], RolloutEngine.hold_cache
    monkeypatch.setattr(
        RolloutEngine, "hold_cache", lambda self, *args: held.append(args) or hold(self, *args)
    )
    capsys.readouterr()
    assert main(make_run_args(tmp_path, "turns", **settings, **IN_PHASES)) == 0
    assert len(held) == 1
    assert_same_runs(tmp_path / "plain", tmp_path / "turns")
    said = "KV cache and update take turns in the same pages; optimizer state on the host during"
    assert said in " ".join(capsys.readouterr().out.split())
    last = read_metrics(tmp_path / "turns")[-1]
    assert last["memory/rollout_gradients_gb"] == last["memory/update_gradients_gb"] > 0
