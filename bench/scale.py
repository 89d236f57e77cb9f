"""python bench/scale.py [NAME...]: how time and memory grow with one thing at a time, on a CPU: curves, exponents and a drawing.

    python bench/scale.py --out bench/results/scale-cpu.json         all, some minutes
    python bench/scale.py layers                                     one of them; with --save-memory beside it

x: tokens of a batch, length of the texts at the same number of tokens, layers, width, rank, composed modules (one upstream step of LoRA each), corpus (one epoch of texts made
into masked batches). The points of a curve take turns, each repeat beginning with another. Time: median over the repeats. Peak memory: above what lay there before the pass.
The exponent e of y ~ x^e is the least-squares slope of log y over log x with its standard error; beside it that of the last two points, which an offset bends less.
"""

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy  # noqa: E402
import torch  # noqa: E402

from bench import measure, rows  # noqa: E402
from bench.arguments import Parser, complain, positive, results_file, say  # noqa: E402
from bench.case import Provider, Setting, Work  # noqa: E402
from bench.cases_scale import GROWTHS, SAVING, SMALL, Shape, build  # noqa: E402

METRICS = ("time", "peak memory", "saved for backward")


# ---------------------------------------------------------------- the fit

@dataclasses.dataclass(frozen=True)
class Fit:
    """y ~ factor * x ** exponent by least squares in log-log. error: standard error of the exponent, None with two points. last: the slope between the last two."""

    exponent: float
    error: float | None
    factor: float
    last: float

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.exponent:.2f}{spread}; {self.last:.2f} between the last two"


def fit(x: list[float], y: list[float]) -> Fit | None:
    """None where a value is not above 0 or there are fewer than two."""
    if len(x) < 2 or min(*x, *y) <= 0:
        return None
    u, v = numpy.log(x), numpy.log(y)
    spread = float(((u - u.mean()) ** 2).sum())
    slope = float(((u - u.mean()) * (v - v.mean())).sum()) / spread
    factor = math.exp(float(v.mean() - slope * u.mean()))
    left = float(((v - math.log(factor) - slope * u) ** 2).sum())
    error = math.sqrt(left / (len(x) - 2) / spread) if len(x) > 2 else None
    return Fit(slope, error, factor, float((v[-1] - v[-2]) / (u[-1] - u[-2])))


# ---------------------------------------------------------------- the measurement

def points(name: str, values: tuple[int, ...], changes: dict) -> dict[tuple[str, int], tuple[Shape, bool]]:
    """(provider, x) -> (shape, whether memory is saved)."""
    growth = GROWTHS[name]
    shapes = {x: dataclasses.replace(growth.shape(x), **{k: v for k, v in changes.items() if k not in CHANGES.get(name, ())}) for x in values}
    return {(provider, x): (shapes[x], saving) for provider, saving in (("peftdebias", False), (SAVING, True)) if growth.both or not saving for x in values}


CHANGES = {"layers": ("layers",), "width": ("hidden",), "rank": ("rank",), "modules": ("modules",), "length": ("sequences", "length"), "tokens": ("sequences", "length")}
"""What grows -> the fields of Shape that are its own."""


def measured(name: str, values: tuple[int, ...], repeats: int, changes: dict, folder: Path) -> list[rows.Row]:
    """Rows of one curve, or of two."""
    works: dict[tuple[str, int], Work] = {}
    asked = points(name, values, changes)
    for key, (shape, saving) in asked.items():
        works[key] = build(shape, saving, folder)
        works[key].run()
    setting = Setting("micro", 0, folder)
    peaks = {key: measure.cpu_peak(Provider(lambda _, work=work: work), setting) for key, work in works.items()}
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for i in range(repeats):
        for key in measure.in_turn(works, i):
            spent[key].append(measure.seconds(works[key], 1, setting.device))
    metrics = {}
    for key, work in works.items():
        low, middle, high = (1000 * float(numpy.quantile(spent[key], q)) for q in (0.2, 0.5, 0.8))
        metrics[key] = {"time": [middle, low, high], **({} if peaks[key] is None else {"peak memory": [peaks[key]] * 3}), **({"saved for backward": [work.held()] * 3} if work.held else {})}
    fits = {}
    for provider in dict.fromkeys(p for p, _ in works):
        for metric in METRICS:
            curve = {x: found[metric][0] for (p, x), found in metrics.items() if p == provider and metric in found}
            if (made := fit([*curve], [*curve.values()])) is not None:
                fits[provider, metric] = made
    base, found = next(iter(asked.values()))[0], []
    words = "32 texts a batch, masked; one thread of Python, gender axis" if base.corpus else base.words
    for (provider, x), of in metrics.items():
        extra = {"size": "scale", "baseline": "peftdebias", "precision": "float32", "repeats": repeats, "load_average": round(os.getloadavg()[0], 2), "load_at_start": measure.LOAD_AT_START,
                 "device": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", "setting": f"at the first {name}: {words}",
                 "shape": dataclasses.asdict(asked[provider, x][0])}
        common = dict(device_name=rows.device_name(setting.device), torch_version=torch.__version__, triton_version=rows.version("triton"), commit=rows.commit(), timestamp=rows.now())
        for metric, ys in of.items():
            made = fits.get((provider, metric))
            found.append(rows.Row(f"scale_{name}", provider, "full" if base.corpus else "step", metric, rows.UNITS[metric], name, x, *ys,
                                  extra | ({} if made is None else {"fit": dataclasses.asdict(made)}), **common))
    return found


