"""The forecast: what it counts is what the program holds, and what does not fit has a name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lwz_trainer.__main__ import main
from lwz_trainer.config.model import ModelSection
from lwz_trainer.config.parallel import ParallelConfig
from lwz_trainer.config.reading import load_config
from lwz_trainer.config.rewards import RewardPoolConfig, RewardsConfig, WritingRewardConfig
from lwz_trainer.config.sections import OptimConfig, UpdateConfig
from lwz_trainer.config.train import TrainConfig
from lwz_trainer.model.architecture import ModelConfig
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.rewards.writing import WritingReward
from lwz_trainer.train.forecast import (
    MemoryForecast,
    _kept_width,
    forecast_memory,
    num_parameters,
)
from lwz_trainer.train.reward_forecast import with_reward_models
from lwz_trainer.update.optimizer import FlatAdamW
from tests.trainer.rollout_case import load_tiny
from tests.trainer.test_model_memory import LiveBytes
from tests.trainer.test_rewards_writing import make_reward_model
from tests.trainer.train_case import ROOT, make_run_args

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QWEN_7B = ModelConfig(
    family="qwen2",
    vocab_size=152064,
    hidden=3584,
    ff=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    rms_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    max_positions=131072,
)


QWEN_32B = replace(QWEN_7B, hidden=5120, ff=27648, layers=64, heads=40, kv_heads=8)


def forecast_of(name: str, model: ModelConfig = QWEN_7B, *, num_ranks: int = 8) -> MemoryForecast:
    """Of a configuration that ships, for nodes of 8 GPUs."""
    config = load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml")
    return forecast_memory(
        config,
        model,
        dtype=torch.bfloat16,
        device=CUDA,
        longest_prompt=1000,
        num_ranks=num_ranks,
        ranks_per_node=8,
    )


def test_num_parameters_counts_what_the_model_has(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3"):
        model, _ = load_tiny(tmp_path, family)
        assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    assert num_parameters(QWEN_7B) == 7_615_616_512


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecast_memory_counts_the_optimizer_bytes(
    tmp_path: Path, dtype: torch.dtype, moments: str
) -> None:
    model, _ = load_tiny(tmp_path)
    config = replace(TrainConfig(), optim=OptimConfig(moments_dtype=moments))
    found = forecast_memory(config, model.config, dtype=dtype, device=CPU, longest_prompt=9)
    model.to(dtype)
    optimizer = FlatAdamW(model, config.optim)
    state = sum(x.numel() * x.element_size() for x in optimizer.state_dict().values() if x.dim())
    # The state names whole fp32 masters; they lie in the weights and, for bf16, lower halves.
    grads = sum(grad.numel() * 4 for grad in optimizer.grads)
    assert sum(found.always.values()) == state
    assert found.update["gradients, fp32"] == grads
    size = 16 if moments == "fp32" else 12
    assert state + grads == size * num_parameters(model.config)


def test_forecast_memory_adds_the_phases_of_an_interleaved_step(tmp_path: Path) -> None:
    model, _ = load_tiny(tmp_path)
    found = {
        schedule: forecast_memory(
            replace(TrainConfig(), update=UpdateConfig(schedule=schedule)),
            model.config,
            dtype=torch.float32,
            device=CPU,
            longest_prompt=9,
        )
        for schedule in ("sequential", "interleaved")
    }
    one, both = found["sequential"], found["interleaved"]
    assert (one.always, one.rollout, one.update) == (both.always, both.rollout, both.update)
    assert both.peak == one.peak + min(sum(one.rollout.values()), sum(one.update.values()))
    (misfit,) = both.misfits(both.peak)
    assert misfit.startswith("rollout and update: ")


def test_forecast_memory_shares_the_optimizer_state_of_a_sharded_one() -> None:
    config = replace(TrainConfig(), parallel=ParallelConfig(shard_optimizer=True))
    kinds = {"dtype": torch.bfloat16, "device": CPU, "longest_prompt": 9}
    alone = forecast_memory(config, QWEN_7B, **kinds)
    shared = forecast_memory(config, QWEN_7B, **kinds, num_ranks=8)
    for owner in ("AdamW moments", "lower halves of the masters"):
        assert shared.always[owner] == alone.always[owner] // 8
    assert shared.always["weights"] == alone.always["weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forecast_memory_divides_everything_of_a_fully_sharded_update(dtype: torch.dtype) -> None:
    """16 bytes a parameter and the reference; what is whole belongs to one of the phases."""
    config = replace(TrainConfig(), parallel=ParallelConfig(shard_parameters=True))
    config = replace(config, loss=replace(config.loss, kl_coef=0.1))
    kinds = {"dtype": dtype, "device": CUDA, "longest_prompt": 9}
    found = forecast_memory(config, QWEN_7B, **kinds, num_ranks=8)
    count = num_parameters(QWEN_7B)
    state = sum(found.always.values()) + found.update["gradients, fp32"]
    assert state == (16 + dtype.itemsize) * count // 8
    assert found.rollout["weights, gathered"] == dtype.itemsize * count
    head = QWEN_7B.vocab_size * QWEN_7B.hidden
    assert found.update["weights at hand and their gradients"] > (2 * dtype.itemsize + 4) * head
    alone = forecast_memory(config, QWEN_7B, **kinds)
    assert "weights, gathered" not in alone.rollout
    assert alone.always["weights"] == dtype.itemsize * count


def test_forecast_of_32b_fits_64_gpus_of_80_gb_only_when_sharded() -> None:
    found = forecast_of("qwen2.5_32b_64gpu", QWEN_32B, num_ranks=64)
    assert num_parameters(QWEN_32B) == 32_763_876_352
    assert found.misfits(80_000_000_000) == []
    (misfit,) = found.misfits(72_000_000_000)
    assert misfit.startswith("rollout: ")
    assert "weights, gathered 65.5 GB" in misfit


def test_forecast_memory_parks_the_optimizer_when_the_cache_does_not_fit_beside_it() -> None:
    config = load_config(TrainConfig, ROOT / "configs" / "qwen2.5_7b_8gpu.yaml")
    kinds = {"dtype": torch.bfloat16, "device": CUDA, "longest_prompt": 1000, "num_ranks": 8}
    unknown = forecast_memory(config, QWEN_7B, **kinds)
    needed = int(sum((unknown.always | unknown.rollout).values()) / (1 - 0.05)) + 2
    roomy = forecast_memory(config, QWEN_7B, **kinds, device_bytes=needed)
    tight = forecast_memory(config, QWEN_7B, **kinds, device_bytes=needed - 4)
    assert roomy == unknown
    assert roomy.parked == {}
    names = {"AdamW moments", "lower halves of the masters"}
    assert tight.parked.keys() == tight.host.keys() == names
    assert tight.always | tight.parked == roomy.always
    assert not names & tight.phases["rollout"].keys()
    assert names <= tight.phases["update"].keys()
    never = replace(config, rollout=replace(config.rollout, offload_optimizer=False))
    found = forecast_memory(never, QWEN_7B, **kinds, device_bytes=needed - 4)
    assert found == unknown
    assert found.misfits(needed - 4)[0].startswith("rollout: ")
    both = replace(
        config,
        rollout=replace(config.rollout, offload_optimizer=True),
        update=replace(config.update, schedule="interleaved"),
    )
    phases = forecast_memory(both, QWEN_7B, **kinds).phases
    assert not names & phases["rollout and update"].keys()
    assert names <= phases["update"].keys()


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for attention: reads q, k and v, and has values of its own as large as q."""
    return q * 1.0 + (k.sum(1, keepdim=True) + v.sum(1, keepdim=True))


