"""An endpoint for callers without an event loop."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.endpoint.client import Endpoint, Message, Usage
from lwz_trainer.endpoint.errors import EndpointDown, EndpointError

__all__ = ["BlockingEndpoint"]

T = TypeVar("T")
R = TypeVar("R")


class BlockingEndpoint:
    """Owns an `Endpoint` and the loop that it runs in; close it or use `with`.

    Args:
        config: address, sampling, limits.
        cache_path: file of the answer cache; None keeps nothing.

    Raises:
        UserError: as `Endpoint`.
    """

    def __init__(self, config: EndpointConfig, cache_path: Path | None = None) -> None:
        self._num_tasks = 2 * config.concurrency
        self._endpoint = Endpoint(config, cache_path)
        self._runner = asyncio.Runner()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def usage(self) -> Usage:
        return self._endpoint.usage

    def close(self) -> None:
        self._is_open = False
        self._runner.run(_give_up(self._under_way))
        self._runner.run(self._endpoint.aclose())
        self._runner.close()

    def chat(self, messages: Sequence[Message], *, parse: Callable[[str], R]) -> R:
        """As `Endpoint.chat`."""
        return self._runner.run(self._endpoint.chat(messages, parse=parse))

    def map(
        self, items: Iterable[T], call: Callable[[Endpoint, T], Awaitable[R]]
    ) -> Generator[tuple[T, R | EndpointError], None, None]:
        """Each item with its answer or its failure, in the order in which they are done.

        Items are taken as there is room for them, so there may be millions. A request is only
        under way while the next result is waited for.

        Args:
            items: what to ask about.
            call: asks, by the endpoint's methods.

        Raises:
            EndpointDown: no further request has a chance; those under way are given up.
        """
        remaining = iter(items)
        pending: dict[asyncio.Task[R], T] = {}

        async def step() -> list[tuple[T, R | EndpointError]]:
            for item in islice(remaining, self._num_tasks - len(pending)):
                pending[asyncio.ensure_future(call(self._endpoint, item))] = item
            if not pending:
                return []
            self._under_way.update(pending)
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            self._under_way -= done
            return [(pending.pop(task), _outcome(task)) for task in done]

        try:
            while results := self._runner.run(step()):
                down = None
                for item, answer in results:
                    if isinstance(answer, EndpointDown):
                        down = answer
                    else:
                        yield item, answer
                if down is not None:
                    raise down
        finally:
            # Who leaves the loop early may drop this generator after closing the endpoint.
            if pending and self._is_open:
                self._runner.run(_give_up(pending))
                self._under_way -= pending.keys()


async def _give_up(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(task: asyncio.Task[R]) -> R | EndpointError:
    error = task.exception()
    return error if isinstance(error, EndpointError) else task.result()
