"""The paper's table beside the paper's own figures, every measure of every system, and differences from the baseline."""

from . import figures
from ..errors import DataError
from ..metrics import bare_name
from ..metrics.tally import Difference
from ..recipe_table import column_title
from .figures import Series
from .page import Cell, Figure, Figures, Section, Table
from .reading import Answered, Source
from .results import Compared, Line, by_seed, drawn_ends, is_whole, lines, paired
from .words import BARS, GLOSSARY, STAGES, cell, examples, ideal_of, interval, is_of, number, stage_title, unit_of

ABOUT_COLUMNS = "Mean ± standard deviation over seeds; below it the 95 % interval (of the mean; with one seed, over the examples)"
ABOUT_PAPER = " and the paper's own figure. The paper trains BERT-base on all of the data; what was run here stands above."


def column_answers(source: Source, column: dict) -> dict[str, list[Answered]]:
    """system -> the answers that a column of the paper's table is about. Raises DataError where a seed has two."""
    found: dict[str, list[Answered]] = {}
    for system in source.systems:
        wanted = [a for a in source.answered if a.system == system and is_of(column, a.stage, a.task) and column["measure"] in a.measures]
        if len({a.seed for a in wanted}) < len(wanted):
            raise DataError(f"{source.title}: column {column['title']!r} of stage {column['stage']}: expected one task with {column['measure']}, got "
                            f"{', '.join(sorted({a.task for a in wanted}))}; name one by \"task\" in the column")
        found[system] = sorted(wanted, key=lambda a: a.seed)
    return found


def against_paper(source: Source, ident: str) -> Section | None:
    blocks = []
    for at, stage in enumerate(dict.fromkeys(c["stage"] for c in source.columns)):
        paper = {(p["system"], p["task"], p["title"]): p["value"] for p in source.paper if p["stage"] == stage and p["value"] is not None}
        answered = [(c, column_answers(source, c)) for c in source.columns if c["stage"] == stage]
        known = [(c, of) for c, of in answered if any(of.values()) or any((s, c["task"], c["title"]) in paper for s in source.systems)]
        columns, of = [c for c, _ in known], [of for _, of in known]
        if not columns:
            continue
        found = [{system: lines(answers).get(c["measure"]) for system, answers in each.items()} for c, each in known]
        shown = [s for s in source.systems if any(f[s] for f in found) or any((s, c["task"], c["title"]) in paper for c in columns)]
        titles = [column_title(c, columns) for c in columns]
        rows = [(system, *(cell(f[system], *([f"paper {number(theirs, c['unit'])}"] if (theirs := paper.get((system, c["task"], c["title"]))) is not None else []))
                           for c, f in zip(columns, found))) for system in shown]
        rows.append(("ideal", *(number(c["ideal"], c["unit"]) for c in columns)))
        table = Table(STAGES.get(stage, stage), ("system", *(title + unit_of(c["unit"]) for c, title in zip(columns, titles))), rows)
        changed = _changes(source, stage, columns, titles, of)
        panels = [_panel(f"{ident}-paper-{at}-{i}", c, title, shown, f, [paper.get((s, c["task"], c["title"])) for s in shown])
                  for i, (c, title, f) in enumerate(zip(columns, titles, found)) if any(f.values())]
        blocks += [table, *([changed] if changed.rows else [])]
        if panels:
            whose = "Filled: here; hollow: the paper's. " if paper else ""
            blocks.append(Figures(panels, f"{whose}{BARS}; dashed: the ideal. The numbers stand in the table above."))
    if not blocks:
        return None
    return Section("paper", "The paper's table" if source.paper else "The recipe's table", [ABOUT_COLUMNS + (ABOUT_PAPER if source.paper else ".")], blocks)


def _changes(source: Source, stage: str, columns: list[dict], titles: list[str], of: list[dict[str, list[Answered]]]) -> Table:
    """Differences of each system from the stage's baseline, of the columns alone, over the seeds that both have."""
    baseline, rows = source.baselines.get(stage), []
    for system in source.systems:
        pairs = [paired(answered.get(baseline, []), answered[system], stage) for answered in of]
        found = [next((d for d in by_seed(p) if d.name == c["measure"]), None) if len(p) > 1 else None for p, c in zip(pairs, columns)]
        if system != baseline and any(found):
            rows.append((system, *(change(d, interval(d.low, d.high, d.unit)) if d else Cell("–") for d in found)))
    return Table(f"Difference from {baseline}", ("system", *titles), rows,
                 f"Paired by seed; below each its 95 % interval (Student's t). Bold: the interval does not hold 0. {CHANCE}")


