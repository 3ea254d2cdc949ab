"""Directories that appear complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "replace_directory"]


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


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Puts what `write` makes at the path that it is given in the place of `target`.

    A kill before the swap leaves the old `target`, one between the swap's two renames none, one
    after them the new one; what else is left behind goes with the next call.
    """
    work = target.parent / f".{target.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    new, old = work / "new", work / "old"
    try:
        write(new)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(work)