def exponents(found: list[rows.Row]) -> list[str]:
    """A line a curve: what was fitted, and why it may be so."""
    lines = {}
    for row in found:
        if "fit" in row.extra_config:
            name = row.kernel_name.removeprefix("scale_")
            lines[row.kernel_name, row.provider, row.metric_name] = f"{name}, {row.provider}, {row.metric_name}: exponent {Fit(**row.extra_config['fit'])}"
    said = [f"{name}: {GROWTHS[name].expected}" for name in dict.fromkeys(row.x_name for row in found)]
    return [*lines.values(), *said]


def savings(found: list[rows.Row]) -> list[str]:
    """What --save-memory costs and brings, x by x."""
    lines = []
    mine = {(row.provider, row.metric_name, row.x_value): row.y_50 for row in found if row.kernel_name == "scale_layers"}
    for x in dict.fromkeys(x for provider, _, x in mine if provider == SAVING):
        parts = [f"{metric} {mine[SAVING, metric, x] / mine['peftdebias', metric, x]:.2f}" for metric in METRICS if mine.get(("peftdebias", metric, x))]
        lines.append(f"{x:g} layers, --save-memory over without: {', '.join(parts)}")
    return lines


# ---------------------------------------------------------------- the drawing

def draw(found: list[rows.Row]):
    """matplotlib Figure: a column for what grows; above time, below peak memory, both axes logarithmic. Dashes and fillings differ, not hues. Raises ModuleNotFoundError without it."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    from peftdebias.report.planted import AFTER, BEFORE

    names = list(dict.fromkeys(row.x_name for row in found))
    figure = Figure(figsize=(1.2 + 1.9 * len(names), 4.8), layout="constrained")
    axes = figure.subplots(2, len(names), sharex="col", sharey="row", squeeze=False)
    for line, metric in zip(axes, METRICS):
        for axis, name in zip(line, names):
            here = [row for row in found if row.x_name == name and row.metric_name == metric]
            curves = {provider: [row for row in here if row.provider == provider and row.y_50 > 0] for provider in ("peftdebias", SAVING)}
            highest = max((curve for curve in curves.values() if curve), key=lambda curve: curve[-1].y_50, default=None)
            for (provider, curve), style in zip(curves.items(), (AFTER, BEFORE)):
                if not curve:
                    continue
                axis.errorbar([r.x_value for r in curve], [r.y_50 for r in curve], yerr=[[r.y_50 - r.y_20 for r in curve], [r.y_80 - r.y_50 for r in curve]], label=provider,
                              linewidth=1.2, markersize=4, elinewidth=1, **style)
                if made := curve[0].extra_config.get("fit"):
                    axis.annotate(f"{made['exponent']:.2f}", (curve[-1].x_value, curve[-1].y_50), xytext=(0, 6 if curve is highest else -13), textcoords="offset points",
                                  ha="right", fontsize=8)
            axis.set(xscale="log", yscale="log")
            axis.minorticks_off()
            axis.set_xticks(values := sorted({row.x_value for row in here}), [f"{x:g}" for x in values], fontsize=7, rotation=45)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, name in zip(axes[1], names):
        axis.set_xlabel(name)
    axes[0][0].set_ylabel("time, ms")
    axes[1][0].set_ylabel("peak memory, MiB")
    handles = {label: handle for line in axes for axis in line for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def save_drawing(found: list[rows.Row], path: Path) -> str:
    """Writes an SVG; a line on it, or on what is missing."""
    try:
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "peftdebias"}):
            draw(found).savefig(path, metadata={"Date": None})
    except ModuleNotFoundError as error:
        return f"no drawing: it needs {error.name} (pip install 'peftdebias[report]')"
    return f"drawing: {path}"


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/scale.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(GROWTHS)} (default all)")
    top.add_argument("--repeats", type=positive, default=5, metavar="N", help="times that every point is timed (default 5)")
    top.add_argument("--small", action="store_true", help="two points a curve of a tiny model: the path, not a measurement")
    top.add_argument("--out", type=results_file, metavar="FILE.json", help="write the rows there; FILE.md and FILE.svg beside it")
    arguments = top.parse_args(argv)
    for name in arguments.names:
        if name not in GROWTHS:
            return complain(f"no curve {name!r}; expected some of {', '.join(GROWTHS)}")
    changes, found = dict(layers=1, hidden=64, vocab=97, sequences=2, length=32, rank=2) if arguments.small else {}, []
    with tempfile.TemporaryDirectory(prefix="peftdebias-bench-") as folder:
        for name in arguments.names or GROWTHS:
            say(f"{name}: timing")
            found += measured(name, SMALL[name] if arguments.small else GROWTHS[name].values, arguments.repeats, changes, Path(folder))
    heading, notes = f"Measured by bench/scale.py on {rows.device_name(torch.device('cpu'))}", {"Exponents": exponents(found)}
    if lines := savings(found):
        notes["--save-memory"] = lines
    print(f"# {heading}\n\n{rows.table(found, notes)}")
    if arguments.out:
        if not rows.saved(arguments.out, lambda: rows.write(arguments.out, found, heading, notes), lambda: say(save_drawing(found, arguments.out.with_suffix(".svg")))):
            return 1
        say(f"result: {arguments.out} and {arguments.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
