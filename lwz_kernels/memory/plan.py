"""Which pages move where when a phase begins: a pure function of page tables."""

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["POOL", "plan_moves"]

POOL = -1
Slot = tuple[int, int]
"""A region's number and a page-sized place in it."""


def plan_moves(
    tables: Mapping[int, Sequence[int]], num_pages: Mapping[int, int]
) -> list[tuple[int, int, int, int, int]]:
    """Moves after which exactly the first `num_pages[region]` slots of each region have a page.

    Pages that one region gives up go to regions that need some; only what is left over goes to the
    pool, and only what is still missing comes from it. Regions without a number keep their pages.

    Args:
        tables: per region the id of the page in each slot, -1 where there is none.
        num_pages: how many pages a region shall have.

    Returns:
        `(src_region, src_page, dst_region, dst_page, num_pages)` with runs joined.

    Example:
        >>> plan_moves({0: [7, 8, 9], 1: [-1, -1, -1]}, {0: 1, 1: 3})
        [(0, 1, 1, 0, 2), (-1, 0, 1, 2, 1)]
    """
    surplus: list[Slot] = []
    missing: list[Slot] = []
    for region, wanted in num_pages.items():
        for slot, page in enumerate(tables[region]):
            if page >= 0 and slot >= wanted:
                surplus.append((region, slot))
            elif page < 0 and slot < wanted:
                missing.append((region, slot))
    common = min(len(surplus), len(missing))
    pairs = list(zip(surplus, missing, strict=False))
    pairs += [(slot, (POOL, 0)) for slot in surplus[common:]]
    pairs += [((POOL, 0), slot) for slot in missing[common:]]
    return _join_runs(pairs)


def _join_runs(pairs: Iterable[tuple[Slot, Slot]]) -> list[tuple[int, int, int, int, int]]:
    moves: list[tuple[int, int, int, int, int]] = []
    for src, dst in pairs:
        if moves:
            src_region, src_page, dst_region, dst_page, num_pages = moves[-1]
            ends = (
                _after(src_region, src_page, num_pages),
                _after(dst_region, dst_page, num_pages),
            )
            if (src, dst) == ends:
                moves[-1] = (src_region, src_page, dst_region, dst_page, num_pages + 1)
                continue
        moves.append((*src, *dst, 1))
    return moves


def _after(region: int, page: int, num_pages: int) -> Slot:
    return (region, page) if region == POOL else (region, page + num_pages)
