"""Equalised odds and demographic parity: how far a classifier's rates lie apart between groups. Two groups or more, two classes or more.

Of a class y and a group g:    selected(g, y) = share of g's examples that are predicted y
                               TPR(g, y)      = the same among g's examples with label y
                               FPR(g, y)      = the same among g's examples with another label
    demographic-parity(y)  largest minus smallest selected(g, y) over the groups
    equalized-odds(y)      the larger of (largest minus smallest TPR) and (largest minus smallest FPR)

Source: fairlearn's demographic_parity_difference and equalized_odds_difference (method between_groups, agg worst_case), after Agarwal et al.
2018 and Hardt et al. 2016; theirs are shares, ours points. Of two classes both have the same differences, so there is one figure and no
positive class to name. Of more, each class against the rest: the largest over the classes, which a rare class decides, and their mean.

One departure: where a group has no example with label y (or none without it), fairlearn takes its rate as 0; here the group is left out of that
difference, and the class out of the figure where fewer than two groups remain for its TPR or its FPR.

Differences of noisy rates are positive for a fair model too. Their floor stands beside them ("shuffled"): the same figure after the groups
are shuffled, for demographic parity among all examples, for equalised odds among those of each label.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, bootstrap, tally
from peftdebias.metrics.classification import aligned
from peftdebias.metrics.tally import Figure, Tally

DEFINITIONS = ("equalized-odds", "demographic-parity")


@dataclass(frozen=True)
class Fairness:
    """See `fairness`. per_class: definition -> class -> difference in points, NaN where it is not defined; left_out: classes without equalised odds."""

    measures: list[Measure]
    per_class: dict[str, dict[str, float]]
    left_out: list[str]


def fairness(predicted, labels, groups, *, classes=None, seed: int = 0, samples: int = 1000, shuffles: int = 200) -> Fairness:
    """Equalised odds and demographic parity differences between the groups.

    0 means that all groups have the same rates, 100 that a class is always predicted for one group and never for another. Range [0, 100] points,
    ideal 0, but read them against their floors. Intervals: bootstrap over examples, shifted as `tally.py` says.

    predicted, labels, groups: one value an example, compared as strings. classes: those that the model knows (default: those that occur).
    """
    predicted, labels, groups = aligned(predicted=predicted, labels=labels, groups=groups)
    classes = np.unique(np.concatenate([predicted, labels])) if classes is None else np.array([str(c) for c in classes])
    names = np.unique(groups)
    if len(names) < 2:
        raise DataError(f"expected 2 groups or more, got {len(names)}: {', '.join(names)}")
    shape = (len(classes), len(names), len(classes))
    codes = [index_of(labels, classes, "label"), index_of(groups, names, "group"), index_of(predicted, classes, "prediction")]
    figures = table_figures(shape, len(labels))
    kept = Tally(np.ravel_multi_index(codes, shape), int(np.prod(shape)), None, figures)
    table = np.bincount(kept.kind, minlength=kept.kinds).reshape(shape)
    per_class = {d: dict(zip(classes.tolist(), per_class_differences(table, d).tolist())) for d in DEFINITIONS}

    found = tally.measures(kept, seed=seed, samples=samples)
    floors = _shuffled(codes, shape, figures, seed, shuffles)
    defined = [i for i, m in enumerate(found) if not np.isnan(m.value)]
    left_out = [y for y, value in per_class["equalized-odds"].items() if np.isnan(value)]
    return Fairness([m for i in defined for m in (found[i], floors[i])], per_class, left_out)


def index_of(values: np.ndarray, known: np.ndarray, what: str) -> np.ndarray:
    """Place of each value in `known`. Raises DataError on one that is not there."""
    place = {str(value): i for i, value in enumerate(known)}
    unknown = next((value for value in values if value not in place), None)
    if unknown is not None:
        raise DataError(f"expected every {what} to be one of {', '.join(place)}, got {unknown}")
    return np.array([place[value] for value in values])


def per_class_differences(table: np.ndarray, definition: str) -> np.ndarray:
    """Counts [..., C labels, G groups, C predicted] -> differences in points [..., C], NaN where not defined."""
    selected = table.sum(-3)  # [..., G, C]
    size = selected.sum(-1, keepdims=True)  # [..., G, 1]
    if definition == "demographic-parity":
        return _spread(tally.ratio(selected, size))
    true = np.diagonal(table, axis1=-3, axis2=-1)  # [..., G, C]
    positives = np.swapaxes(table.sum(-1), -1, -2)  # [..., G, C]
    return np.maximum(_spread(tally.ratio(true, positives)), _spread(tally.ratio(selected - true, size - positives)))


def _spread(rates: np.ndarray) -> np.ndarray:
    """[..., G, C] -> largest minus smallest over the groups, in points; NaN where fewer than two groups have a rate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN alone
        spread = 100 * (np.nanmax(rates, axis=-2) - np.nanmin(rates, axis=-2))
    return np.where((~np.isnan(rates)).sum(-2) > 1, spread, np.nan)


def table_figures(shape: tuple[int, int, int], n: int) -> tuple[Figure, ...]:
    """The figures as functions of a flat table of counts [..., C * G * C]."""
    def figure(name: str, definition: str, over) -> Figure:
        def value(sums):
            each = per_class_differences(sums.reshape(*sums.shape[:-1], *shape), definition)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # no class has it
                return over(each, axis=-1)
        return Figure(name, "points", 0.0, n, value, lifted=True, most=100.0)

    if shape[0] == 2:
        return tuple(figure(d, d, np.nanmax) for d in DEFINITIONS)
    return tuple(figure(f"{d}/{name}", d, over) for d in DEFINITIONS for name, over in (("max", np.nanmax), ("mean", np.nanmean)))


def _shuffled(codes: list[np.ndarray], shape: tuple[int, int, int], figures: tuple[Figure, ...], seed: int, shuffles: int) -> list[Measure]:
    """The floor of each figure: its mean under shuffled groups, with the middle 95 % of shuffles."""
    labels, groups, predicted = codes
    random, found = np.random.default_rng([seed, 1]), np.empty((len(figures), shuffles))
    by_label = np.argsort(labels, kind="stable")
    for s in range(shuffles):
        # Sorting by a random number within each label, against the labels in order, hands every label its own groups in a random order.
        within = np.empty_like(groups)
        within[by_label] = groups[np.lexsort((random.random(len(labels)), labels))]
        moved = {"equalized-odds": within, "demographic-parity": random.permutation(groups)}
        sums = {d: np.bincount(np.ravel_multi_index([labels, g, predicted], shape), minlength=int(np.prod(shape))) for d, g in moved.items()}
        found[:, s] = [figure.value(sums[figure.name.split("/")[0]]) for figure in figures]
    def name(figure):
        return figure.name + ("-shuffled" if "/" in figure.name else "/shuffled")
    return [Measure(name(f), float(np.nanmean(row)) if not np.isnan(row).all() else float("nan"), f.unit, None, *bootstrap.percentile(row), f.n)
            for f, row in zip(figures, found)]
