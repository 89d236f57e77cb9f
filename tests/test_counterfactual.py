"""Counterfactual flips: against their definition as loops, one text at a time; whose words are swapped; pairs; what cannot be measured; two systems compared."""

import json
from types import SimpleNamespace

import numpy
import pytest

from peftdebias import extrinsic
from peftdebias.axes import load_axis
from peftdebias.cda import counterfactuals
from peftdebias.config import Evaluate
from peftdebias.corpus import Example
from peftdebias.errors import ConfigError, DataError
from peftdebias.extrinsic import BETWEEN, _variants
from peftdebias.metrics import bootstrap, counterfactual

from .outside import one_thread  # noqa: F401
from .small import cli, done, flags_of, lines
from .test_evaluation import answer, by_name  # noqa: F401


def changes(n=400, texts=150, seed=0):
    random = numpy.random.default_rng(seed)
    return random.random(n) < 0.2, random.uniform(-0.5, 0.5, n), [f"t{i}" for i in random.integers(0, texts, n)]


def per_text(values, sources):
    return [numpy.mean([v for v, s in zip(values, sources) if s == text]) for text in sorted(set(sources))]


# ---------------------------------------------------------------- the figures

def test_the_figures_are_their_definitions():
    flipped, shift, sources = changes()
    flips, probability = counterfactual.measures(flipped, shift, sources)
    assert (flips.name, flips.unit, flips.ideal) == ("counterfactual/flips", "%", 0.0) and (probability.name, probability.unit) == ("counterfactual/probability", "points")
    assert flips.value == pytest.approx(100 * numpy.mean(per_text(flipped, sources))) and flips.n == len(set(sources))
    assert probability.value == pytest.approx(100 * numpy.mean(per_text(numpy.abs(shift), sources)))


def test_a_text_counts_once_however_many_counterfactuals_it_has():
    flips, probability = counterfactual.measures([True, False, False, False, True], [0.4, 0.0, 0.0, 0.0, -0.2], ["a", "a", "a", "a", "b"])
    assert (flips.value, flips.n) == (pytest.approx(100 * (1 / 4 + 1) / 2), 2) and probability.value == pytest.approx(100 * (0.1 + 0.2) / 2) and probability.n == 2


def test_intervals_are_those_of_drawing_texts():
    flipped, shift, sources = changes()
    means = numpy.array(per_text(flipped, sources))
    low, high = bootstrap.interval(lambda drawn: 100 * means[drawn].mean(), len(means), samples=4000)
    flips, _ = counterfactual.measures(flipped, shift, sources, samples=4000)
    assert (flips.low, flips.high) == pytest.approx((low, high), abs=0.5) and flips.low < flips.value < flips.high
    (one, _) = counterfactual.measures([True], [0.3], ["a"])
    assert one.value == 100 and numpy.isnan(one.low)  # one text says nothing of its spread


def test_what_does_not_fit_is_named():
    with pytest.raises(DataError, match="no counterfactuals to measure on"):
        counterfactual.measures([], [], [])
    for shift, sources in (([0.1], ["a", "b"]), ([0.1, 0.2], ["a"])):
        with pytest.raises(DataError, match=f"expected as many changes and sources as answers, 2, got {len(shift)} and {len(sources)}"):
            counterfactual.measures([True, False], shift, sources)


# ---------------------------------------------------------------- pairs

def pair(first, second):
    return Example(first, second, None, None, "f:1")


def test_both_texts_of_a_pair_change_together():
    gender, race = load_axis("gender"), load_axis("race")
    for first, second in (("He slept.", "His aunt slept."), ("A man, a woman", "it rains"), ("it rains", "the king"), ("the actor's wife", "actress' hats")):
        (found,) = _variants(pair(first, second), gender)
        (one,), (two,) = (counterfactuals(t, gender) or [None] for t in (first, second))
        assert (found.text, found.text_pair) == (one.text if one else first, two.text if two else second)
    (found,) = _variants(pair("they saw her", "house is red"), gender)
    assert found.text == "they saw him" and counterfactuals("they saw her house", gender)[0].text == "they saw his house"  # no rule looks across
    assert _variants(pair("it rains", "it snows"), gender) == [] and BETWEEN.strip() == "."
    found = _variants(pair("a black dog", "a caucasian cat"), race)
    assert len(found) == len(counterfactuals("a black dog .\na caucasian cat", race)) and all(v.text != "a black dog" or v.text_pair != "a caucasian cat" for v in found)


# ---------------------------------------------------------------- on runs

@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    done("upstream", *small.learning(out=out / "gender"))
    done("downstream", *small.task(out=out / "plain"))
    done("downstream", *small.task(out=out / "debiased", adapter=out / "gender"))
    done("downstream", *flags_of(dict(model=small.base, train=small.paired, dev=small.paired, text="first", text_pair="second", label="same", epochs=1, out=out / "pairs")))
    return {path.name: path for path in out.iterdir()}


