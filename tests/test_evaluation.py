"""evaluate and predict: figures against their definition, columns from the run, what is cut is counted, output files are whole or not there."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from peftdebias import axes, evaluation, extrinsic, patch
from peftdebias.answers import Answers, Result, cut_note, is_plain, longest_of, positive_label
from peftdebias.batches import Sample, pack
from peftdebias.checkpoint import load_run
from peftdebias.config import LEAST, MEASURES, Evaluate, Predict
from peftdebias.corpus import Example, read_examples
from peftdebias.errors import AdapterError, ConfigError, DataError
from peftdebias.evaluation import parse_on
from peftdebias.extrinsic import classification_measures
from peftdebias.labelled import Labelled
from peftdebias.metrics import Measure, bootstrap, counterfactual, crows_pairs, nli, seat, stereoset
from peftdebias.metrics.classification import accuracy, f1, macro_f1
from peftdebias.metrics.fairness import fairness
from peftdebias.metrics.tpr_gap import tpr_gap
from peftdebias.tasks import masked_samples
from peftdebias.tokens import Encoded

from .outside import one_thread  # noqa: F401
from .small import cli, done, flags_of, lines, tree


def test_a_pair_needs_room_for_more_than_its_special_tokens(small, tmp_path):
    words = flags_of(dict(model=small.base, train=small.paired, dev=small.paired, text="first", text_pair="second", label="same", epochs=1, out=tmp_path / "run"))
    said = cli("downstream", *words, "--max-length", 3)
    assert said.code == 2 and said.err.splitlines()[-1] == "peftdebias: --max-length: expected at least 4 for pairs, the special tokens and one more, got 3"
    assert not (tmp_path / "run").exists()
    done("downstream", *words, "--max-length", 4)
    assert "expected at least 4 for pairs" in cli("predict", tmp_path / "run", small.paired, "--max-length", 3).err


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """name -> run folder: a classifier of professions, one of health (0 and 1), one of pairs."""
    out = tmp_path_factory.mktemp("runs")
    done("downstream", *small.task(out=out / "jobs"))
    done("downstream", *flags_of(dict(model=small.base, train=small.binary, dev=small.binary, text="text", label="is_health", epochs=1, max_length=12, out=out / "health")))
    done("downstream", *flags_of(dict(model=small.base, train=small.paired, dev=small.paired, text="first", text_pair="second", label="same", epochs=1, out=out / "pairs")))
    return {path.name: path for path in out.iterdir()}


def by_name(path) -> dict[str, dict]:
    return {m["name"]: m for m in json.loads(path.read_text())["measures"]}


@pytest.fixture
def answer():
    """What a classifier says of one text at a time: {label: probability}."""
    def ask(folder, text, pair=None):
        run = load_run(folder)
        (e,) = run.tokenizer.encode([text], None if pair is None else [pair], run.config["max_length"] if run.config["max_length"] < 64 else 64)
        with torch.no_grad():
            row = run.model.class_logits(pack([Sample(e.ids, numpy.array([0]), None, e.segments)]))[0].softmax(-1)
        return dict(zip(run.model.classifier.labels, row.tolist()))
    return ask


# ---------------------------------------------------------------- figures

def test_every_measure_of_the_base_leaves_room_for_what_stands_before_a_text(small, tmp_path):
    """A positioned prompt of three takes three of the model's 64 positions, whatever the texts are measured for."""
    done("upstream", *small.learning(method="prompt", set=["length=3", "positioned=true"], steps=1, out=tmp_path / "run"))
    text = " ".join(["he works in the market ."] * 20)
    (tmp_path / "pairs.csv").write_text(f"sent_more,sent_less,stereo_antistereo,bias_type\nhe {text},she {text},stereo,gender\n")
    (tmp_path / "seat.jsonl").write_text(json.dumps({name: {"category": name, "examples": [f"{word} {text}", word]}
                                                     for name, word in (("targ1", "he"), ("targ2", "she"), ("attr1", "market"), ("attr2", "work"))}))
    (tmp_path / "text.txt").write_text(text + "\n")
    for name, file, cut in (("crows-pairs", "pairs.csv", "2 of 2"), ("seat", "seat.jsonl", "4 of 8"), ("perplexity", "text.txt", "1 of 1")):
        said = done("evaluate", small.base, "--adapter", tmp_path / "run", "--on", f"{name}={tmp_path / file}")
        assert f"{tmp_path / file}: {cut} texts are longer than 61 tokens and were cut" in said.out + said.err


