"""A testbed in the report: every figure of testbed.json in its tables, one drawing a method, nothing that was not measured."""

import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from peftdebias.config import Report  # noqa: E402
from peftdebias.errors import DataError  # noqa: E402
from peftdebias.planted import summary  # noqa: E402
from peftdebias.planted.units import NONE, Unit  # noqa: E402
from peftdebias.report import report, testbed  # noqa: E402
from peftdebias.report.testbed import read_testbed, sections_of_testbed  # noqa: E402
from peftdebias.report.words import number  # noqa: E402

TEXT = {"stereotype-preference": ("1", 0.0), "stereotype-log-odds": ("nats", 0.0), "perplexity": ("1", None)}
LABELS = {"accuracy": ("%", 100.0), "tpr-gap/rms": ("points", 0.0), "tpr-gap/rms-shuffled": ("points", None), "causal/changed": ("%", 0.0), "causal/shift": ("points", 0.0)}


def made() -> dict:
    """Units in which each figure says which unit it is of."""
    units = [Unit(place, strength, seed, method) for seed in (0, 1) for place in ("text", "labels") for strength in (0.4, 0.8) for method in (NONE, "lora", "<i>full</i>")]

    def one(i: int, unit: Unit) -> dict:
        figures = {name: {"value": 0.1 + 0.01 * i + 0.3 * unit.strength + unit.seed * 0.02, "unit": kind, "ideal": ideal}
                   for name, (kind, ideal) in (TEXT if unit.place == "text" else LABELS).items()}
        return {"figures": figures, "parameters": 100 + i, "seconds": 1.0, "cpu_seconds": 2.0}

    results = {unit: one(i, unit) for i, unit in enumerate(units)}
    rows = summary.rows(units, results)
    return {"settings": {"seeds": [0, 1], "scale": 0.5}, "versions": {"device": "a machine", "torch": "2", "commit": "abc"}, "rows": rows,
            "monotone": summary.monotone(rows), "units": len(units), "seconds": 24.0, "cpu_seconds": 48.0}


def test_every_figure_stands_in_a_table_and_every_method_in_a_drawing():
    found = made()
    about, text, labels = sections_of_testbed(found, "t")
    assert [(s.id, s.title) for s in (text, labels)] == [("t-text", "Planted in the text: the masked-LM"), ("t-labels", "Planted in the labels: the classifier")]
    assert dict(about.blocks[0].rows)["time of one core"] == "48 s"
    for section, place, names, units in ((text, "text", TEXT, ("", ", nats", "")), (labels, "labels", LABELS, (", %", ", points", ", points", ", %", ", points"))):
        drawings, table = section.blocks
        rows = [row for row in found["rows"] if row["place"] == place]
        assert [f.caption for f in drawings.figures] == ["lora", "<i>full</i>"] and table.head == ("strength, method", *(name + unit for name, unit in zip(names, units))) and len(table.rows) == len(rows) == 6
        for row, (name, *cells) in zip(rows, table.rows):
            assert name.startswith(f"{row['strength']:g} ")
            for measure, cell in zip(names, cells):
                figure = row["figures"][measure]
                assert cell.text.startswith(number(figure["mean"], figure["unit"])) and number(figure["sd"], figure["unit"]) in cell.text
                assert bool(cell.small) == ("change" in figure) == (row["method"] != NONE)
    assert len(text.notes) == 4 and labels.notes == [f"Spearman's correlation of the planted strength with plain fine-tuning's gap (means over seeds): {found['monotone']['spearman']:.3f}."]


def test_a_figure_that_is_not_there_and_a_difference_that_holds_no_0(monkeypatch):
    drawn, told, found = [], [], made()
    monkeypatch.setattr(testbed.figures, "curves", lambda ident, alt, lines, *a, **more: drawn.append(lines[1][2:4]) or told.append((alt, a[0])) or "")
    sections_of_testbed(found, "t")
    means = [[row["figures"]["stereotype-preference"]["mean"] for row in found["rows"] if (row["place"], row["method"]) == ("text", method)] for method in ("lora", "<i>full</i>")]
    assert drawn[:2] == [([0.4, 0.8], of) for of in means]
    assert [label for _, label in told] == ["stereotype-preference"] * 2 + ["tpr-gap/rms, points"] * 2
    gaps = [number(row["figures"]["tpr-gap/rms"]["mean"], "points") for row in found["rows"] if (row["place"], row["method"]) == ("labels", "lora")]
    assert told[2][0] == f"tpr-gap/rms by link planted in the labels, with lora: 0.4: {gaps[0]}, 0.8: {gaps[1]}"
    found["monotone"]["spearman"] = None  # gaps that are all alike have none
    assert sections_of_testbed(found, "t")[2].notes == []
    for low, high, strong in ((0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)):
        found["rows"][1]["figures"]["perplexity"]["change"] |= {"low": low, "high": high}
        assert sections_of_testbed(found, "t")[1].blocks[1].rows[1][-1].strong == strong
    del found["rows"][0]["figures"]["perplexity"]  # what a unit of an earlier version had not
    assert sections_of_testbed(found, "t")[1].blocks[1].rows[0][-1].text == "–"


def test_the_page_and_its_figures(tmp_path):
    folder = tmp_path / "testbed"
    folder.mkdir()
    (folder / "testbed.json").write_text(json.dumps(made()))
    html, figures = report(Report(paths=(str(folder),), out=str(tmp_path / "r.html")))
    page = html.read_text()
    assert "Planted in the labels: the classifier" in page and page.count("<svg") == 4 and "<i>full" not in page and "&lt;i&gt;full" in page
    assert json.loads(figures.read_text())["sources"] == [json.loads((folder / "testbed.json").read_text())]


@pytest.mark.parametrize("text,words", [("{}", "expected the figures of `testbed`, got something else"), ("[", "expected the figures of `testbed`, got something else"),
                                        ("[" * 100_000, "expected the figures of `testbed`, got something else"),
                                        ('{"rows": null, "settings": {"seeds": [0]}}', "got one that is not done; `peftdebias testbed --out")])
def test_what_is_no_testbed_or_not_done_is_refused(text, words, tmp_path):
    (tmp_path / "testbed.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_testbed(tmp_path)


def test_other_figures_than_a_testbed_s_are_refused(tmp_path):
    for text, words in (('{"rows": [{}], "settings": {"seeds": [0]}}', "KeyError: 'versions'"),
                        ('{"rows": [{}], "settings": {"seeds": [0], "scale": 1}, "versions": {}, "units": 1, "cpu_seconds": 1e999}', "OverflowError: .*")):
        (tmp_path / "testbed.json").write_text(text)
        with pytest.raises(DataError, match=f"^{tmp_path}/testbed.json: expected the figures of `testbed`, got others .{words}.$"):
            report(Report(paths=(str(tmp_path),), out=str(tmp_path / "r.html")))
    assert not (tmp_path / "r.html").exists()
