"""A figure as a function of sums over examples: one definition gives its value, its interval, and the difference of two systems with its own.

Letters: N examples (or clusters of them), K kinds of example, F sums, S resamples.

Every example is of some kind, and every kind adds a row of F numbers to the sums: one for a cell of a table of counts, the false
positives and the mentions of identity terms for FPRD. Drawing N examples with replacement is then one multinomial draw over the kinds, so
76 000 examples cost what their kinds cost. Two systems on the same examples are drawn together (an example's kind is then the pair of its
kinds), which is what makes a paired bootstrap paired (Efron & Tibshirani 1993, chapters 13 and 16).

What sampling noise alone makes larger (root mean squares, sums of absolute values, largest differences, macro-F1 where a resample lacks rare classes) or smaller
(ICAT) is `lifted`: a resample has that noise twice, so its percentile interval lies too high, or too low, and is shifted back (`bootstrap.shifted`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, bootstrap

BLOCK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Figure:
    name: str
    unit: str
    ideal: float | None
    n: int  # examples behind it
    value: Callable[[np.ndarray], np.ndarray]  # sums [..., F] -> [...], NaN where it is not defined
    lifted: bool = False
    most: float = math.inf  # what it cannot go above; asked of lifted ones
    units: int | None = None  # how many of what is drawn it rests on, where that is not n


@dataclass(frozen=True)
class Tally:
    """kind: int [N]. adds: float [K, F]; None where F = K and a kind counts itself (a table of counts).

    strata: int [N], where the numbers of examples of some sorts were chosen and not found: each stratum is then resampled to its own size.
    """

    kind: np.ndarray
    kinds: int
    adds: np.ndarray | None
    figures: tuple[Figure, ...]
    strata: np.ndarray | None = None


@dataclass(frozen=True)
class Difference:
    """second - first of one figure on the same examples, with the 95 % interval of the paired bootstrap; there is none without an interval."""

    name: str
    first: float
    second: float
    unit: str  # of the difference: points where the figures are in %
    ideal: float | None  # of the figures
    low: float
    high: float
    p: float  # two-sided
    test: str  # what gave p
    n: int

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise DataError(f"{self.name}: expected an interval for the difference, got none")

    @property
    def value(self) -> float:
        return self.second - self.first

    def as_json(self) -> dict:
        row = {key: getattr(self, key) for key in ("name", "first", "second")} | {"difference": self.value}
        return row | {key: getattr(self, key) for key in ("unit", "ideal", "low", "high", "p", "test", "n")}


def of_rows(rows: np.ndarray, figures: tuple[Figure, ...]) -> Tally:
    """A tally of examples that add `rows` [N, F]; equal rows are one kind."""
    rows = np.ascontiguousarray(rows, float)
    _, first, kind = np.unique(rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return Tally(kind.ravel(), len(first), rows[first], figures)


def values(tally: Tally) -> np.ndarray:
    """The figures' values [figures]."""
    counts = np.bincount(tally.kind, minlength=tally.kinds)[None]
    return _values(tally, _sums(tally, np.arange(tally.kinds), counts))[:, 0]


def measures(tally: Tally, *, seed: int = 0, samples: int = 1000) -> list[Measure]:
    """Every figure with its interval; none where it rests on one example."""
    found = []
    drawn = np.concatenate([block for (block,) in _resamples([tally], seed, samples)], axis=1)
    for figure, value, resampled in zip(tally.figures, values(tally), drawn):
        if _units(tally, figure) < 2:
            interval = bootstrap.NONE
        else:
            interval = bootstrap.shifted(resampled, float(value), most=figure.most) if figure.lifted else bootstrap.percentile(resampled)
        found.append(Measure(figure.name, float(value), figure.unit, figure.ideal, *interval, figure.n))
    return found


def _units(tally: Tally, figure: Figure) -> int:
    """How many of what is drawn a figure rests on."""
    return min(len(tally.kind), figure.n if figure.units is None else figure.units)


