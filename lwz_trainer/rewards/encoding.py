"""A prompt and its answer as the tokens that a reward model reads, in training and in scoring."""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["AnswerEncoder", "EncodedAnswer"]


@dataclass(frozen=True)
class EncodedAnswer:
    """One input of a reward model.

    Args:
        fields: `input_ids` and, where the tokenizer gives them, `token_type_ids`.
        is_truncated: the end of the answer was cut off.
    """

    fields: dict[str, list[int]]
    is_truncated: bool

    @property
    def input_ids(self) -> list[int]:
        return self.fields["input_ids"]


class AnswerEncoder:
    """The tokenizer's chat template of a user turn (prompt) and an assistant turn (answer).

    Without a template, the tokenizer's encoding of the pair. Its special tokens are taken out of
    both texts, so that text cannot pass for the end of a turn. Too long an input loses the end of
    the answer but keeps the tokens that close the turn, where a decoder's head reads.

    Args:
        tokenizer: of the reward model.
        max_tokens: longest input, more than the tokens that close a turn.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._special_token = _special_token_pattern(tokenizer)
        self.closing_ids = self._find_closing_ids()
        """The tokens that follow every answer, such as the end of the turn."""

    def encode(self, prompt: str, answer: str) -> EncodedAnswer:
        """The input for one answer."""
        fields = self._fields(prompt, answer)
        num_over = len(fields["input_ids"]) - self.max_tokens
        if num_over <= 0:
            return EncodedAnswer(fields, is_truncated=False)
        num_tail = len(self.closing_ids)
        num_head = self.max_tokens - num_tail
        cut = {name: ids[:num_head] + ids[len(ids) - num_tail :] for name, ids in fields.items()}
        return EncodedAnswer(cut, is_truncated=True)

    def _fields(self, prompt: str, answer: str) -> dict[str, list[int]]:
        prompt, answer = (self._special_token.sub(" ", text) for text in (prompt, answer))
        if not self.tokenizer.chat_template:
            encoding = self.tokenizer(prompt, answer, verbose=False)
        else:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            encoding = self.tokenizer.apply_chat_template(messages, return_dict=True)
        names = ("input_ids", "token_type_ids")
        return {name: list(encoding[name]) for name in names if name in encoding}

    def _find_closing_ids(self) -> list[int]:
        first, second = (self._fields("x", answer)["input_ids"] for answer in ("a", "1"))
        num_same = 0
        while num_same < min(len(first), len(second)) and (
            first[-1 - num_same] == second[-1 - num_same]
        ):
            num_same += 1
        return first[len(first) - num_same :]


def _special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches each string that the tokenizer would read as a special token."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
