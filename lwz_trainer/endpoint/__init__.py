"""OpenAI-compatible endpoints: one client with limits, retries, a breaker and a disk cache."""

from lwz_trainer.config.endpoint import EndpointConfig
from lwz_trainer.endpoint.blocking import BlockingEndpoint
from lwz_trainer.endpoint.cache import AnswerCache
from lwz_trainer.endpoint.client import (
    Endpoint,
    Message,
    RewardRoute,
    Usage,
    read_api_key,
)
from lwz_trainer.endpoint.errors import (
    AnswerError,
    EndpointDown,
    EndpointError,
    RequestRefused,
)

__all__ = [
    "AnswerCache",
    "AnswerError",
    "BlockingEndpoint",
    "Endpoint",
    "EndpointConfig",
    "EndpointDown",
    "EndpointError",
    "Message",
    "RequestRefused",
    "RewardRoute",
    "Usage",
    "read_api_key",
]