def _panel(ident: str, column: dict, title: str, systems: list[str], found: dict[str, Line | None], theirs: list[float | None]) -> Figure:
    """Ours beside the paper's; theirs: of each of the systems."""
    of = [found[s] for s in systems]
    low, high = zip(*(drawn_ends(x) if x else (None, None) for x in of))
    series = [Series("here", [x.mean if x else None for x in of], list(low), list(high), 0)]
    if any(v is not None for v in theirs):
        series.append(Series("paper", theirs, [None] * len(systems), [None] * len(systems), 1, True))
    alt = f"Dot plot of {title} for {len(systems)} systems, " + ", ".join(f"{s} {number(x.mean, x.unit)}" for s, x in zip(systems, of) if x)
    return Figure(figures.dots(ident, alt, systems, series, title + unit_of(column["unit"]), column["ideal"]), title)


# ---------------------------------------------------------------- tables

def tables(source: Source, every: Compared) -> list[Section]:
    """A section of each task at a stage. every: what `results.compared` gives."""
    made = []
    for number_, (stage, task) in enumerate(source.stages()):
        of = {system: lines(answers) for system, answers in source.of(stage, task).items()}
        names = [n for n in dict.fromkeys(name for found in of.values() for name in found) if is_whole(n)]
        of = {system: found for system, found in of.items() if any(name in found for name in names)}
        if not names:
            continue
        any_of = {name: next(found[name] for found in of.values() if name in found) for name in names}
        head = ("measure", *of, "ideal", "examples")
        seeds = {system: max(len(line.values) for line in found.values()) for system, found in of.items()}
        rows = [(name + unit_of(any_of[name].unit), *(cell(found.get(name), *_of_seeds(found.get(name), seeds[system])) for system, found in of.items()), ideal_of(any_of[name]), examples(name, of)) for name in names]
        blocks = [Table("Measures", head, rows, _how(of, seeds))]
        changed, notes = every[stage, task]
        if changed:
            blocks += _differences(changed, source.baselines[stage])
        families = [f for f in GLOSSARY if any(bare_name(n).split("/")[0] == f for n in names)]
        blocks.append(Table("What the measures mean", ("measure", "meaning"), [(f, GLOSSARY[f]) for f in families], words=True, folded=True)) if families else None
        made.append(Section(f"measures-{number_}", stage_title(stage, task), [], blocks, notes))
    return made


def _of_seeds(line: Line | None, seeds: int) -> tuple[str, ...]:
    """How many seeds a figure is of, where other figures of its system are of more."""
    return (f"{len(line.values)} of {seeds} seeds",) if line is not None and len(line.values) < seeds else ()


def _how(of: dict[str, dict[str, Line]], seeds: dict[str, int]) -> str:
    """What the small print of a table of measures is."""
    kinds = {line.interval for found in of.values() for line in found.values()}
    said = []
    if "seeds" in kinds:
        said.append("± is the standard deviation over seeds; below it the 95 % interval of the mean over seeds (Student's t).")
        if "examples" in kinds:
            said.append("Without ±: one seed, or all alike; below it the 95 % bootstrap interval over the test examples.")
    elif "examples" in kinds:
        said.append("Below each figure its 95 % bootstrap interval over the test examples; it says nothing of how far another seed would lie.")
    many = sorted(set(seeds.values()))
    said.append(f"Seeds of each system: {many[0]}." if len(many) == 1 else f"Seeds: {', '.join(f'{system} {n}' for system, n in seeds.items())}.")
    return " ".join(said)


CHANCE = "Where nothing is, one difference in twenty looks apart from 0 by chance; p is not corrected for that. Over seeds: of further seeds on this test set, not of another test set."


def _differences(found: dict[str, list[Difference]], baseline: str) -> list[Table]:
    """A table for each system, closed where there are several."""
    return [Table(f"{system}: difference from {baseline}", ("measure", "difference", "95 % interval", "p", baseline, system, "n", "test"),
                  [(d.name, change(d), interval(d.low, d.high, d.unit), f"{d.p:.3f}" if d.p >= 0.001 else "< 0.001", number(d.first, d.unit), number(d.second, d.unit),
                    f"{d.n:,}", d.test) for d in changes], CHANCE, folded=len(found) > 1) for system, changes in found.items()]


def change(d: Difference, *small: str) -> Cell:
    """A difference, set apart where its interval does not hold 0."""
    apart = d.low > 0 or d.high < 0
    return Cell(f"{number(d.value, d.unit, True)}{'' if d.unit == '1' else ' ' + d.unit}", (*small, *(("apart from 0",) if apart else ())), apart)
