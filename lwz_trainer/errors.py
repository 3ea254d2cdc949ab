"""The two exceptions that end a run with one line instead of a traceback.

`UserError`: bad input, exit code 2. `TrainingStopped`: a run that must not go on, exit code 1.
"""

__all__ = ["TrainingStopped", "UserError"]


class UserError(Exception):
    """Bad input. The message says what is wrong, what was expected, and what to do, in one line."""


class TrainingStopped(Exception):
    """The run cannot go on, through nobody's typing: a non-finite loss, a reward that fails.

    A reward without any score in the first step of a run is a `UserError`: it was never set up.
    """