def live_bytes(model: ModelConfig, tokens: int, section: ModelSection) -> int:
    decoder = Decoder(model)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(tokens, dtype=torch.long)
    with LiveBytes() as found:
        hidden = decoder(
            ids,
            torch.arange(tokens),
            attend,
            checkpoint_layers=section.checkpoint_layers,
            mlp_tile_tokens=section.mlp_tile_tokens,
        )
        hidden.sum().backward()
    return found.peak


@pytest.mark.parametrize("tile", [0, 64], ids=["whole", "tiled"])
def test_forecast_memory_counts_the_activations_of_a_pass(tile: int) -> None:
    """The growth with tokens of the peak of live bytes, over two lengths."""
    model = replace(
        QWEN_7B, hidden=64, ff=128, layers=3, heads=4, kv_heads=1, head_dim=16, vocab_size=8
    )
    section = ModelSection(checkpoint_layers=True, mlp_tile_tokens=tile)
    config = replace(TrainConfig(), model=section)
    found = []
    for tokens in (1024, 2048):
        update = replace(config.update, microbatch_tokens=tokens)
        rollout = replace(config.rollout, max_completion_tokens=10)
        forecast = forecast_memory(
            replace(config, update=update, rollout=rollout),
            model,
            dtype=torch.float32,
            device=CPU,
            longest_prompt=9,
        )
        owners = ("activations of one layer", "inputs of all layers")
        found.append(sum(forecast.update[owner] for owner in owners))
    measured = live_bytes(model, 2048, section) - live_bytes(model, 1024, section)
    assert found[1] - found[0] == pytest.approx(measured, rel=0.1)


