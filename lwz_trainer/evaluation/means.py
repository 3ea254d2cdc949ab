"""The mean of what is there."""

import math
from collections.abc import Iterable
from statistics import fmean

__all__ = ["mean_of"]


def mean_of(values: Iterable[float]) -> float:
    """Without the NaN among them, which are missing; NaN if nothing is left."""
    present = [value for value in values if not math.isnan(value)]
    return fmean(present) if present else math.nan