def differences(first: Tally, second: Tally, *, seed: int = 0, samples: int = 1000) -> tuple[list[Difference], list[str]]:
    """(second - first of every figure that both have, names of those without an interval), by the paired bootstrap.

    p = twice the smaller share of resamples on either side of 0, each counted with one more, at most 1 (Davison & Hinkley 1997, chapter 4), and at least 2^(1 - k) where
    a figure rests on k examples or clusters: less, no test of signs can say of so few, while all of their resamples may lie on one side; where that is more than 0.05 the
    interval holds 0. The same shift as in `measures`
    takes the difference of both lifts out. It moves resamples without a difference off 0, so what is told from 0 must be so before it too: p is the larger of both, and an
    interval that held 0 goes on holding it.
    """
    if len(first.kind) != len(second.kind):
        raise DataError(f"expected the same examples, got {len(first.kind)} and {len(second.kind)}")
    blocks = list(_resamples([first, second], seed, samples))
    a, b = (np.concatenate([pair[i] for pair in blocks], axis=1) for i in (0, 1))
    place = {figure.name: i for i, figure in enumerate(second.figures)}
    value_a, value_b = values(first), values(second)
    found, without = [], []
    for i, figure in enumerate(first.figures):
        if figure.name not in place:
            continue
        j = place[figure.name]
        change, value = _change(a[i], b[j]), float(_change(value_a[i], value_b[j]))
        change, units = change[~np.isnan(change)], min(_units(first, figure), _units(second, second.figures[j]))
        if not len(change) or math.isnan(value) or units < 2:
            without.append(figure.name)
            continue
        p, (low, high) = _two_sided(change), bootstrap.percentile(change)
        if figure.lifted:
            moved = change - (change.mean() - value)
            around = (0.0,) if low <= 0 <= high else ()
            low, high = bootstrap.percentile(moved)
            low, high = max(min(low, *around, high), -figure.most), min(max(low, *around, high), figure.most)
            p = max(p, _two_sided(moved))
        if (least := 2.0 ** (1 - units)) > 0.05:
            low, high = min(low, 0.0), max(high, 0.0)
        unit = "points" if figure.unit == "%" else figure.unit
        found.append(Difference(figure.name, float(value_a[i]), float(value_b[j]), unit, figure.ideal, low, high,
                                max(least, p), "paired bootstrap", figure.n))
    return found, without


def _change(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """second - first; 0 where that is rounding, which would count as a side of 0."""
    change = second - first
    return np.where(np.isfinite(change) & (np.abs(change) <= 1e-12 * np.maximum(np.abs(first), np.abs(second))), 0.0, change)


def _two_sided(change: np.ndarray) -> float:
    """How often resampled differences lie on the other side of 0."""
    tail = min((change <= 0).sum(), (change >= 0).sum())
    return min(1.0, 2 * float(tail + 1) / (len(change) + 1))


def _resamples(tallies: list[Tally], seed: int, samples: int) -> Iterator[list[np.ndarray]]:
    """Blocks of resampled figures: for each tally [figures, block], all from the same draws."""
    n = len(tallies[0].kind)
    if n < 1:
        raise DataError("no examples to measure on: expected at least 1, got 0")
    strata = np.zeros(n, np.int64) if tallies[0].strata is None else tallies[0].strata
    joint = strata
    for tally in tallies:
        joint = joint * tally.kinds + tally.kind
    _, first, cells = np.unique(joint, return_index=True, return_counts=True)
    kinds = [tally.kind[first] for tally in tallies]
    columns = [np.flatnonzero(strata[first] == stratum) for stratum in np.unique(strata)]
    random = np.random.default_rng(seed)
    widest = max(len(cells), *(tally.kinds if tally.adds is None else tally.adds.shape[1] for tally in tallies))
    block = max(1, BLOCK // widest)
    for start in range(0, samples, block):
        drawn = np.zeros((min(block, samples - start), len(cells)), np.int64)  # [block, joint kinds]
        for own in columns:
            drawn[:, own] = random.multinomial(cells[own].sum(), cells[own] / cells[own].sum(), size=len(drawn))
        yield [_values(tally, _sums(tally, kind, drawn)) for tally, kind in zip(tallies, kinds)]


def _sums(tally: Tally, kind: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """counts [S, U] of columns that are of `kind` [U] -> sums [S, F]."""
    if tally.adds is not None:
        return counts @ tally.adds[kind]
    order = np.argsort(kind, kind="stable")
    present, starts = np.unique(kind[order], return_index=True)
    sums = np.zeros((len(counts), tally.kinds))
    sums[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums


def _values(tally: Tally, sums: np.ndarray) -> np.ndarray:
    """sums [S, F] -> [figures, S]."""
    return np.array([np.broadcast_to(figure.value(sums), len(sums)) for figure in tally.figures], float).reshape(len(tally.figures), len(sums))


def ratio(above, below) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
