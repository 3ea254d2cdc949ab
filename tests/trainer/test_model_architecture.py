"""Reading transformers configurations: what is carried over, and what is refused by name."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedConfig

from lwz_trainer.errors import UserError
from lwz_trainer.model.architecture import Llama3Scaling, ModelConfig, YarnScaling
from tests.trainer.tiny import tiny_hf_config


def test_from_hf_reads_every_size() -> None:
    config = ModelConfig.from_hf(tiny_hf_config("qwen3", rms_norm_eps=1e-5))
    assert config == ModelConfig(
        family="qwen3",
        vocab_size=300,
        hidden=64,
        ff=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        rms_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=True,
        max_positions=512,
    )


def test_from_hf_knows_the_differences_of_the_families() -> None:
    llama, qwen2 = (ModelConfig.from_hf(tiny_hf_config(name)) for name in ("llama", "qwen2"))
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim) == (False, False, 16)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 16)


def older_config(**overrides: Any) -> SimpleNamespace:
    """The attributes of a configuration before transformers 5 gathered the rope settings."""
    settings: dict[str, Any] = tiny_hf_config("qwen2").to_dict()
    for name in ("rope_parameters", "layer_types"):
        del settings[name]
    return SimpleNamespace(**(settings | overrides))


def test_from_hf_reads_older_rope_settings() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = ModelConfig.from_hf(older_config(rope_theta=1e6, rope_scaling=scaling))
    assert config.rope_theta == 1e6
    assert config.rope_scaling == YarnScaling(
        factor=4.0,
        original_max_positions=128,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=0.1 * math.log(4.0) + 1.0,
        truncate=True,
    )
    assert ModelConfig.from_hf(older_config(rope_theta=1e6)).rope_scaling is None


def test_from_hf_reads_llama3_scaling() -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = ModelConfig.from_hf(tiny_hf_config(rope_parameters=scaling))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )


def test_from_hf_accepts_a_sliding_window_that_is_not_in_use() -> None:
    window = {"sliding_window": 4096, "max_window_layers": 1}
    off = older_config(rope_theta=1e4, use_sliding_window=False, **window)
    assert ModelConfig.from_hf(off).layers == 2
    beyond = older_config(
        rope_theta=1e4, use_sliding_window=True, sliding_window=4096, max_window_layers=2
    )
    assert ModelConfig.from_hf(beyond).layers == 2
    unused = tiny_hf_config("qwen2", use_sliding_window=False, sliding_window=64)
    assert ModelConfig.from_hf(unused).layers == 2


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[Any, str]] = {
    "another architecture": (
        SimpleNamespace(model_type="mamba"),
        r"'mamba', expected one of llama, qwen2, qwen3",
    ),
    "activation": (tiny_hf_config(hidden_act="gelu"), r"hidden_act = 'gelu', expected 'silu'"),
    "llama attention bias": (tiny_hf_config(attention_bias=True), r"attention_bias = True"),
    "qwen3 attention bias": (
        tiny_hf_config("qwen3", attention_bias=True),
        r"attention_bias = True",
    ),
    "mlp bias": (tiny_hf_config(mlp_bias=True), r"mlp_bias = True"),
    "dropout": (tiny_hf_config(attention_dropout=0.1), r"attention_dropout = 0.1"),
    "linear rope": (
        tiny_hf_config(rope_parameters=YARN | {"rope_type": "linear"}),
        r"rope_type = 'linear', expected one of default, llama3, yarn",
    ),
    "dynamic rope": (
        tiny_hf_config(rope_parameters=YARN | {"rope_type": "dynamic"}),
        r"rope_type = 'dynamic'",
    ),
    "partial rotary": (
        older_config(rope_theta=1e4, partial_rotary_factor=0.5),
        r"partial_rotary_factor = 0.5, expected 1.0",
    ),
    "multimodal rope": (
        older_config(rope_theta=1e4, rope_scaling={"type": "default", "mrope_section": [4, 2, 2]}),
        r"mrope_section = \[4, 2, 2\]",
    ),
    "rope by layer type": (
        older_config(rope_parameters={"full_attention": YARN}),
        r"rope_parameters = \['full_attention'\]",
    ),
    "llama3 rope without a factor": (
        older_config(rope_theta=1e4, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        r"'llama3' have no low_freq_factor",
    ),
    "sliding window": (
        tiny_hf_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        r"layer_types = \['sliding_attention'\]",
    ),
    "sliding window, older": (
        older_config(
            rope_theta=1e4, use_sliding_window=True, sliding_window=64, max_window_layers=1
        ),
        r"sliding_window = 64",
    ),
    "quantised": (
        older_config(rope_theta=1e4, quantization_config={"quant_method": "gptq"}),
        r"quantization_config = 'gptq'",
    ),
    "heads": (
        older_config(rope_theta=1e4, num_key_value_heads=3),
        r"4 query heads, expected a multiple of its 3",
    ),
    "odd head size": (older_config(rope_theta=1e4, head_dim=15), r"head size is 15, expected"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=list(REFUSED))
def test_from_hf_refuses_by_name(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf(config)
    assert "\n" not in str(caught.value)
