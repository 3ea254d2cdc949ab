"""Where the score of an answer comes from: a model here or served, a judge, or any function.

A score that cannot be had is NaN with a reason, never a number. A source keeps what it holds open
(a model, connections) and is asked by one thread at a time.
"""

import copy
import importlib
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lwz_trainer.config.rewards import WritingRewardConfig
from lwz_trainer.endpoint import (
    BlockingEndpoint,
    Endpoint,
    EndpointDown,
    EndpointError,
    RewardRoute,
    read_api_key,
)
from lwz_trainer.errors import UserError
from lwz_trainer.rewards.answer import Answer, SourceScores
from lwz_trainer.rewards.judges import ScoreCall, judge_calls
from lwz_trainer.rewards.shared_source import RewardSource

if TYPE_CHECKING:
    import torch

__all__ = ["make_source"]


def make_source(
    name: str,
    config: WritingRewardConfig,
    device: "torch.device | str",
    cache_path: Path | None,
) -> RewardSource:
    """The source that a reward's section names.

    Args:
        name: of the section, for errors.
        config: the section.
        device: where a model runs.
        cache_path: file for the answers of servers; None keeps none.

    Raises:
        UserError: a model, function or key that is not there.
    """
    if config.source == "model":
        return _ModelSource(name, config, device)
    if config.source == "function":
        return _FunctionSource(name, config.function)
    if config.source == "classify" or config.source == "pooling" or config.source == "score":
        return _ServedModelSource(name, config, config.source, cache_path)
    return _EndpointSource(config, cache_path, judge_calls(config))


class _ModelSource:
    """A sequence-classification model in this process."""

    def __init__(
        self, name: str, config: WritingRewardConfig, device: "torch.device | str"
    ) -> None:
        # Brings in transformers, which a run without a model does not wait for.
        from lwz_trainer.rewards.writing import WritingReward

        self.reward = WritingReward(config, device, setting=f"{name}.model")

    def score(self, answers: Sequence[Answer]) -> SourceScores:
        result = self.reward.score([a.prompt for a in answers], [a.text for a in answers])
        return SourceScores(
            result.scores, result.failures, [True] * len(answers), result.is_truncated
        )

    def renewed(self) -> Self:
        """The same: there is memory for one."""
        return self

    def close(self) -> None:
        """Nothing is open."""


class _FunctionSource:
    """A Python callable: list of `Answer` in, as many numbers out."""

    def __init__(self, name: str, path: str) -> None:
        self._path = path
        module_name, _, function_name = path.partition(":")
        sys.path.insert(0, "")  # a module in the working directory, as `python -m` has it
        try:
            self._function = getattr(importlib.import_module(module_name), function_name)
        except Exception as error:  # the user's module may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{name}.function: cannot import '{path}' ({reason}); expected module:function"
            ) from error
        finally:
            sys.path.remove("")
        if not callable(self._function):
            raise UserError(f"{name}.function: '{path}' is no function")

    def score(self, answers: Sequence[Answer]) -> SourceScores:
        try:
            values = list(self._function(list(answers)))
            if len(values) != len(answers):
                raise ValueError(f"{len(values)} scores for {len(answers)} answers")
            scores = [float(value) for value in values]
        except Exception as error:  # the user's function may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            scores = [math.nan] * len(answers)
            failures = [f"{self._path} raised {reason}"] * len(answers)
        else:
            scores = [score if math.isfinite(score) else math.nan for score in scores]
            failures = [f"{self._path} gave no finite score" for s in scores if math.isnan(s)]
        every = [True] * len(answers)
        return SourceScores(scores, failures, every, [False] * len(answers))

    def renewed(self) -> Self:
        """The same: a call that hangs does not keep others from calling."""
        return self

    def close(self) -> None:
        """Nothing is open."""


class _EndpointSource:
    """Scores by requests to a server, as many at once as `endpoint.concurrency` says."""

    def __init__(
        self,
        config: WritingRewardConfig,
        cache_path: Path | None,
        plan: Callable[[Sequence[Answer]], list[ScoreCall]],
    ) -> None:
        read_api_key(config.endpoint.api_key_env)  # a missing key is found before the first step
        self._config = config.endpoint
        self._cache_path = cache_path
        self._plan = plan
        self._endpoint: BlockingEndpoint | None = None

    def score(self, answers: Sequence[Answer]) -> SourceScores:
        calls = self._plan(answers)
        scores = [call.given for call in calls]
        failures: list[str] = []
        waiting = {index for index, call in enumerate(calls) if call.ask is not None}
        if self._endpoint is None:
            self._endpoint = BlockingEndpoint(self._config, self._cache_path)

        def ask(endpoint: Endpoint, index: int) -> Awaitable[float]:
            call = calls[index].ask
            assert call is not None
            return call(endpoint)

        try:
            for index, outcome in self._endpoint.map(sorted(waiting), ask):
                waiting.discard(index)
                if isinstance(outcome, EndpointError):
                    failures.append(str(outcome))
                else:
                    scores[index] = outcome
        except EndpointDown as error:
            failures += [str(error)] * len(waiting)
        return SourceScores(
            scores,
            failures,
            [call.is_applicable for call in calls],
            [call.is_truncated for call in calls],
        )

    def renewed(self) -> Self:
        """One with connections of its own."""
        other = copy.copy(self)
        other._endpoint = None
        return other

    def close(self) -> None:
        """Ends the connections; the next score opens new ones."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None


class _ServedModelSource(_EndpointSource):
    """A reward model that vLLM serves, by `/classify`, `/pooling` or `/score`.

    With a tokenizer the input is made here, cut and cleaned as in training, and sent as token ids.
    Without, the server applies its own chat template to the two turns.
    """

    def __init__(
        self, name: str, config: WritingRewardConfig, route: RewardRoute, cache_path: Path | None
    ) -> None:
        super().__init__(config, cache_path, self._calls)
        self._route: RewardRoute = route
        self._encoder = None
        if config.model:
            from lwz_trainer.rewards.encoding import AnswerEncoder
            from lwz_trainer.rewards.pretrained import load_tokenizer

            tokenizer = load_tokenizer(config.model, f"{name}.model")
            self._encoder = AnswerEncoder(tokenizer, config.max_tokens)

    def _calls(self, answers: Sequence[Answer]) -> list[ScoreCall]:
        return [self._call(answer) for answer in answers]

    def _call(self, answer: Answer) -> ScoreCall:
        is_truncated = False
        inputs: dict[str, Any]
        if self._route == "score":
            inputs = {"text_1": answer.prompt, "text_2": answer.text}
        elif self._encoder is None:
            turns = (("user", answer.prompt), ("assistant", answer.text))
            inputs = {"messages": [{"role": role, "content": text} for role, text in turns]}
        else:
            encoded = self._encoder.encode(answer.prompt, answer.text)
            inputs, is_truncated = {"input": encoded.input_ids}, encoded.is_truncated
        return ScoreCall(
            lambda endpoint: endpoint.reward(self._route, **inputs), is_truncated=is_truncated
        )
