"""Attention and loss operators that need torch alone; importing this package imports none of them.

Each operator is a folder: `api.py` is the contract, `reference.py` defines what correct means.
"""

__all__: list[str] = []
