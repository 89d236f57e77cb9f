"""Compare two systems on the same examples, or over the same seeds: `compare`, for the command line and the Python API.

Two files of `evaluate --examples`: every figure that both hold, the difference second - first with its 95 % interval from the paired bootstrap, and a
p-value (of accuracy: McNemar's). Files about different examples are refused. Files of `evaluate --json`, one a seed: mean and spread, and with
another system's files the difference of the means, paired by seed.

What it adds over metrics/compare.py: reading the files, and what to do with each kind of row. FIGURES lists what can be compared. Identity terms one
by one are left out: with 50 differences in a table some look significant by chance. StereoSet is resampled by target term, SEAT by the word that targets are
made of, the others by example.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from .config import Compare
from .errors import ConfigError, DataError, short
from .lines import Lines, place
from .metrics import bare_name, nli
from .metrics.compare import Spread, classification_tally, mcnemar, mean_tally, over_seeds, seed_difference
from .metrics.crows_pairs import crows_pairs_tally
from .metrics.counterfactual import counterfactual_tally
from .metrics.fprd import TEMPLATES, fprd_tally, frames
from .metrics.seat import SETS, seat_tally
from .metrics.stereoset import LABELS, stereoset_tally
from .metrics.tally import Difference, Tally, differences
from .options import expect
from .outputs import keep_apart, writing

ANSWERS = {"predicted", "probabilities", "predicted_counterfactual", "probabilities_counterfactual", "more", "less", "nll", "scores", "association"}
"""What a system says; everything else in a row is the example."""
NOT_THE_EXAMPLE = ANSWERS | {"measure", "place", "positive", "neutral"}


@dataclasses.dataclass
class Comparison:
    """differences: of two systems, in the order of the first file. spreads: over the seeds of one. notes: lines for people."""

    differences: list[Difference]
    spreads: list[Spread]
    notes: list[str]


@dataclasses.dataclass
class Rows:
    """The rows of one measure in one file. lines: where each stands."""

    path: str
    name: str
    rows: list[dict]
    lines: list[int]

    def column(self, name: str) -> list:
        kind, what = {"predicted": (str, "a label as text"), "label": (str, "a label as text"), "probabilities": (dict, "an object")}.get(name.split("_")[0], (object, ""))
        for row, line in zip(self.rows, self.lines):
            if name not in row:
                raise DataError(f"{place(self.path, line)}: expected {name!r} in a row of {self.name}, got {', '.join(row)}")
            if not isinstance(row[name], kind):
                raise DataError(f"{place(self.path, line)}: {name}: expected {what}, got {short(row[name])}")
        return [row[name] for row in self.rows]

    def one(self, name: str):
        """The value that all rows share."""
        found = self.column(name)
        for value, line in zip(found, self.lines):
            if value != found[0]:
                raise DataError(f"{place(self.path, line)}: expected {name} to be {found[0]!r} as above, got {value!r}")
        return found[0]


def compare(settings: Compare) -> Comparison:
    """What settings ask for; writes settings.json. Raises PeftDebiasError on files that cannot be compared."""
    expect(Compare, settings)
    if settings.against and not settings.seeds:
        raise ConfigError("--against: expected --seeds beside it; two --examples files are compared without")
    for files in (settings.files, settings.against) if settings.seeds else ():
        if twice := next((path for i, path in enumerate(files) if any(os.path.realpath(path) == os.path.realpath(other) for other in files[:i])), None):
            raise ConfigError(f"{twice}: given twice; expected each file once")
    if not settings.seeds and len(settings.files) != 2:
        raise ConfigError(f"expected two files of `evaluate --examples`, got {len(settings.files)} (--seeds takes --json files, one a seed)")
    keep_apart({"--json": settings.json}, [*settings.files, *settings.against])
    with writing(settings.json) if settings.json else contextlib.nullcontext() as file:
        found = _seeds(settings) if settings.seeds else compare_examples(*settings.files, seed=settings.seed, samples=settings.samples)
        if file:
            rows = {"differences": [d.as_json() for d in found.differences], "spreads": [s.as_json() for s in found.spreads]}
            file.write(json.dumps(rows, indent=2) + "\n")
    return found


# ---------------------------------------------------------------- two systems on the same examples

def compare_examples(first: str, second: str, *, seed: int = 0, samples: int = 1000, rows: dict[str, Rows] | None = None) -> Comparison:
    """Every measure that both files of `evaluate --examples` hold. rows: what `read_rows` gives of the first, where that is known."""
    one, other = read_rows(first) if rows is None else rows, read_rows(second)
    common = [name for name in one if name in other]
    if not common:
        raise DataError(f"{second}: expected rows of what {first} has, {', '.join(one)}, got {', '.join(other)}")
    found, notes = [], []
    for path, only in ((first, [n for n in one if n not in other]), (second, [n for n in other if n not in one])):
        if only:
            notes.append(f"{path}: not compared, only there: {', '.join(only)}")
    for name in common:
        a, b = one[name], other[name]
        _same_examples(a, b)
        prefix, tallies, suffix = _kind(name)
        if tallies is None:
            notes.append(f"not compared, has no comparison by example: {name}")
            continue
        try:
            both = tallies(a, b)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{first} or {second}: {name}: expected rows as `evaluate --examples` writes them, got others ({type(error).__name__}: {error})") from None
        except DataError as error:
            raise DataError(str(error) if str(error).startswith((f"{first}:", f"{second}:")) else f"{first} or {second}: {name}: {error}") from None
        compared, without = differences(*both, seed=seed, samples=samples)
        if tallies is _classification:
            compared = [_with_mcnemar(d, a, b) if d.name == "accuracy" else d for d in compared]
        compared = [d for d in compared if "/term/" not in d.name]
        found += [dataclasses.replace(d, name=prefix + d.name + suffix) for d in compared]
        notes += [f"no difference without an interval, so none: {prefix}{figure}{suffix}" for figure in without if "/term/" not in figure]
    return Comparison(found, [], notes)


def read_rows(path: str) -> dict[str, Rows]:
    """measure -> its rows, as `evaluate --examples` writes them."""
    found: dict[str, Rows] = {}
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file")
    source = Lines(path)
    try:
        for line in source:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("measure"), str):
                raise DataError(f"{place(path, source.count)}: expected a row of `evaluate --examples`, an object with 'measure', got {line[:40]!r}")
            rows = found.setdefault(row["measure"], Rows(str(path), row["measure"], [], []))
            rows.rows.append(row)
            rows.lines.append(source.count)
    finally:
        source.close()
    if not found:
        raise DataError(f"{path}: expected rows of `evaluate --examples`, found none")
    return found


def _same_examples(a: Rows, b: Rows) -> None:
    """Raises DataError that names the first example in which the files differ."""
    if len(a.rows) != len(b.rows):
        raise DataError(f"{b.path}: expected the {len(a.rows)} examples of {a.name} that {a.path} has, got {len(b.rows)}")
    for row, other, line, there in zip(a.rows, b.rows, a.lines, b.lines):
        for key in dict.fromkeys([*row, *other]):
            if key not in NOT_THE_EXAMPLE and row.get(key) != other.get(key):
                raise DataError(f"{place(b.path, there)}: expected the example of {place(a.path, line)}, got another {key}: "
                                f"{short(other.get(key))} instead of {short(row.get(key))}")


def _classes(*sides: Rows) -> list[str]:
    """The labels that either system knows."""
    return list(dict.fromkeys(label for rows in sides for label in rows.column("probabilities")[0]))


def _classification(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    classes, groups = _classes(a, b), a.column("group")
    positive = a.one("positive")
    groups = None if all(group is None for group in groups) else groups
    return tuple(classification_tally(rows.column("predicted"), rows.column("label"), groups, classes=classes, positive=positive) for rows in (a, b))


def _with_mcnemar(difference: Difference, a: Rows, b: Rows) -> Difference:
    right = [[p == label for p, label in zip(rows.column("predicted"), rows.column("label"))] for rows in (a, b)]
    found = mcnemar(*right)
    return dataclasses.replace(difference, p=found.p, test=f"{found.test} ({found.only_first} : {found.only_second})")


def _fprd(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    terms = sorted({term for mentioned in a.column("terms") for term in mentioned})
    index = {term: z for z, term in enumerate(terms)}
    mentioned = [[False] * len(terms) for _ in a.rows]
    for row, found in zip(mentioned, a.column("terms")):
        for term in found:
            row[index[term]] = True
    _same("positive", a, b)
    name = bare_name(a.name).split("/")[-1]
    clusters = frames(a.column("text"), terms) if name == TEMPLATES else None
    return tuple(fprd_tally(rows.column("predicted"), rows.column("label"), rows.one("positive"), mentioned, terms, clusters=clusters, name=name).tally for rows in (a, b))


def _same(what: str, a: Rows, b: Rows) -> None:
    """Raises DataError where two systems were measured by another label."""
    if a.one(what) != b.one(what):
        raise DataError(f"{b.path}: {b.name}: expected {what} {a.one(what)!r}, as {a.path} has it, got {b.one(what)!r}")


def _nli(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    if {label for row in (*a.column("probabilities"), *b.column("probabilities")) for label in row} == set(a.column("probabilities")[0]):  # else two models call it differently
        _same("neutral", a, b)

    def one(rows: Rows) -> Tally:
        neutral = rows.one("neutral")
        return nli.nli_tally([p[neutral] for p in rows.column("probabilities")], [p == neutral for p in rows.column("predicted")], rows.column("occupation"))
    return one(a), one(b)


def _counterfactual(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    def one(rows: Rows) -> Tally:
        first, second = rows.column("predicted"), rows.column("predicted_counterfactual")
        before, after = rows.column("probabilities"), rows.column("probabilities_counterfactual")
        return counterfactual_tally([x != y for x, y in zip(first, second)], [q[x] - p[x] for x, p, q in zip(first, before, after)], rows.column("source"))
    return one(a), one(b)


def _crows_pairs(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    name = "/".join(bare_name(a.name).split("/")[-2:])
    return tuple(crows_pairs_tally(name, rows.column("more"), rows.column("less"), rows.column("bias_type")) for rows in (a, b))


def _stereoset(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    def one(rows: Rows) -> Tally:
        return stereoset_tally(rows.column("target"), rows.column("domain"), [[row[label] for label in LABELS] for row in rows.column("scores")])
    return one(a), one(b)


def _seat(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    return tuple(seat_tally(rows.column("test"), [SETS.index(name) for name in rows.column("set")], rows.column("stem"), rows.column("association"),
                            name=bare_name(a.name).split("/")[-1]) for rows in (a, b))


def _loss(a: Rows, b: Rows) -> tuple[Tally, Tally]:
    return tuple(mean_tally("mlm-loss", rows.column("nll"), rows.column("tokens"), unit="nats", ideal=None) for rows in (a, b))


FIGURES: dict[str, Callable[[Rows, Rows], tuple[Tally, Tally]]] = {
    "classification": _classification,
    "fprd": _fprd,
    TEMPLATES: _fprd,
    "bias-nli": _nli,
    "counterfactual": _counterfactual,
    "crows-pairs/nangia": _crows_pairs,
    "crows-pairs/bias-bench": _crows_pairs,
    "stereoset": _stereoset,
    "seat": _seat,
    "seat-mean": _seat,
    "mlm-loss": _loss,
}
"""The rows of `evaluate --examples`, by their measure -> the tallies of two systems."""


def _kind(name: str) -> tuple[str, Callable | None, str]:
    """("only-gender/", what compares, " (b.txt)") of "only-gender/fprd (b.txt)", as `evaluate` names a measure of a module alone, and on one file of several."""
    bare = bare_name(name)
    prefix, _, rest = bare.partition("/")
    if bare not in FIGURES and rest in FIGURES:
        return prefix + "/", FIGURES[rest], name.removeprefix(bare)
    return "", FIGURES.get(bare), name.removeprefix(bare)


# ---------------------------------------------------------------- seeds

def _seeds(settings: Compare) -> Comparison:
    if len(settings.files) < 2:
        raise ConfigError(f"--seeds: expected two files of `evaluate --json` or more, one a seed, got {len(settings.files)}")
    if settings.against and len(settings.against) != len(settings.files):
        raise ConfigError(f"--against: expected the same seeds in the same order, {len(settings.files)} files, got {len(settings.against)}")
    own, notes = _over_files(settings.files)
    spreads = [over_seeds(m["values"], name=name, unit=m["unit"], ideal=m["ideal"]) for name, m in own.items()]
    if not settings.against:
        return Comparison([], spreads, notes)
    theirs, more = _over_files(settings.against)
    found = [seed_difference(m["values"], theirs[name]["values"], name=name, unit=m["unit"], ideal=m["ideal"]) for name, m in own.items() if name in theirs and _of_one_kind(m, theirs[name])]
    if other := [name for name, m in own.items() if name in theirs and not _of_one_kind(m, theirs[name])]:
        more.append(f"left out, of another unit, ideal or number of examples on either side: {', '.join(other)}")
    if alone := [name for name in (*own, *theirs) if (name in own) != (name in theirs)]:
        more.append(f"left out, on one side alone: {', '.join(alone)}")
    if not found:
        raise DataError(f"{settings.against[0]}: expected measures that {settings.files[0]} has, found none")
    return Comparison(found, spreads, notes + [note for note in more if note not in notes])


def _of_one_kind(one: dict, other: dict) -> bool:
    return (one["unit"], one["ideal"], set(one["n"])) == (other["unit"], other["ideal"], set(other["n"]))


def _over_files(paths: tuple[str, ...]) -> tuple[dict[str, dict], list[str]]:
    """(name -> values in the order of `paths`, unit, ideal, of the measures that all files have; a note on the others)."""
    tables = [read_measures(path) for path in paths]
    names = list(dict.fromkeys(name for table in tables for name in table))
    common = [name for name in names if all(table.get(name, {}).get("value") is not None for table in tables)]
    missing = [name for name in names if name not in common]
    if not common:
        empty = (path for path, table in zip(paths, tables) if all(measure["value"] is None for measure in table.values()))
        raise DataError(f"{next(empty, paths[0])}: expected measures that all {len(paths)} files have, found none")
    notes = [f"{Path(paths[0]).name} and others: left out, not in every file: {', '.join(missing)}"] if missing else []
    if other := next((name for name in common if len({table[name]["n"] for table in tables}) > 1), None):
        notes.append(f"{Path(paths[0]).name} and others: {other} is of {', '.join(str(table[other]['n']) for table in tables)} examples: not of one test set?")
    return {name: {"values": [table[name]["value"] for table in tables], "unit": tables[0][name]["unit"], "ideal": tables[0][name]["ideal"],
                   "n": [table[name]["n"] for table in tables]} for name in common}, notes


LARGEST = 1e150  # its square is a float


def read_measures(path: str) -> dict[str, dict]:
    """name -> the measure as `evaluate --json` writes it."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["measures"]
        found = {row["name"]: {key: row[key] for key in ("value", "unit", "ideal", "n")} for row in rows}
        if not all(isinstance(name, str) and isinstance(m["unit"], str) and all(m[key] is None or type(m[key]) in (int, float) for key in ("value", "ideal", "n")) for name, m in found.items()):
            raise ValueError
        if large := next(((name, key) for name, m in found.items() for key in ("value", "ideal", "n") if m[key] is not None and not abs(m[key]) < LARGEST), None):
            raise DataError(f"{path}: {large[0]}: {large[1]}: expected a number below {LARGEST:g}, as large a one as has a spread, got another")
        return found
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: expected a file of `evaluate --json`, got something else") from None
