"""When a completion is over: an end token, a stop string across token boundaries, or its length."""

from typing import Protocol

from lwz_trainer.rollout.sequence import FinishReason

__all__ = ["StopChecker"]


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class StopChecker:
    """Looks at the tail of a completion after each token."""

    def __init__(
        self,
        tokenizer: Decoder,
        *,
        stop: tuple[str, ...],
        eos_ids: tuple[int, ...],
        max_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._eos_ids = frozenset(eos_ids)
        self._max_tokens = max_tokens
        # A token adds at least one byte; four more tokens complete a character cut at the front.
        self._tail = max((len(s.encode()) for s in stop), default=0) + 4

    def check(self, tokens: list[int]) -> tuple[FinishReason, str] | None:
        """(reason, stop string or "") if the completion ends with its last token."""
        if tokens[-1] in self._eos_ids:
            return "eos", ""
        if self._stop:
            tail = self._tokenizer.decode(tokens[-self._tail :], skip_special_tokens=False)
            found = [(tail.find(stop), stop) for stop in self._stop if stop in tail]
            if found:
                return "stop", min(found)[1]
        return ("length", "") if len(tokens) >= self._max_tokens else None

    def text(self, tokens: list[int], reason: FinishReason, stop_string: str) -> str:
        """The completion's text, up to the stop string or the end token."""
        if reason == "eos":
            tokens = tokens[:-1]
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text[: text.index(stop_string)] if stop_string else text
