"""Spearman's rank correlation: does one figure grow with another, however fast? 1: always; 0: no order in common; -1: it falls. Spearman 1904."""

import numpy as np

from peftdebias.errors import DataError


def ranks(values) -> np.ndarray:
    """[n] -> float [n]: places 1 to n from the least up; equal values share the mean of their places."""
    _, place, number = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(number) - (number - 1) / 2)[place]


def spearman(first, second) -> float:
    """Pearson's correlation of the ranks; NaN where either side does not vary. Raises DataError on other lengths than two equal ones from 2."""
    if len(first) != len(second) or len(first) < 2:
        raise DataError(f"expected as many values of both, 2 at least, got {len(first)} and {len(second)}")
    x, y = (ranks(side) - (len(first) + 1) / 2 for side in (first, second))
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale else float("nan")
