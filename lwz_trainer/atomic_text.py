"""Text files that appear complete or not at all."""

import os
import tempfile
from pathlib import Path

from lwz_trainer.errors import UserError

__all__ = ["write_text_atomically"]


def write_text_atomically(out: Path, text: str) -> None:
    """A reader, or a killed writer, never sees half a file. Lone surrogates become "?".

    Raises:
        UserError: the file or its directory cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=out.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8", errors="replace"))
            os.chmod(name, 0o644)
            os.replace(name, out)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; pass another path") from error
