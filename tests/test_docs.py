"""The documents: their tables say what the package has, no name too many, none too few; their links lead somewhere."""

import dataclasses
import importlib.util
import re
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest

import peftdebias
from peftdebias import kernels
from peftdebias.kernels import dispatch
from peftdebias.methods import METHODS, method_class

ROOT = Path(__file__).resolve().parent.parent


def table(path: str, head: str) -> list[list[str]]:
    """The cells of the first table from the line on that begins with `head`, row by row."""
    after = dropwhile(lambda line: not line.startswith(head), (ROOT / path).read_text("utf-8").splitlines())
    rows = takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), after))
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in rows][2:]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_methods():
    rows = {code(name)[0]: rest for name, _, *rest in table("README.md", "| method |")}
    assert set(rows) == set(METHODS)
    for name, (options, *flags) in rows.items():
        cls = method_class(name)
        assert set(filter(None, re.sub(r" *\(.*?\)", "", options).split(", "))) == {field.name for field in dataclasses.fields(cls.Config)}, name
        assert flags == (["", ""] if cls.trains_base else ["yes" if flag else "no" for flag in (cls.mergeable, cls.foldable)]), name


def test_ops_their_files_and_their_forms():
    rows = [(code(files), code(ops)) for files, ops, _ in table("docs/kernels.md", "| file |")]
    assert {op: files[0].removesuffix(".py") for files, ops in rows for op in ops} == kernels.TRITON
    assert {file for files, _ in rows for file in files} == {path.name for path in (ROOT / "kernels" / "fused").glob("*.py")} - {"__init__.py"}
    forms = {code(name)[0]: set(values.split(", ")[1:]) for name, values, _ in table("docs/kernels.md", "| variable |")}
    assert forms == {"PEFTDEBIAS_KERNELS": set(kernels.KINDS[1:])} | {f"PEFTDEBIAS_{op.upper()}": set(known) for op, known in dispatch.FORMS.items()}


def test_public_names():
    assert not [name for name in peftdebias.__all__ if importlib.util.find_spec(f"peftdebias.{name}")]  # importing that would take the name's place
    assert sorted(name for names, _ in table("docs/embedding.md", "## The public names") for name in code(names)) == sorted({*peftdebias.__all__} - {"__version__"})


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


PAGES = [path.relative_to(ROOT) for folder in (ROOT, ROOT / "docs", ROOT / "bench", ROOT / "bench" / "results") for path in sorted(folder.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_are_there(page):
    wrong = []
    for link in re.findall(r"\]\(([^()\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if "://" not in link and not (there.exists() and (not anchor or anchor in slugs(there))):
            wrong.append(link)
    assert not wrong
