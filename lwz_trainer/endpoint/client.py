"""The one client of OpenAI-compatible endpoints: everything that asks a server asks through it.

A request is looked up on disk, sent at most `max_attempts` times with full-jitter exponential
back-off, committed to disk, and read. Time-outs, broken connections, 429 and 5xx are tried again,
other statuses are not. A Retry-After pauses all requests of this client.
"""

import asyncio
import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import httpx2
import tenacity

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.endpoint.breaker import CircuitBreaker
from lwz_trainer.endpoint.cache import AnswerCache
from lwz_trainer.endpoint.errors import AnswerError, EndpointDown, EndpointError, RequestRefused
from lwz_trainer.endpoint.transport import FatalStatus, TransientFailure, get_json, post_json
from lwz_trainer.errors import UserError

__all__ = ["Endpoint", "Message", "RewardRoute", "Usage", "read_api_key"]

T = TypeVar("T")
RewardRoute = Literal["classify", "pooling", "score"]
Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass
class Usage:
    """What was asked for; tokens as the server counts them."""

    num_calls: int = 0
    """Answers that came from the server."""
    num_cache_hits: int = 0
    """Answers that came from disk."""
    num_retries: int = 0
    """Attempts after the first one of a request."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


class Endpoint:
    """An asynchronous client; use it in one event loop, and close it or use `async with`.

    Args:
        config: address, sampling, limits.
        cache_path: file of an `AnswerCache`; None keeps nothing.

    Raises:
        UserError: no address or model is configured, the key's variable is not set, or the cache
            cannot be opened.
    """

    def __init__(self, config: EndpointConfig, cache_path: Path | None = None) -> None:
        if not config.base_url or not config.model:
            raise UserError(
                "no endpoint: set endpoint.base_url (such as http://localhost:8000/v1) and "
                "endpoint.model"
            )
        self._config = config
        self._base_url = config.base_url.rstrip("/")
        self._root = self._base_url.removesuffix("/v1")
        self._secret = read_api_key(config.api_key_env)
        headers = {"Content-Type": "application/json"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # each attempt has one of its own, over all of it
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        self._cache = None if cache_path is None else AnswerCache(cache_path)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._breaker = CircuitBreaker(
            config.breaker_failures, config.breaker_rest_s, time.monotonic
        )
        self._resume_at = 0.0
        self._has_answered = False
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self.usage = Usage()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()
        if self._cache is not None:
            self._cache.close()

    async def chat(self, messages: Sequence[Message], *, parse: Callable[[str], T]) -> T:
        """The parsed text of a chat completion (`parse=str` for the text itself).

        Args:
            messages: the conversation.
            parse: raises ValueError for a text that it cannot read; another answer is then asked
                for, up to `max_answers`. If it can read none, none of them stays on disk: the
                next client that asks the same gets new ones.

        Raises:
            AnswerError: no answer could be read.
            RequestRefused: the server refuses this request.
            EndpointDown: the server is down for all requests.
            EndpointError: every attempt at this request failed.
        """
        body = {"model": self._config.model, "messages": list(messages)}
        return await self._parsed("chat/completions", body, _chat_text, parse)

    async def complete(self, prompt: str, *, parse: Callable[[str], T]) -> T:
        """As `chat`, for a raw prompt that the model continues."""
        body = {"model": self._config.model, "prompt": prompt}
        return await self._parsed("completions", body, _completion_text, parse)

    async def reward(self, route: RewardRoute, **inputs: Any) -> float:
        """The raw score of one input, by a model with one label that vLLM serves.

        Args:
            route: which of vLLM's interfaces.
            inputs: fields that hold the input: `input` or `messages`; for "score" `text_1` and
                `text_2`.

        Raises:
            RequestRefused, EndpointDown, EndpointError: as `chat`.
        """
        # Not part of OpenAI's interface: it lies beside the version, not below it.
        url = f"{self._root}/{route}"
        body = {"model": self._config.model, "use_activation": False, **inputs}
        body |= self._config.extra_fields()
        if route == "pooling":
            body["task"] = "classify"
        return await self._answer(url, body, partial(_raw_score, route), sample=0)

    async def post(self, path: str, body: dict[str, Any], *, read: Callable[[Any], T]) -> T:
        """What `read` takes out of the answer to a JSON request at any path of the server.

        Args:
            path: from the server's root, `/v1` included: not all that vLLM has is OpenAI's.
            body: the whole request; the configured sampling fields are not added.
            read: raises KeyError, TypeError or the like for an answer of another form.

        Raises:
            RequestRefused, EndpointDown, EndpointError: as `chat`.
        """
        return await self._answer(self._root + path, body, read, sample=0)

    async def get(self, path: str, *, read: Callable[[Any], T]) -> T:
        """As `post`, for a GET, which is never answered from disk."""
        return read(await self._attempts(self._root + path, None, read))

    async def _parsed(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], str],
        parse: Callable[[str], T],
    ) -> T:
        url = f"{self._base_url}/{path}"
        body = {**body, **self._config.sampling_fields()}
        reason = ""
        for sample in range(self._config.max_answers):
            text = await self._answer(url, body, read, sample=sample)
            try:
                return parse(text)
            except ValueError as error:
                reason = " ".join(str(error).split())
        if self._cache is not None:
            for sample in range(self._config.max_answers):
                self._cache.forget(_cache_request(url, body, sample))
        raise AnswerError(
            f"none of {self._config.max_answers} answers of {self._config.model} could be read; "
            f"the last: {reason}"
        )

    async def _answer(
        self, url: str, body: dict[str, Any], read: Callable[[Any], T], *, sample: int
    ) -> T:
        """The part of an answer that `read` takes out, from disk or from the server."""
        if self._cache is None:
            return read(await self._attempts(url, body, read))
        request = _cache_request(url, body, sample)
        # Equal requests under way at the same time are sent once: the second waits for the first.
        async with self._locks.setdefault(repr(request), asyncio.Lock()):
            answer = self._cache.get(request)
            if answer is None:
                answer = await self._attempts(url, body, read)
                self._cache.put(request, answer)
            else:
                self.usage.num_cache_hits += 1
                self._has_answered = True
        return read(answer)

    async def _attempts(
        self, url: str, body: dict[str, Any] | None, read: Callable[[Any], Any]
    ) -> Any:
        """The server's answer, once `read` accepts it."""
        if not self._breaker.admits():
            raise EndpointDown(self._breaker.reason)
        is_probe = bool(self._breaker.reason)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientFailure),
            stop=tenacity.stop_after_attempt(self._config.max_attempts),
            wait=self._wait_s,
            reraise=True,
        )
        try:
            answer: Any = await retrying(self._attempt, url, body, read, is_probe)
        except TransientFailure as error:
            reason = f"{url} failed in {self._config.max_attempts} attempts; the last: {error}"
            self._breaker.record_failure(f"the endpoint is down: {reason}")
            raise EndpointError(reason) from error
        except FatalStatus as error:
            reason = f"{url} refuses every request ({error}): check endpoint.base_url, model, key"
            self._breaker.open(reason)
            raise EndpointDown(reason) from error
        except RequestRefused as error:
            reason = f"{url} refuses the request ({error})"
            if not self._has_answered:
                # As long as nothing has worked, the settings are as suspect as the request.
                self._breaker.record_failure(f"{reason}, as all before it: check the settings")
            raise RequestRefused(reason) from error
        self._breaker.record_success()
        self._has_answered = True
        self._count(answer)
        return answer

    async def _attempt(
        self, url: str, body: dict[str, Any] | None, read: Callable[[Any], Any], is_probe: bool
    ) -> Any:
        async with self._slots:
            while (pause := self._resume_at - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if self._breaker.reason and not is_probe:
                raise EndpointDown(self._breaker.reason)
            limits: dict[str, Any] = {"timeout_s": self._config.timeout_s, "secret": self._secret}
            try:
                if body is None:
                    answer = await get_json(self._http, url, **limits)
                else:
                    answer = await post_json(self._http, url, body, **limits)
            except TransientFailure as error:
                self._resume_at = max(self._resume_at, time.monotonic() + error.retry_after_s)
                raise
        try:
            read(answer)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}, in {str(answer)[:200]}"
            raise TransientFailure(f"an answer of another form ({problem})") from error
        return answer

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Full jitter; a Retry-After is waited for by `_resume_at`, whoever comes next."""
        self.usage.num_retries += 1
        return tenacity.wait_random_exponential(
            multiplier=self._config.backoff_s, max=self._config.max_backoff_s
        )(state)

    def _count(self, answer: Any) -> None:
        self.usage.num_calls += 1
        tokens = answer.get("usage")
        if isinstance(tokens, dict):
            self.usage.num_prompt_tokens += tokens.get("prompt_tokens") or 0
            self.usage.num_completion_tokens += tokens.get("completion_tokens") or 0


def read_api_key(variable: str) -> str:
    """The key in an environment variable; "" where none is named.

    Raises:
        UserError: the variable is not set, or holds something else.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {variable} (endpoint.api_key_env) is not set: export it, "
            "or leave the setting empty for a server without a key"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {variable} has characters that no key has: export it again")
    return key


def _cache_request(url: str, body: dict[str, Any], sample: int) -> dict[str, Any]:
    """What an answer is kept under: of one question, the answer of this number."""
    return {"url": url, "body": body, "sample": sample}


def _chat_text(answer: Any) -> str:
    # A model that thinks until its tokens are used up has no content.
    content = answer["choices"][0]["message"].get("content")
    return "" if content is None else _text(content)


def _completion_text(answer: Any) -> str:
    return _text(answer["choices"][0]["text"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _raw_score(route: RewardRoute, answer: Any) -> float:
    """The one number of a reply; ValueError, so another attempt, for any other form."""
    (row,) = answer["data"]
    value = row[{"classify": "probs", "pooling": "data", "score": "score"}[route]]
    if route != "score":
        (value,) = value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a finite score, got {value!r}")
    return float(value)
