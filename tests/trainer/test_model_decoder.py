"""The decoder's values and gradients, against transformers' implementation of the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lwz_trainer.model.decoder import Decoder
from lwz_trainer.model.loading import load_decoder
from lwz_trainer.model.parameter_names import checkpoint_slices
from tests.trainer.tiny import VOCAB_SIZE, causal_attend, make_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    # With 32 and 1 turns the ramp of so small a head would be empty.
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
# One case for each branch of the architecture; lengths below exceed the 64 original positions.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama, H·K is not D": ("llama", {"head_dim": 24}),
    "llama, one head per key": ("llama", {"num_key_value_heads": 4}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "yarn, band not rounded": ("qwen3", {"rope_parameters": YARN_ROPE | {"truncate": False}}),
    "yarn, both scales": (
        "qwen2",
        {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "qwen2 tied": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, overrides = CASES[request.param]
    return make_tiny_model(tmp_path, family, **overrides)


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norm statistics in fp32 even in fp64; this lets it keep fp64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def random_ids(*, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator)


def packed_positions(seqlens: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in seqlens])


def logits_of(
    decoder: Decoder, input_ids: Tensor, seqlens: list[int], *, checkpoint_layers: bool = False
) -> Tensor:
    hidden_TD = decoder(
        input_ids,
        packed_positions(seqlens),
        causal_attend(seqlens),
        checkpoint_layers=checkpoint_layers,
    )
    return hidden_TD @ decoder.head_weight.T


def hf_model(model_dir: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def test_decoder_logits_agree_with_transformers_in_fp32(model_dir: Path) -> None:
    input_ids = random_ids(num_tokens=100)
    want_TV = hf_model(model_dir, torch.float32)(input_ids[None]).logits[0]
    decoder = load_decoder(model_dir, dtype=torch.float32, device="cpu")
    got_TV = logits_of(decoder, input_ids, [100])
    assert relative_error(got_TV, want_TV) < 1e-5


@torch.no_grad()
@pytest.mark.usefixtures("wide_norms")
def test_decoder_logits_agree_with_transformers_in_fp64(model_dir: Path) -> None:
    input_ids = random_ids(num_tokens=100)
    want_TV = hf_model(model_dir, torch.float64)(input_ids[None]).logits[0]
    decoder = load_decoder(model_dir, dtype=torch.float64, device="cpu")
    got_TV = logits_of(decoder, input_ids, [100])
    # Rotary angles are fp32 on both sides and equal to the last bit; only fp64 rounding is left.
    assert relative_error(got_TV, want_TV) < 1e-12


@torch.no_grad()
def test_decoder_in_bf16_loses_no_more_than_transformers(model_dir: Path) -> None:
    input_ids = random_ids(num_tokens=100)
    truth_TV = hf_model(model_dir, torch.float32)(input_ids[None]).logits[0]
    theirs_TV = hf_model(model_dir, torch.bfloat16)(input_ids[None]).logits[0]
    decoder = load_decoder(model_dir, dtype=torch.bfloat16, device="cpu")
    ours_TV = logits_of(decoder, input_ids, [100])
    assert ours_TV.dtype == torch.bfloat16
    assert relative_error(ours_TV, truth_TV) < 2 * relative_error(theirs_TV, truth_TV)


@torch.no_grad()
def test_decoder_packed_sequences_equal_separate_ones(model_dir: Path) -> None:
    decoder = load_decoder(model_dir, dtype=torch.float64, device="cpu")
    first, second = random_ids(num_tokens=5), random_ids(num_tokens=9, seed=1)
    packed_TV = logits_of(decoder, torch.cat((first, second)), [5, 9])
    separate_TV = torch.cat((logits_of(decoder, first, [5]), logits_of(decoder, second, [9])))
    torch.testing.assert_close(packed_TV, separate_TV, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_decoder_accepts_zero_and_one_tokens(model_dir: Path) -> None:
    decoder = load_decoder(model_dir, dtype=torch.float32, device="cpu")
    one_TV = logits_of(decoder, torch.tensor([7]), [1])
    assert one_TV.shape == (1, VOCAB_SIZE)
    assert one_TV.isfinite().all()
    empty_TV = decoder(
        torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), lambda _, q, k, v: q
    )
    assert empty_TV.shape == (0, decoder.config.hidden)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("name", ["llama tied", "qwen2 untied", "qwen3"])
def test_decoder_gradients_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = CASES[name]
    model_dir = make_tiny_model(tmp_path, family, **overrides)
    input_ids = random_ids(num_tokens=20)
    theirs = hf_model(model_dir, torch.float64)
    torch.logsumexp(theirs(input_ids[None]).logits[0], dim=-1).sum().backward()
    their_grads = {name: value.grad for name, value in theirs.named_parameters()}

    decoder = load_decoder(model_dir, dtype=torch.float64, device="cpu")
    torch.logsumexp(logits_of(decoder, input_ids, [20]), dim=-1).sum().backward()
    our_grads = {name: value.grad for name, value in decoder.named_parameters()}

    pieces = checkpoint_slices(decoder.config)
    assert {piece.name for piece in pieces} == their_grads.keys()
    for piece in pieces:
        got, want = our_grads[piece.parameter], their_grads[piece.name]
        assert got is not None, piece.name
        assert want is not None, piece.name
        assert relative_error(got[piece.start : piece.stop], want) < 1e-10, piece.name


def test_decoder_checkpoint_layers_gives_identical_gradients(model_dir: Path) -> None:
    input_ids = random_ids(num_tokens=14)
    grads = []
    for checkpoint_layers in (False, True):
        decoder = load_decoder(model_dir, dtype=torch.float32, device="cpu")
        logits_TV = logits_of(decoder, input_ids, [5, 9], checkpoint_layers=checkpoint_layers)
        torch.logsumexp(logits_TV, dim=-1).sum().backward()
        grads.append([parameter.grad for parameter in decoder.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


def test_decoder_checkpoint_layers_runs_attention_again_in_backward(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny_model(tmp_path), dtype=torch.float32, device="cpu")
    called: list[int] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        called.append(layer)
        return causal_attend([4])(layer, q, k, v)

    ids = random_ids(num_tokens=4)
    hidden_TD = decoder(ids, packed_positions([4]), attend, checkpoint_layers=True)
    assert called == [0, 1]
    hidden_TD.sum().backward()
    assert called == [0, 1, 1, 0]


def test_decoder_cast_keeps_rotary_frequencies_in_fp32(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny_model(tmp_path), dtype=torch.float32, device="cpu")
    before = decoder.inv_freq.clone()
    decoder.to(torch.bfloat16)
    assert decoder.embed.dtype == torch.bfloat16
    assert torch.equal(decoder.inv_freq, before)
    assert "inv_freq" not in decoder.state_dict()


def test_decoder_head_weight_is_the_embedding_only_if_tied(tmp_path: Path) -> None:
    tied = load_decoder(make_tiny_model(tmp_path / "a"), dtype=torch.float32, device="cpu")
    assert tied.head_weight is tied.embed
    untied_dir = make_tiny_model(tmp_path / "b", tie_word_embeddings=False)
    untied = load_decoder(untied_dir, dtype=torch.float32, device="cpu")
    assert untied.head_weight is untied.lm_head


class OperatorCount(TorchDispatchMode):
    """Names of the operators called that compute; views cost a tenth and are left out."""

    VIEWS = ("chunk", "expand", "reshape", "slice", "unsqueeze", "view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize(("family", "limit"), [("llama", 13), ("qwen2", 13), ("qwen3", 16)])
def test_decoder_layer_calls_few_operators(tmp_path: Path, family: str, limit: int) -> None:
    """A CPU decode step is bounded by operator calls, so their number per layer is part of it."""
    counts = []
    for num_layers in (1, 2):
        parent = tmp_path / str(num_layers)
        directory = make_tiny_model(parent, family, num_hidden_layers=num_layers)
        decoder = load_decoder(directory, dtype=torch.float32, device="cpu")
        with OperatorCount() as operators:
            decoder(torch.tensor([3]), torch.tensor([0]), lambda _, q, k, v: q)
        counts.append(operators.names)
    assert 0 < len(counts[1]) - len(counts[0]) <= limit, counts[1]
