"""Who answers questions about requests; answers are kept on disk."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from lwz_trainer.endpoint import BlockingEndpoint, EndpointConfig, EndpointError
from lwz_trainer.prepare.questions import Question

__all__ = ["EndpointJudge", "Judge"]

T = TypeVar("T")


class Judge(Protocol):
    """Answers a question about each request, in any order."""

    def ask(
        self, question: Question[T], requests: Sequence[str]
    ) -> Iterator[tuple[int, T | EndpointError]]:
        """(index of the request, answer or why there is none)."""
        ...

    def usage(self) -> dict[str, int]:
        """What this run asked for, for the report."""
        ...

    def close(self) -> None: ...


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        config: address, sampling, limits.
        cache_path: where its answers are kept.
    """

    def __init__(self, config: EndpointConfig, cache_path: Path) -> None:
        self._endpoint = BlockingEndpoint(config, cache_path)

    def ask(
        self, question: Question[T], requests: Sequence[str]
    ) -> Iterator[tuple[int, T | EndpointError]]:
        return self._endpoint.map(
            range(len(requests)),
            lambda endpoint, index: endpoint.chat(
                [{"role": "user", "content": question.text(requests[index])}],
                parse=question.parse,
            ),
        )

    def usage(self) -> dict[str, int]:
        return dataclasses.asdict(self._endpoint.usage)

    def close(self) -> None:
        self._endpoint.close()
