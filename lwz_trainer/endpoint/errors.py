"""What can go wrong with a request to an endpoint; each message is one line.

`EndpointError` itself: every attempt met a busy, broken or silent server.
"""

from lwz_trainer.errors import TrainingStopped

__all__ = ["AnswerError", "EndpointDown", "EndpointError", "RequestRefused"]


class EndpointError(Exception):
    """This request has no answer; another one may have."""


class RequestRefused(EndpointError):
    """The server refuses this request and would refuse it again (400, 413, 422, ...)."""


class AnswerError(EndpointError):
    """The server answered each time, and no answer could be read."""


class EndpointDown(EndpointError, TrainingStopped):
    """No request has a chance now: the server is down, or refuses this key or model.

    A command that does not catch it ends with exit code 1.
    """
