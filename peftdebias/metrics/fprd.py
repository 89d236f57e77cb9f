"""FPRD: how much more often harmless texts are taken for hateful when they mention one identity term rather than another.

    FPR      share of the negatives (texts without the positive label) that are predicted positive
    FPR(z)   the same among the negatives that mention the term z
    FPRD     sum over terms of |FPR(z) - FPR|                                                  as shares, not %

Source: Dixon et al. 2018, "Measuring and Mitigating Unintended Bias in Text Classification" (false positive equality difference), as the
PEFTDebias paper uses it. A text mentions a term where it has it as a whole word, in any case; "African American" mentions `african`,
`american` and `african american`. A term that no negative mentions has no FPR: it is left out and named. More terms make a larger sum, so
figures compare on the same terms only.

`fprd/script` is what the paper's released script computes: false positives over all texts (that mention z), hateful ones included, in
place of the negatives. It is smaller where hate is frequent, and no false positive rate. Two departures, so that both figures are of the same
mentions and terms: the script takes a term's letters anywhere in a text, in small letters alone, for a mention, and adds the overall share
for every term that hateful texts alone mention.

FPR(z) of a rare term is noisy and |FPR(z) - FPR| never negative, so the sum is positive for a fair model too. Its floor stands beside it
(`fprd/shuffled`): the FPRD after the predictions are shuffled among the negatives, so that no term has anything to do with them.
"""

import csv
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftdebias.axes import word_class
from peftdebias.errors import DataError
from peftdebias.lines import Lines, place
from peftdebias.metrics import Measure, bootstrap, tally
from peftdebias.metrics.classification import aligned
from peftdebias.metrics.tally import Figure, Tally

HEADERS = ("term", "terms", "identity")
TEMPLATES = "fprd-iptts"  # what the figures are called on texts that templates made, which hang together: their clusters are `frames`


@dataclass(frozen=True)
class FPRD:
    """See `fprd`. per_term: FPR(z) in %; negatives: how many mention each term, terms left out included."""

    per_term: dict[str, float]
    negatives: dict[str, int]
    left_out: list[str]
    measures: list[Measure]


def read_terms(path) -> list[str]:
    """One term a line, in lower case, each once; of a csv's line its first field; blank lines and a header (term, terms, identity) are skipped."""
    comma, found = Path(path).name.lower().removesuffix(".gz").endswith(".csv"), []
    source = Lines(path)
    try:
        for line in source:
            try:
                row = next(csv.reader([line], strict=True), []) if comma else [line]
            except csv.Error as error:
                raise DataError(f"{place(path, source.count)}: not csv: {error}") from None
            term = " ".join(row[0].lower().split()) if row else ""
            if term and not (source.count == 1 and term in HEADERS):
                found.append(term)
    finally:
        source.close()
    if not found:
        raise DataError(f"{path}: expected identity terms, one a line, found none")
    return list(dict.fromkeys(found))


def mentions(texts: Sequence[str], terms: Sequence[str]) -> np.ndarray:
    """bool [N texts, Z terms]: which texts mention which terms, as whole words, in any case. Words of a term may be parted by any white space."""
    inside = word_class()
    word = re.compile(f"[{inside}]+")
    single = {term: z for z, term in enumerate(terms) if word.fullmatch(term)}
    several = []  # terms that are no single run of word characters, each with a part of it that a text must have
    for z, term in enumerate(terms):
        if term not in single:
            pattern = r"\s+".join(map(re.escape, term.split()))
            several.append((z, term.split()[0], re.compile(f"(?<![{inside}]){pattern}(?![{inside}])")))
    found = np.zeros((len(texts), len(terms)), bool)
    for i, text in enumerate(texts):
        text = text.lower()
        for match in word.findall(text):
            if match in single:
                found[i, single[match]] = True
        for z, part, pattern in several:
            if part in text and pattern.search(text):
                found[i, z] = True
    return found


def frames(texts: Sequence[str], terms: Sequence[str]) -> list[str]:
    """The texts in lower case with their terms blanked: those that one template made are equal."""
    inside = word_class()
    words = "|".join(r"\s+".join(map(re.escape, term.split())) for term in sorted(terms, key=len, reverse=True))
    term = re.compile(f"(?<![{inside}])(?:{words})(?![{inside}])")
    return [term.sub("_", text.lower()) for text in texts]


def fprd(predicted, labels, positive, mentioned, terms: Sequence[str], *, clusters=None, name: str = "fprd", seed: int = 0, samples: int = 1000, shuffles: int = 1000) -> FPRD:
    """False positive rate differences over identity terms.

    0 means that negatives are taken for positive equally often whatever term they mention. Range [0, number of terms], ideal 0, but read it
    against its floor. FPR: range [0, 100] %, ideal 0. `name` begins the measures' names.

    Intervals: bootstrap over examples, or over whole clusters of them; those of the sums are shifted as tally.py says. A term without negatives in a resample counts
    there as the mean of the others. The floor shuffles all predictions, whatever the clusters.

    predicted, labels: one value an example, compared as strings. mentioned: bool [N, Z], from `mentions`. clusters [N]: what hangs together, as the `frames` of texts
    made from templates; None: nothing does.
    """
    counted = fprd_tally(predicted, labels, positive, mentioned, terms, clusters=clusters, name=name)
    kept = counted.kept
    found = tally.measures(counted.tally, seed=seed, samples=samples)
    floor = _floor(counted, found[0], f"{name}/shuffled", seed, shuffles)
    by_name = {m.name: m for m in found}
    return FPRD({z: by_name[f"{name}/term/{z}"].value for z in kept}, counted.negatives, [z for z in terms if z not in kept], [found[0], floor, *found[1:]])


