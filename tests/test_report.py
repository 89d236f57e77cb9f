"""`report`: what is read, computed and shown, against the files it comes from; what is left out; what does not fit; a file that needs nothing else.

How it looks and behaves in a browser is test_report_page.py's business.
"""

import dataclasses
import importlib.util
import json
import os
import random
import re
import types

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from peftdebias import evaluation  # noqa: E402
from peftdebias.metrics.compare import over_seeds, seed_difference  # noqa: E402
from peftdebias.metrics.tally import Difference  # noqa: E402
from peftdebias.report.words import duration, number  # noqa: E402
from peftdebias.report import figures, flips, page, plots, recipe, results as figures_of, runs, sections, tables, words  # noqa: E402

from .reports import FEW, HOSTILE, Elements, flip_row, hostile_results, hostile_runs, measure, result_folder, results, run_folder, task_measures, task_runs, titles, written  # noqa: E402
from .small import cli, done, tree  # noqa: E402


def sections_of(source) -> list:
    return sections.sections_of(source, "x", 5, figures_of.compared(source))


# ---------------------------------------------------------------- recipes

def test_the_papers_table_has_ours_and_theirs(tmp_path):
    table = results()
    text, data = written(tmp_path, result_folder(tmp_path / "ghc", table))
    source = recipe.source_of_recipe(tmp_path / "ghc")
    (paper,) = (s for s in sections_of(source) if s.id == "x-paper")
    upstream, downstream = (b for b in paper.blocks if b.kind == "table" and not b.caption.startswith("Difference"))
    assert upstream.head == ("system", "StereoSet LM, %", "CrowS-Pairs, %") and downstream.head == ("system", "F1, %", "FPRD")
    assert [row[0] for row in upstream.rows] == ["BERT", "Full-Debias", "Adapter", "Prompt", "LoRA", "SFT", "ideal"]
    values = [m["value"] for r in table["rows"] if (r["system"], r["stage"]) == ("LoRA", "upstream") for m in r["measures"] if m["name"].startswith("crows")]
    spread, (cell,) = over_seeds(values), [row[2] for row in upstream.rows if row[0] == "LoRA"]
    assert cell.text == f"{spread.mean:.2f} ± {spread.sd:.2f}" and cell.small == (f"{spread.low:.2f} to {spread.high:.2f}", "paper 56.12")
    base = next(row for row in upstream.rows if row[0] == "BERT")
    assert " ± " not in base[2].text and base[2].small[1] == "paper 62.33"  # one row: the interval is over examples
    for words in ("Hate speech, race", "0.05", "1 h 06 min", "False positive rates, by identity term", "paper 0.730"):
        assert words in text, words
    assert data["sources"][0]["paper"] == table["paper"] and {r["system"] for r in data["sources"][0]["results"]} == set(table["systems"])


def test_differences_of_a_recipe_from_the_base_and_from_fine_tuning(tmp_path, monkeypatch):
    table = results()
    source = recipe.source_of_recipe(result_folder(tmp_path / "ghc", table))
    data = {"sources": [figures_of.as_data(source, figures_of.compared(source))]}
    assert not any("/term/" in d["name"] for d in data["sources"][0]["differences"])
    for kind in ("dots", "scatter"):
        monkeypatch.setattr(tables.figures, kind, lambda *a: "")
    shown = {b.caption: b.rows for b in tables.against_paper(source, "x").blocks if b.kind == "table"}
    for stage, against, name, at in (("upstream", "BERT", "crows-pairs/bias-bench/race-color", 2), ("downstream", "FT", "fprd", 2)):
        d = next(d for d in figures_of.differences(source, stage, "" if stage == "upstream" else "ghc")[0]["SFT"] if d.name == name)
        assert {row[0]: row for row in shown[f"Difference from {against}"]}["SFT"][at] == tables.change(d, f"{number(d.low, d.unit)} to {number(d.high, d.unit)}")
    assert all(b.note.split(". ")[1] == "Hollow: without debiasing" for b in plots.trade_off(source, "x").blocks)

    def values(system, stage, name):
        return [m["value"] for r in table["rows"] if (r["system"], r["stage"]) == (system, stage) for m in r["measures"] if m["name"] == name]

    for stage, against, name in (("upstream", "BERT", "crows-pairs/bias-bench/race-color"), ("downstream", "FT", "fprd")):
        found = {d["system"]: d for d in data["sources"][0]["differences"] if d["stage"] == stage and d["name"] == name}
        assert set(found) == {"Full-Debias", "Adapter", "Prompt", "LoRA", "SFT"} and {d["against"] for d in found.values()} == {against}
        base = values(against, stage, name) * (3 if stage == "upstream" else 1)  # the untrained base stands beside every seed
        expected = seed_difference(base, values("SFT", stage, name))
        assert (found["SFT"]["difference"], found["SFT"]["low"], found["SFT"]["high"]) == (expected.value, expected.low, expected.high)


def test_a_column_of_a_stage_with_several_tasks_names_its_own(tmp_path):
    table = results(FEW)
    table["rows"] += [r | {"task": "other", "measures": [measure("f1/1", 20.0, ideal=100.0)]} for r in table["rows"] if r["stage"] == "downstream"]
    text, _ = written(tmp_path, result_folder(tmp_path / "named", table))
    assert "20.00" in text and "Downstream: the classifier (other)" in text
    source = recipe.source_of_recipe(tmp_path / "named")
    (paper,) = (s for s in sections_of(source) if s.id == "x-paper")
    both = tables.against_paper(dataclasses.replace(source, columns=source.columns + [source.columns[2] | {"task": "other"}]), "x")
    assert [b.head for b in both.blocks if b.kind == "table"][-2:] == [("system", "F1 (ghc), %", "FPRD", "F1 (other), %"), ("system", "F1 (ghc)", "FPRD", "F1 (other)")]
    assert not any("20.00" in str(row) for b in paper.blocks if b.kind == "table" for row in b.rows)
    for c in table["columns"]:
        c["task"] = None
    said = cli("report", result_folder(tmp_path / "unnamed", table), "--out", tmp_path / "report.html")
    assert said.code == 2 and "column 'F1' of stage downstream: expected one task with f1/1, got ghc, other" in said.err


