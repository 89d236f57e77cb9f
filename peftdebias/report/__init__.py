"""`report`: runs and results as one self-contained HTML file, with their figures as metrics.json beside it.

    reading.py, runs.py, recipe.py      files -> `Source`, plain data
    testbed.py                          a testbed's figures -> sections; planted.py draws them as one picture
    results.py                          over seeds, against the baseline
    sections.py                         a source -> sections of a page: about.py, tables.py, plots.py, training.py, flips.py
    words.py, figures.py                numbers and names; plots as SVG
    page.py, report.html.jinja          the page

The file needs no network, no script and no font, and forbids them itself (Content-Security-Policy). The same files give the same bytes. KINDS lists what
a PATH can be; a new kind is a mark and a function that makes `Part`s.

Left out: anything that is not in the files given. A section without data does not appear.
"""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..config import Report
from ..errors import ConfigError, DataError
from ..options import expect
from ..outputs import files_in, keep_apart, writing
from .page import Section, render
from .reading import Source
from .recipe import source_of_recipe
from .results import as_data, compared
from .runs import source_of_runs
from .sections import sections_of
from .testbed import read_testbed, sections_of_testbed

FORMAT = 1  # of metrics.json
NEEDS = ("jinja2", "matplotlib")
PAGES = (".html", ".htm")
LIMITS = [
    "Measures of bias have positive predictive power only: they can show bias, never its absence. A figure at its ideal does not make a model fair.",
    "Gender is treated as binary, by the data and by the word lists; who does not fit in is not measured.",
    "The word lists of every axis are narrow: names, occupations and turns of phrase that tell of an identity without one of their words stay as they are.",
]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a report shows of one source, and the same as plain data for metrics.json."""

    title: str
    sections: list[Section]
    data: dict


def _runs(folders: list[Path], ident: str, settings: Report) -> list[Part]:
    return [_part(source_of_runs(folders), ident, settings)]


def _recipes(folders: list[Path], ident: str, settings: Report) -> list[Part]:
    sources = list(map(source_of_recipe, folders))
    return [_part(source, f"{ident}{i}", settings) for i, source in enumerate(sources)]


def _part(source: Source, ident: str, settings: Report) -> Part:
    every = compared(source)
    return Part(source.title, sections_of(source, ident, settings.examples, every), as_data(source, every))


def _testbeds(folders: list[Path], ident: str, settings: Report) -> list[Part]:
    found = {folder: read_testbed(folder) for folder in folders}
    parts = []
    for i, (folder, one) in enumerate(found.items()):
        try:
            parts.append(Part(f"Testbed {folder.name}", sections_of_testbed(one, f"{ident}{i}"), one))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{folder / 'testbed.json'}: expected the figures of `testbed`, got others ({type(error).__name__}: {error})") from None
    return parts


KINDS: dict[str, tuple[str, Callable[[list[Path], str, Report], list[Part]]]] = {
    "results.json": ("recipe", _recipes),
    "testbed.json": ("testbed", _testbeds),
    "config.toml": ("runs", _runs),
}
"""The file that marks a folder -> (how its elements' ids begin, what makes parts of all folders of the kind that were given)."""


def available() -> bool:
    """Whether what a report is made with is installed."""
    return all(importlib.util.find_spec(name) for name in NEEDS)


def report(settings: Report) -> tuple[Path, Path]:
    """Write settings.out and metrics.json beside it; returns both. Raises PeftDebiasError, and then leaves nothing behind."""
    expect(Report, settings)
    if not available():
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'peftdebias[report]'")
    out = Path(settings.out)
    beside = out.parent / "metrics.json"
    kinds = _kinds(settings.paths)
    earlier = (*PAGES, beside.name)  # reports may lie in what they show
    keep_apart({"--out": out, "the figures beside it": beside}, [f for path in settings.paths for f in files_in(path) if not f.name.lower().endswith(earlier)])
    if not out.name.lower().endswith(PAGES):
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(PAGES)}, got {out.suffix or 'none such'}")
    for path, mark in ((out, b"<!DOCTYPE html>"), (beside, b'{\n  "format": ')):
        if path.is_file() and not path.read_bytes().startswith(mark):
            raise ConfigError(f"--out {out}: would replace {path}, which is no earlier report; expected another name or folder")
    if beside.is_file() and (page := _page_of(beside)) != out.name and out.with_name(page).is_file():
        raise ConfigError(f"--out {out}: would replace {beside}, the figures of {out.with_name(page)}; expected another folder, or that page")
    with contextlib.ExitStack() as opened:
        html, figures_ = (opened.enter_context(writing(str(path))) for path in (out, beside))
        parts = [part for mark, (ident, make) in KINDS.items() if mark in kinds for part in make(kinds[mark], ident, settings)]
        title = parts[0].title if len(parts) == 1 else f"{len(parts)} results"
        html.write(render(title, [(p.title, p.sections) for p in parts], LIMITS, f"peftdebias {__version__}"))
        told = json.dumps({"format": FORMAT, "page": out.name, "sources": [p.data for p in parts]}, indent=2, ensure_ascii=False) + "\n"
        figures_.write(told.encode("utf-8", "backslashreplace").decode("utf-8"))  # names of folders that are no UTF-8 come as lone surrogates, here escapes of JSON
    return out, beside


def _page_of(figures_: Path) -> str:
    """The name of the page that these figures are of; "report.html" where they do not say."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        page = json.loads(figures_.read_text(encoding="utf-8")).get("page")
        if isinstance(page, str) and page == Path(page).name and page:
            return page
    return Report.out


def _kinds(paths: tuple[str, ...]) -> dict[str, list[Path]]:
    """mark -> the folders that have it, each once. Raises DataError on a path that is none of KINDS."""
    found: dict[str, list[Path]] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path}: expected a folder, got {'a file' if path.exists() else 'none'}")
        mark = next((mark for mark in KINDS if (path / mark).is_file()), None)
        if mark is None:
            raise DataError(f"{path}: expected a folder with {' or '.join(KINDS)}, found none of them")
        folder = path.resolve()
        if folder not in found.setdefault(mark, []):
            found[mark].append(folder)
    return found
