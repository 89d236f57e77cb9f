"""A testbed folder as sections: what was planted against what is measured, before and after each method."""

import json
from pathlib import Path

from . import figures
from ..errors import DataError
from .page import Cell, Figure, Figures, Section, Table
from .words import duration, interval, number, unit_of

PLACES = {
    "text": ("Planted in the text: the masked-LM", "stereotype-preference", "link planted in the text", 0.5,
             "Stereotype preference: how far the share of matched pairs in which the masked-LM prefers the stereotype lies from a half; 0 is ideal, 0.5 the most."),
    "labels": ("Planted in the labels: the classifier", "tpr-gap/rms", "link planted in the labels", 100.0,
               "TPR-GAP, root mean square over occupations, in points; 0 is ideal, and chance alone gives what stands as shuffled."),
}
BASE = {"text": "base", "labels": "plain"}
NONE = "none"  # the method of the unchanged base and of plain fine-tuning


def read_testbed(folder: Path) -> dict:
    """testbed.json. Raises DataError where it is something else or not finished."""
    path = folder / "testbed.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, _ = found["rows"], found["settings"]["seeds"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: expected the figures of `testbed`, got something else") from None
    if not rows:
        raise DataError(f"{path}: expected a testbed with figures, got one that is not done; `peftdebias testbed --out {folder}` goes on")
    return found


def sections_of_testbed(found: dict, ident: str) -> list[Section]:
    """What was run, then a section for each place of planting."""
    settings, versions = found["settings"], found["versions"]
    facts = [("seeds", ", ".join(map(str, settings["seeds"]))), ("scale", f"{settings['scale']:g}"), ("units", str(found["units"])), ("time of one core", duration(found["cpu_seconds"])),
             ("machine", str(versions["device"])), ("torch", str(versions["torch"])), ("commit", str(versions["commit"]))]
    made = [Section(f"{ident}-about", "What was run", ["Biographies of a made-up world, in which the link between occupation and gender has a set strength."],
                    [Table("This testbed", ("", ""), facts, words=True)])]
    for place in PLACES:
        if rows := [row for row in found["rows"] if row["place"] == place]:
            made.append(_section(place, rows, found, f"{ident}-{place}"))
    return made


def _section(place: str, rows: list[dict], found: dict, ident: str) -> Section:
    title, measure, planted, most, meaning = PLACES[place]
    units = {name: next((figure["unit"] for row in rows if (figure := row["figures"].get(name))), "") for name in dict.fromkeys(name for row in rows for name in row["figures"])}
    plain = sorted((row for row in rows if row["method"] == NONE), key=lambda row: row["strength"])
    drawn = []
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows if row["method"] != NONE)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["strength"])
        lines = [(name, style, [row["strength"] for row in of], [row["figures"][measure]["mean"] for row in of], True)
                 for name, style, of in ((f"without ({BASE[place]})", 1, plain), (f"with {method}", 0, own)) if of]
        ends = ", ".join(f"{row['strength']:g}: {number(row['figures'][measure]['mean'], units[measure])}" for row in own)
        svg = figures.curves(f"{ident}-{i}", f"{measure} by {planted}, with {method}: {ends}", lines, measure + unit_of(units[measure]), along=planted, frame=(1.0, most))
        drawn.append(Figure(svg, method))
    compared = any("change" in (figure or {}) for row in rows for figure in row["figures"].values())
    several = any((figure or {}).get("sd") is not None for row in rows for figure in row["figures"].values())
    head = ("strength, method", *(name + unit_of(unit) for name, unit in units.items()))
    table = Table("Means over seeds" + "; below, the 95 % interval of the difference from the unchanged system" * compared if several else "Figures of one seed", head,
                  [(f"{row['strength']:g} {BASE[place] if row['method'] == NONE else row['method']}", *(_cell(row["figures"].get(name)) for name in units)) for row in rows])
    notes = []
    if place == "text":
        for row in rows:
            if row.get("removed") is not None:
                notes.append(f"Link {row['strength']:g}, {row['method']}: {100 * row['removed']:.0f} % of the preference removed at {row['dearer']:.3f} of the base's perplexity.")
    elif found.get("monotone") and found["monotone"]["spearman"] is not None:
        notes.append(f"Spearman's correlation of the planted strength with plain fine-tuning's gap (means over seeds): {found['monotone']['spearman']:.3f}.")
    return Section(ident, title, [meaning], [*([Figures(drawn, "Dashed: the unchanged system. The numbers stand in the table.")] if drawn else []), table], notes)


def _cell(figure: dict | None) -> Cell:
    if figure is None:
        return Cell("–")
    unit = figure["unit"]
    text = number(figure["mean"], unit) + (f" ± {number(figure['sd'], unit)}" if figure["sd"] is not None else "")
    change = figure.get("change")
    return Cell(text, (interval(change["low"], change["high"], unit),) if change else (), strong=bool(change) and (change["low"] > 0 or change["high"] < 0))