def test_forecast_memory_counts_what_a_layer_keeps() -> None:
    """Without checkpoints; three fused projections are for attention, which keeps none here."""
    few, many = (
        replace(
            QWEN_7B, hidden=64, ff=128, layers=n, heads=4, kv_heads=1, head_dim=16, vocab_size=8
        )
        for n in (3, 6)
    )
    section = ModelSection(checkpoint_layers=False)
    of_few, of_many = (
        live_bytes(model, 2048, section) - live_bytes(model, 1024, section) for model in (few, many)
    )
    in_attention = 3 * (4 + 2 * 1) * 16
    kept = (of_many - of_few) / (3 * 1024 * 4)
    assert kept == pytest.approx(_kept_width(few) - in_attention, rel=0.02)


@pytest.mark.parametrize("name", ["qwen2.5_7b_32k_8gpu", "qwen2.5_7b_128k_8gpu"])
def test_forecast_of_long_outputs_fits_80_gb(name: str) -> None:
    assert forecast_of(name).misfits(80_000_000_000) == []


def test_forecast_of_128k_tokens_without_shards_names_what_does_not_fit() -> None:
    config = load_config(TrainConfig, ROOT / "configs" / "qwen2.5_7b_128k_8gpu.yaml")
    kinds = {"dtype": torch.bfloat16, "device": CUDA, "longest_prompt": 1000}
    alone = forecast_memory(
        replace(config, parallel=ParallelConfig()), QWEN_7B, **kinds, num_ranks=8
    )
    rollout, update = alone.misfits(80_000_000_000)
    assert rollout.startswith("rollout: ")
    assert "AdamW moments" in rollout
    assert update.startswith("update: ")


def test_forecast_of_a_million_tokens_names_the_kv_cache() -> None:
    found = forecast_of("qwen2.5_7b_1m_8gpu")
    misfits = found.misfits(80_000_000_000)
    assert "rollout: " in misfits[0]
    assert "KV cache 57.6 GB" in misfits[0]
    assert found.misfits(141_000_000_000) == []
    assert found.host["inputs of all layers"] > 20_000_000_000


def test_dry_run_forecasts_for_ranks_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_run_args(tmp_path, **{"parallel.sequence": 4})
    assert main([*arguments, "--dry-run", "--ranks=8", "--device-gb=0.00001"]) == 0
    out = capsys.readouterr().out
    assert "Forecast, 8 ranks" in out
    assert "DOES NOT FIT, update: " in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks=8"], "belong to --dry-run"),
        (["--dry-run", "--ranks=0"], "--ranks must be above 0"),
        (["--dry-run", "--parallel.sequence=2"], "does not divide the 1 processes"),
    ],
)
def test_dry_run_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*make_run_args(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_reward_models_are_forecast_where_they_wait_and_where_they_score(tmp_path: Path) -> None:
    section = WritingRewardConfig(weight=1, model=make_reward_model(tmp_path))
    model = WritingReward(section, "cpu").model
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    nothing = MemoryForecast(always={}, rollout={}, update={})
    config = RewardsConfig(writing=section)
    name = "reward model of writing"
    assert with_reward_models(nothing, config, CPU) == replace(nothing, always={name: size})
    assert with_reward_models(nothing, config, CUDA) == replace(
        nothing, host={name: size}, rollout={f"{name}, while it scores": size}
    )
    config = replace(config, pool=RewardPoolConfig(workers=3, kind="process"))
    assert with_reward_models(nothing, config, CUDA) == replace(
        nothing, host={f"{name}, 3 copies": 3 * size}
    )
    assert with_reward_models(nothing, RewardsConfig(), CUDA) == nothing


def test_dry_run_names_a_reward_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"rewards.writing.weight": 1, "rewards.writing.model": tmp_path / "nothing"}
    assert main([*make_run_args(tmp_path, **settings), "--dry-run"]) == 2
    assert "rewards.writing.model: cannot load" in capsys.readouterr().err
