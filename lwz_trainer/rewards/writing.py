"""Writing quality: the score of a reward model that reads prompt and answer, not the thinking."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.pretrained import (
    input_limit,
    load_model,
    load_tokenizer,
    pad_token_id,
    padded_batch,
)

__all__ = ["WritingReward", "WritingScores"]


@dataclass(frozen=True)
class WritingScores:
    """Scores of a list of answers, in its order.

    Args:
        scores: the reward model's score; NaN where it failed.
        is_truncated: whether the answer was too long to be read to its end.
        failures: one line for each NaN.
    """

    scores: list[float]
    is_truncated: list[bool]
    failures: list[str]


class WritingReward:
    """A sequence-classification model with one label, in process.

    The input is the model's chat template of a user turn (prompt) and an assistant turn (answer),
    or, for a tokenizer without a template, its encoding of the pair. The tokenizer's special tokens
    are taken out of both, so that text cannot pass for the end of a turn. Too long an input loses
    the end of the answer but keeps the tokens that close the turn, where a decoder's head reads.

    A missing answer gets the model's score of an empty one; `stack_rewards` sees to it that this
    does not win.

    Numerics: fp32 on a CPU, elsewhere the type that the weights were saved in; scores do not depend
    on the batch, up to rounding.

    Args:
        config: section `rewards.writing`.
        device: where the model runs.
    Raises:
        UserError: if the model cannot be loaded or has not exactly one label.
    """

    def __init__(self, config: WritingRewardConfig, device: torch.device | str) -> None:
        setting = "rewards.writing.model"
        self.device = torch.device(device)
        self.batch_size = config.batch_size
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        self.tokenizer = load_tokenizer(config.model, setting)
        self.special_token = _special_token_pattern(self.tokenizer)
        model = load_model(
            AutoModelForSequenceClassification, config.model, setting, dtype=dtype, unread=""
        )
        if model.config.num_labels != 1:
            labels = ", ".join(map(str, model.config.id2label.values()))
            raise UserError(
                f"{setting}: {config.model} has {model.config.num_labels} labels ({labels}), "
                "expected 1; name a reward model with one scalar score"
            )
        self.closing_ids = self._closing_ids()
        self.max_tokens = min(config.max_tokens, input_limit(model, self.tokenizer))
        if self.max_tokens <= len(self.closing_ids):
            raise UserError(
                f"{setting}: {config.model} reads at most {self.max_tokens} tokens; too few"
            )
        self.pad_token_id = pad_token_id(
            model, self.tokenizer, avoid=self.closing_ids[-1] if self.closing_ids else None
        )
        model.config.pad_token_id = self.pad_token_id
        model.config.use_cache = False
        self.model = model.to(self.device)

    def score(self, prompts: list[str], answers: list[str]) -> WritingScores:
        """Scores every answer as a reply to the prompt at the same place.

        A batch that raises is repeated one item at a time; an item that raises again, or whose
        score is not finite, is NaN.
        """
        encodings: list[dict[str, list[int]]] = []
        is_truncated: list[bool] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            encoding, was_cut = self._truncated(self._encode(prompt, answer))
            encodings.append(encoding)
            is_truncated.append(was_cut)

        scores = [math.nan] * len(answers)
        failures: list[str] = []
        by_length = sorted(range(len(answers)), key=lambda i: len(encodings[i]["input_ids"]))
        for start in range(0, len(answers), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            for i, score in zip(
                indices, self._scores([encodings[i] for i in indices], failures), strict=True
            ):
                scores[i] = score
        return WritingScores(scores, is_truncated, failures)

    def _scores(self, encodings: list[dict[str, list[int]]], failures: list[str]) -> list[float]:
        """Scores of one batch; NaN and a line in `failures` for each item that fails."""
        failure = ""
        try:
            batch = padded_batch(encodings, self.pad_token_id, self.device)
            with torch.inference_mode():
                scores = self.model(**batch).logits.float().squeeze(-1).tolist()
        except (RuntimeError, ValueError, IndexError) as error:
            failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        # Outside the handler, where the traceback no longer holds the memory of the failed pass.
        if failure and len(encodings) > 1:
            return [self._scores([encoding], failures)[0] for encoding in encodings]
        if failure:
            failures.append(failure)
            return [math.nan]
        for i, score in enumerate(scores):
            if not math.isfinite(score):
                failures.append(f"the reward model's score is {score}")
                scores[i] = math.nan
        return scores

    def _encode(self, prompt: str, answer: str) -> dict[str, list[int]]:
        prompt, answer = (self.special_token.sub(" ", text) for text in (prompt, answer))
        if not self.tokenizer.chat_template:
            encoding = self.tokenizer(prompt, answer, verbose=False)
        else:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            encoding = self.tokenizer.apply_chat_template(messages, return_dict=True)
        fields = ("input_ids", "token_type_ids")
        return {name: list(encoding[name]) for name in fields if name in encoding}

    def _closing_ids(self) -> list[int]:
        """The tokens that follow every answer, such as the end of the turn."""
        first, second = (self._encode("x", answer)["input_ids"] for answer in ("a", "1"))
        num_same = 0
        while num_same < min(len(first), len(second)) and (
            first[-1 - num_same] == second[-1 - num_same]
        ):
            num_same += 1
        return first[len(first) - num_same :]

    def _truncated(self, encoding: dict[str, Any]) -> tuple[dict[str, list[int]], bool]:
        num_over = len(encoding["input_ids"]) - self.max_tokens
        if num_over <= 0:
            return encoding, False
        num_tail = len(self.closing_ids)
        num_head = self.max_tokens - num_tail
        return {
            name: ids[:num_head] + ids[len(ids) - num_tail :] for name, ids in encoding.items()
        }, True


def _special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches each string that the tokenizer would read as a special token."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
