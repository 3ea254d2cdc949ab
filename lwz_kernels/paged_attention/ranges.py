"""Checks of the numbers in page tables and slots; on a GPU, reading them would stop the device.

The native library checks for itself.
"""

import torch

__all__ = ["check_pages", "check_slots"]


def check_pages(
    k_cache: torch.Tensor, page_table: torch.Tensor, context_lens: torch.Tensor
) -> None:
    """Raises ValueError for a length, or a page below one, that is out of range."""
    if k_cache.device.type != "cpu":
        return
    num_pages, page_size = k_cache.shape[:2]
    capacity = page_table.shape[1] * page_size
    if bool(((context_lens < 0) | (context_lens > capacity)).any()):
        raise ValueError(
            "context_lens is out of range: expected 0 <= length <= max_pages * page_size = "
            f"{capacity}, got {context_lens.tolist()}"
        )
    first_keys = torch.arange(page_table.shape[1]) * page_size
    is_used = first_keys < context_lens[:, None]
    if bool((is_used & ((page_table < 0) | (page_table >= num_pages))).any()):
        raise ValueError(
            "page_table names a page that is out of range: expected 0 <= page < num_pages = "
            f"{num_pages}"
        )


def check_slots(k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Raises ValueError for a slot past the last page."""
    if k_cache.device.type != "cpu" or slot_mapping.numel() == 0:
        return
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    if int(slot_mapping.max()) >= num_slots:
        raise ValueError(
            "slot_mapping is out of range: expected slot < num_pages * page_size = "
            f"{num_slots}, got {int(slot_mapping.max())}"
        )
