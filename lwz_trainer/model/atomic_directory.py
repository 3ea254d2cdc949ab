"""Directories that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory"]


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields an empty sibling of `target` that takes its name when the block ends well.

    An exception in the block removes the sibling and leaves `target` untouched.

    Raises:
        OSError: the parent cannot be written, or `target` became a non-empty directory meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        # POSIX renames over an empty directory and refuses a full one.
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
