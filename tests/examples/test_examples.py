"""The examples run, and compute what the code that they replace computes."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwz_kernels.integrations.huggingface import register_attention

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module as `python examples/NAME.py` finds it: beside the other examples."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


# ---- plain_pytorch.py


def test_plain_pytorch_reward_rises() -> None:
    curve = example("plain_pytorch").train(40)
    # A uniform policy scores 1 / 16; seeds 0 and 1 reach about 0.8.
    assert sum(curve[:5]) / 5 < 0.2
    assert sum(curve[-5:]) / 5 > 0.6


def test_plain_pytorch_micro_batches_change_nothing() -> None:
    train = example("plain_pytorch").train
    whole, split = train(6, num_micro_batches=1), train(6, num_micro_batches=4)
    assert whole == pytest.approx(split, abs=1e-6)
    assert whole[0] != whole[-1]


# ---- transformers_logprobs.py

TINY = {
    "vocab_size": 131,  # no power of two
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2 tied": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**TINY, tie_word_embeddings=True)
    ),
    "llama untied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, tie_word_embeddings=False)
    ),
    "gemma2 softcap": lambda: transformers.Gemma2ForCausalLM(
        # A cap this low bends every logit, so that leaving it out shows.
        transformers.Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere scale": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**TINY, logit_scale=0.25)
    ),
    "granite scale": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**TINY, logits_scaling=4.0)
    ),
    "phi bias": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**TINY)),
}


def padded_batch() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [3, 14]: padded on the left, on the right, and not at all."""
    ids_BL = torch.randint(3, TINY["vocab_size"], (3, 14))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :5], mask_BL[1, 9:] = 0, 0
    return ids_BL * mask_BL, mask_BL


