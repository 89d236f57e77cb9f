"""SEAT and WEAT: do the vectors of two sets of targets lie differently to two sets of attributes? May et al. 2019, arXiv 1903.10561; Caliskan et al. 2017.

Of targets X, Y (male and female names, say) and attributes A, B (career and family words), as words (WEAT) or in bare sentences (SEAT):

    s(w)         mean over a in A of cos(w, a) - mean over b in B of cos(w, b)
    effect size  d = (mean of s over X - mean of s over Y) / standard deviation of s over X and Y together (n - 1 in the denominator)
    p            of the permutation test, one-sided: the share of the partitions of X and Y into sets of these sizes in which the first set's sum of s is at
                 least the observed one. Exact where there are at most PERMUTATIONS; else of PERMUTATIONS, the observed one and the others drawn at random

What a model's vector of a text is, is not said here (tasks.sentence_vectors): May et al. take the first token's of the last layer, bias-bench the mean over
all tokens. The two do not give the same figures; a table says which. Cosines need no normalisation, so none is done. A text that stands twice in a set counts
once, as in the published code. Two sums are equal where they differ by rounding only (1e-12 of the sum of |s|); the published code compares them bit by bit.

A file, NAME.jsonl by tradition, is one JSON object: {"targ1": {"category": ..., "examples": [texts]}, "targ2", "attr1", "attr2"}.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftdebias.errors import DataError
from peftdebias.files import read_object
from peftdebias.metrics import Measure, tally
from peftdebias.metrics.tally import Figure, Tally

SETS = ("targ1", "targ2", "attr1", "attr2")
PERMUTATIONS = 100_000  # as bias-bench
BLOCK = 2**22  # numbers permuted at once
ROUNDING = 1e-12  # of cosines: targets that lie alike have no effect size, and rounding is no sign of one


@dataclass(frozen=True)
class AssociationTest:
    """name: of the file. sets: the texts of each of SETS, every one once. categories: what the file calls the sets."""

    name: str
    sets: tuple[tuple[str, ...], ...]
    categories: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """Of all four sets, in that order."""
        return [text for texts in self.sets for text in texts]

    @property
    def targets(self) -> int:
        """How many of them are targets."""
        return len(self.sets[0]) + len(self.sets[1])


# ---------------------------------------------------------------- files

def read_tests(path: str | Path) -> list[AssociationTest]:
    """The test of a file, or of every .jsonl of a folder, numbers in their names in order. Raises DataError that names the file."""
    path = Path(path)
    if not path.is_dir():
        return [_read(path)]
    files = sorted(path.glob("*.jsonl"), key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
    if not files:
        raise DataError(f"{path}: expected association tests, files *.jsonl, found none")
    return [_read(file) for file in files]


def _read(path: Path) -> AssociationTest:
    data = read_object(path, DataError)
    if not all(isinstance(data.get(name), dict) for name in SETS):
        raise DataError(f"{path}: expected a JSON object with {', '.join(SETS)}, got {', '.join(data) or 'no keys'}")
    sets = []
    for name in SETS:
        texts = data[name].get("examples")
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts) or not texts:
            raise DataError(f"{path}: expected a list of texts under {name}.examples, got {json.dumps(texts)[:40]}")
        sets.append(tuple(dict.fromkeys(texts)))
    return AssociationTest(path.name.removesuffix(".jsonl"), tuple(sets), tuple(str(data[name].get("category", name)) for name in SETS))


# ---------------------------------------------------------------- figures

def associations(vectors: np.ndarray, test: AssociationTest) -> np.ndarray:
    """s(w) of every target, float64 [targets]; one number where they differ by no more than ROUNDING. vectors: [texts, D], of test.texts in their order, none zero."""
    unit = np.asarray(vectors, float)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    first, second = np.split(unit[test.targets:], [len(test.sets[2])])
    s = unit[:test.targets] @ (first.mean(0) - second.mean(0))  # mean of cosines = cosine part of the mean of unit vectors
    return s if np.ptp(s) > ROUNDING else np.full_like(s, s.mean())


def p_value(s: np.ndarray, first: int, *, seed: int = 0) -> float:
    """p of the one-sided permutation test, in (0, 1]."""
    least = s[:first].sum() - 1e-12 * np.abs(s).sum()
    if math.comb(len(s), first) <= PERMUTATIONS:
        chosen = np.array(list(itertools.combinations(range(len(s)), first)))
        return float((s[chosen].sum(1) >= least).mean())
    return (1 + sum(int((sums >= least).sum()) for sums in _permuted(s, first, seed))) / PERMUTATIONS


def _permuted(s: np.ndarray, first: int, seed: int) -> Iterator[np.ndarray]:
    """Sums of `first` of s drawn without replacement, PERMUTATIONS - 1 times in blocks."""
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // len(s))
    for start in range(0, PERMUTATIONS - 1, block):
        rows = np.repeat(s[None], min(block, PERMUTATIONS - 1 - start), 0)
        yield random.permuted(rows, axis=1, out=rows)[:, :first].sum(1)


def measures(test: AssociationTest, s: np.ndarray, *, name: str = "seat", seed: int = 0, samples: int = 1000) -> list[Measure]:
    """Effect size and p of one test.

    Effect size: 0 means that the two sets of targets lie alike to the attributes; above 0, the first lies nearer to the first. Range: about [-2, 2], ideal 0.
    p: small where partitions at random seldom lie as far apart in that direction; a large one (d below 0) is no sign of fairness. Range (0, 1]; no interval. n: targets.
    Interval of d: bootstrap over the words that targets are made of (`stems`), within each set, attributes as they are; none where a set has one word.

    s: what `associations` gives.
    """
    first = len(test.sets[0])
    kept = seat_tally([test.name] * len(s), [0] * first + [1] * (len(s) - first), stems(*test.sets[:2]), s, name=name)
    (found,) = tally.measures(kept, seed=seed, samples=samples)
    return [found, Measure(f"{name}/{test.name}/p", p_value(s, first, seed=seed), "1", None, None, None, len(s))]


def stems(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """What each target is made of, as one string: its words that no target of the other set has. Of "This is Amy." among sentences with men's names: "amy".

    Sentences with one stem differ in their template alone and are near each other, so an interval that takes them for independent is too narrow.
    """
    words = [[frozenset(re.findall(r"\w+", text.lower())) for text in texts] for texts in (first, second)]
    other = [frozenset().union(*side) for side in words[::-1]]
    return [" ".join(sorted(of - other[side])) or text for side, texts in enumerate((first, second)) for text, of in zip(texts, words[side])]


def seat_tally(tests, sides, clusters, s, *, name: str = "seat") -> Tally:
    """The effect sizes of some tests as functions of sums: an example is a cluster (a stem of one side of one test), which adds (targets, sum of s, sum of s^2); each
    side of each test is a stratum, since sets as large as each other were chosen.

    tests, sides, clusters, s: of each target [N]; sides are 0 (X) or 1 (Y). s is centred and scaled by test, which d does not see and rounding does.
    """
    tests, sides, s = np.asarray(tests, str), np.asarray(sides, int), np.asarray(s, float)
    names, test = np.unique(tests, return_inverse=True)
    stratum = 2 * test + sides
    _, members, cluster = np.unique([f"{own}\t{stem}" for own, stem in zip(stratum, clusters)], return_index=True, return_inverse=True)
    adds, figures = np.zeros((cluster.max() + 1, len(names), 2, 3)), []
    for i, one in enumerate(names):
        own = test == i
        scaled = s[own] - s[own].mean()
        scaled = scaled / (np.abs(scaled).max() or 1.0)
        np.add.at(adds[:, i], (cluster[own], sides[own]), np.stack([np.ones(len(scaled)), scaled, scaled**2], 1))
        sizes = np.bincount(stratum[members], minlength=2 * len(names))[2 * i:2 * i + 2]  # words of each side
        figures.append(Figure(f"{name}/{one}/effect-size", "1", 0.0, int(own.sum()), lambda sums, i=i: _effect(sums.reshape(*sums.shape[:-1], len(names), 2, 3)[..., i, :, :]),
                              units=int(sizes.sum()) if sizes.min() > 1 else 1))
    return Tally(np.arange(len(adds)), len(adds), adds.reshape(len(adds), -1), tuple(figures), stratum[members])


def _effect(sums: np.ndarray) -> np.ndarray:
    """d of [..., 2 sides, (targets, sum of s, sum of s^2)] -> [...]; NaN where a side is empty or all s are equal."""
    means = tally.ratio(sums[..., 1], sums[..., 0])
    n, total, squares = np.moveaxis(sums.sum(-2), -1, 0)
    variance = tally.ratio(squares - tally.ratio(total**2, n), n - 1)
    variance = np.where(variance > 1e-12, variance, np.nan)
    return (means[..., 0] - means[..., 1]) / np.sqrt(variance)