def test_plots_of_several_tasks_are_of_their_own_columns(tmp_path, monkeypatch):
    """Each pair once, under its own task's titles; the columns of one task say nothing of which measures of another are drawn."""
    table, tasks = results(FEW), ("ghc", "other", "third")
    down = [r for r in table["rows"] if r["stage"] == "downstream"]
    table["rows"] += [r | {"task": task, "measures": [m | {"value": m["value"] + at} for m in r["measures"]]} for at, task in enumerate(tasks) if at for r in down]
    columns = [c for c in table["columns"] if c["stage"] == "downstream"]
    table["columns"] = [c | {"task": task, "title": f"{task} {c['title']}"} for task in tasks[:2] for c in columns] + [columns[1] | {"task": "other", "title": "rate", "measure": "fprd/fpr"}] * 2
    source, given = recipe.source_of_recipe(result_folder(tmp_path / "ghc", table)), []
    monkeypatch.setattr(plots.figures, "scatter", lambda ident, alt, points, across, up, *a: given.append((alt, points, across, up)) or "")
    drawn = [[figure.caption for figure in block.figures] for block in plots.trade_off(source, "x").blocks]
    ours = ["ghc FPRD against ghc F1"], ["other FPRD against other F1", "rate against other F1"], ["fprd against f1/1"]
    assert drawn == [["crows-pairs/bias-bench/race-color against stereoset/lm/overall"], *ours]
    for (alt, points, across, up), caption in zip(given, sum(drawn, [])):
        assert caption == f"{up.removesuffix(', %')} against {across.removesuffix(', %')}"
        unit = "%" if up.endswith("%") else "1"
        assert alt == f"Scatter plot of {caption}: " + "; ".join(f"{system} {number(y, unit)} and {number(x)}" for system, (x, *_), (y, *_) in points)


def test_a_column_without_a_figure_is_left_out(tmp_path):
    table = results(FEW)
    for row in table["rows"]:
        row["measures"] = [m for m in row["measures"] if not m["name"].startswith(("stereoset", "fprd"))]
    source = recipe.source_of_recipe(result_folder(tmp_path / "ghc", table))
    (paper,) = (s for s in sections_of(source) if s.id == "x-paper")
    heads = [b.head for b in paper.blocks if b.kind == "table" and not b.caption.startswith("Difference")]
    assert heads == [("system", "CrowS-Pairs, %"), ("system", "F1, %", "FPRD")]  # the paper has an FPRD
    source = recipe.source_of_recipe(result_folder(tmp_path / "none", table | {"rows": [], "paper": []}))
    assert [s.id for s in sections_of(source)] == ["x-about"]


def test_what_was_asked_beside_the_recipe_and_what_is_done_is_told(tmp_path):
    settings = {"upstream": {"": {"lr": 1.0}, "LoRA": {"steps": 7, "lr": 2.0}}, "downstream": {}}
    facts = dict(recipe.source_of_recipe(result_folder(tmp_path / "ghc", results(FEW, settings=settings, units=40))).facts)
    assert list(facts) == ["recipe", "model", "axis", "data", "scale", "settings", "seeds", "systems", "done", "time"]
    assert facts["settings"] == "upstream: lr 1.0, LoRA: steps 7, lr 2.0" and facts["done"] == f"{len(results(FEW)['rows'])} of 40 units"
    assert "done" not in dict(recipe.source_of_recipe(result_folder(tmp_path / "ghc", results(FEW, units=len(results(FEW)["rows"])))).facts)


def test_a_recipes_runs_and_examples_are_read_from_its_folder(tmp_path):
    table = results(FEW)
    folder = result_folder(tmp_path / "ghc")
    run_folder(folder / "runs" / "up", "upstream")
    (folder / "e.jsonl").write_text(json.dumps(flip_row()) + "\n")
    table["rows"][0] |= {"run": "runs/up"}
    next(r for r in table["rows"] if r["system"] == "LoRA" and r["stage"] == "downstream").update(examples="e.jsonl")
    text, _ = written(tmp_path, result_folder(folder, table))
    assert "Training" in titles(text) and "Texts whose label flips" in titles(text) and "LoRA, ghc: 1 of 1" in text


def test_runs_and_recipes_in_one_report(tmp_path):
    text, data = written(tmp_path, result_folder(tmp_path / "a", results(FEW)), *task_runs(tmp_path, [0]), result_folder(tmp_path / "b", results(FEW, title="Another")))
    assert [s["title"] for s in data["sources"]] == ["Hate speech, race", "Another", "plain-0, lora-0"] and "3 results" in text
    ids = [a["id"] for _, a in Elements(text).tags if "id" in a]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------- flips

def test_flips_are_counted_capped_and_ordered(tmp_path):
    rows = [flip_row(text=f"he has {i} dogs", counterfactual=f"she has {i} dogs", p=0.4 + i / 100) for i in range(30)] + [flip_row(after="guard")] * 5
    rows.insert(3, {"measure": "classification", "text": "other"})
    run = run_folder(tmp_path / "run", "downstream", final=task_measures(random.Random(0)), examples={"": rows})
    text, _ = written(tmp_path, run, examples=4)
    shown = [t for t in Elements(text).all("p") if " dogs" in t]
    assert shown == [f"{who} has {i} dogs" for i in (29, 28, 27, 26) for who in ("he", "she")]
    assert "30 of 35 counterfactuals get another label" in text and "Shown: the 4 in which" in text and "may be offensive" in text
    assert [m for m in Elements(text).all("mark")] == ["he", "she"] * 4 and "test.jsonl:3" in text and "data/test.jsonl" not in text
    assert text.count("dogs") == 8 and "other" not in Elements(text).all("p")
    text, _ = written(tmp_path, run, examples=0)
    assert "30 of 35" in text and " dogs" not in text
    assert "Shown: the" not in written(tmp_path, run, examples=30)[0]


