"""Two systems on the same examples, and one system under several seeds: McNemar's test, Student's t, tallies of what an examples file holds.

Differences with the paired bootstrap are tally.py's. Left out: corrections for many comparisons; with m rows in a table, expect 5 % of m to look
significant where nothing is.
"""

import math
from dataclasses import dataclass

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import tally
from peftdebias.metrics.classification import aligned, f1_of_counts
from peftdebias.metrics.fairness import index_of, table_figures
from peftdebias.metrics.tally import Difference, Figure, Tally
from peftdebias.metrics.tpr_gap import gaps_of_counts, rms_of_gaps

EXACT_BELOW = 25  # discordant pairs, up to which the chi-square approximation is too coarse


@dataclass(frozen=True)
class McNemar:
    """only_first, only_second: examples that one of the two got right and the other did not. p: two-sided, of "both err equally often"."""

    only_first: int
    only_second: int
    p: float
    test: str


def mcnemar(first_right, second_right) -> McNemar:
    """McNemar 1947: of the examples that exactly one system gets right, do both get as many?

    Fewer than EXACT_BELOW of them: exact binomial, p = P(as uneven or more | 1/2 each). Else chi-square with one degree of freedom and Edwards'
    continuity correction, (max(0, |b - c| - 1))^2 / (b + c). first_right, second_right: bool [N].
    """
    first_right, second_right = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if first_right.shape != second_right.shape:
        raise DataError(f"expected the same examples, got {len(first_right)} and {len(second_right)}")
    b, c = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    n = b + c
    if n < EXACT_BELOW:
        p = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
        return McNemar(b, c, p, "McNemar, exact")
    return McNemar(b, c, math.erfc(math.sqrt(max(0, abs(b - c) - 1) ** 2 / n / 2)), "McNemar, chi-square")


# ---------------------------------------------------------------- tallies

