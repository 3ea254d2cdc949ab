"""Keyed randomness and inverse-CDF sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwz_trainer.rollout.sampling import keyed_uniforms, sample_tokens


def uniforms(count: int, *, seed: int = 0, step: int = 0) -> torch.Tensor:
    samples = torch.arange(count)
    return keyed_uniforms(seed, step, samples, torch.zeros_like(samples))


def test_keyed_uniforms_are_uniform_and_uncorrelated() -> None:
    samples = torch.arange(300).repeat_interleave(300)
    positions = torch.arange(300).repeat(300)
    grid = keyed_uniforms(7, 11, samples, positions).view(300, 300)
    assert grid.min() > 0
    assert grid.max() < 1
    histogram = torch.histc(grid.float(), bins=100, min=0, max=1)
    chi2 = ((histogram - 900) ** 2 / 900).sum()
    assert chi2 < 160  # 99 degrees of freedom: P(chi2 > 160) is about 1e-4
    for shifted in (grid.roll(1, 0), grid.roll(1, 1), keyed_uniforms(8, 11, samples, positions)):
        stacked = torch.stack([grid.flatten(), shifted.flatten()])
        assert torch.corrcoef(stacked)[0, 1].abs() < 0.02


def test_keyed_uniforms_differ_when_parts_of_the_key_are_swapped() -> None:
    one, two = torch.tensor([1]), torch.tensor([2])
    keys = [(1, 2, one, one), (2, 1, one, one), (1, 1, two, one), (1, 1, one, two)]
    assert len({float(keyed_uniforms(*key)) for key in keys}) == 4


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 1000])
def test_sample_tokens_follows_the_distribution(vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(vocab)
    count = 20_000
    tokens, logprobs = sample_tokens(
        logits.expand(count, -1).clone(), uniforms(count), temperature=0.8
    )
    expected = torch.log_softmax(logits / 0.8, -1)
    torch.testing.assert_close(logprobs, expected[tokens], rtol=1e-5, atol=1e-5)
    frequency = torch.bincount(tokens, minlength=vocab) / count
    likely = expected.exp() > 0.002
    error = (frequency - expected.exp())[likely].abs()
    assert (error < 5 * (expected.exp()[likely] / count).sqrt()).all()


def test_sample_tokens_never_draws_an_impossible_token() -> None:
    logits = torch.full((3, 700), float("-inf"))
    logits[:, 300] = 0.0
    edges = torch.tensor([1e-16, 0.5, 1 - 1e-16], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, edges, temperature=1.0)
    assert tokens.tolist() == [300, 300, 300]
    assert logprobs.tolist() == [0, 0, 0]


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 20), top_p=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_sample_tokens_stays_in_the_nucleus(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator) * 2
    count = 200
    tokens, logprobs = sample_tokens(
        logits.expand(count, -1).clone(),
        uniforms(count, seed=seed),
        temperature=1.0,
        top_p=top_p,
        top_k=top_k,
    )
    order = logits.argsort(descending=True)[:top_k]
    probs = logits[order].softmax(-1)
    inside = order[probs.cumsum(-1) - probs < top_p]
    assert set(tokens.tolist()) <= set(inside.tolist())
    renormalised = torch.log_softmax(logits[inside], -1)
    position = {int(token): index for index, token in enumerate(inside)}
    expected = renormalised[[position[int(token)] for token in tokens]]
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
