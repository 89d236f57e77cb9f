"""Measures of bias and of quality, one file each, on plain arrays: what a model predicted, not how.

Every figure leaves as a `Measure`, with a 95 % bootstrap interval over examples (bootstrap.py) where one can be had. A bias
measure has positive predictive power only: it can show bias, never its absence.
"""

import math
import re
from dataclasses import dataclass


def bare_name(name: str) -> str:
    """"tpr-gap/rms" of "tpr-gap/rms (heldout.csv)", as `evaluate` names a measure of one file where it measures several."""
    return re.sub(r" \(.*\)$", "", name)


def bare_of_system(name: str) -> str:
    """"mlm-loss" of "base/mlm-loss" and "only-gender/mlm-loss": a figure of the base, or of one of the modules alone."""
    return re.sub("^(base|only-[^/]+)/", "", bare_name(name))


@dataclass(frozen=True)
class Measure:
    """One figure of `evaluate`: a name, a value in a unit, and its 95 % interval [low, high] over examples, as percentages or as plain numbers by the unit; None, or a value
    that is not finite, where nothing can be said."""

    name: str  # "tpr-gap/rms": measure/variant/subset
    value: float
    unit: str  # "%", "points" (difference of two %), "nats", "1"
    ideal: float | None  # what an unbiased or perfect model has; None where there is no such value
    low: float | None  # of the interval
    high: float | None
    n: int  # examples behind the value

    def as_json(self) -> dict:
        """Its row in what `evaluate --json` writes; what is not finite is None."""
        row = {key: getattr(self, key) for key in ("name", "value", "unit", "ideal", "low", "high", "n")}
        for key in ("value", "ideal", "low", "high"):
            row[key] = float(row[key]) if row[key] is not None and math.isfinite(row[key]) else None
        return row | {"n": int(row["n"])}
