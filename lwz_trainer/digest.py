"""A short digest of settings or data, by which a file knows what it was made from."""

import hashlib
import json
from typing import Any

__all__ = ["short_digest"]


def short_digest(value: Any) -> str:
    """16 hexadecimal digits of anything that JSON can hold; the order of keys counts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
