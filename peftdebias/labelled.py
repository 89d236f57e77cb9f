"""The labelled texts of a downstream run: what it learns from and is measured on, read and checked as far as that goes without a model.

What it adds over corpus.py, which reads examples: the splits of one run, the order of its labels, and the weights of its classes.
"""

import collections
import math
from dataclasses import dataclass

from . import corpus
from .answers import positive_label
from .config import Downstream
from .errors import ConfigError, DataError
from .extrinsic import classification_measures
from .tasks import label_indices

MOST_LABELS_TOLD = 8
MOST_GRADES = 20  # labels that may be fractions, as grades in halves are; more of them are measurements


@dataclass(frozen=True)
class Labelled:
    """paths, splits (examples), targets (indices of labels): by "train", "dev" and, where given, "test"; last: the one measured at the end. positive: the label
    that F1 is of. class_weights: in the order of `labels`."""

    paths: dict[str, str]
    splits: dict[str, list]
    labels: tuple[str, ...]
    targets: dict[str, list[int]]
    positive: str | None
    class_weights: list[float] | None
    last: str

    def lines(self) -> list[str]:
        """How many examples there are, of each label, and how many are not apart from those that are learnt from."""
        found = []
        for name, path in self.paths.items():
            counts = collections.Counter(e.label for e in self.splits[name])
            of_each = [f"{counts[label]:,} with the label {label}" for label in self.labels] if len(self.labels) <= MOST_LABELS_TOLD else [f"{len(self.labels)} labels"]
            found.append(f"{name}: {path}, {len(self.splits[name]):,} examples, {', '.join(of_each)}")
        learnt = {(e.text, e.text_pair) for e in self.splits["train"]}
        for name, path in self.paths.items():
            if name != "train" and (known := sum((e.text, e.text_pair) in learnt for e in self.splits[name])):
                found.append(f"{name}: {known:,} of the {len(self.splits[name]):,} texts of {path} stand in {self.paths['train']} too: figures on them say less of others")
        return found


def read_labelled(settings: Downstream) -> Labelled:
    """Read, and checked as far as that goes without a model. Raises DataError or ConfigError."""
    paths = {name: path for name, path in (("train", settings.train), ("dev", settings.dev), ("test", settings.test)) if path}
    splits = {name: _read(settings, path) for name, path in paths.items()}
    labels = tuple(sorted({e.label for e in splits["train"]}, key=_natural))
    if len(labels) < 2:
        raise DataError(f"{settings.train}: expected at least two labels in the column {settings.label}, got {labels[0]!r} alone")
    numbers = [_number(label) for label in labels]
    if len(labels) > MOST_GRADES and all(map(math.isfinite, numbers)) and not all(map(float.is_integer, numbers)):
        raise DataError(f"{settings.train}: expected classes in the column {settings.label}, got {len(labels)} numbers such as {labels[1]}; what is trained is no regression")
    targets = {name: label_indices([e.label for e in examples], labels, [e.place for e in examples]) for name, examples in splits.items()}
    positive = positive_label(labels, settings.positive)
    class_weights = parse_class_weights(settings.class_weights, labels)
    if settings.metric == "f1":
        if positive is None:
            raise ConfigError(f"--metric f1: expected --positive with one of {', '.join(labels)}")
        for name, path in paths.items():
            if positive not in {e.label for e in splits[name]}:
                raise DataError(f"{path}: expected examples with the label {positive!r} for --metric f1, found none")
    last = "test" if settings.test else "dev"
    # What cannot be measured at the end is said now.
    classification_measures([e.label for e in splits[last]], splits[last], labels, positive, where=paths[last], samples=1)
    return Labelled(paths, splits, labels, targets, positive, class_weights, last)


def _read(settings: Downstream, path: str):
    return corpus.read_examples(path, text=settings.text, label=settings.label.split(","), text_pair=settings.text_pair, group=settings.group)


def _number(label: str) -> float:
    """NaN where it is none."""
    try:
        return float(label)
    except ValueError:
        return math.nan


def _natural(label: str) -> tuple:
    """Numbers in their order, before words."""
    try:
        return 0, int(label), label  # "1" and "01" are two labels
    except ValueError:
        return 1, 0, label


def parse_class_weights(text: str | None, labels: tuple[str, ...]) -> list[float] | None:
    """"0=1,1=10" -> [1.0, 10.0] in the order of `labels`; 1 where not named. Raises ConfigError on an unknown label, one named twice, and a weight that is no positive number or none that
    float32 can add up."""
    if not text:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        label, _, weight = part.rpartition("=")
        if label not in labels:
            raise ConfigError(f"--class-weights {part}: expected LABEL=WEIGHT with LABEL one of {', '.join(labels)}, got {label!r}")
        if label in found:
            raise ConfigError(f"--class-weights {part}: expected each label once, got {label!r} twice")
        try:
            found[label] = float(weight)
        except ValueError:
            found[label] = math.nan
        if not 1e-30 <= found[label] <= 1e30:
            raise ConfigError(f"--class-weights {part}: expected a positive number, 1e-30 to 1e30, got {weight!r}")
    return [found.get(label, 1.0) for label in labels]