def classification_tally(predicted, labels, groups=None, *, classes, positive=None) -> Tally:
    """Accuracy, F1s and, with groups, the gaps between them, all as functions of one table of counts [C labels, G groups, C predicted].

    classes: that the model knows. The values are those of classification.py, tpr_gap.py and fairness.py.
    """
    predicted, labels, groups = aligned(predicted=predicted, labels=labels, groups=["all"] * len(labels) if groups is None else groups)
    classes, names = np.array([str(c) for c in classes]), np.unique(groups)
    shape = (len(classes), len(names), len(classes))
    kind = np.ravel_multi_index([index_of(labels, classes, "label"), index_of(groups, names, "group"), index_of(predicted, classes, "prediction")], shape)

    def figure(name, unit, ideal, value, lifted=False, n=len(labels), units=None):
        return Figure(name, unit, ideal, n, lambda sums: value(sums.reshape(*sums.shape[:-1], *shape)), lifted, most=100.0, units=units)

    def true(table):  # [..., C, G, C] -> [..., C]
        return np.diagonal(table.sum(-2), axis1=-2, axis2=-1)

    def f1(table):  # [..., C]
        return f1_of_counts(true(table), table.sum((-3, -2)) - true(table), table.sum((-2, -1)) - true(table))

    def macro(table):
        each = f1(table)
        return tally.ratio(np.nansum(each, -1), (~np.isnan(each)).sum(-1))

    figures = [figure("accuracy", "%", 100.0, lambda table: 100 * true(table).sum(-1) / table.sum((-3, -2, -1))), figure("f1/macro", "%", 100.0, macro, lifted=True)]
    if positive in labels:
        place = classes.tolist().index(positive)
        figures.append(figure(f"f1/{positive}", "%", 100.0, lambda table: f1(table)[..., place]))
    if len(names) == 2:
        def rms(table):  # as hits and misses of each label and group, [..., C, G, 2]
            hits, all_of = np.swapaxes(np.diagonal(table, axis1=-3, axis2=-1), -1, -2), table.sum(-1)
            return rms_of_gaps(gaps_of_counts(np.stack([all_of - hits, hits], -1)))
        positives = np.bincount(kind // shape[2], minlength=shape[0] * shape[1]).reshape(shape[:2])  # of each label in each group
        figures.append(figure("tpr-gap/rms", "points", 0.0, rms, lifted=True, n=int(positives[positives.min(1) > 0].sum()), units=None if (positives.min(1) > 1).any() else 1))
    if len(names) > 1:
        figures += table_figures(shape, len(labels))
    return Tally(kind, int(np.prod(shape)), None, tuple(figures))


def mean_tally(name: str, values, weights=None, *, unit: str, ideal: float | None) -> Tally:
    """The mean of `values` [N], or sum of values by sum of weights. n: those that have a weight."""
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    figure = Figure(name, unit, ideal, int((weights > 0).sum()), lambda sums: tally.ratio(sums[..., 0], sums[..., 1]))
    return tally.of_rows(np.stack([values, weights], 1), (figure,))


# ---------------------------------------------------------------- seeds

@dataclass(frozen=True)
class Spread:
    """One figure over n seeds. sd: of single seeds (n - 1 in the denominator). low, high: 95 % interval of the mean, Student's t. None from one seed."""

    name: str
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    unit: str
    ideal: float | None
    n: int

    def __str__(self) -> str:
        """"54.1 ± 2.3": mean and standard deviation over seeds."""
        return f"{self.mean:.4g}" if self.sd is None else f"{self.mean:.4g} ± {self.sd:.2g}"

    def as_json(self) -> dict:
        return {key: getattr(self, key) for key in ("name", "mean", "sd", "low", "high", "unit", "ideal", "n")}


def over_seeds(values, *, name: str = "", unit: str = "1", ideal: float | None = None) -> Spread:
    """Mean and spread of one figure over runs that differ in their seed alone: how far training moves it, which no interval over examples shows."""
    values = np.asarray(values, float)
    if not len(values) or not np.isfinite(values).all():
        raise DataError(f"{name or 'values'}: expected a number for each seed, got {values.tolist()}")
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Spread(name, mean, None, None, None, unit, ideal, n)
    if (values == values[0]).all():  # whatever rounding the mean has
        mean, sd = float(values[0]), 0.0
    else:
        sd = float(values.std(ddof=1))
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Spread(name, mean, sd, mean - half, mean + half, unit, ideal, n)


def seed_difference(first, second, *, name: str = "", unit: str = "1", ideal: float | None = None) -> Difference:
    """second - first over the same seeds in the same order: paired t-test. Where all seeds change alike, as a figure of few steps may, no spread says how sure
    that is: then p is that of their signs, 2^(1 - n), and the interval reaches to 0 where p is above 0.05."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    if len(first) != len(second) or len(first) < 2:
        raise DataError(f"{name or 'values'}: expected the same two seeds or more of both, got {len(first)} and {len(second)}")
    change = over_seeds(second - first, name=name)
    low, high, test = change.low, change.high, "paired t over seeds"
    if change.sd > 1e-12 * max(abs(first).max(), abs(second).max()):
        p = max(0.0, 1 - t_inside(abs(change.mean) / change.sd * math.sqrt(change.n), change.n - 1))  # rounding may end above 1
    elif (first == second).all():
        p = 1.0
    else:
        p, test = 2.0 ** (1 - change.n), "signs of seeds"
        low, high = (min(low, 0.0), max(high, 0.0)) if p > 0.05 else (low, high)
    unit = "points" if unit == "%" else unit
    one, other = float(first.mean()), float(second.mean())
    if abs(other - one) <= 1e-12 * max(abs(first).max(), abs(second).max()):  # their rounding, whose sign would look like a direction
        other = one
    return Difference(name, one, other, unit, ideal, low, high, p, test, change.n)


def t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom: the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, cosine) if freedom % 2 else (1.0, 1.0)
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if freedom % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + sine * total) if freedom > 1 else 2 / math.pi * angle


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < level else (low, middle)
    return high
