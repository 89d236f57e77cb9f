"""Figures of a source as a reader sees them: over seeds with mean, sd and interval, and against the baseline, never without an interval."""

import dataclasses
import math
from pathlib import Path

from ..comparison import Rows, compare_examples, read_rows
from ..errors import DataError
from ..metrics import bare_name, bare_of_system
from ..metrics.compare import over_seeds, seed_difference
from ..metrics.tally import Difference
from .reading import Answered, Source

QUALITY = ("accuracy", "f1", "mlm-loss", "perplexity")  # how well the task is done; and StereoSet's LM_SCORES
LM_SCORES = {"lm", "icat"}
LOWER_IS_BETTER = ("mlm-loss", "perplexity")
ONE_BY_ONE = ("/class/", "/term/")  # measures of one class or identity term, which have sections of their own
FLOORS = ("shuffled", "floor")


@dataclasses.dataclass(frozen=True)
class Line:
    """One measure of one system. values: of each seed, {seed: value}. sd: of single seeds, None from one. low, high: 95 % interval, of the mean over
    seeds (interval "seeds") or, where there is one seed or all are alike, over examples ("examples"); None where there is none. n: examples."""

    name: str
    unit: str
    ideal: float | None
    values: dict[int, float]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    interval: str | None
    n: int | None

    def as_json(self) -> dict:
        row = dataclasses.asdict(self)
        return row | {"values": [{"seed": seed, "value": value} for seed, value in self.values.items()]}


def lines(answers: list[Answered]) -> dict[str, Line]:
    """measure -> its line, of one system's answers over seeds, in order of appearance. A measure without a value is left out."""
    found = {}
    for name in dict.fromkeys(name for a in answers for name in a.measures):
        rows = {a.seed: a.measures[name] for a in answers if name in a.measures and a.measures[name]["value"] is not None}
        if rows:
            found[name] = _line(name, rows)
    return found


def _line(name: str, rows: dict[int, dict]) -> Line:
    values = {seed: float(row["value"]) for seed, row in rows.items()}
    first = next(iter(rows.values()))
    first = first | {"n": first["n"] if len({row["n"] for row in rows.values()}) == 1 else None}
    spread = over_seeds(list(values.values()), name=name, unit=first["unit"], ideal=first["ideal"])
    if spread.sd:
        return Line(name, first["unit"], first["ideal"], values, spread.mean, spread.sd, spread.low, spread.high, "seeds", first["n"])
    ends = (first["low"], first["high"], "examples") if first["low"] is not None and first["high"] is not None else (None, None, None)
    return Line(name, first["unit"], first["ideal"], values, spread.mean, spread.sd, *ends, first["n"])


Compared = dict[tuple[str, str], tuple[dict[str, list[Difference]], list[str]]]  # (stage, task) -> what `differences` gives


def compared(source: Source) -> Compared:
    """All differences, computed once for all who tell of them: a comparison by example reads whole files and draws from them."""
    return {(stage, task): differences(source, stage, task) for stage, task in source.stages()}


def differences(source: Source, stage: str, task: str) -> tuple[dict[str, list[Difference]], list[str]]:
    """(system -> its differences from the baseline of the stage, notes on what was not compared).

    Two seeds or more in common: paired by seed. One: by the examples of both, where they are kept. Measures one by one are left out, as many differences look
    significant by chance.
    """
    of, baseline, found, notes = source.of(stage, task), source.baselines.get(stage), {}, []
    read: tuple[Path | None, dict[str, Rows]] = None, {}  # of the baseline, for the next system: two files at most are held at a time
    if baseline not in of:
        return {}, []
    for system, answers in of.items():
        if system == baseline:
            continue
        pairs = paired(of[baseline], answers, stage)
        shared = [pair for pair in pairs if any(map(_compared, _both([pair])))]
        pairs = shared or pairs * (len(pairs) == 1)  # one pair may have examples alone
        if any(a.same != b.same for a, b in pairs):
            notes.append(f"{system}: not compared with {baseline}, whose model, settings or data are others")
        elif len(pairs) >= 2:
            found[system] = by_seed(pairs)
            if unlike := _unlike(pairs):
                notes.append(f"{system}: {', '.join(unlike)}: not compared with {baseline} under every seed: another number of examples, unit or ideal on either side")
        elif not pairs:
            notes.append(f"{system}: not compared with {baseline}: no seed with a figure that both have")
        elif pairs[0][0].examples and pairs[0][1].examples:
            first, second = (answer.examples for answer in pairs[0])
            try:
                read = read if read[0] == first else (first, read_rows(str(first)))
                every = [d for d in compare_examples(str(first), str(second), rows=read[1]).differences if _compared(d.name)]
                found[system] = [d for d in every if _is_of(d, *pairs[0])]
                if others := [d.name for d in every if d not in found[system]]:
                    notes.append(f"{system}: {', '.join(others)}: not compared with {baseline}: the examples are of other data than the figures")
                if found[system] and max(len(_seeds(side)) for side in (of[baseline], answers)) > 1:
                    notes.append(f"{system}: differences are of seed {pairs[0][1].seed} alone, the only one both have")
            except DataError as error:
                notes.append(f"{system}: not compared with {baseline}: {error}")
        else:
            notes.append(f"{system}: not compared with {baseline}, since a difference needs two seeds or more of both, or `evaluate --examples` of both")
    return {system: rows for system, rows in found.items() if rows}, notes


