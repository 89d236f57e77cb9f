"""What a page is made of, and the page itself: sections of tables, figures and examples, filled into report.html.jinja.

Everything that comes from data is text. jinja2 escapes it, and `shown` makes visible what would otherwise act without being seen: control characters, and
those that turn the direction of writing. SVG from figures.py is the one thing that goes in as it is; its texts went through the same two there.
"""

import dataclasses
import importlib.resources
import unicodedata
from typing import Any

KEPT = {"\t", "\n", "\u200c", "\u200d", "\ufe0e", "\ufe0f"}  # joiners and variant selectors, which Arabic, Indic scripts and emoji need


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of several lines: the figure, and smaller what belongs to it. strong: set apart, by more than colour."""

    text: str
    small: tuple[str, ...] = ()
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The first column heads its rows. folded: closed until it is opened (the table behind a plot)."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""
    folded: bool = False
    words: bool = False  # its cells are words, not numbers
    kind: str = "table"


@dataclasses.dataclass(frozen=True)
class Figure:
    """svg: from figures.py. caption: what is to be seen."""

    svg: Any
    caption: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """Several that stand side by side where there is room. note: how to read them; tables: what they were drawn from."""

    figures: list[Figure]
    note: str = ""
    tables: list[Table] = dataclasses.field(default_factory=list)
    kind: str = "figures"


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and its counterfactual as (piece, whether the other has something else there); before, after: what was predicted, how surely (%)."""

    place: str
    text: list[tuple[str, bool]]
    counterfactual: list[tuple[str, bool]]
    before: tuple[str, str]
    after: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Examples:
    title: str
    note: str
    rows: list[Example]
    kind: str = "examples"


@dataclasses.dataclass(frozen=True)
class Lines:
    """Commands, one a line."""

    title: str
    lines: list[str]
    kind: str = "lines"


@dataclasses.dataclass(frozen=True)
class Section:
    """paragraphs stand before the blocks (Table, Figures, Examples, Lines); notes behind them."""

    id: str
    title: str
    paragraphs: list[str]
    blocks: list[Any]
    notes: list[str] = dataclasses.field(default_factory=list)


def shown(value):
    """Control characters, lone surrogates and direction marks as what they are, ⟨U+202E⟩; other values as they came."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(c if c in KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn") else f"\u27e8U+{ord(c):04X}\u27e9" for c in value)


def render(title: str, parts: list[tuple[str, list[Section]]], limits: list[str], made_by: str) -> str:
    """The HTML file. parts: (title of a source, its sections)."""
    import jinja2

    source = importlib.resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=shown, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(title=title, parts=parts, limits=limits, made_by=made_by)
