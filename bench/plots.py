"""python bench/plots.py FILE.json...: draws the times of bench/compare.py's rows as FILE.svg: for each case and size a bar a provider, from zero, and the floor as a line.

What it adds over rows.py: the drawing, from rows alone, by hand, so that it needs no library. Ours is dark, theirs light, and every bar has its name and number beside it: it can be
read in grey.
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.arguments import Parser, complain, existing_file  # noqa: E402
from bench.rows import Row, number, read, saved  # noqa: E402
from peftdebias.outputs import write_text  # noqa: E402

WIDTH, LEFT, RIGHT = 820, 270, 200  # of the picture; of the names; of the numbers behind the longest bar
BAR, STEP, HEAD, FOOT = 16, 24, 34, 34  # heights: of a bar, from bar to bar, above and below those of a panel
OURS, THEIRS, INK, PAPER = "#1d3557", "#cfd8e3", "#1a1a1a", "#ffffff"

Panel = tuple[str, list[Row]]


def panels(found: Sequence[Row]) -> list[Panel]:
    """(case and size, time rows) of the steps."""
    times = [row for row in found if row.metric_name == "time" and "floor_ms" in row.extra_config]
    keys = dict.fromkeys((row.kernel_name, row.extra_config["size"]) for row in times)
    return [(f"{case}, {size}", [row for row in times if (row.kernel_name, row.extra_config["size"]) == (case, size)]) for case, size in keys]


def describe(found: Sequence[Row]) -> str:
    """The drawing in words."""
    said = [f"{name}: {', '.join(f'{row.provider} {number(row.y_50)}' for row in rows)}, floor {number(rows[0].extra_config['floor_ms'])}" for name, rows in panels(found)]
    return "Milliseconds a step. " + "; ".join(said)


def draw(found: Sequence[Row]) -> str:
    """An SVG document."""
    made = panels(found)
    height = sum(HEAD + STEP * len(rows) + FOOT for _, rows in made)
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height), "role": "img",
                                       "aria-labelledby": "title desc", "font-family": "DejaVu Sans, Verdana, sans-serif", "font-size": "12", "fill": INK})
    _add(root, "title", "Milliseconds a step, provider by provider", id="title")
    _add(root, "desc", describe(found), id="desc")
    _add(root, "rect", width=WIDTH, height=height, fill=PAPER)
    top = 0
    for name, rows in made:
        _panel(root, top, name, rows)
        top += HEAD + STEP * len(rows) + FOOT
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _panel(root, top: float, name: str, rows: list[Row]) -> None:
    floor = rows[0].extra_config["floor_ms"]
    scale = (WIDTH - LEFT - RIGHT) / max(floor, *(row.y_80 for row in rows))
    first, last = top + HEAD, top + HEAD + STEP * len(rows)
    _add(root, "text", f"{name}: ms a step, less is better", x=12, y=top + 20, font_size=13, font_weight="bold")
    for i, row in enumerate(rows):
        y, mine = first + STEP * i, row.provider.startswith("peftdebias")
        middle, end = y + BAR / 2, LEFT + scale * row.y_80
        _add(root, "text", row.provider, x=LEFT - 8, y=middle + 4, text_anchor="end", font_weight="bold" if mine else "normal")
        _add(root, "rect", x=LEFT, y=y, width=scale * row.y_50, height=BAR, fill=OURS if mine else THEIRS, stroke=INK, stroke_width=0.8)
        _line(root, f"M{LEFT + scale * row.y_20:.1f} {middle}H{end:.1f}M{end:.1f} {middle - 4}v8", 1.2)
        spread = f" ({number(row.y_20)} to {number(row.y_80)})" if row.y_20 != row.y_80 else ""
        _add(root, "text", f"{number(row.y_50)}{spread}", x=end + 8, y=middle + 4)
    place = LEFT + scale * floor
    _line(root, f"M{place:.1f} {first - 5}V{last + 2}", 1.6, stroke_dasharray="5 3")
    _add(root, "path", d=f"M{LEFT} {first - 5}V{last + 2}", stroke=INK, stroke_width=0.8)
    _add(root, "text", f"floor {number(floor)}: the FLOPs at {rows[0].extra_config['gemm_gflops']:.0f} GFLOP/s", x=place, y=last + 15, font_size=11)


def _line(root, path: str, width: float, **attributes) -> None:
    """Ink on a strip of paper: it is seen on a dark bar too."""
    _add(root, "path", d=path, stroke=PAPER, stroke_width=width + 2.4, fill="none")
    _add(root, "path", d=path, stroke=INK, stroke_width=width, fill="none", **attributes)


def _add(root, tag: str, text: str | None = None, **attributes) -> None:
    element = ElementTree.SubElement(root, tag, {key.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in attributes.items()})
    element.text = text


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="bench/plots.py", description=__doc__.splitlines()[0])
    top.add_argument("files", nargs="+", type=existing_file, metavar="FILE.json")
    for path in top.parse_args(argv).files:
        try:
            found = read(path)
        except (OSError, ValueError, TypeError) as error:
            return complain(f"{path}: expected the rows of a benchmark, got {error}")
        if not panels(found):
            return complain(f"{path}: expected steps with a floor, as bench/compare.py writes them, found none")
        drawing = path.with_suffix(".svg")
        if not saved(drawing, lambda: write_text(drawing, draw(found))):
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
