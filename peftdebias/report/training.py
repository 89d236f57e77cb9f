"""Training curves: loss over steps and what validation found, a plot for each system, a line for each seed."""

from . import figures
from .page import Figure, Figures, Section, Table
from .reading import RunFiles, Source, Stretch

MOST_POINTS = 120  # of a line; more are averaged


def training(source: Source, ident: str) -> Section | None:
    """The section, or None where no run left its events."""
    groups: dict[str, dict] = {}  # title -> folder -> run
    seen = set()
    for a in source.answered:
        if a.run and a.run.folder not in seen and any(s.steps or s.validations for s in a.run.stretches):
            seen.add(a.run.folder)  # a run may have been measured on several tasks
            groups.setdefault(f"{a.system}, {a.stage}{' ' + a.task if a.task else ''}", {})[a.run.folder] = a.run
    made, tables = [], []
    for number, (title, runs) in enumerate(groups.items()):
        made += _figures(f"{ident}-training-{number}", title, list(runs.values()))
        tables.append(_table(title, list(runs.values())))
    if not made:
        return None
    note = "A line for each seed; a ring marks the state that was kept. Training losses are means over some steps, validation is on held-out data."
    return Section("training", "Training", [], [Figures(made, note, [t for t in tables if t.rows])])


def _figures(ident: str, title: str, runs: list[RunFiles]) -> list[Figure]:
    """One plot, or two where validation is in another unit than the loss."""
    key = _validated(runs)
    losses = [("training loss", 0, *_thinned(_points(run, "steps", "loss")), False) for run in runs]
    losses = [(name, style, steps, values, len(steps) == 1) for name, style, steps, values, _ in losses if steps]  # a single value is no line
    checked = [(f"validation {key}", 1, *map(list, zip(*points)), True) for run in runs if (points := _points(run, "validations", key))]
    kept = [point for run in runs for point in _kept(run, key)]
    made = []
    if key == "loss":
        made.append(("loss", "loss, nats", losses + checked, kept))
    else:
        made += [("loss", "loss, nats", losses, []), (key, f"{key}, %", checked, kept)]
    return [Figure(figures.curves(f"{ident}-{i}", _alt(title, what, lines), lines, label, points), f"{title}: {what}")
            for i, (what, label, lines, points) in enumerate(made) if lines]


def _alt(title: str, what: str, lines: list[tuple]) -> str:
    ends = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, _, _, values, _ in lines[:4])
    return f"Line plot of {what} over training steps, {title}: {ends}"


def _validated(runs: list[RunFiles]) -> str:
    """What chose the state that was kept."""
    figures_ = next((f for run in runs for s in run.stretches for _, f in s.validations), {})
    wanted = runs[0].config.get("metric", "loss")
    return wanted if wanted in figures_ else next(iter(figures_), "loss")


def _starts(run: RunFiles) -> list[tuple[float, Stretch]]:
    """Trainings of one run stand behind each other."""
    found, start = [], 0.0
    for stretch in run.stretches:
        found.append((start, stretch))
        start += max((step for step, _ in [*stretch.steps, *stretch.validations]), default=0)
    return found


def _points(run: RunFiles, kind: str, key: str) -> list[tuple[float, float]]:
    return [(start + step, found[key]) for start, stretch in _starts(run) for step, found in getattr(stretch, kind) if key in found]


def _kept(run: RunFiles, key: str) -> list[tuple[float, float]]:
    return [(start + step, found[key]) for start, stretch in _starts(run) for step, found in stretch.validations if step == stretch.kept and key in found]


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(steps, values), groups of neighbours averaged so that at most MOST_POINTS are left."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]


def _table(title: str, runs: list[RunFiles]) -> Table:
    key = _validated(runs)
    of = [dict(reversed(_points(run, "validations", key))) for run in runs]  # where one training ends and the next begins, the end
    steps = sorted({step for found in of for step in found})
    digits = 4 if key == "loss" else 2
    rows = [(f"{step:g}", *(f"{found[step]:.{digits}f}" if step in found else "–" for found in of)) for step in steps]
    return Table(f"Validation {key}: {title}", ("step", *(f"seed {run.config.get('seed')}" for run in runs)), rows, folded=True)
