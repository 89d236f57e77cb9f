"""The report in headless Chromium: no message, no request, no script of the data's; it fits a desktop and a phone, is dark where the reader is, and greys well.

Skipped where there is no Chromium. PEFTDEBIAS_SCREENSHOTS=FOLDER keeps pictures of what was opened.
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from peftdebias import config  # noqa: E402
from peftdebias.report import page, report  # noqa: E402

from .browser import browser  # noqa: E402, F401
from .reports import FEW, HOSTILE, flip_row, hostile_results, hostile_runs, result_folder, results, run_folder, task_runs  # noqa: E402


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every text wants to be more than text."""
    root = tmp_path_factory.mktemp("hostile")
    folders = [*hostile_runs(root), result_folder(root / "recipe", hostile_results()), run_folder(root / "flips", "downstream", 3, examples={"": [flip_row(HOSTILE, HOSTILE + "x", HOSTILE, "b")]})]
    return report(config.Report(paths=tuple(map(str, folders)), out=str(root / "report.html")))[0]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A report of runs and a recipe with flips."""
    root = tmp_path_factory.mktemp("real")
    rows = [flip_row(text=f"he is number {i} of the nurses", counterfactual=f"she is number {i} of the nurses") for i in range(3)]
    folders = [*task_runs(root), run_folder(root / "flips", "downstream", 9, examples={"": rows}), result_folder(root / "recipe", results(FEW))]
    return report(config.Report(paths=tuple(map(str, folders)), out=str(root / "report.html")))[0]


def kept(browser, name: str) -> None:  # noqa: F811
    if folder := os.environ.get("PEFTDEBIAS_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("what", ["hostile", "real"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_says_nothing_asks_for_nothing_and_fits(what, width, dark, browser, request):  # noqa: F811
    path = request.getfixturevalue(what)
    found = browser.open(path, width, dark=dark)
    assert found.said == [] and found.asked == [path.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll inside their own box
    assert width == 1280 or browser.evaluate("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(box => getComputedStyle(box).overflowX == 'auto' && box.tabIndex == 0)")
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (paper, ink) == (("rgb(20, 23, 26)", "rgb(231, 234, 238)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 35)"))
    kept(browser, f"{what}-{width}-{'dark' if dark else 'light'}")


def test_the_test_sees_a_message_and_a_request(browser, tmp_path):  # noqa: F811
    """The same texts put into a page unescaped: without the policy they run and ask, with it the policy is seen to be broken."""
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    for name, head in (("without", ""), ("with", policy)):
        (tmp_path / f"{name}.html").write_text(f"<!DOCTYPE html>{head}<p>{HOSTILE.replace('alert', 'console.log')}", encoding="utf-8")
    found = browser.open(tmp_path / "without.html")
    assert any("evil.invalid" in url for url in found.asked) and any('"type": "log"' in said for said in found.said)
    found = browser.open(tmp_path / "with.html")
    assert any("Content Security Policy" in said for said in found.said) and not any('"type": "log"' in said for said in found.said)


def test_hostile_data_is_text_in_the_browser_too(hostile, browser):  # noqa: F811
    browser.open(hostile)
    shown = page.shown(HOSTILE)
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object, embed, link, form, input').length") == 0
    assert browser.evaluate("[...document.querySelectorAll('*')].every(e => [...e.attributes].every(a => !a.name.startsWith('on')))")
    for tag in ("h2", "td", "th", "p", "bdi", "summary", "figcaption", "svg title"):
        assert any(shown in text for text in browser.evaluate(f"[...document.querySelectorAll({tag!r})].map(e => e.textContent)")), tag
    assert browser.evaluate("document.documentElement.textContent.includes('\\u202e')") is False


def test_ids_are_unique_and_links_lead_somewhere(real, browser):  # noqa: F811
    browser.open(real)
    ids = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 20
    assert browser.evaluate("[...document.querySelectorAll('a, use')].every(e => document.getElementById(e.getAttribute('href').slice(1)))")
    assert browser.evaluate("[...document.querySelectorAll('[aria-labelledby]')].every(e => document.getElementById(e.getAttribute('aria-labelledby')).textContent.length > 3)")


def test_labels_of_a_drawing_do_not_lie_on_each_other_or_outside(real, browser):  # noqa: F811
    """Every text of every drawing, as the browser sets it: inside the drawing, and apart from the other texts."""
    for width in (1280, 375):
        browser.open(real, width)
        found = browser.evaluate("""(() => {
            const wrong = [];
            for (const svg of document.querySelectorAll('svg')) {
                const frame = svg.getBoundingClientRect(), boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
                for (const [text, b] of boxes)
                    if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.top < frame.top - 2 || b.bottom > frame.bottom + 2) wrong.push(['outside', text]);
                boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([two, b]) => {
                    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4) wrong.push([one, two]);
                }));
            }
            return wrong;
        })()""")
        assert found == []


@pytest.mark.parametrize("what", ["hostile", "real"])
def test_on_paper_nothing_is_closed_or_cut(what, browser, request):  # noqa: F811
    """In the width of a sheet: nobody can open a section there, or scroll to the last columns of a table."""
    browser.open(request.getfixturevalue(what), 725)
    assert not browser.evaluate("[...document.querySelectorAll('details > :not(summary)')].some(e => e.checkVisibility())")
    assert browser.evaluate("[...document.querySelectorAll('table')].some(t => t.getBoundingClientRect().right > 725)")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.evaluate("[...document.querySelectorAll('details > :not(summary)')].every(e => e.checkVisibility())")
        assert browser.evaluate("[...document.querySelectorAll('table, pre')].filter(t => t.getBoundingClientRect().right > 725).map(t => t.textContent.slice(0, 80))") == []
        assert browser.evaluate("document.documentElement.scrollWidth") == 725
    finally:
        browser.ask("Emulation.setEmulatedMedia", media="")


def test_every_section_opens_and_its_examples_are_closed_at_first(real, browser):  # noqa: F811
    browser.open(real)
    assert browser.evaluate("[...document.querySelectorAll('.example')].every(e => e.checkVisibility() === false)") and browser.evaluate("document.querySelectorAll('.example').length") == 3
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("[...document.querySelectorAll('.example')].every(e => e.checkVisibility())")
    assert browser.evaluate("document.documentElement.scrollWidth") == 1280
