"""Where an OpenAI-compatible server is, how it samples, and how patiently it is asked.

Each field's docstring is its help text on the command line.
"""

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lwz_trainer.errors import UserError

__all__ = ["EndpointConfig"]

_OWN_FIELDS = {"model", "messages", "prompt", "input", "stream", "n"}
_OWN_FIELDS |= {"text_1", "text_2", "task", "use_activation"}  # what a reward model is sent


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint: a hosted service, or vLLM's server."""

    base_url: str = ""
    """Where it is, up to and with the version: http://localhost:8000/v1."""
    model: str = ""
    """The model's name at that server."""
    api_key_env: str = ""
    """Environment variable that holds the API key; empty for a server without one."""
    temperature: float | None = None
    """Sampling temperature; unset: the server's own."""
    top_p: float | None = None
    """Nucleus; unset: the server's own."""
    max_tokens: int | None = None
    """Longest answer in tokens, thinking included; unset: the server's own."""
    extra_body: str = ""
    """JSON object with further fields of a request, such as {"top_k": 20}."""
    concurrency: int = 16
    """Most requests under way at once."""
    timeout_s: float = 600.0
    """A request without an answer after this long has failed."""
    max_attempts: int = 6
    """Times that a request is sent before a busy, broken or silent server counts as failing."""
    max_answers: int = 3
    """Answers asked for before one that cannot be read (no JSON, wrong range) is a failure."""
    backoff_s: float = 1.0
    """Upper end of the first random wait between attempts; it doubles each time."""
    max_backoff_s: float = 60.0
    """Upper end of the longest random wait; a server's own Retry-After is kept in full."""
    breaker_failures: int = 4
    """Requests in a row that failed in every attempt, after which the server counts as down."""
    breaker_rest_s: float = 60.0
    """How long a server that is down is left alone before one request tries again."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts", "max_answers", "breaker_failures"):
            if getattr(self, name) < 1:
                raise UserError(f"endpoint.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_s", "backoff_s", "max_backoff_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"endpoint.{name} must be above 0, got {getattr(self, name)}")
        if self.breaker_rest_s < 0:
            raise UserError(
                f"endpoint.breaker_rest_s must be at least 0, got {self.breaker_rest_s}"
            )
        if self.temperature is not None and self.temperature < 0:
            raise UserError(f"endpoint.temperature must be at least 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"endpoint.top_p must be in (0, 1], got {self.top_p}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"endpoint.max_tokens must be at least 1, got {self.max_tokens}")
        if self.base_url:
            self._check_base_url()
        self.extra_fields()

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of a request that say how to sample; unset ones are left out."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        return {
            **{name: value for name, value in fields.items() if value is not None},
            **self.extra_fields(),
        }

    def _check_base_url(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"endpoint.base_url must look like http://host:8000/v1, got '{self.base_url}'"
            )
        if url.username or url.password or url.query:
            # Not shown: it is what must not be shown.
            raise UserError(
                "endpoint.base_url must hold no user, password or query: put the key into an "
                "environment variable and name that in endpoint.api_key_env"
            )

    def extra_fields(self) -> dict[str, Any]:
        """The fields of `extra_body`."""
        if not self.extra_body:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except ValueError as error:
            raise UserError(f"endpoint.extra_body is not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise UserError(
                f"endpoint.extra_body must be a JSON object, got a {type(fields).__name__}"
            )
        if own := sorted(_OWN_FIELDS & fields.keys()):
            raise UserError(
                f"endpoint.extra_body holds '{own[0]}', which the request sets itself; remove it"
            )
        return fields
