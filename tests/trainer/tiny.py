"""Tiny random models with a real tokenizer, saved as Hugging Face directories.

`make_tiny_model` is what the trainer's tests train, sample from and load; `causal_attend` is the
attention that they check against.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lwz_trainer.model.decoder import Attend

__all__ = [
    "EOS",
    "PAD",
    "VOCAB_SIZE",
    "causal_attend",
    "make_tiny_model",
    "make_tiny_tokenizer",
    "tiny_hf_config",
]

EOS = "<|im_end|>"
# transformers gives every Qwen tokenizer this token, so it must be in the vocabulary.
PAD = "<|endoftext|>"
VOCAB_SIZE = 300

_CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_MODELS: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
_TRAINING_LINES = [
    "The sea was calm, and the ship went slowly to the north.",
    "<think> Plan the story: a beginning, a middle and an end. </think>",
    "<answer> Once there was a writer who wrote a very long letter. </answer>",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens that can spell any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<|im_start|>", EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TRAINING_LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS if eos else None, pad_token=PAD
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_hf_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """V 300, D 64, F 128, two layers, H 4, J 2; `overrides` are transformers' names."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # Ten times the usual spread: attention is far from uniform and errors are visible.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "qwen3":
        settings["head_dim"] = 32  # so that H·K is not D
    return _CONFIGS[family](**(settings | overrides))


def make_tiny_model(
    tmp_path: Path, family: str = "llama", *, seed: int = 0, **overrides: Any
) -> Path:
    """Saves a random fp32 model with tokenizer, EOS and chat template; returns its directory.

    Args:
        tmp_path: the directory `tiny-<family>` is made here.
        family: "llama", "qwen2" or "qwen3".
        seed: of the weights; norms and biases are random too, so that none can be forgotten.
        overrides: of `tiny_hf_config`.
    """
    out_dir = tmp_path / f"tiny-{family}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[family](tiny_hf_config(family, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
    model.save_pretrained(out_dir)
    make_tiny_tokenizer().save_pretrained(out_dir)
    return out_dir


def causal_attend(seqlens: list[int]) -> Attend:
    """Causal attention inside each of the packed sequences; keeps the fp64 of its inputs."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for parts in zip(q.split(seqlens), k.split(seqlens), v.split(seqlens), strict=True):
            q_1HLK, k_1JLK, v_1JLK = (part.transpose(0, 1)[None] for part in parts)
            out_1HLK = F.scaled_dot_product_attention(
                q_1HLK, k_1JLK, v_1JLK, is_causal=True, enable_gqa=True
            )
            outputs.append(out_1HLK[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend
