"""Writing quality: the score of a reward model that reads prompt and answer, not the thinking."""

import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForSequenceClassification

from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.encoding import AnswerEncoder
from lwz_trainer.rewards.parking import ParkedModel
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

    Its input is that of `AnswerEncoder`. A missing answer gets the model's score of an empty one;
    `stack_rewards` sees to it that this does not win.

    Numerics: fp32 on a CPU, elsewhere the type that the weights were saved in; scores do not depend
    on the batch, up to rounding.

    Args:
        config: section `rewards.writing`.
        device: where the model runs; its weights wait in host memory.
        setting: name of the config field that holds the model, for errors.
    Raises:
        UserError: if the model cannot be loaded or has not exactly one label.
    """

    def __init__(
        self,
        config: WritingRewardConfig,
        device: torch.device | str,
        setting: str = "rewards.writing.model",
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = config.batch_size
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        tokenizer = load_tokenizer(config.model, setting)
        model = load_model(
            AutoModelForSequenceClassification, config.model, setting, dtype=dtype, unread=""
        )
        if model.config.num_labels != 1:
            labels = ", ".join(map(str, model.config.id2label.values()))
            raise UserError(
                f"{setting}: {config.model} has {model.config.num_labels} labels ({labels}), "
                "expected 1; name a reward model with one scalar score"
            )
        max_tokens = min(config.max_tokens, input_limit(model, tokenizer))
        self.encoder = AnswerEncoder(tokenizer, max_tokens)
        closing_ids = self.encoder.closing_ids
        if max_tokens <= len(closing_ids):
            raise UserError(f"{setting}: {config.model} reads at most {max_tokens} tokens; too few")
        self.pad_token_id = pad_token_id(
            model, tokenizer, avoid=closing_ids[-1] if closing_ids else None
        )
        model.config.pad_token_id = self.pad_token_id
        model.config.use_cache = False
        self.model = model
        self.parked = ParkedModel(model, self.device)

    def score(self, prompts: list[str], answers: list[str]) -> WritingScores:
        """Scores every answer as a reply to the prompt at the same place.

        A batch that raises is repeated one item at a time; an item that raises again, or whose
        score is not finite, is NaN.
        """
        encodings = [
            self.encoder.encode(prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        scores = [math.nan] * len(answers)
        failures: list[str] = []
        by_length = sorted(range(len(answers)), key=lambda i: len(encodings[i].input_ids))
        with self.parked.on_device():
            for start in range(0, len(answers), self.batch_size):
                indices = by_length[start : start + self.batch_size]
                batch_scores = self._scores([encodings[i].fields for i in indices], failures)
                for i, score in zip(indices, batch_scores, strict=True):
                    scores[i] = score
        return WritingScores(scores, [encoding.is_truncated for encoding in encodings], failures)

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