def paired(baseline: list[Answered], answers: list[Answered], stage: str) -> list[tuple[Answered, Answered]]:
    """(the baseline's, the system's) under each seed that both have. Upstream the baseline is untrained: measured once, it stands beside every seed."""
    if stage == "upstream" and len(baseline) == 1:
        return [(baseline[0], b) for b in answers]
    return [(a, b) for a in baseline for b in answers if a.seed == b.seed]


def _seeds(answers: list[Answered]) -> list[int]:
    """Those under which anything has a value."""
    return [a.seed for a in answers if any(row["value"] is not None for row in a.measures.values())]


def by_seed(pairs: list[tuple[Answered, Answered]]) -> list[Difference]:
    """Differences second - first of all measures that two pairs or more have, each pair under one seed."""
    found = []
    for name, rows in _both(pairs).items():
        kept = [(a["value"], b["value"]) for a, b in rows if _alike(a, b)]
        if len(kept) >= 2 and _compared(name):
            found.append(seed_difference(*zip(*kept), name=name, unit=rows[0][0]["unit"], ideal=rows[0][0]["ideal"]))
    return found


def _both(pairs: list[tuple[Answered, Answered]]) -> dict[str, list[tuple[dict, dict]]]:
    """measure -> its rows in every pair where both have a value."""
    names = dict.fromkeys(name for a, _ in pairs for name in a.measures)
    rows = {name: [(a.measures[name], b.measures[name]) for a, b in pairs if name in a.measures and name in b.measures] for name in names}
    return {name: kept for name, every in rows.items() if (kept := [(a, b) for a, b in every if a["value"] is not None and b["value"] is not None])}


def _alike(one: dict, other: dict) -> bool:
    """Whether two figures can be of one test set."""
    return all(one[key] == other[key] for key in ("n", "unit", "ideal"))


def _unlike(pairs: list[tuple[Answered, Answered]]) -> list[str]:
    return [name for name, rows in _both(pairs).items() if _compared(name) and not all(_alike(a, b) for a, b in rows)]


def _is_of(found: Difference, first: Answered, second: Answered) -> bool:
    """Whether a difference is one of the figures that both have, where they have them."""
    own = [(answer.measures.get(found.name, {}).get("value"), value) for answer, value in ((first, found.first), (second, found.second))]
    return all(there is None or math.isclose(there, value, rel_tol=1e-4, abs_tol=1e-6) for there, value in own)


def _compared(name: str) -> bool:
    """Whether differences are given of a measure."""
    return is_whole(name) and not is_floor(name)


def is_whole(name: str) -> bool:
    """Whether a measure is of all classes and terms together, not of one of them."""
    return bare_name(name).startswith("f1/") or not any(part in bare_name(name) for part in ONE_BY_ONE)  # f1/LABEL may be called anything


POSSIBLE = {"%": (0.0, 100.0), "points": (0.0, 100.0)}  # by unit; of others by how their names begin (docs/measures.md)
POSSIBLE_OF = {"bias-nli": (0.0, 1.0), "fprd": (0.0, math.inf), "fprd-iptts": (0.0, math.inf), "mlm-loss": (0.0, math.inf), "perplexity": (1.0, math.inf),
               "seat": (-2.0, 2.0), "seat-mean": (-2.0, 2.0)}
SIGNED = "/class/", "/shift"  # in the names of figures in points that may lie below 0: a gap of one class, where answers shift


def drawn_ends(line: Line) -> tuple[float | None, float | None]:
    """The interval as a plot shows it: cut at what the figure can be, which the interval of a mean over few seeds may leave. What a seed has is possible: effect
    sizes of sets of unlike sizes may lie a little beyond 2."""
    if line.low is None or line.high is None:
        return None, None
    name = bare_of_system(line.name)
    least, most = POSSIBLE.get(line.unit) or POSSIBLE_OF.get(name.split("/")[0], (-math.inf, math.inf))
    if line.unit == "points" and any(part in name for part in SIGNED):
        least = -most
    elif name.startswith("seat") and name.endswith("/p"):
        least, most = 0.0, 1.0
    seen = (*line.values.values(), *((line.low, line.high) if line.interval == "examples" else ()))
    return max(line.low, min(least, *seen)), min(line.high, max(most, *seen))


def is_floor(name: str) -> bool:
    """Whether a measure says what chance alone would give."""
    parts = bare_name(name).split("/")
    return parts[0] != "f1" and parts[-1].endswith(FLOORS)


def is_quality(name: str) -> bool:
    parts = bare_name(name).split("/")
    return parts[0] in QUALITY or bool(LM_SCORES & set(parts[1:]))


def as_data(source: Source, every: Compared) -> dict:
    """All of it as plain data, for metrics.json. every: what `compared` gives."""
    results, changes = [], []
    for stage, task in source.stages():
        for system, answers in source.of(stage, task).items():
            results.append({"stage": stage, "task": task, "system": system, "seeds": _seeds(answers),
                            "measures": [line.as_json() for line in lines(answers).values()]})
        changes += [{"stage": stage, "task": task, "system": system, "against": source.baselines[stage], **d.as_json()} for system, rows in every[stage, task][0].items() for d in rows]
    return {"kind": source.kind, "title": source.title, "about": dict(source.facts), "results": results, "differences": changes, "paper": source.paper}
