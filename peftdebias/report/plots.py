"""Quality against bias, and what a system does class by class and term by term."""

from ..metrics import bare_name
from . import figures
from .figures import Series
from .page import Figure, Figures, Section, Table
from .reading import Source
from .results import Line, drawn_ends, is_floor, is_quality, is_whole, lines
from .words import BARS, cell, examples, is_of, number, stage_title, titled, unit_of

MOST_PANELS = 6  # scatter plots of a stage
MOST_ROWS = 40  # of a dot plot; the table has all


def _pairs(source: Source, stage: str, task: str, of: dict[str, dict[str, Line]]) -> tuple[str | None, list[str]]:
    """(measure of quality, measures of bias) of a task at a stage, each once: those of the paper's columns, else one of each family."""
    names = list(dict.fromkeys(name for found in of.values() for name in found))
    listed = list(dict.fromkeys(c["measure"] for c in source.columns if is_of(c, stage, task) and c["measure"] in names))
    names = listed if any(map(is_quality, listed)) and not all(map(is_quality, listed)) else names
    quality = [n for n in names if is_quality(n)]
    best = next((n for n in quality if n != "f1/macro"), quality[0] if quality else None)
    bias, families = [], set()
    for name in names:
        if not is_quality(name) and not is_floor(name) and is_whole(name) and (name in listed or of_family(name) not in families):
            families.add(of_family(name))
            bias.append(name)
    return best, bias[:MOST_PANELS]


def of_family(name: str) -> str:
    """"crows-pairs/nangia" of "crows-pairs/nangia/all"; the first word of others."""
    parts = bare_name(name).split("/")
    return "/".join(parts[:2]) if parts[0] in ("crows-pairs", "stereoset") else parts[0]


def trade_off(source: Source, ident: str) -> Section | None:
    blocks = []
    for number_, (stage, task) in enumerate(source.stages()):
        of = {system: lines(answers) for system, answers in source.of(stage, task).items()}
        quality, bias = _pairs(source, stage, task, of)
        made, rows = [], []
        for i, name in enumerate(bias):
            points = [(system, found[quality], found[name]) for system, found in of.items() if quality in found and name in found]
            if len(points) < 2:
                continue
            x, y = points[0][1:]
            across, up = titled(source, stage, task, quality), titled(source, stage, task, name)
            caption = f"{up} against {across}"
            alt = f"Scatter plot of {caption}: " + "; ".join(f"{s} {number(b.mean, b.unit)} and {number(a.mean, a.unit)}" for s, a, b in points)
            svg = figures.scatter(f"{ident}-trade-{number_}-{i}", alt, [(s, (a.mean, *drawn_ends(a)), (b.mean, *drawn_ends(b))) for s, a, b in points],
                                  across + unit_of(x.unit), up + unit_of(y.unit), x.ideal, y.ideal, source.baselines.get(stage))
            made.append(Figure(svg, caption))
            rows += [(system, quality, cell(a), name, cell(b)) for system, a, b in points]
        if made:
            tables = [Table("The numbers behind the plots", ("system", "quality", "", "bias", ""), rows, folded=True)]
            hollow = "Hollow: without debiasing. " if source.baselines.get(stage) in of else ""
            note = f"{stage_title(stage, task)}. {hollow}{BARS}; dashed: the ideal, where it lies near."
            blocks.append(Figures(made, note, tables))
    return Section("trade-off", "Quality against bias", [], blocks) if blocks else None


# ---------------------------------------------------------------- one by one

OF_ALL = {"/class/": "tpr-gap/rms", "/term/": ("fprd/fpr", "fprd-iptts/fpr")}
"""What stands beside the figures of each class or term: its name holds no label, so what is behind it is a file."""