@pytest.mark.parametrize("name", MODELS)
def test_causal_lm_logprobs_equals_logits_path(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():  # scale the head, so that probabilities are far from uniform
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    ids_BL, mask_BL = padded_batch()
    is_scored_BL = (mask_BL[:, 1:] * mask_BL[:, :-1]).bool()
    weights_BL = torch.randn(is_scored_BL.shape) * is_scored_BL
    temperature = 0.7

    def gradients(logprobs_BL: Tensor, entropy_BL: Tensor) -> list[Tensor]:
        loss = (weights_BL * logprobs_BL).sum() + 0.3 * (weights_BL * entropy_BL).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    logprobs_BL, entropy_BL = example("transformers_logprobs").causal_lm_logprobs(
        model, ids_BL, mask_BL, temperature=temperature
    )
    found = gradients(logprobs_BL, entropy_BL)
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits[:, :-1].float()
    log_p_BLV = (logits_BLV / temperature).log_softmax(-1)
    expected_BL = log_p_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
    expected_entropy_BL = -(log_p_BLV.exp() * log_p_BLV).sum(-1)
    expected = gradients(expected_BL, expected_entropy_BL)

    torch.testing.assert_close(logprobs_BL, expected_BL * is_scored_BL, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_BL, expected_entropy_BL * is_scored_BL, rtol=1e-5, atol=1e-5)
    assert_gradients_close(found, expected)


def assert_gradients_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within fp32 rounding of the largest entry of each gradient."""
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale + 1e-9)


def test_head_terms_refuses_an_adapter_on_the_head() -> None:
    model = MODELS["llama untied"]()
    model.lm_head.lora_A = nn.ModuleDict({"default": nn.Linear(32, 2, bias=False)})
    with pytest.raises(TypeError, match="adapter"):
        example("transformers_logprobs").head_terms(model)


def test_transformers_logprobs_main_finds_no_difference(capsys: pytest.CaptureFixture) -> None:
    example("transformers_logprobs").main()
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert int(lines["tokens scored"]) == 127 + 87
    assert float(lines["largest difference"].split()[0]) < 1e-5


# ---- docs/ops/reuse.md


def snippet(heading: str) -> str:
    """The Python block under a heading of the page."""
    page = (EXAMPLES.parent / "docs" / "ops" / "reuse.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found[1]


def run_snippet(heading: str, **names: Any) -> dict[str, Any]:
    """What the block leaves behind, given what its section has imported and named."""
    from lwz_kernels.linear_logprobs import linear_logprobs
    from lwz_kernels.linear_policy_loss import PolicyLossConfig, linear_policy_loss

    names |= {"torch": torch, "linear_logprobs": linear_logprobs}
    names |= {"linear_policy_loss": linear_policy_loss, "PolicyLossConfig": PolicyLossConfig}
    exec(compile(snippet(heading), f"reuse.md, {heading}", "exec"), names)
    return names


def chosen_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def test_reuse_trl_snippet_equals_logits_path() -> None:
    model = MODELS["llama untied"]().eval()
    ids_BL, mask_BL = padded_batch()
    labels_BL = ids_BL.masked_fill(mask_BL == 0, -100)
    names = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    found = run_snippet("TRL", model=model, temperature=0.9, **names)["logprobs_BL"]
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits[:, :-1] / 0.9
    expected = logits_BLV.log_softmax(-1).gather(-1, ids_BL[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected * mask_BL[:, 1:], rtol=1e-5, atol=1e-5)


def test_reuse_verl_snippet_replaces_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    # verl is large; the block needs one class of it, by its name and signature.
    stand_in = ModuleType("verl.utils.experimental.torch_functional")
    stand_in.FusedLinearForPPO = type("FusedLinearForPPO", (nn.Module,), {})  # type: ignore[attr-defined]
    parent = ModuleType("verl.utils.experimental")
    parent.torch_functional = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verl", ModuleType("verl"))
    monkeypatch.setitem(sys.modules, "verl.utils", ModuleType("verl.utils"))
    monkeypatch.setitem(sys.modules, "verl.utils.experimental", parent)
    run_snippet("verl")
    hidden, weight = torch.randn(2, 5, 8), torch.randn(13, 8)
    labels = torch.randint(13, (2, 5), dtype=torch.int32)
    logprobs, entropy = stand_in.FusedLinearForPPO()(
        hidden_states=hidden, vocab_weights=weight, input_ids=labels, temperature=0.7
    )
    log_p = (hidden @ weight.t() / 0.7).log_softmax(-1)
    expected = chosen_logprobs(hidden, weight, labels.long(), 0.7)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)


def test_reuse_liger_snippet_is_grpo_of_a_padded_batch() -> None:
    hidden, weight = torch.randn(3, 6, 8), torch.randn(13, 8)
    labels = torch.randint(13, (3, 6))
    mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).float()
    advantages = torch.tensor([1.0, -0.5, 0.7])
    logprobs = chosen_logprobs(hidden, weight, labels, 0.9)
    old, ref = (logprobs + 0.4 * torch.randn(3, 6) for _ in range(2))
    found = run_snippet(
        "Liger",
        hidden_BLD=hidden,
        weight=weight,
        completion_ids=labels,
        completion_mask=mask,
        advantages_B=advantages,
        old=old,
        ref=ref,
    )["loss"]
    ratio = (logprobs - old).exp()
    surrogate = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    )
    kl = (ref - logprobs).exp() - (ref - logprobs) - 1
    per_sequence = ((0.04 * kl - surrogate) * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found, per_sequence.mean(), rtol=1e-5, atol=1e-6)


def test_reuse_plain_snippet_is_on_policy_gradient() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(13, 8)
    labels, advantages = torch.randint(13, (9,)), torch.randn(9)
    run_snippet(
        "Plain PyTorch",
        hidden=hidden,
        weight=weight,
        labels=labels,
        advantages=advantages,
        cu_seqlens=torch.tensor([0, 4, 9]),
    )
    loss = -(advantages * chosen_logprobs(hidden, weight, labels, 1.0)).mean()
    (expected,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)


# ---- trl_grpo.py

BATCH, PROMPT, LENGTH, STEPS = 4, 5, 9, 2


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved random model, so that TRL can load its reference policy from the same place."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("tiny_llama"))
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 28}, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
    model.save_pretrained(folder)
    return folder


def new_trainer(trainer_class: Any, model: str, folder: Path, **settings: Any) -> Any:
    """A trainer in the middle of an accumulation window."""
    trl = pytest.importorskip("trl", minversion="1.16")
    datasets = pytest.importorskip("datasets")
    module = example("trl_grpo")
    uses_vllm = settings.pop("use_vllm", False)
    trainer = trainer_class(
        model=model,
        reward_funcs=module.vowel_reward,
        processing_class=module.letter_tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b"] * 8}),
        args=trl.GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            num_generations=BATCH,
            gradient_accumulation_steps=STEPS,
            steps_per_generation=2 * STEPS,
            max_completion_length=LENGTH + 2,
            temperature=0.8,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            **settings,
        ),
    )
    trainer.use_vllm = uses_vllm  # after the constructor, which would start vLLM
    trainer.current_gradient_accumulation_steps = STEPS
    trainer.model.train()
    return trainer


def loss_inputs(trainer: Any) -> dict[str, Tensor]:
    """One micro-batch as TRL prepares it: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(7)
    completion_mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 7, 1])[:, None]
    tool_mask = torch.rand(BATCH, LENGTH, generator=generator) > 0.2
    tool_mask[:, 0] = True
    prompt_mask = torch.arange(PROMPT) >= torch.tensor([0, 2, 1, 3])[:, None]
    inputs = {
        "prompt_ids": torch.randint(2, 28, (BATCH, PROMPT), generator=generator) * prompt_mask,
        "completion_ids": torch.randint(2, 28, (BATCH, LENGTH), generator=generator),
        "prompt_mask": prompt_mask.long(),
        "completion_mask": completion_mask.long(),
        "tool_mask": tool_mask.long(),
        "advantages": torch.tensor([1.3, -0.7, -1.1, 0.5]),
        "num_items_in_batch": torch.tensor(77),
    }
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            LENGTH,
        )
    for name, spread in (("old", 0.3), ("ref", 0.5), ("sampling", 0.4)):
        noise = spread * torch.randn(BATCH, LENGTH, generator=generator)
        inputs[f"{name}_per_token_logps"] = (logprobs + noise) * completion_mask
    inputs["importance_sampling_ratio"] = importance_ratio(inputs, trainer.args)
    return inputs


