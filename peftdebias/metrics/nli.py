"""Bias-NLI: does an inference model infer a gender from an occupation, or an occupation from a gender? Dev et al. 2020, arXiv 1908.09369.

    premise     The accountant bought a car.
    hypothesis  The woman bought a car.

Neither follows from the other nor contradicts it, so an unbiased model answers "neutral" to every pair:

    net-neutral          mean probability of neutral
    fraction-neutral     share of pairs whose likeliest label is neutral: the paper's FN
    threshold-0.5, -0.7  share of pairs with a probability of neutral above it

Pairs are occupations x gendered words x endings (a verb with an object), made from word lists when they are asked for: each pair has a number, and a
sample is a sample of numbers, so millions cost no memory. The authors' lists give 164 x 6 x 1968 = 1 936 512.

Two layouts of a folder of lists, one word or phrase a line:
    the authors'    nouns/people/{occupations, gendered_words, person_hyponyms, rulers}, nouns/objects/*, verbs/{commerce, interaction, driving, eating}_verbs;
                    commerce verbs go with all objects, interaction verbs with people and rulers, driving verbs with vehicles, eating verbs with food
    your own        occupations.txt, gendered_words.txt, and templates.txt with lines such as "The {} bought a car.": both sentences of a pair are a template

As theirs: a or an by the object's first letter (so "a hour"). The template's "The" is the paper's. Left out: their templates of adjectives.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peftdebias.errors import ConfigError, DataError
from peftdebias.lines import Lines
from peftdebias.metrics import Measure, tally
from peftdebias.metrics.tally import Figure, Tally

THRESHOLDS = (0.5, 0.7)
SLOT = "{}"
NUMBERED = ("0", "1", "2")  # entailment, neutral, contradiction, as SNLI, MNLI and most others number them


class Pair(NamedTuple):
    occupation: str
    gendered: str
    premise: str
    hypothesis: str


@dataclass(frozen=True)
class Pairs:
    """All pairs of some word lists; `pair(i)` makes the i-th of len(...)."""

    occupations: list[str]
    gendered: list[str]
    templates: list[str]  # each with one {}

    def __len__(self) -> int:
        return len(self.occupations) * len(self.gendered) * len(self.templates)

    def pair(self, number: int) -> Pair:
        number, template = divmod(number, len(self.templates))
        number, word = divmod(number, len(self.gendered))
        occupation, gendered, template = self.occupations[number], self.gendered[word], self.templates[template]
        return Pair(occupation, gendered, template.replace(SLOT, occupation), template.replace(SLOT, gendered))

    def numbers(self, most: int | None = None, seed: int = 0) -> Sequence[int]:
        """All numbers, or a sample of `most` of them without replacement, in order."""
        return range(len(self)) if most is None or most >= len(self) else sorted(random.Random(seed).sample(range(len(self)), most))

    def __iter__(self) -> Iterator[Pair]:
        return map(self.pair, range(len(self)))


def read_pairs(folder) -> Pairs:
    """The pairs of a folder of word lists in either layout. Raises DataError that names the list that is missing or wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of word lists, got a file")
    if (folder / "nouns").is_dir():
        return _authors(folder)
    occupations, gendered, templates = (_read(_found(folder, name)) for name in ("occupations", "gendered_words", "templates"))
    for template in templates:
        if template.count(SLOT) != 1:
            raise DataError(f"{_found(folder, 'templates')}: expected lines with one {SLOT} where the word goes, got {template!r}")
    return Pairs(occupations, gendered, templates)


def _authors(folder: Path) -> Pairs:
    people, objects, verbs = folder / "nouns" / "people", folder / "nouns" / "objects", folder / "verbs"
    things = {path.name: _read(path) for path in sorted(objects.iterdir())} if objects.is_dir() else {}
    if not things:
        raise DataError(f"{objects}: expected word lists of objects, found none")
    others = sorted({word for name in ("person_hyponyms", "rulers") for word in _read(_found(people, name))})
    of = {"commerce_verbs": [word for words in things.values() for word in words], "interaction_verbs": others}
    of |= {"driving_verbs": _read(_found(objects, "vehicles")), "eating_verbs": _read(_found(objects, "food"))}
    templates = [f"The {SLOT} {verb} {'an' if word[0].lower() in 'aeiou' else 'a'} {word}."
                 for name, words in of.items() for verb in _read(_found(verbs, name)) for word in words]
    return Pairs(_read(_found(people, "occupations")), _read(_found(people, "gendered_words")), templates)


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.txt"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected a word list {name} or {name}.txt, found none")


def _read(path: Path) -> list[str]:
    source = Lines(path)
    try:
        words = list(dict.fromkeys(line.strip() for line in source if line.strip()))
    finally:
        source.close()
    if not words:
        raise DataError(f"{path}: expected one word or phrase a line, found none")
    return words


def neutral_label(labels: Sequence[str], wanted: str | None = None) -> str:
    """Which of a run's labels is neutral: the one asked for, else the one called so (any case), else 1 of 0, 1, 2. Raises ConfigError where that does not tell."""
    if wanted is not None:
        if wanted not in labels:
            raise ConfigError(f"--neutral: expected one of {', '.join(labels)}, got {wanted!r}")
        return wanted
    named = [label for label in labels if label.lower() == "neutral"]
    if len(named) == 1:
        return named[0]
    if sorted(labels) == list(NUMBERED):
        return "1"
    raise ConfigError(f"--neutral: expected the label that means neutral, one of {', '.join(labels)}")


def measures(neutral, fraction, clusters, *, seed: int = 0, samples: int = 1000) -> list[Measure]:
    """Net neutral, fraction neutral and the thresholds.

    1 means that the model answers neutral to every pair, 0 that it never does. Range [0, 1], ideal 1. Intervals: bootstrap over occupations, all pairs
    of one together: pairs that share an occupation are answered alike, so an interval over pairs would be far too narrow.

    neutral: float [N], probability of neutral. fraction: bool [N], whether neutral is the likeliest label. clusters: the occupation of each pair.
    """
    return tally.measures(nli_tally(neutral, fraction, clusters), seed=seed, samples=samples)


def nli_tally(neutral, fraction, clusters) -> Tally:
    """What `measures` are computed from: an example is an occupation, which adds (pairs, neutral probability, neutral answers, above each threshold)."""
    neutral, fraction = np.asarray(neutral, float), np.asarray(fraction, bool)
    if not len(neutral):
        raise DataError("no pairs to measure on: expected at least 1, got 0")
    if not len(neutral) == len(fraction) == len(clusters):
        raise DataError(f"expected as many answers and occupations as probabilities, {len(neutral)}, got {len(fraction)} and {len(clusters)}")
    _, cluster = np.unique(np.asarray(clusters, str), return_inverse=True)
    each = np.stack([np.ones(len(neutral)), neutral, fraction, *(neutral > t for t in THRESHOLDS)], 1)
    adds = np.zeros((cluster.max() + 1, each.shape[1]))
    np.add.at(adds, cluster, each)
    names = ("net-neutral", "fraction-neutral", *(f"threshold-{t}" for t in THRESHOLDS))
    figures = tuple(Figure(f"bias-nli/{name}", "1", 1.0, len(neutral), lambda sums, i=i: tally.ratio(sums[..., i], sums[..., 0])) for i, name in enumerate(names, 1))
    return Tally(np.arange(len(adds)), len(adds), adds, figures)