TEXTS = ["She is a nurse .", "it rains .", "the king and his wife .", "He kneads dough .", "her mother is a guard .", "dough .", "he works in the ward ."]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def test_flips_of_a_run_are_those_of_each_text_and_its_counterfactual(runs, texts, tmp_path, answer):  # noqa: F811
    said = done("evaluate", runs["plain"], "--axis", "gender", "--on", f"counterfactual={texts}", "--seed", 5, "--samples", 47, "--json", tmp_path / "m.json",
                "--examples", tmp_path / "e.jsonl")
    found, rows, axis = by_name(tmp_path / "m.json"), lines(tmp_path / "e.jsonl"), load_axis("gender")
    touched = [(i, text, counterfactuals(text, axis)[0].text) for i, text in enumerate(TEXTS) if counterfactuals(text, axis)]
    assert [(r["source"], r["text"], r["counterfactual"]) for r in rows] == touched and len(touched) == 5
    assert rows[1]["place"] == f"{texts}:3" and f"{texts}: 5 of 7 texts have words of the axis gender; 5 counterfactuals" in said.err
    flips, shifts = [], []
    for r in rows:
        before, after = answer(runs["plain"], r["text"]), answer(runs["plain"], r["counterfactual"])
        assert r["probabilities"] == pytest.approx(before, abs=1e-6) and r["probabilities_counterfactual"] == pytest.approx(after, abs=1e-6)
        label, other = max(before, key=before.get), max(after, key=after.get)
        assert (r["predicted"], r["predicted_counterfactual"]) == (label, other)
        flips.append(label != other)
        shifts.append(abs(after[label] - before[label]))
    assert found["counterfactual/flips"]["value"] == pytest.approx(100 * numpy.mean(flips)) and found["counterfactual/flips"]["n"] == 5
    assert found["counterfactual/probability"]["value"] == pytest.approx(100 * numpy.mean(shifts), abs=1e-4) and numpy.mean(shifts) > 0.001
    told = [r["probabilities_counterfactual"][r["predicted"]] - r["probabilities"][r["predicted"]] for r in rows]
    assert list(found.values()) == [m.as_json() for m in counterfactual.measures(flips, told, [r["source"] for r in rows], seed=5, samples=47)]


def test_the_axis_is_that_of_the_runs_module_unless_it_is_named(small, runs, texts, tmp_path):
    own = done("evaluate", runs["debiased"], "--on", f"counterfactual={texts}").out
    assert own == done("evaluate", runs["debiased"], "--axis", "gender", "--on", f"counterfactual={texts}").out
    said = cli("evaluate", runs["plain"], "--on", f"counterfactual={texts}")
    assert said.code == 2 and f"--on counterfactual={texts}: expected --axis NAME|FILE, since {runs['plain']} has no module" in said.err
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nkeep_untouched = false\ngroups = [["dough", "ward", "rains"]]\n')
    done("evaluate", runs["debiased"], "--axis", mine, "--on", f"counterfactual={texts}", "--examples", tmp_path / "e.jsonl", "--json", tmp_path / "m.json")
    rows = lines(tmp_path / "e.jsonl")
    assert [r["source"] for r in rows] == [1, 1, 3, 3, 5, 5, 6, 6] and rows[0]["counterfactual"] == "it dough ." and {r["axis"] for r in rows} == {"mine"}
    assert {m["n"] for m in by_name(tmp_path / "m.json").values()} == {4}  # of texts, whatever their counterfactuals


def test_several_modules_of_one_axis_tell_it_where_all_were_learnt_on_its_words(monkeypatch):
    own = {"ours": load_axis("gender").digest(), "theirs": "of other words"}
    monkeypatch.setattr(extrinsic, "read_header", lambda folder: {"axis_sha256": own[folder]})

    def axis_of(**sources):
        names = {name.replace("_", "-"): folder for name, folder in sources.items()}
        return extrinsic._axis(SimpleNamespace(model=SimpleNamespace(methods=dict.fromkeys(names)), sources=names), Evaluate(model="m"), "f").name

    assert axis_of(gender="ours", gender_2="ours") == "gender"
    for sources, words in (({"gender": "ours", "gender_2": "theirs"}, "m has a module learnt on other words"), ({"gender": "ours", "race": "ours"}, "m has modules on gender, race")):
        with pytest.raises(ConfigError, match=words):
            axis_of(**sources)


