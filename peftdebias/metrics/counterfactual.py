"""Counterfactual flips: how often a classifier changes its mind when a text says she for he, and by how much.

A text with attribute words of an axis has V counterfactuals (cda.py; one on an axis of pairs), each of which replaces the words and nothing else:

    flips         share of the counterfactuals whose likeliest label is another one than the text's
    probability   |P(label | counterfactual) - P(label | text)|, label: the likeliest for the text

Both are the mean over texts of the mean over a text's counterfactuals, so that a text counts once however many identities its axis has.

Source: Kusner et al. 2017 (counterfactual fairness) and Garg et al. 2019, "Counterfactual Fairness in Text Classification" (the gap in what is predicted).
A flip shows that the words of the axis decide, not that they may not: where the label is about the axis itself ("is this about women?") it should flip.
"""

import numpy as np

from peftdebias.errors import DataError
from peftdebias.metrics import Measure, tally
from peftdebias.metrics.tally import Figure, Tally

NAME = "counterfactual"


def measures(flipped, shift, sources, *, seed: int = 0, samples: int = 1000) -> list[Measure]:
    """Flips and the change of probability.

    0 means that no word of the axis changes an answer. Flips: range [0, 100] %; probability: range [0, 100] points; ideal 0 both. Intervals: bootstrap
    over texts, all counterfactuals of one together; n: texts.

    flipped: bool [N counterfactuals], whether the label changed. shift: float [N], by how much the probability of the text's label changed, as a share.
    sources: [N], which text each belongs to, compared as strings.
    """
    return tally.measures(counterfactual_tally(flipped, shift, sources), seed=seed, samples=samples)


def counterfactual_tally(flipped, shift, sources) -> Tally:
    """What `measures` are computed from: an example is a text, which adds (1, share of its counterfactuals that flip, their mean change)."""
    flipped, shift = np.asarray(flipped, float), np.abs(np.asarray(shift, float))
    if not len(flipped):
        raise DataError("no counterfactuals to measure on: expected at least 1, got 0")
    if not len(flipped) == len(shift) == len(sources):
        raise DataError(f"expected as many changes and sources as answers, {len(flipped)}, got {len(shift)} and {len(sources)}")
    _, text, variants = np.unique(np.asarray([str(s) for s in sources]), return_inverse=True, return_counts=True)
    each = np.stack([np.bincount(text, weights=values) / variants for values in (flipped, shift)], 1)  # [texts, 2]

    def mean(column):
        return lambda sums: 100 * tally.ratio(sums[..., column], sums[..., 0])

    figures = (Figure(f"{NAME}/flips", "%", 0.0, len(variants), mean(1)), Figure(f"{NAME}/probability", "points", 0.0, len(variants), mean(2)))
    return tally.of_rows(np.concatenate([np.ones((len(variants), 1)), each], 1), figures)