@dataclass(frozen=True)
class Counted:
    """A tally of FPRD's figures; kept: the terms with negatives. patterns: of each kind of negative, which kept terms it mentions [P, Z'];
    sizes [P]: how many negatives are of it; positives: how many of all negatives are predicted positive."""

    tally: Tally
    kept: list[str]
    negatives: dict[str, int]
    patterns: np.ndarray
    sizes: np.ndarray
    positives: int


def fprd_tally(predicted, labels, positive, mentioned, terms: Sequence[str], *, clusters=None, name: str = "fprd") -> Counted:
    """What `fprd` is computed from. Sums are laid out as (1, negative, false positive) of a text, then the same for the texts that mention each term."""
    predicted, labels = aligned(predicted=predicted, labels=labels)
    mentioned, positive = np.asarray(mentioned, bool), str(positive)
    if mentioned.shape != (len(labels), len(terms)):
        raise DataError(f"expected mentions of {len(terms)} terms in {len(labels)} texts, got {mentioned.shape[1]} in {mentioned.shape[0]}")
    negative = labels != positive
    wrong = negative & (predicted == positive)
    if not negative.any():
        raise DataError(f"expected texts without the label '{positive}', found none")
    count = mentioned[negative].sum(0)
    kept = np.flatnonzero(count)
    if not len(kept):
        shown = ", ".join(terms[:5]) + (", ..." if len(terms) > 5 else "")
        raise DataError(f"expected texts without the label '{positive}' that mention an identity term, found none with any of {len(terms)}: {shown}")
    own = np.stack([np.ones(len(labels)), negative, wrong], 1)  # [N, 3]
    codes = np.concatenate([own, mentioned[:, kept]], 1)  # a kind: what the text is, and what it mentions
    kinds = tally.of_rows(codes, ())
    adds = (kinds.adds[:, :3, None] * np.concatenate([np.ones((kinds.kinds, 1)), kinds.adds[:, 3:]], 1)[:, None]).reshape(kinds.kinds, -1)  # [K, 3 (1 + Z')]

    def layout(sums):  # [..., F] -> ones, negatives, false positives, each [..., 1 + Z']
        return np.moveaxis(sums.reshape(*sums.shape[:-1], 3, 1 + len(kept)), -2, 0)

    def summed(rates):  # [..., 1 + Z'] -> [...]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a resample without any term
            return np.nanmean(np.abs(rates[..., 1:] - rates[..., :1]), axis=-1) * len(kept)

    def value(sums):
        _, negatives, false = layout(sums)
        return summed(tally.ratio(false, negatives))

    def script(sums):
        ones, _, false = layout(sums)
        return summed(tally.ratio(false, ones))

    def rate(place):
        return lambda sums: 100 * tally.ratio(layout(sums)[2][..., place], layout(sums)[1][..., place])

    _, of = np.unique(range(len(labels)) if clusters is None else clusters, return_inverse=True)

    def units(inside):  # how many clusters have such texts
        return int(np.count_nonzero(np.bincount(of[inside])))

    n = int(negative.sum())
    figures = (Figure(name, "1", 0.0, n, value, lifted=True, most=len(kept), units=units(negative)),
               Figure(f"{name}/script", "1", 0.0, len(labels), script, lifted=True, most=len(kept)),
               Figure(f"{name}/fpr", "%", 0.0, n, rate(0), units=units(negative)),
               *(Figure(f"{name}/term/{terms[z]}", "%", 0.0, int(count[z]), rate(i), units=units(negative & mentioned[:, z])) for i, z in enumerate(kept, 1)))
    kind, rows = kinds.kind, adds
    if clusters is not None:
        order = np.argsort(of, kind="stable")
        whole = tally.of_rows(np.add.reduceat(adds[kind[order]], np.flatnonzero(np.diff(of[order], prepend=-1)), axis=0), ())
        kind, rows = whole.kind, whole.adds
    of_negatives = tally.of_rows(mentioned[negative][:, kept].astype(float), ())
    return Counted(Tally(kind, len(rows), rows, figures), [terms[z] for z in kept], {term: int(c) for term, c in zip(terms, count)},
                   of_negatives.adds, np.bincount(of_negatives.kind), int(wrong.sum()))


def _floor(counted: Counted, of: Measure, name: str, seed: int, shuffles: int) -> Measure:
    """Predictions shuffled among the negatives. How many positives fall to each kind of text is multivariate hypergeometric, so no text need be moved."""
    wrong = np.random.default_rng([seed, 1]).multivariate_hypergeometric(counted.sizes, counted.positives, size=shuffles, method="marginals")  # [shuffles, P]
    rates = tally.ratio(wrong @ counted.patterns, counted.sizes @ counted.patterns)
    shuffled = np.abs(rates - counted.positives / counted.sizes.sum()).sum(-1)
    return Measure(name, float(shuffled.mean()), of.unit, None, *bootstrap.percentile(shuffled), of.n)
