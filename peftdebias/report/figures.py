"""Plots as SVG that belongs to the page: text stays text in the page's colour, series take the page's colours, nothing is fetched.

matplotlib draws with stand-in colours, which become currentColor and CSS variables here, so that one drawing serves light and dark pages. Series differ
by marker and line as well as by colour, so that a print in grey can be read. Every figure is WIDTH units wide, a phone's width, and as high as it needs.
"""

import contextlib
import dataclasses
import io
import logging
import re
import warnings
import xml.etree.ElementTree as ElementTree

from .page import shown

WIDTH = 330  # of the viewBox, about pixels
POINT = 72  # units an inch
FONT = 10
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
DASHES = ("-", "--")
INK, FAINT, PAPER = "#010201", "#010202", "#010203"
SERIES = tuple(f"#0102{16 + i:02x}" for i in range(7))
COLOURS = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {code: f"var(--series-{i})" for i, code in enumerate(SERIES)}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
MOST_NAMES = 24  # in a legend
LONGEST_LABEL, LONGEST_TITLE = 22, 46  # characters of a name beside an axis, and of one along an axis or in a legend; the table has all of it


@dataclasses.dataclass(frozen=True)
class Series:
    """One set of marks. values: y or x of each row or point, None where there is none; low, high: ends of the intervals. style: which of the MARKERS and,
    in turn, of the SERIES' colours; hollow: an empty mark, for what is compared with."""

    name: str
    values: list[float | None]
    low: list[float | None]
    high: list[float | None]
    style: int = 0
    hollow: bool = False


