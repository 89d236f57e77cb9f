"""Bootstrap intervals over examples: where the figure lies that test sets of this size have on average.

Percentile intervals (Efron & Tibshirani 1993, chapter 13): draw n of the n examples with replacement, compute the figure,
take the middle `level` of many such figures. The same seed gives the same interval. Three ways, one meaning:

    interval        any statistic of the drawn indices; one Python call a resample
    mean_interval   plain means, vectorised
    counts          statistics of a table of counts (accuracy, F1, TPR gaps). Drawing n examples and counting cells is one
                    draw from a multinomial over the cells, so 10 000 examples cost no more than 100

What sampling noise alone makes larger or smaller is moved back (`shifted`). One example says nothing of its spread: there is no
interval, (nan, nan).

Left out: BCa intervals, paired tests between runs, spread over seeds. What it cannot show: a cell with no example stays empty
in every resample, so figures that rest on a handful of examples look surer than they are.
"""

import math
from collections.abc import Callable

import numpy as np

from peftdebias.errors import DataError

NONE = (math.nan, math.nan)


def interval(
    statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of `statistic(indices)`, with indices int64 [n] in [0, n)."""
    _check(n)
    if n == 1:
        return NONE
    random = np.random.default_rng(seed)
    return percentile(np.array([statistic(random.integers(0, n, n)) for _ in range(samples)], float), level)


def mean_interval(values, *, seed: int = 0, samples: int = 1000) -> tuple[float, float]:
    """(low, high) of the mean of `values` [n]."""
    values = np.asarray(values, float)
    _check(len(values))
    if len(values) == 1:
        return NONE
    distinct, cells = np.unique(values, return_counts=True)
    if len(distinct) <= 64:  # right or wrong, better or worse: a table of counts
        return percentile(counts(cells, seed=seed, samples=samples) @ distinct / len(values))
    random = np.random.default_rng(seed)
    block = max(1, 2**22 // len(values))  # resamples at once, about 64 MiB
    means = [
        values[random.integers(0, len(values), (min(block, samples - start), len(values)))].mean(1)
        for start in range(0, samples, block)
    ]
    return percentile(np.concatenate(means))


def counts(cells, *, seed: int = 0, samples: int = 1000) -> np.ndarray:
    """Resampled tables of counts: int [...] -> int64 [samples, ...], each with the total of `cells`."""
    cells = np.asarray(cells)
    n = int(cells.sum())
    _check(n)
    drawn = np.random.default_rng(seed).multinomial(n, cells.ravel() / n, size=samples)
    return drawn.reshape(samples, *cells.shape)


def percentile(statistics: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of `statistics` [samples]. Resamples in which the figure is not defined (NaN) are left out."""
    statistics = statistics[~np.isnan(statistics)]
    if not len(statistics):
        return NONE
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def shifted(statistics: np.ndarray, value: float, *, least: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """The percentile interval of a figure that noise lifts (or lowers): a resample has that noise twice, so what resampling adds, the mean of `statistics` minus
    `value`, is taken off. Within [least, most], the figure's range, and around `value`."""
    low, high = percentile(statistics)
    if math.isnan(low):
        return NONE
    lift = float(np.nanmean(statistics)) - value
    low, high = (min(max(bound - lift, least), most) for bound in (low, high))
    return min(low, value), max(high, value)


def _check(n: int) -> None:
    if n < 1:
        raise DataError("no examples to measure on: expected at least 1, got 0")
