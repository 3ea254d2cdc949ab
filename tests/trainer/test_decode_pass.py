"""A decode step's forward pass in one native call, against the decoder that it stands for."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lwz_kernels import native
from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_decoder
from lwz_trainer.rollout import decode_pass as decode_pass_module
from lwz_trainer.rollout.attend import DecodeAttend
from lwz_trainer.rollout.decode_pass import decode_pass
from lwz_trainer.rollout.kv_cache import PagedKVCache
from tests.trainer.rollout_case import load_tiny, make_engine, make_requests, sample_all
from tests.trainer.test_model_decoder import YARN_ROPE
from tests.trainer.tiny import make_tiny_model

needs_native = pytest.mark.skipif(
    not native.is_available(), reason=f"native library: {native.unavailable_reason()}"
)
CONTEXTS = [1, 17, 8, 40, 0]
PAGE_SIZE = 8
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def _attend(model: Decoder) -> DecodeAttend:
    """Random caches; the last row is inactive."""
    config, batch, pages_each = model.config, len(CONTEXTS), 6
    shape = (2, config.layers, batch * pages_each, PAGE_SIZE, config.kv_heads, config.head_dim)
    pages = torch.randperm(batch * pages_each, dtype=torch.int32).view(batch, pages_each)
    last = torch.tensor(CONTEXTS) - 1
    page = pages.long().gather(1, (last.clamp(min=0) // PAGE_SIZE)[:, None])[:, 0]
    return DecodeAttend(
        PagedKVCache(torch.randn(shape).to(model.embed.dtype)),
        pages,
        torch.tensor(CONTEXTS, dtype=torch.int32),
        torch.where(last < 0, -1, page * PAGE_SIZE + last % PAGE_SIZE),
    )


def _copy(attend: DecodeAttend) -> DecodeAttend:
    memory = torch.stack((attend.cache.keys, attend.cache.values))
    return DecodeAttend(
        PagedKVCache(memory), attend.page_table_BP, attend.context_lens_B, attend.slots_B
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decode_pass_is_as_good_as_the_decoder(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Both against the decoder in fp64: the same operations, so about the same error."""
    torch.manual_seed(0)
    family, changes = CASES[name]
    model_dir = make_tiny_model(tmp_path, family, **changes)
    model = load_decoder(model_dir, dtype=dtype, device="cpu")
    exact_model = load_decoder(model_dir, dtype=dtype, device="cpu").double()
    attend = _attend(model)
    ids, positions = torch.randint(8, 64, (len(CONTEXTS),)), torch.tensor(CONTEXTS).clamp(min=1) - 1
    wide = torch.stack((attend.cache.keys, attend.cache.values)).double()
    exact_attend = DecodeAttend(
        PagedKVCache(wide), attend.page_table_BP, attend.context_lens_B, attend.slots_B
    )

    def run(model: Decoder, attend: DecodeAttend, run: Any) -> tuple[Tensor, Tensor, Tensor]:
        attend = _copy(attend)
        with torch.inference_mode():
            hidden = run(model, ids, positions, attend)
        return hidden[:-1], attend.cache.keys, attend.cache.values

    def through_module(model: Decoder, *arguments: Any) -> Tensor:
        return model(*arguments)

    def in_fp64(model: Decoder, ids: Tensor, positions: Tensor, attend: DecodeAttend) -> Tensor:
        with (
            mock.patch("lwz_trainer.rollout.attend.paged_attention", _paged_attention_in_fp64),
            mock.patch("lwz_trainer.rollout.attend.store_kv", _store_in_fp64),
        ):
            return model(ids, positions, attend)

    truth = run(exact_model, exact_attend, in_fp64)
    eager = run(model, attend, through_module)
    with (
        mock.patch.object(decode_pass_module, "is_fast_for_few_rows", return_value=True),
        mock.patch.object(model, "forward", side_effect=AssertionError("not the native call")),
    ):
        found = run(model, attend, decode_pass)
    for one, other, exact in zip(found, eager, truth, strict=True):
        allowed = 2 * (other.double() - exact).abs().max() + 3e-6 * exact.abs().max()
        assert (one.double() - exact).abs().max() <= allowed


def _paged_attention_in_fp64(*arguments: Tensor) -> Tensor:
    from lwz_kernels.paged_attention import reference

    return reference.paged_attention(*arguments, softmax_scale=arguments[0].shape[2] ** -0.5)


def _store_in_fp64(*arguments: Tensor) -> None:
    from lwz_kernels.paged_attention import reference

    reference.store_kv(*arguments)


@needs_native
def test_engine_decodes_natively_and_samples_what_the_decoder_would(tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tmp_path)
    requests = make_requests()
    with mock.patch.object(
        decode_pass_module, "decode_layers", wraps=decode_pass_module.decode_layers
    ) as calls:
        ours = sample_all(make_engine(model, tokenizer), requests)
    assert calls.call_count > 10
    with mock.patch.object(decode_pass_module, "_runs_native", return_value=False):
        plain = sample_all(make_engine(model, tokenizer), requests)
    assert [sample.completion_ids for sample in ours] == [s.completion_ids for s in plain]
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)


def test_without_the_library_the_decoder_itself_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_tiny(tmp_path)
    monkeypatch.setattr(native, "_load", lambda: (None, "not built here"))
    with mock.patch.object(decode_pass_module, "decode_layers") as calls:
        samples = sample_all(make_engine(model, tokenizer), make_requests())
    assert len(samples) == 16
    assert calls.call_count == 0