def test_flips_come_by_how_far_the_first_label_falls_each_with_both_labels_probabilities(tmp_path):
    rows = [flip_row(text=text, counterfactual=text + " too", p=p, q=q) for text, p, q in (("far", 0.62, 0.07), ("near", 0.97, 0.48), ("farthest", 0.94, 0.04))]
    run = run_folder(tmp_path / "run", "downstream", final=task_measures(random.Random(0)), examples={"": rows})
    (block,) = next(s for s in sections_of(runs.source_of_runs([run])) if s.id == "x-flips").blocks
    assert [("".join(piece for piece, _ in row.text), row.before, row.after) for row in block.rows] == [
        ("farthest", ("guard", "94 %"), ("nurse", "96 %")), ("far", ("guard", "62 %"), ("nurse", "93 %")), ("near", ("guard", "97 %"), ("nurse", "52 %"))]


def test_pieces_are_the_texts_and_mark_what_differs():
    for first, second in (("He met her.", "She met him."), ("", "x"), ("same", "same"), ("a  b\n", "a b c\n"), ("the king's men", "the queen's women")):
        one, two = flips.pieces(first, second)
        assert "".join(p for p, _ in one) == first and "".join(p for p, _ in two) == second
        assert [p for p, other in one if not other] == [p for p, other in two if not other]
    assert flips.pieces("He met her.", "She met him.")[0] == [("He", True), (" met ", False), ("her", True), (".", False)]


# ---------------------------------------------------------------- the file

URLS = {"src", "srcset", "action", "formaction", "poster", "background", "cite", "data", "ping", "manifest", "xlink:href", "longdesc", "icon"}
ALLOWED = set("html head meta title style body header nav main section footer h1 h2 h3 p ul li a b i bdi wbr mark pre small div table caption thead tbody tr th td details summary "
              "figure figcaption svg g path defs clippath rect use text tspan".split())


def every_kind(root) -> list:
    rows = [flip_row(HOSTILE, HOSTILE + "x", HOSTILE, "b")]
    return [*hostile_runs(root), run_folder(root / "flips", "downstream", 3, examples={"": rows}), result_folder(root / "recipe", hostile_results())]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return written(root, *every_kind(root))


