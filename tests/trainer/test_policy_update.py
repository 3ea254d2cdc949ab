"""The update: exact on-policy start, and a result that no split of the batch changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lwz_kernels.adamw import join_halves
from lwz_kernels.linear_policy_loss.reference import linear_policy_loss_reference
from lwz_trainer.config.loss import LossConfig
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import SequencePlan
from lwz_trainer.config.sections import OptimConfig, RolloutConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.errors import TrainingStopped
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.parallel import Ranks, Teams
from lwz_trainer.train.step_memory import StepMemory
from lwz_trainer.update.optimizer import FlatAdamW, learning_rate
from lwz_trainer.update.packing import TrainSample
from lwz_trainer.update.policy_update import PolicyUpdate, UpdateMetrics
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all
from tests.trainer.tiny import causal_attend

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), group=None)
NO_TEAMS = Teams(SequencePlan(1, 1, {}))
TEMPERATURE = 0.7


def train_samples(model: Decoder, tokenizer: Any) -> list[TrainSample]:
    engine = make_engine(model, tokenizer, temperature=TEMPERATURE)
    return [
        TrainSample(
            group=sample.group,
            sample=sample.sample,
            prompt_ids=sample.prompt_ids,
            completion_ids=sample.completion_ids,
            sampling_logprobs=sample.logprobs,
            advantage=(sample.sample * 7 % 5 - 2) / 2,
            in_loss=True,
        )
        for sample in sample_all(engine, make_requests())
    ]


def run_update(
    model: Decoder,
    samples: list[TrainSample],
    *,
    optim: OptimConfig | None = None,
    ref_model: Decoder | None = None,
    loss: LossConfig | None = None,
    section: ModelSection | None = None,
    **settings: Any,
) -> tuple[UpdateMetrics, FlatAdamW]:
    optimizer = FlatAdamW(model, optim or OptimConfig(lr=1e-3, max_grad_norm=0))
    update = PolicyUpdate(
        model,
        optimizer,
        ALONE,
        NO_TEAMS,
        UpdateConfig(**settings),
        loss or LossConfig(),
        ref_model=ref_model,
        temperature=TEMPERATURE,
        max_completion_tokens=24,
        section=section or ModelSection(attention="sdpa", checkpoint_layers=False),
    )
    return update.run(samples, num_groups=4, lr=1e-3), optimizer


def flat_grad(optimizer: FlatAdamW) -> torch.Tensor:
    return torch.cat(optimizer.grads)


def test_run_starts_exactly_on_policy(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    reference, _ = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    result, _ = run_update(model, samples, ref_model=reference, loss=LossConfig(kl_coef=0.1))
    values = result.values
    assert values["ratio_mean"] == values["ratio_max"] == 1
    assert values["clip_frac_low"] == values["clip_frac_high"] == 0
    assert values["kl"] == pytest.approx(0, abs=1e-9)
    assert values["sampler/prob_diff_mean"] < 1e-5
    assert values["sampler/logprob_diff_max"] < 1e-3
    assert values["sampler/ess_frac"] == pytest.approx(1, abs=1e-4)


LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_run_gradient_is_that_of_the_formula(tmp_path: Path, loss_type: str, impl: str) -> None:
    """One sample at a time, full logits, autograd, normalised by hand."""
    model, tokenizer = load_tiny(tmp_path)
    truth, _ = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    num_tokens = sum(len(sample.completion_ids) for sample in samples)
    for sample in samples:
        length = len(sample.completion_ids)
        ids = torch.tensor(sample.prompt_ids + sample.completion_ids)
        hidden = truth(ids[:-1], torch.arange(len(ids) - 1), causal_attend([len(ids) - 1]))
        start = len(sample.prompt_ids) - 1
        loss, _ = linear_policy_loss_reference(
            hidden[start:],
            truth.head_weight,
            ids[start + 1 :],
            torch.full((length,), sample.advantage),
            torch.ones(length, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, length]),
            num_loss_tokens=num_tokens,
            num_sequences=len(samples),
            temperature=TEMPERATURE,
            config=LossConfig(
                loss_type=loss_type,
                max_completion_tokens=24 if loss_type == "dr_grpo" else None,
            ),
        )
        loss.backward()
    _, optimizer = run_update(model, samples, loss=LossConfig(loss_type=loss_type, impl=impl))
    ours = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in truth.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=float(2e-5 * scale))
    assert flat_grad(optimizer).norm() > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_run_does_not_depend_on_packing(tmp_path: Path, loss_type: str) -> None:
    results = []
    for settings in (
        {"microbatch_tokens": 4096, "share_prompts": True},
        {"microbatch_tokens": 4096, "share_prompts": False},
        {"microbatch_tokens": 40, "share_prompts": True},
        {"microbatch_tokens": 1, "share_prompts": False},
    ):
        model, tokenizer = load_tiny(tmp_path)
        samples = train_samples(model, tokenizer)
        loss_config = LossConfig(loss_type=loss_type)
        metrics, optimizer = run_update(model, samples, loss=loss_config, **settings)
        results.append((metrics.values["loss"], flat_grad(optimizer)))
    loss, grad = results[0]
    for other_loss, other_grad in results[1:]:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other_grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


SECTIONS = {
    "checkpointed": ModelSection(checkpoint_layers=True),
    "offloaded": ModelSection(checkpoint_layers=True, offload_layers=True),
    "tiled": ModelSection(checkpoint_layers=False, mlp_tile_tokens=7),
    "all": ModelSection(checkpoint_layers=True, offload_layers=True, mlp_tile_tokens=7),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_run_that_saves_memory_gives_the_same_gradient(tmp_path: Path, name: str) -> None:
    """Three micro-batches of different lengths, so that host buffers are used again."""
    grads = []
    for section in (ModelSection(checkpoint_layers=False), SECTIONS[name]):
        model, tokenizer = load_tiny(tmp_path)
        samples = train_samples(model, tokenizer)
        _, optimizer = run_update(model, samples, section=section, microbatch_tokens=60)
        grads.append(flat_grad(optimizer))
    if name in ("checkpointed", "offloaded"):
        assert torch.equal(grads[1], grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_run_clips_after_the_first_of_several_updates(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    result, _ = run_update(
        model,
        samples,
        optim=OptimConfig(lr=1e-2),
        num_minibatches=2,
        num_epochs=3,
        loss=LossConfig(clip_ratio_low=0.01, clip_ratio_high=0.01),
    )
    assert result.num_updates == 6
    assert result.values["clip_frac_low"] > 0
    assert result.values["clip_frac_high"] > 0
    assert result.values["ratio_max"] > 1.01


def test_run_without_any_spread_measures_and_changes_nothing(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = [replace(s, advantage=0.0) for s in train_samples(model, tokenizer)]
    result, optimizer = run_update(model, samples)
    assert (flat_grad(optimizer) == 0).all()
    assert result.values == {"loss": 0, "grad_norm": 0}
    with_bonus, _ = run_update(model, samples, loss=LossConfig(entropy_coef=0.01))
    assert with_bonus.values["entropy"] > 0


def test_run_leaves_masked_samples_out_of_loss_and_normaliser(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    masked = [replace(s, in_loss=s.sample % 2 == 0) for s in samples]
    _, with_mask = run_update(model, masked)
    other, _ = load_tiny(tmp_path)
    _, without = run_update(other, [s for s in samples if s.sample % 2 == 0])
    torch.testing.assert_close(flat_grad(with_mask), flat_grad(without), rtol=1e-3, atol=1e-7)


def test_run_with_everything_masked_changes_nothing(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    before = [p.clone() for p in model.parameters()]
    samples = [replace(s, in_loss=False) for s in train_samples(model, tokenizer)]
    run_update(model, samples)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_run_stops_before_the_step_and_names_the_samples(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    samples = train_samples(model, tokenizer)
    samples[6] = replace(samples[6], advantage=float("nan"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TrainingStopped, match=r"not finite.*samples \[6\]"):
        run_update(model, samples, microbatch_tokens=1, share_prompts=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_zero_grad_takes_no_second_buffer(tmp_path: Path) -> None:
    """Resizing a storage to its own size would."""
    model, _ = load_tiny(tmp_path)
    optimizer = FlatAdamW(model, OptimConfig())
    optimizer.zero_grad()
    addresses = [grad.data_ptr() for grad in optimizer.grads]
    optimizer.zero_grad()
    assert [grad.data_ptr() for grad in optimizer.grads] == addresses
    optimizer.release_grads()
    assert all(grad.untyped_storage().nbytes() == 0 for grad in optimizer.grads)
    optimizer.zero_grad()
    assert all((grad == 0).all() for grad in optimizer.grads)


def test_no_parameter_moves_in_50_steps(tmp_path: Path) -> None:
    """The engine samples from the weights that the optimizer steps, in both phases; and into one
    cache, whose pages belong to gradients and moments in between."""
    model, tokenizer = load_tiny(tmp_path)
    engine = make_engine(model, tokenizer, temperature=TEMPERATURE, max_completion_tokens=4)
    config = TrainConfig(rollout=RolloutConfig(memory="phase", offload_optimizer=True))
    memory = StepMemory(config, model, engine, ALONE, longest_prompt=3)
    optimizer = FlatAdamW(model, OptimConfig(lr=1e-3), grads=memory.grads, state=memory.state)
    update = PolicyUpdate(
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
    request = make_requests()[:1]
    addresses = [p.data_ptr() for p in model.parameters()]
    first = [p.clone() for p in model.parameters()]
    caches = set()
    for step in range(50):
        memory.enter_rollout()
        caches.add(engine._held.cache.keys.data_ptr())
        samples = [
            TrainSample(
                group=0,
                sample=sample.sample,
                prompt_ids=sample.prompt_ids,
                completion_ids=sample.completion_ids,
                sampling_logprobs=sample.logprobs,
                advantage=1.0 - sample.sample % 2 * 2,
                in_loss=True,
            )
            for sample in sample_all(engine, request, step=step)
        ]
        assert [p.data_ptr() for p in model.parameters()] == addresses
        memory.enter_update()
        update.run(samples, num_groups=1, lr=1e-3)
        memory.end_update()
        assert [p.data_ptr() for p in model.parameters()] == addresses
    assert len(caches) == 1
    assert not any(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def test_flat_adamw_works_in_place_and_matches_torch(tmp_path: Path) -> None:
    model, _tokenizer = load_tiny(tmp_path)
    twin, _ = load_tiny(tmp_path)
    config = OptimConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    addresses = None
    optimizer = FlatAdamW(model, config)
    decayed = [p for p in twin.parameters() if p.dim() >= 2]
    plain = [p for p in twin.parameters() if p.dim() < 2]
    expected = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    for _ in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            grad = torch.randn_like(theirs)
            (ours * grad).sum().backward()
            (theirs * grad).sum().backward()
        norm = optimizer.grad_norm()
        torch.testing.assert_close(
            norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5), rtol=1e-4, atol=0
        )
        optimizer.step(lr=1e-3, grad_norm=norm)
        expected.step()
        now = [p.data_ptr() for p in model.parameters()]
        assert addresses in (None, now)
        addresses = now
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_flat_adamw_keeps_small_steps_of_bf16_parameters() -> None:
    """A step far below a bf16 ulp of the weight is not lost: it adds up in the master."""
    module = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
    optimizer = FlatAdamW(module, OptimConfig(lr=1e-4, max_grad_norm=0))
    for _ in range(100):
        optimizer.zero_grad()
        module(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(lr=1e-4, grad_norm=optimizer.grad_norm())
    assert module.weight.grad is None
    torch.testing.assert_close(module.weight.float(), torch.full((4, 4), 0.99), rtol=0, atol=0.004)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_flat_adamw_of_bf16_parameters_steps_an_exact_fp32_master(moments: str) -> None:
    """torch's AdamW on an fp32 copy; a checkpoint goes on bit for bit where it was."""
    config = OptimConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, moments_dtype=moments)
    module = torch.nn.Linear(20, 10, bias=False).to(torch.bfloat16)
    copy = torch.nn.Parameter(module.weight.detach().float().clone())
    expected = torch.optim.AdamW([copy], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    models = {"whole": module, "resumed": torch.nn.Linear(20, 10, bias=False).to(torch.bfloat16)}
    models["resumed"].load_state_dict(module.state_dict())
    optimizers = {name: FlatAdamW(model, config) for name, model in models.items()}
    for step in range(4):
        if step == 2:
            state = {k: v.clone() for k, v in optimizers["resumed"].state_dict().items()}
            models["resumed"] = torch.nn.Linear(20, 10, bias=False).to(torch.bfloat16)
            optimizers["resumed"] = FlatAdamW(models["resumed"], config)
            for name, value in optimizers["resumed"].state_dict().items():
                value.copy_(state[name])
        grad = torch.randn(10, 20)
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            models[name].weight.main_grad.copy_(grad)
            optimizer.step(lr=1e-3, grad_norm=optimizer.grad_norm())
        copy.grad = grad * (0.5 / grad.norm())
        expected.step()
    whole, resumed = (optimizer.state_dict() for optimizer in optimizers.values())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    master = join_halves(whole["master_upper_0"], whole["master_lower_0"])
    error = 1e-6 if moments == "fp32" else 0.02 * 4e-3
    torch.testing.assert_close(master, copy.detach().flatten(), rtol=1e-6, atol=error)
    assert torch.equal(module.weight.flatten(), master.to(torch.bfloat16))
    assert whole["exp_avg_0"].dtype == (torch.bfloat16 if moments == "bf16" else torch.float32)


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="linear", min_lr_frac=0.5)
    rates = [learning_rate(config, step, 6) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5])
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(lr=1.0), 9, 10) == 1.0
