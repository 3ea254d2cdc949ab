"""attn_implementation="lwz" against transformers' own: logits, gradients, what it refuses."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lwz_kernels.integrations.huggingface import packed_mask, register_attention

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Full attention with grouped heads; per-head norms; a window in every layer, and in every other.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "mistral window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=5)
    ),
    "qwen2 mixed": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
        )
    ),
}
LENGTH = 23
PACKED = torch.cat([torch.arange(n) for n in (9, 1, 13)])
LEFT = torch.ones(2, LENGTH, dtype=torch.int64).index_fill(1, torch.arange(6), 0)
LEFT[0] = 1
INPUTS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "packed": {"position_ids": PACKED.expand(2, -1)},
    "padded left": {"attention_mask": LEFT},
    "padded right": {"attention_mask": LEFT.flip(1)},
}


def run(model: Any, implementation: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits of the real tokens, and the gradients of a sum of them with fixed weights."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    input_ids = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % SIZES["vocab_size"]
    logits = model(input_ids, use_cache=False, **inputs).logits
    if "attention_mask" in inputs:
        logits = logits[inputs["attention_mask"].bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("name", MODELS)
def test_lwz_equals_sdpa(name: str, case: str) -> None:
    lwz = register_attention()
    lwz.calls = 0
    model = MODELS[name]().double()
    expected = run(model, "sdpa", INPUTS[case])
    assert lwz.calls == 0
    found = run(model, "lwz", INPUTS[case])
    lwz.check_calls(SIZES["num_hidden_layers"])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_lwz_equals_eager_for_packed_documents(name: str) -> None:
    """To fp32, which is what "eager" takes its softmax in; and documents do not see each other."""
    model = MODELS[name]().double()
    expected, found, whole = (
        run(model, implementation, INPUTS[case])
        for implementation, case in (("eager", "packed"), ("lwz", "packed"), ("lwz", "plain"))
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[0], found[0], atol=1e-3)


def test_lwz_recomputes_under_gradient_checkpointing() -> None:
    lwz = register_attention()
    lwz.calls = 0
    model = MODELS["llama"]().double()
    expected = run(model, "lwz", INPUTS["packed"])
    lwz.check_calls(2)
    model.gradient_checkpointing_enable()
    model.train()
    found = run(model, "lwz", INPUTS["packed"])
    lwz.check_calls(4)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "mistral window"])
def test_lwz_generates_from_a_cache_as_sdpa_does(name: str) -> None:
    """Left-padded prompts, then tokens one by one."""
    lwz = register_attention()
    model = MODELS[name]().double().eval()
    prompts = torch.arange(2 * 8).view(2, 8) + 3
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = []
    lwz.calls = 0
    for implementation in ("sdpa", "lwz"):
        model.set_attn_implementation(implementation)
        result = model.generate(
            prompts,
            attention_mask=mask,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        found.append(torch.stack(result.logits))
    lwz.check_calls(6 * 2)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_register_attention_never_replaces_another() -> None:
    lwz = register_attention()
    assert register_attention() is lwz
    assert register_attention("lwz_torch", impl="torch").impl == "torch"
    before = transformers.AttentionInterface()["sdpa"]
    for taken in ("sdpa", "eager", "flash_attention_2"):
        with pytest.raises(ValueError, match=f"'{taken}' is taken in transformers"):
            register_attention(taken)
    with pytest.raises(ValueError, match="'lwz' is taken"):
        register_attention(impl="torch")
    assert transformers.AttentionInterface()["sdpa"] is before


def test_check_calls_says_where_it_did_not_run() -> None:
    lwz = register_attention()
    lwz.calls = 0
    run(MODELS["llama"](), "sdpa", {})
    with pytest.raises(RuntimeError, match="lwz ran 0 times, expected 2: load the model with"):
        lwz.check_calls(2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": 0.1}, "got dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"a mask tensor \[1, 1, 4, 4\]"),
    ],
)
def test_what_would_change_the_result_is_refused(options: dict[str, Any], match: str) -> None:
    q = torch.zeros(1, 2, 4, 8)
    arguments = {"attention_mask": None} | options
    with pytest.raises(NotImplementedError, match=match):
        register_attention()(torch.nn.Module(), q, q, q, **arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_vmap": True}, "masks other than causal"),
        ({"mask_function": lambda b, h, q, k: k <= q + 1}, "sees keys behind it"),
        ({"attention_mask": torch.tensor([[True, False, True, True]])}, "at the ends of rows only"),
    ],
)
def test_masks_that_segments_cannot_say_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(NotImplementedError, match=match):
        packed_mask(1, 4, 4, **options)


def test_chunks_are_documents() -> None:
    mask = packed_mask(
        1, 7, 7, mask_function=lambda b, h, q, k: (k <= q) & (k // 3 == q // 3), local_size=3
    )
    assert [tuple(row[:2]) for row in mask.table.segments] == [(0, 3), (3, 3), (6, 1)]
    assert mask.window_size == 3


def test_a_row_of_padding_sees_nothing() -> None:
    mask = packed_mask(2, 3, 3, attention_mask=torch.tensor([[False] * 3, [True] * 3]))
    assert [tuple(row[:4]) for row in mask.table.segments] == [(3, 3, 3, 3)]


def test_import_does_not_import_transformers() -> None:
    code = "import sys, lwz_kernels.integrations.huggingface; print('transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "False"
