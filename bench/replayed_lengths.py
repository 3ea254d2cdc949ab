"""Answers as long as the model itself writes them, and the same lengths in every trainer.

What padding costs depends on how far lengths differ, so a benchmark needs the lengths of real
answers; two trainers that sample for themselves would get different ones. The model answers once,
each answer over at the model's own end token, and every trainer is made to stop there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_generation_config, load_pretrained, resolve_eos_ids
from lwz_trainer.model.source import resolve_model_dir
from lwz_trainer.rollout import Request, RolloutEngine
from lwz_trainer.rollout.kv_cache import kv_memory_limit
from lwz_trainer.rollout.sequence import FinishReason
from lwz_trainer.rollout.stopping import StopChecker

__all__ = ["draw_lengths", "replay_in_transformers", "replayed_in_engine"]


def draw_lengths(
    model_dir: str, prompts: list[str], *, group_size: int, max_tokens: int, num_steps: int
) -> list[list[int]]:
    """Lengths of sampled answers, [steps][prompts · group_size] tokens with the end token.

    Args:
        model_dir: a model whose end token is its own.
        prompts: as the model sees them.
        group_size: answers to each.
        max_tokens: an answer is cut there.
        num_steps: times that all prompts are answered.
    """
    model, tokenizer = load_pretrained(model_dir, dtype=resolve_dtype("bf16", "cpu"), device="cpu")
    engine = RolloutEngine(
        model,
        tokenizer,
        eos_ids=resolve_eos_ids(tokenizer, load_generation_config(resolve_model_dir(model_dir))),
        config=RolloutConfig(max_completion_tokens=max_tokens, temperature=1.0, stop=()),
        memory_limit_bytes=kv_memory_limit(model.embed.device),
    )
    requests = [
        Request(
            group, tokenizer.encode(prompt), [group * group_size + n for n in range(group_size)]
        )
        for group, prompt in enumerate(prompts)
    ]
    return [
        [
            len(sample.completion_ids)
            for sample in engine.generate(requests, seed=0, step=step, policy_version=0)[0]
        ]
        for step in range(num_steps)
    ]


class ReplayedStops(StopChecker):
    """Ends the n-th answer at the n-th length, whatever its last token is."""

    def __init__(self, lengths: Iterator[int], **settings: Any) -> None:
        super().__init__(**settings)
        self._lengths = lengths
        self._length_of: dict[int, int] = {}

    def check(self, tokens: list[int]) -> tuple[FinishReason, str] | None:
        if len(tokens) == 1:
            self._length_of[id(tokens)] = next(self._lengths)
        return ("eos", "") if len(tokens) == self._length_of[id(tokens)] else None


@contextmanager
def replayed_in_engine(lengths: list[list[int]]) -> Iterator[None]:
    """Within this, a new engine's answers end at these lengths, [steps][answers]."""
    flat = iter([length for step in lengths for length in step])

    def make(_tokenizer: Any, **settings: Any) -> ReplayedStops:
        return ReplayedStops(flat, tokenizer=_tokenizer, **settings)

    with patch("lwz_trainer.rollout.engine.StopChecker", make):
        yield


class EndAt(LogitsProcessor):
    """Leaves each row its end token only at its length, and no end token before."""

    def __init__(self, lengths: list[int], *, prompt_len: int, eos_id: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._prompt_len, self._eos_id = prompt_len, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends_B = self._lengths == input_ids.shape[1] - self._prompt_len + 1
        scores[:, self._eos_id] = -torch.inf
        scores[ends_B] = -torch.inf
        scores[ends_B, self._eos_id] = 0
        return scores


def replay_in_transformers(model: Any, lengths: list[list[int]], *, eos_id: int) -> None:
    """From now on the rows of the n-th `model.generate` end at the lengths of the n-th step."""
    generate, steps = model.generate, iter(lengths)

    def replayed(input_ids: Tensor, **settings: Any) -> Tensor:
        end_at = EndAt(next(steps), prompt_len=input_ids.shape[1], eos_id=eos_id)
        return generate(input_ids, logits_processor=LogitsProcessorList([end_at]), **settings)

    model.generate = replayed
