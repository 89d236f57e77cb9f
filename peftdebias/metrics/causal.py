"""The causal effect of gender on a classifier, on matched texts that differ in nothing else: what the two answers to a pair have in common is the text, so
whatever parts them was caused by gender.

    changed      share of pairs whose two predictions differ                                   %,      ideal 0, range 0 to 100
    shift        mean of P(m side | read as m) - P(m side | read as f)                         points, ideal 0, range -100 to 100
                 P(m side | ...): probability of all labels whose stereotype is m; above 0, answers follow the stereotype

A model that ignores gender has 0 in both; one that knows nothing but gender, and follows the stereotype, has 100 in both. `changed` counts whatever
direction an answer goes, `shift` only towards the stereotype. Unlike a difference between groups neither has a floor: without an effect both are exactly 0.

Source: the counterfactual reading of fairness in Kusner et al. 2017, arXiv 1703.06856; `shift` is the mean effect of the intervention "gender := m".
"""

from collections.abc import Mapping, Sequence

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure
from peftdebias.metrics.bootstrap import mean_interval


def gender_effect(first, second, genders: Sequence[str], labels: Sequence[str], stereotypes: Mapping[str, str], *, seed: int = 0, samples: int = 1000) -> list[Measure]:
    """[causal/changed, causal/shift], with bootstrap intervals over pairs.

    first, second: probabilities [N, C] of a text and of its counterfactual. genders: [N] of the first texts, "m" or "f". labels: [C]. stereotypes: label -> gender.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.shape != (len(genders), len(labels)) or not len(first):
        raise DataError(f"expected probabilities of {len(genders)} pairs and {len(labels)} labels, got {list(first.shape)} and {list(second.shape)}")
    if odd := sorted({*genders, *(stereotypes.get(label, "none") for label in labels)} - {"m", "f"}):
        raise DataError(f"expected the genders m and f, got {', '.join(odd)}")
    towards_m = np.array([stereotypes[label] == "m" for label in labels])  # [C]
    read_as_m = np.where(np.array(genders)[:, None] == "m", first, second)  # [N, C]
    read_as_f = first + second - read_as_m
    changed = 100.0 * (first.argmax(1) != second.argmax(1))
    shift = 100 * (read_as_m - read_as_f)[:, towards_m].sum(1)
    return [Measure(f"causal/{name}", float(values.mean()), unit, 0.0, *mean_interval(values, seed=seed, samples=samples), len(values))
            for name, values, unit in (("changed", changed, "%"), ("shift", shift, "points"))]
