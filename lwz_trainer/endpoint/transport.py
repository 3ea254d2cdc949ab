"""One POST or GET: an answer, or an exception that says whether another attempt may help."""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Awaitable
from typing import Any

import httpx2

from lwz_trainer.endpoint.errors import RequestRefused

__all__ = ["FatalStatus", "TransientFailure", "get_json", "post_json"]

_TRANSIENT_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
# Key, account, address or model: wrong for every request alike.
_FATAL_STATUSES = frozenset({401, 402, 404})
_MAX_SHOWN = 200


class TransientFailure(Exception):
    """Another attempt may succeed, `retry_after_s` from now at the earliest."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class FatalStatus(Exception):
    """No request will succeed with this key, address and model."""


async def post_json(
    client: httpx2.AsyncClient, url: str, body: dict[str, Any], *, timeout_s: float, secret: str
) -> Any:
    """Sends a JSON body once and returns the JSON answer.

    Args:
        client: carries the headers.
        url: absolute.
        body: the request.
        timeout_s: from sending to the last byte of the answer, however slowly bytes drip in.
        secret: blanked out of answers and messages, as some servers repeat the key; "" for none.

    Raises:
        TransientFailure: no connection, no answer in time, half an answer, no JSON, 429, 5xx.
        RequestRefused: another status.
        FatalStatus: 401, 402 or 404.
    """
    # Plain ASCII, since JSON may hold lone surrogates, which have no UTF-8.
    content = json.dumps(body)
    return await _json_of(client.post(url, content=content), timeout_s, secret)


async def get_json(client: httpx2.AsyncClient, url: str, *, timeout_s: float, secret: str) -> Any:
    """As `post_json`, without a body."""
    return await _json_of(client.get(url), timeout_s, secret)


async def _json_of(sending: Awaitable[httpx2.Response], timeout_s: float, secret: str) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            response = await sending
        text = response.text
    except TimeoutError as error:
        raise TransientFailure(f"no answer within {timeout_s:g} s") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise TransientFailure(f"{type(error).__name__}: {_shown(str(error), secret)}") from error
    if secret:
        text = text.replace(secret, "***")
    if response.status_code != 200:
        status = response.status_code
        reason = f"HTTP {status}: {_shown(text, secret) or 'no text'}"
        if status in _TRANSIENT_STATUSES:
            raise TransientFailure(reason, _retry_after(response.headers.get("retry-after", "")))
        if status in _FATAL_STATUSES:
            raise FatalStatus(reason)
        raise RequestRefused(reason)
    try:
        return json.loads(text)
    except ValueError as error:
        raise TransientFailure(f"an answer that is no JSON: {_shown(text, secret)!r}") from error


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header: a number, or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _shown(text: str, secret: str) -> str:
    text = " ".join(text.split())
    text = text.replace(secret, "***") if secret else text
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
