"""A judge in this process: a model with a chat template, run by the trainer's own engine."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lwz_trainer.config.prepare import LocalJudgeConfig
from lwz_trainer.config.sections import RolloutConfig
from lwz_trainer.data.prompts import Prompt
from lwz_trainer.data.templates import render_chat
from lwz_trainer.endpoint import AnswerCache, AnswerError, EndpointError, RequestRefused
from lwz_trainer.errors import UserError
from lwz_trainer.model.linear import resolve_dtype
from lwz_trainer.model.loading import load_pretrained
from lwz_trainer.model.source import resolve_model_dir, weights_stamp
from lwz_trainer.prepare.questions import Question
from lwz_trainer.rollout import Request
from lwz_trainer.rollout.making import make_engine

__all__ = ["LocalJudge"]

T = TypeVar("T")


class LocalJudge:
    """Asks in batches; a kill costs the batch under way.

    The random numbers of an answer depend on the seed and the request alone, so an answer is the
    same whichever others are written beside it.

    Args:
        config: which model, and how it is sampled.
        seed: of the sampling.
        cache_path: where its answers are kept.
    """

    def __init__(self, config: LocalJudgeConfig, seed: int, cache_path: Path) -> None:
        self._config = config
        self._seed = seed
        self._cache = AnswerCache(cache_path)
        self._model_dir = resolve_model_dir(config.path)
        is_cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        if is_cuda and not torch.cuda.is_available():
            raise UserError("local.device is cuda, but torch sees no GPU: use auto or cpu")
        device = torch.device("cuda" if is_cuda else "cpu")
        self._model, self._tokenizer = load_pretrained(
            str(self._model_dir), dtype=resolve_dtype(config.dtype, device), device=device
        )
        self._engine = make_engine(
            self._model,
            self._tokenizer,
            self._model_dir,
            RolloutConfig(
                max_completion_tokens=config.max_completion_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                stop=(),
                max_num_seqs=config.max_num_seqs,
            ),
        )
        self._num_answers = 0
        self._num_cache_hits = 0

    def ask(
        self, question: Question[T], requests: Sequence[str]
    ) -> Iterator[tuple[int, T | EndpointError]]:
        size = self._config.max_num_seqs
        for start in range(0, len(requests), size):
            chunk = range(start, min(start + size, len(requests)))
            yield from self._ask_chunk(question, {index: requests[index] for index in chunk})

    def usage(self) -> dict[str, int]:
        return {"num_answers": self._num_answers, "num_cache_hits": self._num_cache_hits}

    def close(self) -> None:
        self._cache.close()

    def _ask_chunk(
        self, question: Question[T], requests: dict[int, str]
    ) -> Iterator[tuple[int, T | EndpointError]]:
        remaining: dict[int, list[int]] = {}
        for index, request in requests.items():
            prompt = Prompt(question.text(request), None, "en", index)
            text = render_chat(prompt, self._tokenizer, None, "")
            token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            num_tokens = len(token_ids) + self._config.max_completion_tokens
            if num_tokens > self._model.config.max_positions:
                yield index, RequestRefused("the question is longer than the model's context")
            else:
                remaining[index] = token_ids
        reasons = dict.fromkeys(remaining, "")
        for sample in range(self._config.max_answers):
            answers = self._answers(remaining, sample)
            for index, answer in answers.items():
                try:
                    parsed = question.parse(answer)
                except ValueError as error:
                    reasons[index] = str(error)
                    continue
                del remaining[index]
                yield index, parsed
        for index in remaining:
            yield index, AnswerError(f"no answer could be read; the last: {reasons[index]}")

    def _answers(self, prompts: dict[int, list[int]], sample: int) -> dict[int, str]:
        """One answer each, from disk or newly sampled."""
        keys = {index: self._cache_key(ids, sample) for index, ids in prompts.items()}
        cached = {index: self._cache.get(key) for index, key in keys.items()}
        answers = {index: text for index, text in cached.items() if text is not None}
        self._num_cache_hits += len(answers)
        by_number = {_number(key): index for index, key in keys.items() if index not in answers}
        requests = [
            Request(group, prompts[index], [number])
            for group, (number, index) in enumerate(by_number.items())
        ]
        if requests:
            samples, _ = self._engine.generate(requests, seed=self._seed, step=0, policy_version=0)
            for done in samples:
                index = by_number[done.sample]
                answers[index] = done.text
                self._cache.put(keys[index], done.text)
            self._num_answers += len(samples)
        return answers

    def _cache_key(self, prompt_ids: list[int], sample: int) -> dict[str, Any]:
        return {
            "model": str(self._model_dir.resolve()),
            "weights": weights_stamp(self._model_dir),
            "dtype": str(self._model.head_weight.dtype),
            "prompt_ids": prompt_ids,
            "temperature": self._config.temperature,
            "top_p": self._config.top_p,
            "max_completion_tokens": self._config.max_completion_tokens,
            "seed": self._seed,
            "sample": sample,
        }


def _number(key: dict[str, Any]) -> int:
    """62 bits that stand for a prompt and a sample, as the engine's sample number."""
    text = json.dumps([key["prompt_ids"], key["sample"]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
