"""TPR gap: how much more often a class is found for one gender than for the other, per class and as root mean square.

For a class y and a group g:    TPR(g, y) = share of the examples with label y and group g that are predicted y
                                gap(y)    = 100 (TPR(first, y) - TPR(second, y))            in points
                                RMS       = square root of the mean over classes of gap(y)^2

Source: De-Arteaga et al. 2019, "Bias in Bios" (the gap); Romanov et al. 2019, "What's in a Name?" (its RMS). A class with no
positives in either of the groups has no gap: it is left out and named.

The RMS of noisy gaps is positive also for a model that treats both groups alike. Its floor is therefore measured beside it:
the RMS after the groups are shuffled among the examples of each class.
"""

from dataclasses import dataclass

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, bootstrap
from peftdebias.metrics.classification import aligned

FEMALE = frozenset({"f", "female", "w", "woman"})  # in any case


@dataclass(frozen=True)
class TPRGap:
    """See `tpr_gap`."""

    first: str  # gap = TPR(first) - TPR(second)
    second: str
    per_class: dict[str, float]  # class -> gap in points, classes in alphabetical order
    left_out: list[str]  # classes with no positives in one of the groups
    positives: dict[str, tuple[int, int]]  # class -> examples in the first and in the second group, classes left out included
    rms: Measure
    floor: Measure  # RMS under groups shuffled within class: its mean, with the range of the middle 95 % of shuffles
    classes: list[Measure]  # per_class with intervals; n = positives of the class

    def as_measures(self) -> list[Measure]:
        return [self.rms, self.floor, *self.classes]


def tpr_gap(
    predicted, labels, groups, *, first: str | None = None, seed: int = 0, samples: int = 1000, shuffles: int = 1000
) -> TPRGap:
    """True-positive-rate gap between the two groups, TPR(first) - TPR(second), of every class in `labels`.

    0 means that positives of the class are found equally often in both groups; above 0, more often in the first. Per class:
    range [-100, 100] points, ideal 0. RMS: range [0, 100] points, ideal 0, but read it against its floor.

    Which group is first: `first` where given; else the one of "f", "female", "w", "woman" (any case), so that the gap is
    female minus male as in the sources; where that does not tell (none of them, or both), the alphabetically first, so 0/1
    groups give 0 minus 1. The RMS does not depend on it.

    Intervals: bootstrap over examples, percentile per class. Classes that lack a group in a resample are left out of it. The
    interval of the RMS is for the RMS that test sets of this size have on average: resampling adds the sampling noise a
    second time, which lifts every resampled RMS, so the percentile interval is shifted down by that lift (`bootstrap.shifted`).
    It is not an interval for the RMS without noise, which lies lower, by how much the floor suggests. An interval per
    class rests on the smaller group: where that is a handful of positives, all found or all missed, it is too narrow, so
    `positives` goes with it; where it is a single one there is no interval, and none of the RMS where that is so of every class.

    predicted, labels, groups: one value an example, compared as strings. A prediction may be a class that no label has.
    """
    predicted, labels, groups = aligned(predicted=predicted, labels=labels, groups=groups)
    first, second = _order(np.unique(groups), first)
    classes, codes = np.unique(labels, return_inverse=True)
    # positives and hits: [C classes, 2 groups, 2 (missed, found)]
    code = 4 * codes + 2 * (groups == second) + (predicted == labels)
    table = np.bincount(code, minlength=4 * len(classes)).reshape(-1, 2, 2)

    kept = (table.sum(2) > 0).all(1)  # [C]
    if not kept.any():
        raise DataError(f"expected a class with positives in both groups '{first}' and '{second}', got none of {len(classes)} classes")
    gaps = gaps_of_counts(table)  # [C], NaN where left out
    value = float(rms_of_gaps(gaps))
    drawn = gaps_of_counts(bootstrap.counts(table, seed=seed, samples=samples))  # [samples, C]
    drawn_rms = rms_of_gaps(drawn[:, kept])
    several = table.sum(2).min(1) > 1  # [C]
    low, high = bootstrap.shifted(drawn_rms, value, most=100.0) if several.any() else bootstrap.NONE
    shuffled = rms_of_gaps(gaps_of_counts(_shuffle(table[kept], seed, shuffles)))  # [shuffles]
    n = int(table[kept].sum())
    return TPRGap(
        first,
        second,
        {str(name): float(gap) for name, gap in zip(classes[kept], gaps[kept])},
        [str(name) for name in classes[~kept]],
        {str(name): (int(row[0].sum()), int(row[1].sum())) for name, row in zip(classes, table)},
        Measure("tpr-gap/rms", value, "points", 0.0, low, high, n),
        Measure("tpr-gap/rms-shuffled", float(shuffled.mean()), "points", None, *bootstrap.percentile(shuffled), n),
        [
            Measure(f"tpr-gap/class/{classes[c]}", float(gaps[c]), "points", 0.0, *(bootstrap.percentile(drawn[:, c]) if several[c] else bootstrap.NONE), int(table[c].sum()))
            for c in np.flatnonzero(kept)
        ],
    )


def _order(groups: np.ndarray, first: str | None) -> tuple[str, str]:
    groups = [str(group) for group in groups]  # alphabetical
    if len(groups) != 2:
        shown = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
        raise DataError(f"expected 2 groups, got {len(groups)}: {shown}")
    if first is not None and str(first) not in groups:
        raise DataError(f"expected the first group to be one of {', '.join(groups)}, got {first}")
    female = [group for group in groups if group.lower() in FEMALE]
    first = str(first) if first is not None else female[0] if len(female) == 1 else groups[0]
    return first, groups[1 - groups.index(first)]


def gaps_of_counts(table: np.ndarray) -> np.ndarray:
    """[..., C, 2, 2] -> gaps in points [..., C], NaN where a group has no positives."""
    found, positives = table[..., 1].astype(float), table.sum(-1)
    rates = np.divide(found, positives, out=np.full_like(found, np.nan), where=positives > 0)  # [..., C, 2]
    return 100 * (rates[..., 0] - rates[..., 1])


def rms_of_gaps(gaps: np.ndarray) -> np.ndarray:
    """[..., C] -> [...], over the classes that have a gap; NaN where none has."""
    defined = ~np.isnan(gaps)
    squares = np.where(defined, gaps, 0.0) ** 2
    number = defined.sum(-1)
    return np.sqrt(np.divide(squares.sum(-1), number, out=np.full(number.shape, np.nan), where=number > 0))


def _shuffle(table: np.ndarray, seed: int, shuffles: int) -> np.ndarray:
    """Groups shuffled within each class: [C, 2, 2] -> [shuffles, C, 2, 2] with the same positives per group and hits per class.

    How many of the hits fall to the first group is hypergeometric, so no example need be moved.
    """
    missed, found = table.sum(1).T  # [C]
    positives = table.sum(2)  # [C, 2]
    first_found = np.random.default_rng([seed, 1]).hypergeometric(found, missed, positives[:, 0], size=(shuffles, len(table)))
    found_by = np.stack([first_found, found - first_found], axis=-1)  # [shuffles, C, 2]
    return np.stack([positives - found_by, found_by], axis=-1)
