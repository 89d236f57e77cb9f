"""What units say together: a row for every strength and method, each figure over the seeds with its spread and, beside the unchanged system, its paired
difference; the two things that must hold; the table in Markdown.

A method removes the share 1 - preference(method) / preference(base) of the stereotype preference, of means over seeds. It reaches the bar where that is at
least HALF and its perplexity on balanced text is at most DEARER that of the base, again of means.
"""

import math
from collections.abc import Mapping, Sequence

from ..metrics.compare import over_seeds, seed_difference
from ..metrics.rank import spearman
from .units import NONE, Unit

HALF, DEARER = 0.5, 1.05
GAP, PREFERENCE = "tpr-gap/rms", "stereotype-preference"


def rows(units: Sequence[Unit], results: Mapping[Unit, dict]) -> list[dict]:
    """One for each place, strength and method, in the order of `units`: {place, strength, method, parameters, seeds, figures, and `removed`... for the text}.

    figures: name -> {values of the seeds, mean, sd, low, high, unit, ideal, n; change: against method none, over the same seeds, from two seeds up}.
    """
    found = []
    for place, strength, method in dict.fromkeys((u.place, u.strength, u.method) for u in units):
        seeds = [u.seed for u in units if (u.place, u.strength, u.method) == (place, strength, method)]
        own, plain = ([results[Unit(place, strength, seed, name)] for seed in seeds] for name in (method, NONE))
        figures = {name: _figure(name, own, plain if method != NONE else None) for name in own[0]["figures"]}
        row = {"place": place, "strength": strength, "method": method, "parameters": own[0]["parameters"], "seeds": seeds, "figures": figures,
               "seconds": round(sum(r["seconds"] for r in own), 1), "cpu_seconds": round(sum(r["cpu_seconds"] for r in own), 1)}
        if place == "text" and method != NONE:
            row |= _removed(row["figures"], plain)
        found.append(row)
    return found


def _figure(name: str, own: list[dict], plain: list[dict] | None) -> dict:
    values, about = [r["figures"][name]["value"] for r in own], {key: own[0]["figures"][name][key] for key in ("unit", "ideal")}
    figure = {"values": values} | {k: v for k, v in over_seeds(values, name=name, **about).as_json().items() if k != "name"}
    if plain is not None and len(values) > 1:
        change = seed_difference([r["figures"][name]["value"] for r in plain], values, name=name, **about).as_json()
        figure["change"] = {key: change[key] for key in ("difference", "low", "high", "p", "unit", "test")}
    return figure


def _removed(figures: dict, plain: list[dict]) -> dict:
    """removed: share of the base's preference; None where the base has none. dearer: perplexity by the base's. reached: the bar."""
    before, dear = (sum(r["figures"][name]["value"] for r in plain) / len(plain) for name in (PREFERENCE, "perplexity"))
    removed, dearer = 1 - figures[PREFERENCE]["mean"] / before if before else None, figures["perplexity"]["mean"] / dear
    return {"removed": removed, "dearer": dearer, "reached": removed is not None and removed >= HALF and dearer <= DEARER}


def monotone(found: Sequence[dict]) -> dict | None:
    """Does plain fine-tuning's gap grow with what is planted in the labels? Spearman's correlation of the strengths with the gap's means, and for each seed
    alone; None for fewer than two strengths, and in place of a correlation that is not defined."""
    plain = sorted((r for r in found if r["place"] == "labels" and r["method"] == NONE), key=lambda r: r["strength"])
    if len(plain) < 2:
        return None
    strengths, gaps = [r["strength"] for r in plain], [r["figures"][GAP] for r in plain]
    each = [spearman(strengths, [g["values"][i] for g in gaps]) for i in range(len(plain[0]["seeds"]))]
    return {"strengths": strengths, "means": [g["mean"] for g in gaps], "spearman": _defined(spearman(strengths, [g["mean"] for g in gaps])),
            "spearman_of_each_seed": [_defined(rho) for rho in each]}


def _defined(x: float) -> float | None:
    return x if math.isfinite(x) else None


# ---------------------------------------------------------------- Markdown

def markdown(found: dict) -> str:
    """testbed.json as two tables and the two answers."""
    text, labels = ([r for r in found["rows"] if r["place"] == place] for place in ("text", "labels"))
    seeds = ", ".join(map(str, found["settings"]["seeds"]))
    lines = [f"Means ± standard deviations over the seeds {seeds}; in brackets the 95 % interval of the difference from the first row of that strength "
             "(paired t over the seeds)." if len(found["settings"]["seeds"]) > 1 else f"Figures of the one seed {seeds}.", ""]
    lines += _head("link in the text", "method", "parameters", "stereotype preference", "removed", "log-odds, nats", "perplexity", "by the base's",
                   "half removed at no more than 5 %")
    for r in text:
        f, base = r["figures"], r["method"] == NONE
        against = ("-", "-", "-") if base else (_percent(r["removed"]), f"{r['dearer']:.3f}", "yes" if r["reached"] else "no")
        lines.append(_row(f"{r['strength']:g}", "base" if base else r["method"], f"{r['parameters']:,}", _spread(f[PREFERENCE], 3), against[0],
                          _spread(f["stereotype-log-odds"], 2), _spread(f["perplexity"], 3), *against[1:]))
    lines += ["", *_head("link in the labels", "method", "accuracy, %", "TPR-GAP rms, points", "of which chance", "predictions changed, %", "shift, points")]
    for r in labels:
        f = r["figures"]
        lines.append(_row(f"{r['strength']:g}", "plain" if r["method"] == NONE else r["method"],
                          *(_spread(f[name], 1) for name in ("accuracy", GAP, "tpr-gap/rms-shuffled", "causal/changed", "causal/shift"))))
    if (grows := found["monotone"]) is not None:
        lines += ["", f"Spearman's correlation of the strength in the labels with plain fine-tuning's TPR-GAP, means over seeds: {_number(grows['spearman'], 3)} "
                      f"over {len(grows['strengths'])} strengths (each seed alone: {', '.join(_number(rho, 3) for rho in grows['spearman_of_each_seed'])})."]
    run = [r for r in text if r["method"] != NONE]
    short = {s: [r["method"] for r in run if r["strength"] == s and not r["reached"]] for s in dict.fromkeys(r["strength"] for r in run)}
    if short:
        lines += [""] + [f"Link {s:g} in the text: half of the stereotype preference removed at no more than 5 % worse perplexity by "
                         f"{_but(names, [r['method'] for r in run if r['strength'] == s])}." for s, names in short.items()]
    lines += ["", f"{found['units']} units in {found['cpu_seconds']:,.0f} s of one core ({found['seconds']:,.0f} s on the clock, added up), scale "
                  f"{found['settings']['scale']:g}; {found['versions']['device']}, torch {found['versions']['torch']}, commit {found['versions']['commit']}."]
    return "\n".join(lines) + "\n"


def _but(short: list[str], every: list[str]) -> str:
    if len(short) == len(every):
        return "no method"
    return f"every method but {', '.join(short)}" if short else "every method"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _spread(figure: dict, digits: int) -> str:
    """"58.4 ± 2.1 [-3.0 to 1.2]"."""
    said = _number(figure["mean"], digits) + ("" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}")
    change = figure.get("change")
    return said if change is None else f"{said} [{change['low']:+.{digits}f} to {change['high']:+.{digits}f}]"