def one_by_one(source: Source, ident: str, key: str, part: str, title: str, meaning: str) -> Section | None:
    """Every class or term of each system beside the baseline's."""
    blocks = []
    for number_, (stage, task) in enumerate(source.stages()):
        every = {system: lines(answers) for system, answers in source.of(stage, task).items()}
        files = {name.removeprefix(bare_name(name)) for found in every.values() for name in found if bare_name(name).endswith(OF_ALL[part])}
        of = {system: {_one_of(name, part, files): line for name, line in found.items() if part in bare_name(name)} for system, found in every.items()}
        of = {system: found for system, found in of.items() if found}
        for at, (family, file) in enumerate(dict.fromkeys(key[:2] for found in of.values() for key in found)):
            here = {system: {one: line for (*key, one), line in found.items() if key == [family, file]} for system, found in of.items()}
            overall = {system: every[system].get(f"{family}/fpr{file}") for system in here}
            baseline = source.baselines.get(stage)
            beside = {system for system in here if baseline in here and {a.same for a in source.of(stage, task)[system]} == {a.same for a in source.of(stage, task)[baseline]}}
            blocks.append(_dots_of(f"{ident}-{key}-{number_}-{at}", stage_title(stage, task), family + file, here, overall, baseline, beside, key))
    return Section(key, title, [meaning], blocks) if blocks else None


def _one_of(name: str, part: str, files: set[str]) -> tuple[str, str, str]:
    """("fprd", " (a.csv)", "gay") of "fprd/term/gay (a.csv)". files: what stands behind the names of measures on one file of several; a class may be called "nurse (male)"."""
    family, one = name.split(part, 1)
    file = max((file for file in files if one.endswith(file)), key=len, default="")
    return family, file, one.removesuffix(file)


def _dots_of(ident: str, where: str, family: str, of: dict[str, dict[str, Line]], overall: dict[str, Line | None], baseline: str | None, beside: set[str],
             key: str) -> Figures:
    """beside: the systems whose data and settings are the baseline's, which stands in their plots alone."""
    first = of[baseline] if baseline in of else next(iter(of.values()))
    some = {name: line for found in reversed(list(of.values())) for name, line in found.items()}
    names = sorted(some, key=lambda n: (-first[n].mean if n in first else 0.0, n))
    many = len(names) > MOST_ROWS
    drawn = sorted(sorted(some, key=lambda n: (-(some[n].n or 0), n))[:MOST_ROWS], key=names.index) if many else names
    others = [s for s in of if s != baseline] or list(of)
    ends = [v for found in of.values() for name in drawn if (line := found.get(name)) for v in (line.mean, *drawn_ends(line)) if v is not None]
    dashed = {system: (rate.mean, "all texts") if (rate := overall.get(system)) else (0.0, "ideal") for system in others}
    ends += [at for at, _ in dashed.values()]  # it is in the picture
    made = []
    for i, system in enumerate(others):
        series = [_series(baseline, of[baseline], drawn, 0, True)] if system in beside and system != baseline else []
        series.append(_series(system, of[system], drawn, 1 if series else 0, False))
        if all(v is None for v in series[-1].values):
            continue  # it has others than those drawn
        unit = next(iter(of[system].values())).unit
        label = f"false positive rate ({family})" if key == "terms" else family
        alt = (f"Dot plot of {label} by {'class' if key == 'classes' else 'term'}, {' beside '.join(s.name for s in series)}, {len(drawn)} rows, from "
               f"{number(max(v for s in series for v in s.values if v is not None), unit)} to {number(min(v for s in series for v in s.values if v is not None), unit)}")
        made.append(Figure(figures.dots(f"{ident}-{i}", alt, drawn, series, label + unit_of(unit), *dashed[system], (min(ends), max(ends))), system))
    table = Table("The numbers behind the plots", ("class" if key == "classes" else "term", *of, "examples"),
                  [(name, *(cell(found.get(name)) for found in of.values()), examples(name, of)) for name in names], folded=True)
    note = f"{where}. " + ("Hollow: without debiasing. " if beside - {baseline} else "") + BARS + "."
    return Figures(made, note + (f" Drawn: the {MOST_ROWS} of {len(names)} with the most examples." if many else ""), [table])


def _series(name: str, found: dict[str, Line], rows: list[str], style: int, hollow: bool) -> Series:
    of = [found.get(row) for row in rows]
    low, high = zip(*(drawn_ends(x) if x else (None, None) for x in of))
    return Series(name, [x.mean if x else None for x in of], list(low), list(high), style, hollow)