def test_seed_and_samples_reach_every_measure(small, runs, tmp_path, monkeypatch):
    asked = []

    def heard(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **drawn: asked.append((module.__name__.rpartition(".")[2], drawn["seed"], drawn["samples"])) or original(*args, **drawn))

    for module in (crows_pairs, stereoset, seat, nli, counterfactual):
        heard(module, "measures")
    heard(extrinsic, "fprd")
    row = {"target": "nurse", "bias_type": "gender", "context": "The nurse is BLANK.",
           "sentences": [{"gold_label": label, "sentence": f"The nurse is {word}."} for label, word in zip(stereoset.LABELS, ("she", "he", "market"))]}
    (tmp_path / "stereoset.json").write_text(json.dumps({"data": {"intrasentence": [row]}}))
    (tmp_path / "seat.jsonl").write_text(json.dumps({name: {"category": name, "examples": [word]} for name, word in zip(seat.SETS, ("he", "she", "market", "work"))}))
    (tmp_path / "lists").mkdir()
    for name, text in (("occupations", "nurse\nbaker\n"), ("gendered_words", "man\n"), ("templates", "The {} is here.\n")):
        (tmp_path / "lists" / f"{name}.txt").write_text(text)
    (tmp_path / "terms.txt").write_text("he\nshe\n")
    for run, name, file, flags in ((small.base, "crows-pairs", small.pairs, ()), (small.base, "stereoset", tmp_path / "stereoset.json", ()),
                                   (small.base, "seat", tmp_path / "seat.jsonl", ()), (runs["pairs"], "bias-nli", tmp_path / "lists", ("--neutral", "no")),
                                   (runs["health"], "counterfactual", small.binary, ("--axis", "gender")),
                                   (runs["health"], "fprd", small.binary, ("--terms", tmp_path / "terms.txt"))):
        done("evaluate", run, "--on", f"{name}={file}", "--seed", 6, "--samples", 41, *flags)
    assert asked == [(name, 6, 41) for name in ("crows_pairs", "crows_pairs", "stereoset", "seat", "nli", "counterfactual", "extrinsic")]