def dots(ident: str, alt: str, rows: list[str], series: list[Series], label: str, ideal: float | None = None, ideal_name: str = "ideal",
         ends: tuple[float, float] | None = None):
    """Rows of marks with intervals on one scale. rows: names, from the top. ends: what the scale reaches from and to, for plots that share it."""
    with _drawing(28 + 15 * len(rows) + 18 * len(series) + (18 if ideal is not None else 0) + 30) as figure:
        axes = figure.subplots()
        places = range(len(rows))
        if ideal is not None:
            axes.axvline(ideal, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label=ideal_name, zorder=1)
        for i, one in enumerate(series):
            shift = (i - (len(series) - 1) / 2) * 0.34
            known = [(x, p + shift, low, high) for x, p, low, high in zip(one.values, places, one.low, one.high) if x is not None]
            bars = [(y, low, high) for _, y, low, high in known if low is not None and high is not None]
            if bars:
                axes.hlines(*zip(*bars), colors=_colour(one), linewidth=1.1, zorder=2)
            axes.plot([k[0] for k in known], [k[1] for k in known], zorder=3, **_marks(one), markersize=4.5)
        if ends is not None:
            room = 0.04 * (ends[1] - ends[0]) or 1.0
            axes.set_xlim(ends[0] - room, ends[1] + room)
        axes.set_yticks(list(places), [_cut(name) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(_cut(label, LONGEST_TITLE))
        axes.grid(axis="x", color=FAINT, linewidth=0.4)
        axes.hlines([y + 0.5 for y in places], 0, 1, transform=axes.get_yaxis_transform(), colors=FAINT, linewidth=0.25, zorder=0)
        axes.tick_params(length=0)
        _legend(figure, axes, 1)
        return _svg(figure, ident, alt)


def scatter(ident: str, alt: str, points: list[tuple[str, tuple, tuple]], x_label: str, y_label: str, x_ideal: float | None = None, y_ideal: float | None = None,
            baseline: str | None = None):
    """Quality against bias. points: (system, (x, low, high), (y, low, high)). Ideals are drawn where they lie near."""
    columns = 2 if max(len(p[0]) for p in points) <= 18 else 1
    with _drawing(240 + _legend_height(len(points), columns)) as figure:
        axes = figure.subplots()
        for i, (name, (x, *x_ends), (y, *y_ends)) in enumerate(points):
            one = Series(name, [], [], [], i, name == baseline)
            if None not in x_ends:
                axes.plot(x_ends, [y, y], color=_colour(one), linewidth=1, zorder=2)
            if None not in y_ends:
                axes.plot([x, x], y_ends, color=_colour(one), linewidth=1, zorder=2)
            axes.plot([x], [y], zorder=3, **_marks(one), markersize=7)
        for ideal, limits, line in ((x_ideal, axes.get_xlim(), axes.axvline), (y_ideal, axes.get_ylim(), axes.axhline)):
            if ideal is not None and limits[0] - 0.5 * (limits[1] - limits[0]) <= ideal <= limits[1] + 0.5 * (limits[1] - limits[0]):
                line(ideal, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        axes.set_xlabel(_cut(x_label, LONGEST_TITLE))
        axes.set_ylabel(_cut(y_label, 36))
        axes.grid(color=FAINT, linewidth=0.4)
        axes.margins(0.08)
        _legend(figure, axes, columns)
        return _svg(figure, ident, alt)


def curves(ident: str, alt: str, lines: list[tuple[str, int, list[float], list[float], bool]], label: str, kept: list[tuple[float, float]] = (), along: str = "step",
           frame: tuple[float, float] | None = None):
    """Figures over training steps, or over what `along` names. frame: both scales reach from 0 to these, for plots that are to be compared. lines: (name, style, steps, values, whether each value gets a mark); of several with one name the first is in the legend.
    kept: (step, value) of the states that were kept."""
    names = list(dict.fromkeys(line[0] for line in lines))
    with _drawing(200 + _legend_height(len(names) + bool(kept), 1)) as figure:
        axes = figure.subplots()
        told = set()
        for name, style, steps, values, marked in lines:
            mark = {"marker": MARKERS[style], "markersize": 3.5} if marked else {}
            axes.plot(steps, values, color=SERIES[style], linestyle=DASHES[style], linewidth=1.4, label=None if name in told else _text(name), **mark)
            told.add(name)
        if kept:
            axes.plot([k[0] for k in kept], [k[1] for k in kept], linestyle="none", marker="o", markersize=10, markerfacecolor="none", markeredgecolor=INK, label="kept")
        axes.xaxis.get_major_locator().set_params(integer=along == "step")
        if frame is not None:
            axes.set_xlim(-0.04 * frame[0], 1.04 * frame[0])
            axes.set_ylim(0, 1.04 * frame[1])
        axes.set_xlabel(_cut(along, LONGEST_TITLE))
        axes.set_ylabel(_cut(label, LONGEST_LABEL))
        axes.grid(color=FAINT, linewidth=0.4)
        _legend(figure, axes, 1)
        return _svg(figure, ident, alt)


# ---------------------------------------------------------------- how it is drawn

def _colour(one: Series) -> str:
    return SERIES[one.style % len(SERIES)]


def _marks(one: Series) -> dict:
    colour = _colour(one)
    return {"linestyle": "none", "marker": MARKERS[one.style % len(MARKERS)], "color": colour, "markerfacecolor": PAPER if one.hollow else colour, "markeredgecolor": colour,
            "markeredgewidth": 1.2, "label": _text(one.name)}


def _text(text: str) -> str:
    """As it may stand in a drawing: one line; a leading underscore would keep matplotlib from showing it in a legend."""
    text = " ".join(shown(str(text)).split())
    return "\u200b" + text if text.startswith("_") else text


def _cut(text: str, longest: int = LONGEST_LABEL) -> str:
    text = _text(text)
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def _legend_height(names: int, columns: int) -> int:
    return 15 * (-(-names // columns) if names <= MOST_NAMES else 1)


def _legend(figure, axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MOST_NAMES:
        figure.legend([], [], title=f"{len(names)} systems; the numbers below name them", loc="outside lower left", frameon=False, title_fontsize=FONT - 0.5)
    elif len(names) > 1:
        figure.legend(handles, [_cut(name, LONGEST_TITLE) for name in names], loc="outside lower left", ncols=columns, frameon=False, fontsize=FONT - 0.5,
                      handlelength=2.2, columnspacing=1.2, labelspacing=0.35)


@contextlib.contextmanager
def _drawing(height: float):
    """A figure of WIDTH x height units under our settings, whatever the user's matplotlibrc says."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "peftdebias", "text.parse_math": False, "text.usetex": False, "font.family": "DejaVu Sans", "font.size": FONT,
                "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.facecolor": "none", "xtick.color": INK, "ytick.color": INK,
                "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.labelcolor": INK,
                "figure.facecolor": "none", "axes.formatter.useoffset": False}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # letters that the measuring font lacks; the page's fonts have them
            yield Figure(figsize=(WIDTH / POINT, height / POINT), layout="constrained")


def _svg(figure, ident: str, alt: str):
    """The drawing as an <svg> element for a page: role, name, our colours, no fixed size, no metadata, ids of its own."""
    import markupsafe  # comes with jinja2

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{SVG}metadata" or child.tag == f"{SVG}style":
                parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", shown(alt))
    title = ElementTree.Element(f"{SVG}title")
    title.text = shown(alt)
    root.insert(0, title)
    used = set(re.findall(r"url\(#([^)]+)\)", "".join(v for e in root.iter() for v in e.attrib.values())))
    used |= {e.attrib[f"{XLINK}href"][1:] for e in root.iter() if f"{XLINK}href" in e.attrib}
    ids = {old: f"{ident}-{n}" for n, old in enumerate(sorted(used))}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in ids:
            element.set("id", ids[own])
        if (link := element.attrib.pop(f"{XLINK}href", None)) is not None:
            element.set("href", f"#{ids[link[1:]]}")
        for key, value in element.attrib.items():
            if key in ("style", "fill", "stroke", "clip-path"):
                value = re.sub(r"#0102[0-9a-f]{2}", lambda found: COLOURS[found[0]], value)
                value = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{ids[found[1]]})", value)
                element.set(key, re.sub(r"font: ?([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family:[^;]*;?", "", value)))
        element.tag = element.tag.removeprefix(SVG)
    return markupsafe.Markup(ElementTree.tostring(root, encoding="unicode"))