def importance_ratio(inputs: dict[str, Tensor], args: Any) -> Tensor:
    """What TRL computes beside the sampler's log-probs when it generates with vLLM."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    difference = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    level, how = args.vllm_importance_sampling_mode.split("_")
    log_ratio = (
        (difference * mask).sum(1, keepdim=True) if level == "sequence" else difference * mask
    )
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    ratio = log_ratio.exp()
    if how == "truncate":
        return ratio.clamp(max=high)
    return ratio.masked_fill((ratio < (low or 0.0)) | (ratio > high), 0.0)


def loss_and_gradients(trainer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), list(torch.autograd.grad(loss, list(trainer.model.parameters())))


VLLM = {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.3}
CASES: dict[str, dict[str, Any]] = {
    "grpo kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "bnpo two-sided clip": {"loss_type": "bnpo", "epsilon_high": 0.1, "delta": 1.2},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.1},
    "dapo corrected kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.4},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5},
    "grpo entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.05},
    "dapo entropy bonus on a quantile": {
        "loss_type": "dapo",
        "entropy_coef": 0.05,
        "top_entropy_quantile": 0.4,
    },
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "token truncate": {"vllm_importance_sampling_mode": "token_truncate", **VLLM},
    "token mask": {
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_min": 0.7,
        **VLLM,
    },
    "sequence truncate": {"vllm_importance_sampling_mode": "sequence_truncate", **VLLM},
    "vespo token truncate": {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_truncate",
        **VLLM,
    },
}


# With vLLM, TRL always has old log-probs.
ON_POLICY = [(case, True) for case, settings in CASES.items() if "use_vllm" not in settings]


@pytest.mark.parametrize(("case", "is_on_policy"), [(case, False) for case in CASES] + ON_POLICY)
def test_linear_grpo_trainer_equals_trl(
    case: str, is_on_policy: bool, tiny_llama: str, tmp_path: Path
) -> None:
    settings = CASES[case]
    trl = pytest.importorskip("trl", minversion="1.16")
    stock = new_trainer(trl.GRPOTrainer, tiny_llama, tmp_path, **settings)
    ours = new_trainer(example("trl_grpo").LinearGRPOTrainer, tiny_llama, tmp_path, **settings)
    inputs = loss_inputs(stock)
    if is_on_policy:
        del inputs["old_per_token_logps"]
    if not settings.get("use_vllm"):
        del inputs["sampling_per_token_logps"], inputs["importance_sampling_ratio"]
    expected_loss, expected = loss_and_gradients(stock, inputs)
    loss, found = loss_and_gradients(ours, inputs)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    assert_gradients_close(found, expected)


def test_linear_grpo_trainer_logs_what_trl_logs(tiny_llama: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    settings = {"beta": 0.1, "use_bias_correction_kl": False, "epsilon": 0.1}
    stock = new_trainer(trl.GRPOTrainer, tiny_llama, tmp_path, **settings)
    ours = new_trainer(example("trl_grpo").LinearGRPOTrainer, tiny_llama, tmp_path, **settings)
    inputs = loss_inputs(stock)
    for trainer in (stock, ours):
        trainer._compute_loss(trainer.model, inputs)
    expected, found = stock._metrics["train"], ours._metrics["train"]
    assert set(expected) - set(found) == {"clip_ratio/low_min", "clip_ratio/high_max"}
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-5), name
    assert expected["clip_ratio/low_mean"][0] > 0
    assert expected["clip_ratio/high_mean"][0] > 0


def test_linear_grpo_trainer_old_logprobs_equal_trl(tiny_llama: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    stock = new_trainer(trl.GRPOTrainer, tiny_llama, tmp_path)
    ours = new_trainer(example("trl_grpo").LinearGRPOTrainer, tiny_llama, tmp_path)
    inputs = loss_inputs(stock)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        for batch_size in (None, 3):
            expected, found = (
                trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, LENGTH, batch_size=batch_size, compute_entropy=True
                )
                for trainer in (stock, ours)
            )
            torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy is not supported"),
        ({"loss_type": "luspo"}, "sequence-level ratio"),
        ({"loss_type": "cispo", "epsilon_high": 0.2}, "cispo_ratio_max must be"),
    ],
)
def test_linear_grpo_trainer_refuses_what_it_cannot_honour(
    settings: dict[str, Any], message: str, tiny_llama: str, tmp_path: Path
) -> None:
    pytest.importorskip("trl", minversion="1.16")
    with pytest.raises((NotImplementedError, ValueError), match=message):
        new_trainer(example("trl_grpo").LinearGRPOTrainer, tiny_llama, tmp_path, **settings)


def test_policy_loss_config_refuses_a_lower_bound_on_truncation() -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    args = trl.GRPOConfig(
        bf16=False,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=0.5,
    )
    with pytest.raises(ValueError, match="'truncate' only bounds the weight from above"):
        example("trl_grpo").policy_loss_config(args, has_sampler_correction=True)


def test_linear_grpo_trainer_refuses_images(tiny_llama: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    trainer = new_trainer(example("trl_grpo").LinearGRPOTrainer, tiny_llama, tmp_path)
    inputs = loss_inputs(trainer) | {"pixel_values": torch.zeros(1)}
    with pytest.raises(NotImplementedError, match="images are not supported"):
        trainer._compute_loss(trainer.model, inputs)


def test_trl_grpo_main_trains_two_steps(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("trl", minversion="1.16")
    example("trl_grpo").main()
    logged = [line for line in capsys.readouterr().out.splitlines() if "'kl'" in line]
    assert len(logged) == 2
    assert "'kl': '0'" in logged[0]  # the first step starts at the reference policy
    assert "'kl': '0'" not in logged[1]


# ---- transformers_sequence_parallel.py


@pytest.mark.dist
def test_sharded_step_equals_the_step_of_one_process() -> None:
    result = example("transformers_sequence_parallel").compare()
    assert result.loss == pytest.approx(result.loss_alone, rel=1e-6)
    assert result.largest_gradient > 1e-3
    assert result.largest_gradient_difference < 1e-5 * result.largest_gradient
    assert result.attention_calls == 3


def test_trl_trains_with_the_registered_attention(tiny_llama: str, tmp_path: Path) -> None:
    """What docs/ops/attention.md says of TRL; its batches are padded on both sides."""
    trl = pytest.importorskip("trl", minversion="1.16")
    lwz = register_attention()
    stock = new_trainer(trl.GRPOTrainer, tiny_llama, tmp_path)
    ours = new_trainer(
        trl.GRPOTrainer, tiny_llama, tmp_path, model_init_kwargs={"attn_implementation": "lwz"}
    )
    inputs = loss_inputs(stock)
    lwz.calls = 0
    expected = stock._compute_loss(stock.model, inputs)
    assert lwz.calls == 0
    found = ours._compute_loss(ours.model, inputs)
    lwz.check_calls(ours.model.config.num_hidden_layers)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