def test_nothing_in_the_file_points_outside_and_data_makes_no_element(hostile):
    text, _ = hostile
    found = Elements(text)
    assert {tag for tag, _ in found.tags} <= ALLOWED and found.tags.count(("meta", {"charset": "utf-8"})) == 1
    assert not any("http:" in a["href"] for _, a in found.tags if "href" in a)
    for tag, attributes in found.tags:
        assert not URLS & set(attributes) and not any(name.startswith("on") for name in attributes), (tag, attributes)
        if "href" in attributes:
            assert re.fullmatch(r"#[\w.-]+", attributes["href"]), attributes
            assert any(a.get("id") == attributes["href"][1:] for _, a in found.tags)
        for name in ("style", "clip-path"):
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", attributes.get(name, ""))), attributes
    (style,) = found.all("style")
    assert "url(" not in style and "@import" not in style
    (policy,) = (a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_hostile_data_is_shown_as_text(hostile):
    text, data = hostile
    shown = page.shown(HOSTILE)
    assert "\u202e" not in text and "\x07" not in text and "⟨U+202E⟩gnp.⟨U+202C⟩" in shown and shown.endswith("⟨U+0007⟩")
    found = Elements(text)
    for tag in ("p", "th", "td", "title", "h2", "figcaption", "summary", "bdi"):  # texts, classes, names, places
        assert any("<script>alert(1)</script>\"'&amp; $x_1^2$ ⟨U+202E⟩" in t for t in found.all(tag)), tag
    assert any(a.get("aria-label", "").count("<script>") for tag, a in found.tags if tag == "svg")
    assert "49" not in [t.strip() for t in found.all("bdi")] and "{{ 7 * 7 }}" in text  # no template within
    labels = [t for t in found.all("text")]
    assert "$a$" in labels and any("$x_1^2$" in t for t in found.all("caption") + found.all("figcaption") + found.all("th"))  # no mathematics
    assert any(t.endswith("_x") for t in labels)
    assert HOSTILE in [s["title"] for s in data["sources"]]  # metrics.json keeps it as it was


def test_what_is_shown():
    for text in ("plain", "né 漢字 עברית", "a\tb\nc", "👩\u200d🔬", "می\u200cخواهم"):
        assert page.shown(text) == text
    for text, expected in (("a\u202eb", "a⟨U+202E⟩b"), ("\u200f", "⟨U+200F⟩"), ("\x00", "⟨U+0000⟩"), ("\ud800", "⟨U+D800⟩"), ("\u2067x\u2069", "⟨U+2067⟩x⟨U+2069⟩"), ("\ufeff", "⟨U+FEFF⟩")):
        assert page.shown(text) == expected
    assert page.shown(3.5) == 3.5 and page.shown(None) is None


def test_the_same_files_give_the_same_bytes(tmp_path):
    folders = [*task_runs(tmp_path, [0]), result_folder(tmp_path / "recipe", results(FEW))]
    first = written(tmp_path, *folders)
    assert written(tmp_path, *folders) == first


def test_every_figure_has_a_name_and_every_table_a_caption(tmp_path):
    text, _ = written(tmp_path, *task_runs(tmp_path, [0]), result_folder(tmp_path / "recipe", results(FEW)))
    tags = Elements(text).tags
    drawings = [a for tag, a in tags if tag == "svg"]
    assert len(drawings) == 13 and all(a["role"] == "img" and len(a["aria-label"]) > 30 and a["viewbox"].startswith("0 0 330 ") and "width" not in a for a in drawings)
    assert len([1 for tag, _ in tags if tag == "table"]) == len([1 for tag, _ in tags if tag == "caption"]) > 10
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")
    assert "#0102" not in text  # no stand-in colour is left


def test_drawings_take_the_pages_colours_and_keep_text():
    series = [figures.Series("first", [1.0, None, 3.0], [0.5, None, 2.0], [1.5, None, 4.0], 0, True), figures.Series("second", [2.0, 2.0, 2.0], [None] * 3, [None] * 3, 1)]
    drawn = figures.dots("d", "alt", ["a", "$b$", "_c"], series, "gap, points", 0.0)
    assert "var(--series-0)" in drawn and "var(--series-1)" in drawn and "currentColor" in drawn and "font-family" not in drawn and "metadata" not in drawn
    assert all(f">{t}</text>" in drawn for t in ("a", "$b$", "gap, points", "first", "second", "ideal"))
    assert not re.search(r"#[0-9a-f]{6}", drawn.replace("#d-", ""))
    one, two = figures.curves("c", "alt", [("loss", 0, [1, 2], [3.0, 2.0], False)], "loss"), figures.scatter("s", "alt", [("x", (1, None, None), (2, 1, 3))], "a", "b")
    ids = [re.findall(r' id="([^"]+)"', d) for d in (drawn, one, two)]
    assert all(i and all(n.startswith(p) for n in i) for i, p in zip(ids, "dcs"))


def test_bars_end_where_the_figure_does():
    def line(unit, low, high, name="m", value=1.0, interval="seeds"):
        return figures_of.Line(name, unit, 0.0, {0: value}, value, None, low, high, interval, 5)

    families = {"bias-nli/net-neutral": (0, 1), "fprd": (0, 9), "fprd/shuffled (a.csv)": (0, 9), "fprd-iptts/script": (0, 9), "mlm-loss": (0, 9), "perplexity (a.txt)": (1, 9),
                "seat/sent-weat6/effect-size": (-2, 2), "seat-mean/weat6/effect-size": (-2, 2), "seat/weat6/p": (0, 1)}
    assert {name.split("/")[0].split(" ")[0] for name in families} == set(figures_of.POSSIBLE_OF) <= set(words.GLOSSARY)
    for name, ends in [*families.items(), ("base/perplexity", (1, 9)), ("only-gender/fprd (a.csv)", (0, 9))]:
        assert figures_of.drawn_ends(line("1", -9.0, 9.0, name)) == ends and figures_of.drawn_ends(line("1", 1.1, 1.2, name, 1.15)) == (1.1, min(1.2, max(ends[1], 1.15)))
    assert figures_of.drawn_ends(line("1", -9.0, 9.0, "seat/unlike/effect-size", 2.07)) == (-2.0, 2.07)  # what a seed has is possible
    assert figures_of.drawn_ends(line("1", 1.9, 2.1, "seat/unlike/effect-size", 2.0, "examples")) == (1.9, 2.1)
    assert figures_of.drawn_ends(line("%", -9.0, 50.0, "fprd/fpr")) == (0.0, 50.0) and figures_of.drawn_ends(line("points", -9.0, 5.0, "tpr-gap/rms (/class/a.csv)")) == (0.0, 5.0)
    assert figures_of.drawn_ends(line("%", -40.0, 300.0)) == (0.0, 100.0) and figures_of.drawn_ends(line("%", 3.0, 4.0)) == (3.0, 4.0)
    assert figures_of.drawn_ends(line("points", -140.0, 30.0, "tpr-gap/class/nurse")) == (-100.0, 30.0)
    assert figures_of.drawn_ends(line("points", -140.0, 130.0, "tpr-gap/rms")) == (0.0, 100.0) and figures_of.drawn_ends(line("1", -4.0, 300.0)) == (-4.0, 300.0)
    assert figures_of.drawn_ends(line("%", None, None)) == (None, None)


def test_series_differ_by_more_than_colour():
    assert len(set(figures.MARKERS)) == len(figures.MARKERS) == 12 and len(set(figures.SERIES)) == len(figures.SERIES) == 7 and len(set(figures.DASHES)) == 2
    drawn = figures.scatter("s", "alt", [(f"system {i}", (i, i - 1, i + 1), (i, None, None)) for i in range(12)], "a", "b", baseline="system 0")
    marks = [a["d"] for tag, a in Elements(drawn).tags if tag == "path" and a.get("id", "").startswith("s-") and a["d"].count("z") + a["d"].count("Z") > 0]
    assert len(set(marks)) >= 12 and all(f">system {i}</text>" in drawn for i in range(12))


def test_many_classes_are_drawn_in_part_and_listed_whole(tmp_path):
    rng = random.Random(0)
    many = [measure(f"tpr-gap/class/c{i}", rng.uniform(-9, 9), "points", n=100 + i) for i in range(50)]
    other = [measure("tpr-gap/class/c0", 1.0, "points", n=1)]  # not among those drawn
    text, _ = written(tmp_path, run_folder(tmp_path / "a", "downstream", method=None, final=many), run_folder(tmp_path / "b", "downstream", final=many),
                      run_folder(tmp_path / "c", "downstream", method="bias", final=other))
    found = Elements(text)
    assert "Drawn: the 40 of 50 with the most examples." in text and sum(t in {f"c{i}" for i in range(50)} for t in found.all("th")) == 50
    labels = [t for t in found.all("text") if re.fullmatch(r"c\d+", t)]
    assert sorted(labels, key=lambda t: int(t[1:])) == [f"c{i}" for i in range(10, 50)]


def test_values_that_are_missing_or_not_finite_are_no_numbers(tmp_path):
    final = [measure("accuracy", None), measure("f1/macro", float("nan")), measure("tpr-gap/rms", float("inf"), "points"), measure("fprd", 0.5, "1") | {"low": None, "high": None, "n": None}]
    run = run_folder(tmp_path / "run", "downstream", final=final)
    text, data = written(tmp_path, run)
    assert [m["name"] for r in data["sources"][0]["results"] for m in r["measures"]] == ["fprd"] and "0.500" in text
    assert [r["seeds"] for r in data["sources"][0]["results"]] == [[0]] and "nan" not in text.lower().replace("nangia", "")


def test_numbers():
    assert [number(value, "1") for value in (100.0, 99.96)] == ["100.0", "99.960"]
    assert [number(v, u) for v, u in ((12.344, "%"), (-0.001, "points"), (0.01234, "1"), (145.44, "1"), (None, "%"))] == ["12.34", "\u22120.0010", "0.012", "145.4", "–"]
    assert number(1.5, "points", True) == "+1.50" and number(-1.5, "points", True) == "\u22121.50" and number(0.0, "points", True) == "0.00"
    assert number(-1e-7) == number(-0.0) == "0.00"
    assert [duration(s) for s in (3, 61, 3725, 59.6, 3599.7)] == ["3 s", "1 min 01 s", "1 h 02 min", "1 min 00 s", "1 h 00 min"]


@pytest.mark.parametrize("low,high,strong", [(0.0, 2.0, False), (-2.0, 0.0, False), (0.1, 2.0, True), (-2.0, -0.1, True)])
def test_a_difference_is_set_apart_where_its_interval_does_not_hold_0(low, high, strong):
    assert tables.change(Difference("m", 1.0, 1.0 + (low + high) / 2, "points", 0.0, low, high, 0.1, "t", 9)).strong == strong


# ---------------------------------------------------------------- where marks stand

@pytest.fixture
def axes_of(monkeypatch):
    """A drawing in place of its SVG: the axes of it."""
    monkeypatch.setattr(figures, "_svg", lambda figure, ident, alt: figure.axes[0])
    return figures


def data_of(line) -> list[tuple[float, float]]:
    return list(zip(*(list(map(float, values)) for values in line.get_data())))


def test_dots_stand_at_their_figures_with_their_intervals_from_the_top_row(axes_of):
    series = [figures.Series("first", [1.0, None, 3.0], [0.5, None, 2.0], [1.5, None, 4.0], 0, True), figures.Series("second", [2.0, 2.5, 2.0], [None] * 3, [None] * 3, 1)]
    axes = axes_of.dots("d", "alt", ["a", "b", "c"], series, "gap", 0.0, ends=(0.0, 10.0))
    ideal, first, second = axes.lines
    assert [x for x, _ in data_of(ideal)] == [0, 0] and [(x, round(y)) for x, y in data_of(first)] == [(1, 0), (3, 2)]
    assert [(x, round(y)) for x, y in data_of(second)] == [(2, 0), (2.5, 1), (2, 2)]
    bars = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert [[x for x, _ in bar] for bar in bars] == [[0.5, 1.5], [2, 4]] and [bar[0][1] for bar in bars] == [y for _, y in data_of(first)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"] and axes.get_ylim()[0] > 2 > 0 > axes.get_ylim()[1]
    assert axes.get_xlim()[0] < 0 and axes.get_xlim()[1] > 10
    assert first.get_markerfacecolor() == figures.PAPER and second.get_markerfacecolor() == second.get_color() == figures.SERIES[1]


def test_points_have_quality_across_and_bias_up_each_with_its_interval(axes_of):
    axes = axes_of.scatter("s", "alt", [("base", (70.0, 68.0, 73.0), (20.0, 15.0, 26.0)), ("ours", (71.0, None, None), (10.0, 8.0, 11.0))], "accuracy", "gap", None, 0.0, "base")
    lines = list(map(data_of, axes.lines))
    assert lines[:5] == [[(68, 20), (73, 20)], [(70, 15), (70, 26)], [(70, 20)], [(71, 8), (71, 11)], [(71, 10)]]
    assert [axes.lines[i].get_markerfacecolor() == figures.PAPER for i in (2, 4)] == [True, False]
    assert [y for _, y in lines[5]] == [0, 0] and len(lines) == 6


def test_curves_show_the_states_that_were_kept_and_reach_to_their_frame(axes_of):
    axes = axes_of.curves("c", "alt", [("loss", 0, [1, 2, 3], [3.0, 2.0, 2.5], True)], "loss", [(2, 2.0), (3, 2.5)], frame=(30.0, 5.0))
    line, kept = axes.lines
    assert data_of(line) == [(1, 3), (2, 2), (3, 2.5)] and data_of(kept) == [(2, 2), (3, 2.5)]
    assert axes.get_xlim() == pytest.approx((-1.2, 31.2)) and axes.get_ylim() == pytest.approx((0, 5.2))


def test_the_plots_get_the_figures_of_the_lines(tmp_path, monkeypatch):
    """Quality across, bias up, each with its own ideal; terms from the highest rate of fine-tuning down, beside the rate of all texts, on one scale."""
    source, given = recipe.source_of_recipe(result_folder(tmp_path / "ghc", results(FEW))), {"scatter": [], "dots": []}
    for kind, calls in given.items():
        monkeypatch.setattr(plots.figures, kind, lambda *a, calls=calls: calls.append(a[2:]) or "")
    plots.trade_off(source, "x"), plots.one_by_one(source, "x", "terms", "/term/", "t", "m")
    of = {system: figures_of.lines(answers) for system, answers in source.of("downstream", "ghc").items()}

    def point(line):
        return (line.mean, *figures_of.drawn_ends(line))

    (points, across, up, *ideals), = (call for call in given["scatter"] if "FPRD" in call[2])
    assert points == [(system, point(of[system]["f1/1"]), point(of[system]["fprd"])) for system in ("FT", "LoRA")] and ideals == [100.0, 0.0, "FT"] and across.startswith("F1")
    (rows, series, _, ideal, named, ends), = given["dots"]
    plain, lora = ({row: of[system][f"fprd/term/{row}"] for row in rows} for system in ("FT", "LoRA"))
    assert rows == sorted(rows, key=lambda row: -plain[row].mean) and len(rows) == 3 and (ideal, named) == (of["LoRA"]["fprd/fpr"].mean, "all texts")
    assert [(one.name, one.values, one.hollow) for one in series] == [("FT", [plain[row].mean for row in rows], True), ("LoRA", [lora[row].mean for row in rows], False)]
    every = [value for lines in (plain, lora) for line in lines.values() for value in point(line)]
    assert ends == (min(every), max(every))


def test_the_papers_figures_stand_beside_ours_in_the_drawing(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(tables.figures, "dots", lambda ident, alt, rows, series, label, ideal, *rest: given.setdefault(label, (rows, series, ideal)) and "")
    source = recipe.source_of_recipe(result_folder(tmp_path / "ghc", results()))
    sections_of(source)
    rows, (ours, theirs), ideal = next(found for label, found in given.items() if label.startswith("CrowS-Pairs"))
    means = [figures_of.lines(source.of("upstream", "")[system])["crows-pairs/bias-bench/race-color"].mean for system in rows]
    assert ours.values == means and (ours.name, theirs.name, ours.hollow, theirs.hollow, ideal) == ("here", "paper", False, True, 50.0)
    assert dict(zip(rows, theirs.values))["LoRA"] == 56.12 and dict(zip(rows, theirs.values))["BERT"] == 62.33


# ---------------------------------------------------------------- bad input

def changed(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


BAD = {
    "no path": (lambda d: [], "missing: PATH"),
    "not there": (lambda d: [d / "none"], "none: expected a folder, got none"),
    "a file": (lambda d: [changed(d, "f.txt", "x") / "f.txt"], "f.txt: expected a folder, got a file"),
    "no result": (lambda d: [d], "expected a folder with results.json or testbed.json or config.toml, found none of them"),
    "an evaluation of none": (lambda d: [changed(run_folder(d / "r", "downstream"), "evaluation.json", {"measures": [{"name": 1}]})],
                              "evaluation.json: expected measures with name, value"),
    "no JSON": (lambda d: [changed(run_folder(d / "r", "downstream"), "evaluation.json", "{")], "evaluation.json: expected JSON, got "),
    "a corrupt line": (lambda d: [changed(run_folder(d / "r", "upstream"), "metrics.jsonl", '{"event": "step", "step": 1}\n[1]\n')],
                       "metrics.jsonl:2: expected a JSON object, got '[1]'"),
    "a line deeper than Python's JSON reads": (lambda d: [changed(run_folder(d / "r", "upstream"), "metrics.jsonl", "[" * 100_000)], "metrics.jsonl:1: expected a JSON object"),
    "a probability of no size": (lambda d: [run_folder(d / "r", "downstream", examples={"": [flip_row(p=10**400)]})], "examples.jsonl:1: expected probabilities of 'guard' and 'nurse'"),
    "an event without a step": (lambda d: [changed(run_folder(d / "r", "upstream"), "metrics.jsonl", '{"event": "step"}\n')],
                                "metrics.jsonl:1: expected an event with a step"),
    "a run of something else": (lambda d: [changed(run_folder(d / "r", "upstream"), "config.toml", 'command = "demo"\n')],
                                "config.toml: expected a run of upstream or downstream, got 'demo'"),
    "a run without a seed": (lambda d: [changed(run_folder(d / "r", "upstream"), "config.toml", 'command = "upstream"\nmodel = "m"\n')],
                             "config.toml: expected seed, got None"),
    "a flip without its texts": (lambda d: [run_folder(d / "r", "downstream", final=[], examples={"": [{"measure": "counterfactual", "text": "x"}]}, evaluations={"": []})],
                                 "examples.jsonl:1: expected 'counterfactual' in a row of counterfactual, got measure, text"),
    "a flip without a probability": (lambda d: [run_folder(d / "r", "downstream", examples={"": [flip_row() | {"probabilities": {"guard": 0.8}}]})],
                                     "examples.jsonl:1: expected probabilities of 'guard' and 'nurse', got guard"),
    "measures that are no list": (lambda d: [changed(run_folder(d / "r", "downstream"), "evaluation.json", {"measures": 3})], "evaluation.json: expected a list of measures, got 3"),
    "versions that are none": (lambda d: [changed(run_folder(d / "r", "downstream"), "versions.json", [1])], "versions.json: expected a JSON object, got [1]"),
    "a line that is no JSON": (lambda d: [changed(run_folder(d / "r", "upstream"), "metrics.jsonl", "{" + "x" * 50)], "metrics.jsonl:1: expected a JSON object, got '{" + "x" * 39 + "'"),
    "a row that is none": (lambda d: [result_folder(d / "r", results(rows=[[7] * 40]))], "results.json: rows[0]: expected an object, got [" + "7, " * 19 + "7,..."),
    "a page of somebody else's": (lambda d: [run_folder(d / "r", "upstream"), "--out", changed(d, "own.html", "<html>") / "own.html"],
                                  "own.html, which is no earlier report; expected another name or folder"),
    "results of another kind": (lambda d: [result_folder(d / "r", {"kind": "bench"})], 'results.json: expected the results of a recipe, an object with kind "recipe"'),
    "another format": (lambda d: [result_folder(d / "r", results(format=2))], "results.json: expected format 1, got 2"),
    "no rows": (lambda d: [result_folder(d / "r", results(rows=None))], "results.json: expected 'rows' to be a list, got null"),
    "a row of nobody": (lambda d: [result_folder(d / "r", results(rows=[results()["rows"][0] | {"system": "X"}]))], "rows[0]: expected system to be one of BERT, FT"),
    "a row twice": (lambda d: [result_folder(d / "r", results(rows=results()["rows"][:1] * 2))],
                    "rows[1]: expected one row a system, seed, stage and task, got BERT, seed 0, upstream"),
    "an ideal that is no number": (lambda d: [result_folder(d / "r", results(columns=[results()["columns"][0] | {"ideal": "high"}]))],
                                   "columns[0]: expected 'ideal' to be a number or null, got \"high\""),
    "a task that is no text": (lambda d: [result_folder(d / "r", results(columns=[results()["columns"][0] | {"task": ["a"]}]))],
                               "columns[0]: expected 'task' to be a text or null, got [\"a\"]"),
    "examples that are gone": (lambda d: [result_folder(d / "r", results(rows=[results()["rows"][0] | {"examples": "e.jsonl"}]))], "e.jsonl: no such file"),
    "figures in the page's place": (lambda d: [run_folder(d / "r", "upstream"), "--out", d / "metrics.json"], "metrics.json: is the place of the figures beside it too; expected two"),
    "a folder": (lambda d: [run_folder(d / "r", "upstream"), "--out", d / ".."], "/..: expected a name that ends in .html or .htm, got none such"),
    "a page that no browser opens": (lambda d: [run_folder(d / "r", "upstream"), "--out", d / "report"], "report: expected a name that ends in .html or .htm, got none such"),
    "nowhere to write": (lambda d: [run_folder(d / "r", "upstream"), "--out", d / "no" / "r.html"], "r.html: cannot be written: No such file or directory"),
}


@pytest.mark.parametrize("make, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, make, words):
    (tmp_path / "in").mkdir()
    argv = make(tmp_path / "in")
    before = tree(tmp_path)
    said = cli("report", *argv, *([] if "--out" in argv else ["--out", tmp_path / "report.html"]))
    assert said.code == 2 and words in said.err.splitlines()[-1] and said.out == "" and len(said.err.splitlines()) <= 2 and tree(tmp_path) == before


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(name, *more))
    said = cli("report", run_folder(tmp_path / "r", "upstream"), "--out", tmp_path / "o.html")
    assert said.code == 2 and said.err.splitlines()[-1] == "peftdebias: a report needs jinja2 and matplotlib: pip install 'peftdebias[report]'" and not (tmp_path / "o.html").exists()


def test_the_command_says_where_the_report_lies(tmp_path):
    said = done("report", run_folder(tmp_path / "r", "upstream"), "--out", tmp_path / "o.html")
    assert said.out.splitlines() == [f"result: {tmp_path / 'o.html'} and {tmp_path / 'metrics.json'}"] and (tmp_path / "o.html").stat().st_size > 5000


def test_a_report_inside_of_its_run_is_written_again(tmp_path):
    run = run_folder(tmp_path / "r", "upstream").rename(tmp_path / os.fsdecode(b"r\xe9"))  # a name that is no UTF-8, as old disks have them
    for name in ("R.HTML", "R.HTML"):
        done("report", run, "--out", run / name)
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["sources"][0]["title"] == run.name


def test_the_figures_of_another_page_are_not_replaced(tmp_path):
    run = run_folder(tmp_path / "r", "upstream")
    done("report", run, "--out", tmp_path / "a.html")
    figures = (tmp_path / "metrics.json").read_text()
    assert json.loads(figures)["page"] == "a.html"
    said = cli("report", run, "--out", tmp_path / "b.html")
    assert said.code == 2 and said.err.splitlines()[-1] == (
        f"peftdebias: --out {tmp_path}/b.html: would replace {tmp_path}/metrics.json, the figures of {tmp_path}/a.html; expected another folder, or that page")
    assert not (tmp_path / "b.html").exists() and (tmp_path / "metrics.json").read_text() == figures
    (tmp_path / "a.html").unlink()
    done("report", run, "--out", tmp_path / "b.html")
    (tmp_path / "b.html").rename(tmp_path / "report.html")
    for told in ("../a.html", ""):  # figures that do not say are of report.html
        (tmp_path / "metrics.json").write_text(figures.replace('"page": "a.html"', f'"page": "{told}"'))
        assert f"the figures of {tmp_path}/report.html;" in cli("report", run, "--out", tmp_path / "b.html").err


def test_a_legend_takes_no_room_from_its_plot():
    """Many systems: the drawing grows by their names, up to as many as anybody reads."""
    def drawn(count: int, name: str) -> tuple[float, str]:
        found = str(figures.scatter("s", "alt", [(f"{name} {i}", (i, None, None), (i, None, None)) for i in range(count)], "a", "b"))
        return float(re.search(r'viewBox="0 0 [0-9.]+ ([0-9.]+)"', found)[1]), found

    long, short = "a system of a longer name", "s"
    heights = {(count, name): drawn(count, name)[0] for count in (2, 20, 24, 25, 200) for name in (long, short)}
    assert heights[20, long] - heights[2, long] == pytest.approx(18 * 15) and heights[20, short] - heights[2, short] == pytest.approx(9 * 15)
    assert heights[200, long] == heights[25, long] < heights[24, long]
    _, found = drawn(25, long)
    assert "25 systems; the numbers below name them" in found and long not in found and f"{long} 23" in drawn(24, long)[1]


def test_quality_is_accuracy_where_there_is_one():
    of = {"FT": dict.fromkeys(("f1/macro", "accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled"))}
    assert plots._pairs(types.SimpleNamespace(columns=[]), "downstream", "", of) == ("accuracy", ["tpr-gap/rms"])
    names = ("accuracy", "fprd", "fprd/fpr")  # one of each family, or those of the recipe's columns
    for columns, bias in (([], ["fprd"]), ([{"stage": "downstream", "task": None, "measure": name} for name in names], ["fprd", "fprd/fpr"])):
        assert plots._pairs(types.SimpleNamespace(columns=columns), "downstream", "", {"FT": dict.fromkeys(names)}) == ("accuracy", bias)


def test_measures_of_several_files_keep_their_ideal_their_meaning_and_their_rate(tmp_path):
    """As `evaluate` names them: "fprd (a.csv)"; a class may have such a name itself."""
    of = {"a.csv": 9.0, "b.csv": 20.0}
    final = [measure(f"{name} ({file})", value + more, unit, None) for file, value in of.items()
             for name, more, unit in (("perplexity", 1, "1"), ("fprd", 2, "1"), ("fprd/fpr", 0, "%"), ("fprd/term/old", 3, "%"), ("fprd/term/young (1)", 4, "%"))]
    final += [measure("tpr-gap/class/nurse (male)", 5.0, "points"), measure("tpr-gap/class/nurse (female)", -5.0, "points"), measure("tpr-gap/rms", 5.0, "points")]
    text, _ = written(tmp_path, run_folder(tmp_path / "run", "downstream", final=final))
    found = Elements(text)
    assert text.count(">lower<") == 2 and {"perplexity", "fprd", "tpr-gap"} <= {t for t in found.all("th")}
    assert {"old", "young (1)", "nurse (male)", "nurse (female)"} <= set(found.all("th")) and not any(t.startswith("old (") for t in found.all("th"))
    for file, value in of.items():
        assert f"false positive rate (fprd ({file}))" in text
    assert text.count("all texts") >= 2


def test_a_folder_called_class_is_no_class_and_a_label_in_brackets_no_file(tmp_path):
    """Two files of one name give their whole path to a measure's name."""
    paths = ("/home/u/class/a/test.csv", "/home/u/term/b/test.csv")
    final = [measure(f"{name} ({path})", value, unit) for path in paths for name, value, unit in (("accuracy", 80.0, "%"), ("tpr-gap/rms", 5.0, "points"), ("tpr-gap/class/nurse", 4.0, "points"))]
    final += [measure("f1/hate (strong)", 60.0), measure("tpr-gap/rms", 6.0, "points"), measure("tpr-gap/class/hate (strong)", 6.0, "points")]
    text, _ = written(tmp_path, run_folder(tmp_path / "run", "downstream", final=final))
    found = Elements(text)
    assert {f"accuracy ({path}), %" for path in paths} <= set(found.all("th")) and {"nurse", "hate (strong)"} <= set(found.all("th")) and "hate" not in found.all("th")
    assert not any(t.startswith("a/test") for t in found.all("th"))
    assert [figures_of.is_whole(name) for name in ("f1/health/class/nurse", "tpr-gap/class/nurse", "fprd/term/gay", "accuracy")] == [True, False, False, True]
    assert [figures_of.is_floor(name) for name in ("f1/second floor", "tpr-gap/rms-shuffled", "fprd/shuffled (a.csv)", "perplexity")] == [False, True, True, False]


def test_examples_of_systems_that_differ_are_all_told(tmp_path):
    runs = [run_folder(tmp_path / name, "downstream", method=method, final=[measure("accuracy", 80.0, n=n), measure("f1/macro", 70.0, n=7)])
            for name, method, n in (("a", None, 1000), ("b", "lora", 50))]
    cells = Elements(written(tmp_path, *runs)[0]).all("td")
    assert "1,000 / 50" in cells and "7" in cells and "1,000" not in cells


def test_the_dashed_line_is_in_the_picture(monkeypatch, tmp_path):
    drawn, kept = [], figures.dots
    monkeypatch.setattr(figures, "dots", lambda *given, **more: drawn.append((given[5], given[-1])) or kept(*given, **more))
    final = [measure("tpr-gap/rms", 30.0, "points"), *(measure(f"tpr-gap/class/{c}", v, "points") for c, v in (("nurse", 25.0), ("guard", 40.0)))]
    written(tmp_path, run_folder(tmp_path / "run", "downstream", final=final))
    assert drawn == [(0.0, (0.0, 42.0))]


def test_flips_of_several_files_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(flip_row() | {"measure": name}) + "\n" for name in ("counterfactual (a.csv)", "counterfactual (b.csv)", "base/counterfactual (a.csv)", "fprd")))
    assert len(flips._read(path)[0]) == flips._read(path)[1] == 2


def test_every_measure_has_a_meaning():
    assert set(words.GLOSSARY) == {begin for names in evaluation.GIVES.values() for begin in names}


def test_a_text_of_two_is_shown_with_its_pair_and_long_names_are_cut():
    row = flip_row(place="a/b.tsv:7") | {"text_pair": "he sews", "counterfactual_pair": "she sews"}
    found = flips._example(row)
    assert ["".join(piece for piece, _ in side) for side in (found.text, found.counterfactual)] == ["he is a nurse\nhe sews", "she is a nurse\nshe sews"] and found.place == "b.tsv:7"
    assert [figures._cut("x" * n) for n in (22, 23)] == ["x" * 22, "x" * 21 + "…"]
