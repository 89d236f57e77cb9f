"""Task quality: accuracy, F1 of one class, macro-F1, in % with bootstrap intervals over examples.

Classes are compared as strings, so 1 and "1" are one class. Left out: class weights, averages other than macro.
"""

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, bootstrap


def accuracy(predicted, labels, *, seed: int = 0, samples: int = 1000) -> Measure:
    """Share of examples whose predicted class is the label.

    0 means that every prediction is wrong, 100 that none is. Range [0, 100] %, ideal 100.
    """
    predicted, labels = aligned(predicted=predicted, labels=labels)
    right = predicted == labels
    low, high = bootstrap.mean_interval(100 * right, seed=seed, samples=samples)
    return Measure("accuracy", 100 * float(right.mean()), "%", 100.0, low, high, len(labels))


def f1(predicted, labels, positive, *, seed: int = 0, samples: int = 1000) -> Measure:
    """F1 of the class `positive`: 2 TP / (2 TP + FP + FN), the harmonic mean of its precision and recall.

    0 means that no positive was found, 100 that all were and nothing else. Range [0, 100] %, ideal 100. Source: van
    Rijsbergen 1979; the paper reports it for the hate class. A resample without any positive, true or predicted, is left out.
    """
    predicted, labels = aligned(predicted=predicted, labels=labels)
    positive = str(positive)
    if positive not in labels:
        raise DataError(f"no example with label '{positive}'; labels: {', '.join(np.unique(labels))}")
    is_positive, said = labels == positive, predicted == positive
    cells = np.array([(is_positive & said).sum(), (~is_positive & said).sum(), (is_positive & ~said).sum(), 0])
    cells[3] = len(labels) - cells.sum()  # TP, FP, FN, TN
    drawn = f1_of_counts(*np.moveaxis(bootstrap.counts(cells, seed=seed, samples=samples)[:, :3], 1, 0))
    return Measure(f"f1/{positive}", float(f1_of_counts(*cells[:3])), "%", 100.0, *(bootstrap.percentile(drawn) if len(labels) > 1 else bootstrap.NONE), len(labels))


def macro_f1(predicted, labels, *, seed: int = 0, samples: int = 1000) -> Measure:
    """Plain mean over classes of `f1`. The classes are those of labels and predictions together, as in scikit-learn.

    0 means that no example is right, 100 that all are. Range [0, 100] %, ideal 100. A rare class counts as much as a
    common one. A resample may lack rare classes and is the mean over those it has, which lifts it where they are the hard
    ones, so the interval is shifted back (`bootstrap.shifted`).
    """
    predicted, labels = aligned(predicted=predicted, labels=labels)
    classes, codes = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    table = np.bincount(codes[: len(labels)] * len(classes) + codes[len(labels) :], minlength=len(classes) ** 2)
    used = np.flatnonzero(table)  # K pairs (label, predicted) that occur, K <= examples
    label_of = np.eye(len(classes))[used // len(classes)]  # [K, C]
    predicted_of = np.eye(len(classes))[used % len(classes)]  # [K, C]

    def mean_f1(cells):  # [..., K] -> [...]
        true = cells @ (label_of * predicted_of)
        scores = f1_of_counts(true, cells @ predicted_of - true, cells @ label_of - true)
        return np.nanmean(scores, axis=-1)

    value = float(mean_f1(table[used]))
    drawn = mean_f1(bootstrap.counts(table[used], seed=seed, samples=samples))
    low, high = bootstrap.shifted(drawn, value, most=100.0) if len(labels) > 1 else bootstrap.NONE
    return Measure("f1/macro", value, "%", 100.0, low, high, len(labels))


def f1_of_counts(true_positive, false_positive, false_negative):
    """In %; NaN where the class occurs neither in labels nor in predictions."""
    both = 2 * np.asarray(true_positive, float)
    total = both + false_positive + false_negative
    return 100 * np.divide(both, total, out=np.full_like(both, np.nan), where=total > 0)


def aligned(**columns) -> list[np.ndarray]:
    """The columns as string arrays of one length, at least 1; an error names the columns that differ or lack a value."""
    (first, expected), *_ = ((name, len(values)) for name, values in columns.items())
    for name, values in columns.items():
        if len(values) != expected:
            raise DataError(f"expected as many {name} as {first}, {expected}, got {len(values)}")
        missing = next((i for i, value in enumerate(values) if value is None), None)
        if missing is not None:
            raise DataError(f"{name}: expected a value for every example, got none for example {missing} (counted from 0)")
    if not expected:
        raise DataError("no examples to measure on: expected at least 1, got 0")
    return [np.array([str(value) for value in values]) for values in columns.values()]
