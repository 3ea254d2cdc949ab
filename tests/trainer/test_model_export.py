"""Export: transformers and our loader read back exactly the model that was written."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lwz_trainer.errors import UserError
from lwz_trainer.model import export
from lwz_trainer.model.atomic_directory import replace_directory
from lwz_trainer.model.export import save_pretrained
from lwz_trainer.model.loading import load_hf_config, load_pretrained
from tests.trainer.tiny import EOS, make_tiny_model, tiny_hf_config

FAMILIES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_pretrained(str(path), dtype=dtype, device="cpu")


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100_000])
def test_save_pretrained_round_trip_is_bit_identical(
    tmp_path: Path, family: str, overrides: dict[str, Any], max_shard_bytes: int
) -> None:
    model_dir = make_tiny_model(tmp_path, family, **overrides)
    decoder, tokenizer = load(model_dir)
    out_dir = tmp_path / "parent" / "out"
    save_pretrained(decoder, tokenizer, model_dir, out_dir, max_shard_bytes=max_shard_bytes)

    again, _ = load(out_dir)
    assert again.config == decoder.config
    for (name, got), want in zip(again.named_parameters(), decoder.parameters(), strict=True):
        assert torch.equal(got, want), name

    ids = torch.arange(20)[None]
    with torch.no_grad():
        want_logits = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
        got_logits = AutoModelForCausalLM.from_pretrained(out_dir)(ids).logits
    assert torch.equal(got_logits, want_logits)
    assert [path.name for path in out_dir.parent.iterdir()] == ["out"]


def test_save_pretrained_writes_the_trained_weights(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    decoder, tokenizer = load(model_dir)
    with torch.no_grad():
        decoder.layers[0].gate_up_proj[128:].fill_(3.0)
    save_pretrained(decoder, tokenizer, model_dir, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(model_dir / "model.safetensors")
    assert written["model.layers.0.mlp.up_proj.weight"].eq(3.0).all()
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(written[gate], before[gate])
    assert written.keys() == before.keys()


def test_save_pretrained_shards_below_the_limit_and_lists_them(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    decoder, tokenizer = load(model_dir)
    out_dir = tmp_path / "out"
    save_pretrained(decoder, tokenizer, model_dir, out_dir, max_shard_bytes=100_000)
    index = json.loads((out_dir / "model.safetensors.index.json").read_text())
    files = sorted(out_dir.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = []
    for file in files:
        tensors = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert not (out_dir / "model.safetensors").exists()


def test_save_pretrained_writes_tokenizer_template_and_generation_config(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    GenerationConfig(eos_token_id=[0, 1]).save_pretrained(model_dir)
    decoder, tokenizer = load(model_dir)
    out_dir = tmp_path / "out"
    save_pretrained(decoder, tokenizer, model_dir, out_dir)
    again = AutoTokenizer.from_pretrained(out_dir)
    chat = [{"role": "user", "content": "Write."}]
    assert again.eos_token == EOS
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\nWrite.<|im_end|>\n"
    )
    assert GenerationConfig.from_pretrained(out_dir).eos_token_id == [0, 1]


def test_save_pretrained_config_names_dtype_and_architecture(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    decoder, tokenizer = load(model_dir, torch.bfloat16)
    config = load_hf_config(model_dir)
    config.architectures = None
    out_dir = tmp_path / "out"
    save_pretrained(decoder, tokenizer, config, out_dir)
    written = json.loads((out_dir / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert config.architectures is None
    assert AutoModelForCausalLM.from_pretrained(out_dir).dtype == torch.bfloat16
    stored = load_file(out_dir / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_save_pretrained_refuses_a_used_directory(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    decoder, tokenizer = load(model_dir)
    with pytest.raises(UserError, match=r"it exists, expected a new or empty directory"):
        save_pretrained(decoder, tokenizer, model_dir, model_dir)
    (tmp_path / "empty").mkdir()
    save_pretrained(decoder, tokenizer, model_dir, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_save_pretrained_refuses_another_models_config(tmp_path: Path) -> None:
    decoder, tokenizer = load(make_tiny_model(tmp_path))
    other = tiny_hf_config(num_hidden_layers=3)
    with pytest.raises(UserError, match=r"describes another model than the weights"):
        save_pretrained(decoder, tokenizer, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_pretrained_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_tiny_model(tmp_path)
    decoder, tokenizer = load(model_dir)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(UserError, match=r"cannot export to .*No space left on device"):
        save_pretrained(decoder, tokenizer, model_dir, tmp_path / "parent" / "out")
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.parametrize(("num_renames", "left"), [(0, "old"), (1, None), (2, "new")])
def test_replace_directory_killed_leaves_the_old_none_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int, left: str | None
) -> None:
    final = tmp_path / "final"
    rename, calls = Path.rename, iter(range(9))

    def rename_or_die(self: Path, target: Path) -> Path:
        if next(calls) == num_renames:
            raise KeyboardInterrupt
        return rename(self, target)

    def writes(text: str) -> Callable[[Path], None]:
        def write(directory: Path) -> None:
            directory.mkdir()
            (directory / "weights").write_text(text)

        return write

    replace_directory(final, writes("old"))
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_or_die)
        replace_directory(final, writes("new"))
    assert (final / "weights").read_text() == left if left else not final.exists()
    replace_directory(final, writes("newest"))
    assert (final / "weights").read_text() == "newest"
    assert list(tmp_path.iterdir()) == [final]
