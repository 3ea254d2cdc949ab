"""What makes a checkpoint another run's: one small digest for each part that must stay as it was.

These are the weights that a run starts from, its seed, and its data with their order. Whatever may
change between two starts of one run has no place here: the number of steps, the learning rate,
rewards, memory, saving.
"""

import hashlib
import json
from typing import Any

__all__ = ["part_digest"]


def part_digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