def test_words_of_ones_own_under_a_shipped_name_are_not_taken_for_the_shipped_ones(small, texts, tmp_path):
    axis = tmp_path / "own.toml"
    axis.write_text('name = "gender"\nkeep_untouched = true\ngroups = [["he", "she"], ["his", "her"]]\n')
    done("upstream", *small.learning(axis=axis, steps=2), "--out", tmp_path / "own")
    done("downstream", *small.task(epochs=1, adapter=tmp_path / "own"), "--out", tmp_path / "run")
    asked = ["evaluate", tmp_path / "run", "--on", f"counterfactual={texts}"]
    words = "other words of the same name than those that"
    assert f"--axis gender: {words} {tmp_path}/run/adapter was learnt on" in done(*asked, "--axis", "gender").err and words not in done(*asked, "--axis", axis).err
    said = cli(*asked)
    assert said.code == 2 and f"expected --axis NAME|FILE, since {tmp_path / 'run'} has a module learnt on other words than those of the shipped axis gender" in said.err
    assert "counterfactual/flips" in done(*asked, "--axis", axis).out


def test_a_labelled_file_gives_its_texts(small, runs, tmp_path):
    done("evaluate", runs["debiased"], "--on", f"counterfactual={small.test}", "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    truth = [json.loads(line)["hard_text"] for line in small.test.read_text().splitlines()]
    assert all(r["text"] == truth[r["source"]] for r in lines(tmp_path / "e.jsonl")) and by_name(tmp_path / "m.json")["counterfactual/flips"]["n"] > 20


def test_pairs_of_texts(small, runs, tmp_path, answer):
    table = tmp_path / "pairs.tsv"
    table.write_text("first\tsecond\nit rains .\tshe is a nurse .\nhe is a guard .\tdough .\ndough .\tdough .\n")
    done("evaluate", runs["pairs"], "--axis", "gender", "--on", f"counterfactual={table}", "--examples", tmp_path / "e.jsonl")
    rows = lines(tmp_path / "e.jsonl")
    assert [(r["counterfactual"], r["counterfactual_pair"]) for r in rows] == [("it rains .", "he is a nurse ."), ("she is a guard .", "dough .")]
    assert rows[0]["probabilities_counterfactual"] == pytest.approx(answer(runs["pairs"], "it rains .", "he is a nurse ."), abs=1e-6)
    said = cli("evaluate", runs["pairs"], "--axis", "gender", "--on", f"counterfactual={small.heldout}")
    assert said.code == 2 and f"{small.heldout}: expected a csv, tsv or jsonl file with the columns first and second" in said.err


def test_what_cannot_be_measured_is_named(small, runs, tmp_path):
    (tmp_path / "none.txt").write_text("it rains .\ndough .\n")
    for argv, words in (([runs["debiased"], "--on", f"counterfactual={tmp_path / 'none.txt'}"], "none.txt: expected texts with words of the axis gender, found none in 2 texts"),
                        ([small.base, "--axis", "gender", "--on", f"counterfactual={small.test}"], "expected a model with a classifier for --on counterfactual="),
                        ([runs["plain"], "--axis", "shoes", "--on", f"counterfactual={small.test}"], "unknown axis 'shoes'")):
        said = cli("evaluate", *argv, "--json", tmp_path / "m.json")
        assert said.code == 2 and words in said.err and len(said.err.splitlines()) == 2 and not (tmp_path / "m.json").exists()


# ---------------------------------------------------------------- two systems

def test_two_systems_are_compared_on_the_same_texts(small, runs, tmp_path):
    for name in ("plain", "debiased"):
        done("evaluate", runs[name], "--axis", "gender", "--on", f"counterfactual={small.test}", "--json", tmp_path / f"{name}.json", "--examples", tmp_path / f"{name}.jsonl")
    done("compare", tmp_path / "plain.jsonl", tmp_path / "debiased.jsonl", "--json", tmp_path / "d.json")
    first, second = by_name(tmp_path / "plain.json"), by_name(tmp_path / "debiased.json")
    found = {d["name"]: d for d in json.loads((tmp_path / "d.json").read_text())["differences"]}
    assert list(found) == ["counterfactual/flips", "counterfactual/probability"]
    for name, d in found.items():
        assert (d["first"], d["second"]) == (pytest.approx(first[name]["value"]), pytest.approx(second[name]["value"])) and d["unit"] == "points"
        assert d["low"] <= d["difference"] <= d["high"] and d["n"] == first[name]["n"]


def test_counterfactuals_whose_words_lie_behind_the_cut_are_counted(runs, tmp_path):
    (tmp_path / "texts.txt").write_text("dough dough dough dough dough dough . she kneads .\nShe is a nurse .\n")
    said = done("evaluate", runs["plain"], "--axis", "gender", "--on", f"counterfactual={tmp_path}/texts.txt", "--max-length", 6)
    assert f"{tmp_path}/texts.txt: 1 of 2 counterfactuals have the tokens of their text, which counts as no flip: the words lie behind the cut, or the vocabulary lacks them" in said.err
    assert "the tokens of their text" not in done("evaluate", runs["plain"], "--axis", "gender", "--on", f"counterfactual={tmp_path}/texts.txt").err