def test_a_text_without_a_word_to_mask_says_nothing(small, tmp_path):
    (tmp_path / "one.txt").write_text(small.heldout.read_text().splitlines()[0] + "\n\U0001f984\n")
    (tmp_path / "three.txt").write_text("\n".join([*small.heldout.read_text().splitlines()[:2], "\U0001f984"]))
    done("evaluate", small.base, "--on", f"perplexity={tmp_path / 'one.txt'}", "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    assert [(m["n"], m["low"], m["high"]) for m in by_name(tmp_path / "m.json").values()] == 2 * [(1, None, None)]  # one text has no spread
    assert [(r["tokens"] > 0, r["nll"] > 0) for r in lines(tmp_path / "e.jsonl")] == [(True, True), (False, False)]
    said = done("compare", tmp_path / "e.jsonl", tmp_path / "e.jsonl")
    assert "no difference without an interval, so none: mlm-loss" in said.out + said.err
    done("evaluate", small.base, "--on", f"perplexity={tmp_path / 'three.txt'}", "--json", tmp_path / "m.json")
    assert all(m["n"] == 2 and 0 < m["low"] < m["value"] < m["high"] for m in by_name(tmp_path / "m.json").values())


def test_perplexity_is_its_definition(small, tmp_path):
    """The masks are those of the seed; loss is the mean over masked tokens of -log P, one text at a time here."""
    done("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--seed", 3, "--samples", 47, "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    run, found = load_run(small.base), by_name(tmp_path / "m.json")
    texts = small.heldout.read_text().splitlines()
    samples = masked_samples([[e.ids] for e in run.tokenizer.encode(texts)], run.tokenizer, numpy.random.default_rng([3, 4]))
    nll = []
    for s in samples:
        with torch.no_grad():
            nll.append(F.cross_entropy(run.model.mlm_logits(pack([s])).double(), torch.as_tensor(s.targets).long(), reduction="sum").item())
    loss = sum(nll) / sum(len(s.targets) for s in samples)
    assert found["mlm-loss"]["value"] == pytest.approx(loss, rel=1e-5) and found["perplexity"]["value"] == pytest.approx(numpy.exp(loss), rel=1e-4)
    assert found["mlm-loss"]["low"] < loss < found["mlm-loss"]["high"] and found["mlm-loss"]["n"] == len(texts) and found["mlm-loss"]["unit"] == "nats"
    rows = lines(tmp_path / "e.jsonl")
    counts = numpy.array([r["tokens"] for r in rows])
    low, high = bootstrap.interval(lambda drawn: numpy.array(nll)[drawn].sum() / counts[drawn].sum(), len(texts), seed=3, samples=47)  # of tokens, texts drawn
    assert (found["mlm-loss"]["low"], found["mlm-loss"]["high"]) == pytest.approx((low, high), rel=1e-5) and len(set(counts)) > 1
    assert [r["text"] for r in rows] == texts and [r["nll"] for r in rows] == pytest.approx(nll, rel=1e-5) and [r["tokens"] for r in rows] == [len(s.targets) for s in samples]
    done("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--seed", 4, "--json", tmp_path / "other.json")
    assert by_name(tmp_path / "other.json")["mlm-loss"]["value"] != found["mlm-loss"]["value"]


def test_a_module_changes_what_is_measured(small, tmp_path):
    done("upstream", *small.learning(out=tmp_path / "gender"))
    for name, argv in (("base", [small.base]), ("with", [small.base, "--adapter", tmp_path / "gender"]), ("run", [tmp_path / "gender"])):
        done("evaluate", *argv, "--on", f"perplexity={small.heldout}", "--on", f"crows-pairs={small.pairs}", "--json", tmp_path / f"{name}.json")
    base, attached, run = (by_name(tmp_path / f"{name}.json") for name in ("base", "with", "run"))
    assert base["mlm-loss"]["value"] != attached["mlm-loss"]["value"] and attached == run  # RUN is its base with its module
    assert list(base) == ["mlm-loss", "perplexity", *(f"crows-pairs/{s}/{k}" for s in ("nangia", "bias-bench") for k in ("all", "gender"))]


def test_texts_of_a_run_are_as_long_as_it_was_trained_with_and_pairs_as_long_as_the_model_reads(small, tmp_path):
    done("upstream", *small.learning(steps=1, valid_every=1, max_length=6, out=tmp_path / "short"))
    said = done("evaluate", tmp_path / "short", "--on", f"perplexity={small.heldout}", "--on", f"crows-pairs={small.pairs}")
    assert [line.partition(": ")[0] for line in said.err.splitlines() if "longer than" in line] == [str(small.heldout)] and "longer than 6 tokens" in said.err


def test_classification_figures_are_those_of_the_examples(small, runs, tmp_path, answer):
    done("evaluate", runs["jobs"], "--on", f"classification={small.test}", "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    found, rows = by_name(tmp_path / "m.json"), lines(tmp_path / "e.jsonl")
    truth = [json.loads(line) for line in small.test.read_text().splitlines()]
    assert [(r["text"], r["label"], r["group"]) for r in rows] == [(t["hard_text"], t["profession"], t["gender"]) for t in truth]
    for r in rows[:5]:
        assert r["probabilities"] == pytest.approx(answer(runs["jobs"], r["text"]), abs=1e-6) and r["predicted"] == max(r["probabilities"], key=r["probabilities"].get)
    assert found["accuracy"]["value"] == pytest.approx(100 * numpy.mean([r["predicted"] == r["label"] for r in rows]))
    assert set(found["accuracy"]) == {"name", "value", "unit", "ideal", "low", "high", "n"} and found["accuracy"]["n"] == 60


def test_columns_come_from_the_run_unless_they_are_named(small, runs, tmp_path):
    assert "f1/1" in done("evaluate", runs["health"], "--on", f"classification={small.binary}", "--examples", tmp_path / "e.jsonl").out  # text and is_health, F1 of 1
    assert {row["positive"] for row in lines(tmp_path / "e.jsonl")} == {"1"}
    renamed = tmp_path / "r.csv"
    renamed.write_text(small.binary.read_text().replace("text,is_health", "body,ill"))
    said = cli("evaluate", runs["health"], "--on", f"classification={renamed}")
    assert said.code == 2 and f"{renamed}:1: no column 'text'; columns: body, ill" in said.err
    own = done("evaluate", runs["health"], "--on", f"classification={small.binary}").out
    assert done("evaluate", runs["health"], "--on", f"classification={renamed}", "--text", "body", "--label", "ill").out == own
    assert done("evaluate", runs["health"], "--on", f"classification={small.binary}", "--positive", "0").out.count("f1/0") == 1
    (tmp_path / "words.txt").write_text("he\nshe\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({k: v for k, v in row.items() if k != "gender"}) + "\n" for row in lines(small.test)))
    done("evaluate", runs["jobs"], "--on", f"fprd={tmp_path / 't.jsonl'}", "--positive", "nurse", "--terms", tmp_path / "words.txt")  # groups are another measure's
    said = cli("evaluate", runs["health"] / "model", "--on", f"classification={small.binary}")  # the bare model folder knows no columns
    assert said.code == 2 and f"--on classification={small.binary}: expected --text COL and --label COL" in said.err


def example(label, group=None):
    return Example("t", None, label, group, "f:1")


def test_rows_of_examples_have_all_that_a_measure_is_made_of():
    examples = [example("yes", "f"), Example("t", "u", "no", None, "f:2")]
    assert Answers(examples, ("yes", "no"), numpy.array([[0.75, 0.25], [0.5, 0.5]]), ["yes", "yes"], []).rows("m", positive="no") == [
        {"measure": "m", "place": "f:1", "text": "t", "label": "yes", "group": "f", "predicted": "yes", "probabilities": {"yes": 0.75, "no": 0.25}, "positive": "no"},
        {"measure": "m", "place": "f:2", "text": "t", "text_pair": "u", "label": "no", "group": None, "predicted": "yes", "probabilities": {"yes": 0.5, "no": 0.5}, "positive": "no"}]


def test_how_long_texts_may_be_and_which_files_have_one_a_line():
    def longest(room, most=None, **trained):
        return longest_of(SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(longest=room)), config=trained), Predict(run="r", max_length=most))

    assert [longest(512), longest(512, max_length=300), longest(512, 20, max_length=300), longest(64, 300), longest(LEAST)] == [256, 300, 20, 64, LEAST]
    for source, named, plain in (("-", None, True), ("a.TXT", None, True), ("a.txt.gz", None, True), ("a.txt", "1", False), ("a.csv.gz", None, False)):
        assert is_plain(source, named, (None, None)) == plain
    with pytest.raises(ConfigError, match="^--text x: expected a csv, tsv or jsonl file to take it from, got standard input, where a line is a text$"):
        is_plain("-", "x", (None, None))


def test_gaps_of_0_that_say_nothing_are_told():
    examples = [example(label, group) for label in "abc" for group in "fmfm"]
    truth = [e.label for e in examples]

    def notes(predicted):
        return classification_measures(predicted, examples, ("a", "b", "c"), where="f.csv", samples=5)[1]

    assert notes(["b"] * 12) == ["f.csv: every prediction is b: gaps and differences between groups are 0 whatever the texts are"]
    assert notes(["a" if label == "c" else label for label in truth]) == ["TPR-GAP: 0 since no example of them was found: c"] and notes(truth) == []


def test_texts_that_are_learnt_from_are_told():
    def split(*texts):
        return [Example(*text, "yes", None, "f:1") for text in texts]

    splits = {"train": split(("a", None), ("b", "c"), ("b", "c")), "dev": split(("a", "c"), ("b", None), ("c", None)), "test": split(("a", None), ("x", None), ("b", "c"))}
    read = Labelled({name: f"{name}.csv" for name in splits}, splits, ("yes",), {}, None, None, "test")
    assert read.lines()[3:] == ["test: 2 of the 3 texts of test.csv stand in train.csv too: figures on them say less of others"]


def test_what_cannot_be_measured_is_left_out_or_named_with_its_file():
    found, notes = classification_measures(["0", "0"], [example("0"), example("0")], ("0", "1"), where="f.csv", samples=5)
    assert [m.name for m in found] == ["accuracy", "f1/macro"] and notes == ["f.csv: no F1 of '1', which no example has"]
    assert classification_measures(["0", "1"], [example("0"), example("0")], ("0", "1"), where="f.csv", samples=5)[1] == notes
    assert classification_measures(["0", "0"], [example("0"), example("1")], ("0", "1"), where="f.csv", samples=5)[0][2].name == "f1/1"
    found, notes = classification_measures(["0", "1", "0"], [example("0", "f"), example("0", "m"), example("1", "f")], ("0", "1"), where="f.csv", samples=5)
    assert [m.name for m in found] == ["accuracy", "f1/macro", "f1/1", "tpr-gap/rms", "tpr-gap/rms-shuffled", "tpr-gap/class/0", "demographic-parity",
                                       "demographic-parity/shuffled"]
    assert notes == ["TPR-GAP: left out, without positives of both groups: 1", "TPR-GAP: without an interval, of a single example in one group: 0",
                     "equalized-odds: left out, without examples of them, or of others, in two groups: 0, 1"]
    found, notes = classification_measures(["0", "1", "0"], [example("0", "f"), example("0", "m"), example("1", "x")], ("0", "1"), where="f.csv", samples=5)
    assert [m.name for m in found][3:] == ["demographic-parity", "demographic-parity/shuffled"] and notes[0] == "f.csv: no TPR-GAP, which is of 2 groups; 3 groups here"
    with pytest.raises(DataError, match="^f.csv: expected 2 groups, got 1: f$"):
        classification_measures(["0"], [example("0", "f")], ("0", "1"), where="f.csv", samples=5)


def test_a_file_of_one_group_has_no_gaps_unless_somebody_asks_for_them(runs, small, tmp_path):
    rows = [row for row in map(json.loads, small.test.read_text().splitlines()) if row["gender"] == "f"]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = done("evaluate", runs["jobs"], "--on", f"classification={tmp_path}/f.jsonl", "--json", tmp_path / "m.json")
    assert f"{tmp_path}/f.jsonl: no gaps between groups: all examples are of the group 'f'" in said.err
    assert [*by_name(tmp_path / "m.json")] == ["accuracy", "f1/macro"] and by_name(tmp_path / "m.json")["accuracy"]["n"] == len(rows) > 1
    asked = cli("evaluate", runs["jobs"], "--on", f"classification={tmp_path}/f.jsonl", "--group", "gender")
    assert asked.code == 2 and "f.jsonl: expected 2 groups, got 1: f" in asked.err


@pytest.mark.parametrize("labels,wanted,found", [(("0", "1"), None, "1"), (("no", "Yes"), None, "Yes"), (("0.0", "1.0"), None, "1.0"), (("a", "b"), None, None), (("a", "b"), "a", "a"), (("0", "1", "2"), None, None),
                                                 (("0", "1", "2"), "2", "2")])  # fmt: skip
def test_which_label_f1_is_of(labels, wanted, found):
    assert positive_label(labels, wanted) == found


# ---------------------------------------------------------------- --on

def test_entries_name_a_measure_and_a_file(tmp_path):
    (tmp_path / "a=b.txt").write_text("x")
    assert parse_on((f"perplexity={tmp_path}/a=b.txt",)) == [("perplexity", f"{tmp_path}/a=b.txt")]
    for entry, error, words in (("bias=f", ConfigError, f"--on bias=f: expected NAME=FILE with NAME one of {', '.join(MEASURES)}, got 'bias'"),
                                ("perplexity", ConfigError, "expected perplexity=FILE, got no file"), ("perplexity=", ConfigError, "got no file"),
                                ("perplexity=none.txt", DataError, "none.txt: no such file")):
        with pytest.raises(error, match=words):
            parse_on((entry,))


def test_a_model_without_the_head_that_a_measure_needs_is_named(small, runs):
    for name, path in (("perplexity", small.heldout), ("crows-pairs", small.pairs)):
        said = cli("evaluate", runs["jobs"], "--on", f"{name}={path}")
        assert said.code == 2 and f"{runs['jobs']}: expected a model with a masked-LM head for --on {name}={path}, got one without" in said.err
    said = cli("evaluate", small.base, "--on", f"classification={small.test}")
    assert said.code == 2 and f"{small.base}: expected a model with a classifier for --on classification={small.test}, got one without" in said.err
    for run, entry, flags, words in (("jobs", f"bias-nli={small.root}", ("--neutral", "nurse"), "expected a run on pairs of texts (--text-pair), got one on single texts"),
                                     ("pairs", f"iptts={small.binary}", (), "expected a run on single texts, got one on pairs")):
        said = cli("evaluate", runs[run], "--on", entry, *flags)
        assert said.code == 2 and said.err.endswith(f"--on {entry}: {words}\n")
    said = cli("evaluate", small.base)
    assert said.code == 2 and f"--on: expected at least one NAME=FILE with NAME one of {', '.join(MEASURES)}, got none" in said.err


# ---------------------------------------------------------------- cut

def test_the_note_on_cut_texts():
    def encoded(cut):
        return Encoded(numpy.zeros(3), None, cut)

    assert cut_note([encoded(0), encoded(0)], 9, "f") == []
    assert cut_note([encoded(0), encoded(2), encoded(5)], 9, "f") == ["f: 2 of 3 texts are longer than 9 tokens and were cut (7 tokens left out)"]


def test_evaluate_and_predict_count_what_they_cut_and_cut_as_the_run_did(small, runs, tmp_path, monkeypatch):
    words = f"{small.binary}: {{}} of 96 texts are longer than {{}} tokens and were cut"
    lengths = [len(e.ids) for e in load_run(small.base).tokenizer.encode([e.text for e in read_examples(small.binary, text="text")])]
    for said in (done("evaluate", runs["health"], "--on", f"classification={small.binary}"), done("predict", runs["health"], small.binary)):
        assert words.format(sum(n > 12 for n in lengths), 12) in said.err  # the run's --max-length
    assert words.format(sum(n > 20 for n in lengths), 20) in done("predict", runs["health"], small.binary, "--max-length", 20).err
    assert "longer than" not in done("predict", runs["health"], small.binary, "--max-length", 64).err
    (tmp_path / "long.txt").write_text("he is a nurse\n" + "he " * 80 + "\n")
    said = done("evaluate", small.base, "--on", f"perplexity={tmp_path / 'long.txt'}")
    assert f"{tmp_path}/long.txt: 1 of 2 texts are longer than 64 tokens and were cut (18 tokens left out)" in said.err
    with open(tmp_path / "long.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "<stdin>: 1 of 2 texts are longer than 12 tokens and were cut" in done("predict", runs["health"]).err


# ---------------------------------------------------------------- predict

def test_predictions_are_the_models_answers_whatever_the_format(small, runs, tmp_path, monkeypatch, answer):
    texts = [e.text for e in read_examples(small.test, text="hard_text")][:7]
    (tmp_path / "t.txt").write_text("\n".join(texts[:3]) + "\n\n" + "\n".join(texts[3:]) + "\n")  # a blank line is no text
    (tmp_path / "t.csv").write_text("id,body\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(texts)))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"hard_text": t}) + "\n" for t in texts))
    with open(tmp_path / "t.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        rows = done("predict", runs["jobs"]).rows
    assert [r["text"] for r in rows] == texts and all(list(r) == ["text", "label", "probabilities"] for r in rows)
    for row in rows:
        expected = answer(runs["jobs"], row["text"])
        assert row["probabilities"] == pytest.approx(expected, abs=2e-6) and list(row["probabilities"]) == list(expected)
        assert row["label"] == max(expected, key=expected.get) and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len({r["probabilities"]["nurse"] for r in rows}) > 3  # the answers differ
    assert done("predict", runs["jobs"], tmp_path / "t.txt").rows == rows
    assert done("predict", runs["jobs"], tmp_path / "t.jsonl").rows == rows  # the run's own column
    for row, again in zip(rows, done("predict", runs["jobs"], tmp_path / "t.csv", "--text", "body", "--batch-tokens", 30).rows, strict=True):
        assert again["text"] == row["text"] and again["probabilities"] == pytest.approx(row["probabilities"], abs=2e-6)
    said = done("predict", runs["jobs"], tmp_path / "t.txt", "--out", tmp_path / "out.jsonl")
    assert f"{tmp_path / 't.txt'}: 1 blank lines have no row" in said.err and "blank" not in done("predict", runs["jobs"], tmp_path / "t.jsonl").err
    assert said.out == "" and lines(tmp_path / "out.jsonl") == rows and said.err.splitlines()[-1] == f"result: {tmp_path / 'out.jsonl'}"


def test_a_file_is_labelled_by_stretches(small, runs, tmp_path, monkeypatch):
    """So that any file fits in memory: what is before a corrupt record is answered before it is read, and a file that is to be written is not there then."""
    texts = [e.text for e in read_examples(small.test, text="hard_text")][:7]
    (tmp_path / "t.csv").write_text("hard_text\n" + "".join(f'"{t}"\n' for t in texts))
    (tmp_path / "pairs.tsv").write_text("\n".join(small.paired.read_text().splitlines()[:6]) + "\n")
    asked = [("predict", runs["jobs"], tmp_path / "t.csv", "--max-length", 8), ("predict", runs["pairs"], tmp_path / "pairs.tsv")]
    whole = [done(*words) for words in asked]
    monkeypatch.setattr("peftdebias.evaluation.STRETCH", 3)
    for words, before in zip(asked, whole):
        said = done(*words)
        assert [(r["text"], r["label"]) for r in said.rows] == [(r["text"], r["label"]) for r in before.rows] and said.err == before.err
        assert all(r["probabilities"] == pytest.approx(b["probabilities"], abs=2e-6) for r, b in zip(said.rows, before.rows, strict=True))
    assert "7 of 7 texts are longer than 8 tokens" in whole[0].err
    (tmp_path / "t.csv").write_bytes((tmp_path / "t.csv").read_bytes() + b"\xff\n")
    said = cli(*asked[0])
    assert said.code == 2 and f"{tmp_path / 't.csv'}:9: expected utf-8" in said.err and [json.loads(line)["text"] for line in said.out.splitlines()] == texts[:6]
    assert cli(*asked[0], "--out", tmp_path / "out.jsonl").code == 2 and not (tmp_path / "out.jsonl").exists()
    with open(tmp_path / "t.txt", "a") as ours, monkeypatch.context() as sent:
        sent.setattr(sys, "stdout", ours)
        with pytest.raises(ConfigError, match="^--out: standard output is .*t.txt, which is read"):  # else it would never end
            evaluation.predict(Predict(run=str(runs["jobs"]), file=str(tmp_path / "t.txt")))
    (tmp_path / "blank.csv").write_text("hard_text\n" + "  \n" * 4)
    said = cli("predict", runs["jobs"], tmp_path / "blank.csv", "--out", tmp_path / "out.jsonl")
    assert said.code == 2 and "no text in" in said.err and not (tmp_path / "out.jsonl").exists()


def test_modules_are_written_into_the_weights_where_they_can_be(small, tmp_path, monkeypatch, answer):
    done("upstream", *small.learning(out=tmp_path / "gender"))
    done("downstream", *small.task(out=tmp_path / "run", adapter=tmp_path / "gender", epochs=1))
    merge, merged, refused = patch.merge, [], AdapterError("merge: it scales a place where another method acts")

    def told(model, *names):
        merged.append(names)
        if len(merged) > 1:
            raise refused
        merge(model, *names)
        assert model.encoder.hooks.merged

    monkeypatch.setattr(patch, "merge", told)
    (tmp_path / "t.txt").write_text("she is a nurse")
    expected = answer(tmp_path / "run", "she is a nurse")
    for _ in range(2):
        (row,) = done("predict", tmp_path / "run", tmp_path / "t.txt").rows
        assert row["probabilities"] == pytest.approx(expected, abs=2e-6)
    assert merged == [("gender",)] * 2
    monkeypatch.setattr("peftdebias.methods.lora.LoRA.mergeable", False)
    (row,) = done("predict", tmp_path / "run", tmp_path / "t.txt").rows
    assert len(merged) == 2 and row["probabilities"] == pytest.approx(expected, abs=2e-6)


def test_a_run_on_pairs_labels_pairs(small, runs, tmp_path, monkeypatch, answer):
    rows = done("predict", runs["pairs"], small.paired).rows
    first, second, _ = small.paired.read_text().splitlines()[1].split("\t")
    assert len(rows) == 95 and rows[0]["text"] == first and rows[0]["probabilities"] == pytest.approx(answer(runs["pairs"], first, second), abs=2e-6)
    assert rows[0]["probabilities"] != pytest.approx(answer(runs["pairs"], first), abs=1e-4)  # the second text counts
    assert done("predict", runs["pairs"] / "model", small.paired, "--text", "first", "--text-pair", "second").rows == rows  # the folder alone says nothing of pairs
    with open(small.heldout) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for argv, what in (([], "<stdin>"), ([small.heldout], str(small.heldout))):
            said = cli("predict", runs["pairs"], *argv)
            assert said.code == 2 and f"{what}: expected a csv, tsv or jsonl file with the columns first and second, since the run labels pairs" in said.err


def test_a_model_folder_with_a_classifier_predicts_too(runs, tmp_path):
    (tmp_path / "t.csv").write_text("text\nhe is a nurse\n")
    assert done("predict", runs["health"] / "model", tmp_path / "t.csv").rows[0]["label"] in "01"


# ---------------------------------------------------------------- files

def test_one_measure_on_two_files_has_two_names(small, tmp_path):
    (tmp_path / "more.txt").write_text("she is a nurse at home\nhe is a banker\n")
    on = ["--on", f"perplexity={small.heldout}", "--on", f"perplexity={tmp_path / 'more.txt'}"]
    done("evaluate", small.base, *on, "--json", tmp_path / "both.json", "--examples", tmp_path / "e.jsonl")
    done("evaluate", small.base, *on[2:], "--json", tmp_path / "more.json")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.txt").write_text("she is a banker\n")
    done("evaluate", small.base, *on, "--on", f"perplexity={tmp_path / 'deep' / 'more.txt'}", "--json", tmp_path / "three.json")
    assert list(by_name(tmp_path / "three.json"))[-2:] == [f"{name} ({(tmp_path / 'deep/more.txt').resolve()})" for name in ("mlm-loss", "perplexity")]
    found, alone = by_name(tmp_path / "both.json"), by_name(tmp_path / "more.json")
    assert list(found) == ["mlm-loss (heldout.txt)", "perplexity (heldout.txt)", "mlm-loss (more.txt)", "perplexity (more.txt)"]
    assert found["mlm-loss (more.txt)"]["value"] == alone["mlm-loss"]["value"] != found["mlm-loss (heldout.txt)"]["value"]
    assert {row["measure"] for row in lines(tmp_path / "e.jsonl")} == {"mlm-loss (heldout.txt)", "mlm-loss (more.txt)"}
    done("evaluate", small.base, *on[2:], *on[:2], "--json", tmp_path / "turned.json")
    assert by_name(tmp_path / "turned.json") == found  # whatever their order
    (tmp_path / "more (1).csv").write_bytes(small.pairs.read_bytes())
    for name in ("e.jsonl", "f.jsonl"):
        done("evaluate", small.base, *on, "--on", f"crows-pairs={small.pairs}", "--on", f"crows-pairs={tmp_path / 'more (1).csv'}", "--examples", tmp_path / name)
    compared = done("compare", tmp_path / "e.jsonl", tmp_path / "f.jsonl", "--json", tmp_path / "c.json")
    names = [d["name"] for d in json.loads((tmp_path / "c.json").read_text())["differences"]]
    assert names[:2] == ["mlm-loss (heldout.txt)", "mlm-loss (more.txt)"] and "not compared" not in compared.err
    crows = [name for name in names if name.startswith("crows-pairs/")]
    assert len(crows) >= 4 and {n.removesuffix(" (more (1).csv)") for n in crows if n.endswith("(1).csv)")} == {n.removesuffix(f" ({small.pairs.name})") for n in crows if not n.endswith("(1).csv)")}


def test_output_files_that_cannot_be_written_are_known_before_anything_is_computed(small, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.checkpoint, "load_run", None)
    for argv in (["evaluate", small.base, "--on", f"perplexity={small.heldout}", "--json", tmp_path / "m.json", "--examples", tmp_path / "no" / "e.jsonl"],
                 ["predict", runs["jobs"], small.heldout, "--out", tmp_path / "no" / "e.jsonl"]):
        said = cli(*argv)
        assert said.code == 2 and f"{tmp_path}/no/e.jsonl: cannot be written" in said.err and tree(tmp_path) == {}


@pytest.mark.parametrize("flag", ["--json", "--examples"])
def test_standard_output_holds_nothing_beside_a_file_that_goes_there(flag, small, tmp_path):
    one = tmp_path / "one"
    asked = ("evaluate", small.base, "--on", f"perplexity={small.heldout}")
    said, kept = done(*asked, flag, "-"), done(*asked, flag, one)
    assert one.read_text() == said.out.replace('"json": "-"', f'"json": "{one}"')
    assert kept.out.splitlines()[:-1] == said.err.splitlines()[-len(kept.out.splitlines()):-1] and said.err.endswith("result: standard output\n")
    if flag == "--examples":
        said = done("compare", one, one, "--json", "-")
        assert json.loads(said.out)["differences"] and "result: standard output" in said.err and "difference" in said.err


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
def test_standard_output_by_its_name_is_not_written_over(small, tmp_path):
    """As a file that is open twice would be, each time from its beginning."""
    with open(tmp_path / "m.json", "w") as file:
        words = [sys.executable, "-m", "peftdebias", "evaluate", small.base, "--on", f"perplexity={small.heldout}", "--json", "/dev/stdout"]
        said = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, text=True, check=True).stderr
    assert json.loads((tmp_path / "m.json").read_text())["measures"] and "perplexity" in said.splitlines()[-2]


def test_settings_for_the_python_api():
    with pytest.raises(ConfigError, match="--on: expected at least one"):
        evaluation.evaluate(Evaluate(model="none"))


def test_an_option_that_no_measure_takes_is_told(small):
    said = done("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--bias-type", "gender", "--axis", "nosuch", "--max-pairs", 3, "--max-length", 20)
    assert [line for line in said.err.splitlines() if "no effect" in line] == [
        "--bias-type: no effect here: it is an option of crows-pairs", "--axis: no effect here: it is an option of counterfactual", "--max-pairs: no effect here: it is an option of bias-nli"]
    assert "no effect" not in done("evaluate", small.base, "--on", f"perplexity={small.heldout}").err
    said = cli("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--text", "column")
    assert said.code == 2 and f"--text column: expected a csv, tsv or jsonl file to take it from, got txt alone ({small.heldout})" in said.err


@pytest.mark.parametrize("flag", ["--axis", "--terms"])
def test_results_do_not_take_the_place_of_a_file_of_words(flag, small, tmp_path):
    (tmp_path / "own.toml").write_text("words")
    said = cli("evaluate", small.base, "--on", f"perplexity={small.heldout}", flag, tmp_path / "own.toml", "--json", tmp_path / "own.toml")
    assert said.code == 2 and f"--json {tmp_path}/own.toml: is read" in said.err and (tmp_path / "own.toml").read_text() == "words"
    said = cli("evaluate", small.base, "--on", f"seat={tmp_path}", "--examples", tmp_path / "own.toml")  # a file of the folder that is measured
    assert said.code == 2 and f"--examples {tmp_path}/own.toml: is read" in said.err and (tmp_path / "own.toml").read_text() == "words"


def test_figures_name_every_file_that_they_may_be_of(small, tmp_path):
    own = shutil.copy(Path(axes.__file__).with_name("gender.toml"), tmp_path / "own.toml")
    done("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--axis", own, "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["files"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (small.heldout, own)}


def test_every_option_of_measures_names_measures():
    named = {name for f in dataclasses.fields(Evaluate) for name in f.metadata["of"]}
    assert named < set(evaluation.ON) and all(f.metadata["help"].startswith(", ".join(f.metadata["of"])) for f in dataclasses.fields(Evaluate))


def test_a_model_that_overflows_gives_no_figures(small, runs, tmp_path):
    """Its weights are finite, what it says is not: one line, and no file."""
    for name, folder, inside in (("base", small.base, ""), ("run", runs["jobs"], "model")):
        shutil.copytree(folder, tmp_path / name)
        path = tmp_path / name / inside / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        key = next(key for key in tensors if key.endswith("layer.0.intermediate.dense.weight"))
        safetensors.torch.save_file(tensors | {key: tensors[key].sign() * 1e38}, path, {"format": "pt"})
    (tmp_path / "test.jsonl").write_text(json.dumps({n: {"category": n, "examples": ["he", "she"]} for n in ("targ1", "targ2", "attr1", "attr2")}))
    for words in (["evaluate", tmp_path / "base", "--on", f"perplexity={small.heldout}"], ["evaluate", tmp_path / "base", "--on", f"crows-pairs={small.pairs}"],
                  ["evaluate", tmp_path / "base", "--on", f"seat={tmp_path / 'test.jsonl'}"],
                  ["evaluate", tmp_path / "run", "--on", f"classification={small.root / 'world' / 'test.jsonl'}"]):
        said = cli(*words, "--json", tmp_path / "found.json")
        assert said.code == 2 and "expected finite numbers, got" in said.err.splitlines()[-1] and not (tmp_path / "found.json").exists(), said


def test_floors_take_no_more_shuffles_than_samples():
    rows = [example(label, group) for label in "0011" * 5 for group in "fm"]
    found, _ = classification_measures(list("01001101") * 5, rows, ("0", "1"), where="f.csv", samples=1)
    floors = [m for m in found if m.name.endswith("/shuffled")]
    assert len(floors) == 2 and all(m.low == m.value == m.high for m in floors)


def test_figures_of_a_classifier_are_those_of_the_runs_labels_with_the_seed_and_samples_given():
    """A label that neither is true nor predicted is one of the classes."""
    predicted, labels, groups = list("01001101") * 5, list("00001111" * 5), list("fm" * 20)
    drawn, known = dict(seed=5, samples=300), ("0", "1", "2")
    found, _ = classification_measures(predicted, [example(*row) for row in zip(labels, groups)], known, "1", where="f.csv", **drawn)
    assert found == [accuracy(predicted, labels, **drawn), macro_f1(predicted, labels, **drawn), f1(predicted, labels, "1", **drawn),
                     *tpr_gap(predicted, labels, groups, **drawn).as_measures(), *fairness(predicted, labels, groups, classes=known, shuffles=200, **drawn).measures]


def test_a_note_on_every_system_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("a\n")
    monkeypatch.setitem(evaluation.ON, "perplexity", lambda run, path, settings: Result([], [], ["cut"]))
    run = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(longest=9, at_most=None), methods={"gender": None, "race": None}, without=lambda *names: contextlib.nullcontext()))
    assert evaluation.evaluate_run(run, Evaluate(model="m", on=(f"perplexity={tmp_path / 't.txt'}",))).notes == ["cut"]


def test_figures_and_examples_of_every_system_and_file_have_one_name(tmp_path, monkeypatch):
    """Two files that are called alike are told by their paths; a module alone is measured without the others."""
    files = [tmp_path / "t.txt", tmp_path / "deep" / "t.txt"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text("a\n")
    monkeypatch.setitem(evaluation.ON, "perplexity", lambda run, path, settings: Result([Measure("mlm-loss", 1.0, "nats", None, None, None, 1)], [{"measure": "mlm-loss"}], []))
    for modules, expected in ((("gender", "race"), {"": (), "base/": ("gender", "race"), "only-gender/": ("race",), "only-race/": ("gender",)}), (("gender",), {"": ()})):
        off = []
        run = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(longest=9, at_most=None), methods=dict.fromkeys(modules), without=lambda *names: off.append(names) or contextlib.nullcontext()))
        found = evaluation.evaluate_run(run, Evaluate(model="m", on=tuple(f"perplexity={os.path.relpath(file)}" for file in files)))
        assert off == list(expected.values()) and [m.name for m in found.measures] == [f"{prefix}mlm-loss ({file.resolve()})" for prefix in expected for file in files]
        assert [row["measure"] for row in found.examples] == [m.name for m in found.measures]
    assert parse_on((f"perplexity={files[0]}",))
    with pytest.raises(ConfigError, match="given twice; expected it once"):
        parse_on((f"perplexity={files[0]}", f"perplexity={os.path.relpath(files[0])}"))


def test_files_of_a_folder_are_those_that_no_results_are(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "found.json"):
        (tmp_path / name).write_text("")
    assert evaluation._data(str(tmp_path)) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"] and evaluation._data(str(tmp_path / "found.json")) == [tmp_path / "found.json"]
