"""The texts of an upstream run, from files to notes: what is held out, what is read, left out and cut, the same batches wherever they are made."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib

import pytest

from peftdebias import weights
from peftdebias.axes import load_axis
from peftdebias.cda import Intervention, families
from peftdebias.holdout import HeldOut
from peftdebias.stream import Recipe

from .small import cli, done, flags_of, learn, lines, sha256, without_times

def note(said) -> tuple[int, ...]:
    """(texts, touched, families, members, held out) of the note on the corpus."""
    found = re.search(r"corpus: (\d+) texts, (\d+) with words of the axis gender; (\d+) families of (\d+) texts to train on, (\d+) families held out", said.err)
    return tuple(map(int, found.groups()))


def test_a_corpus_of_a_few_lines_holds_out_a_text_with_words_of_the_axis(small, tmp_path):
    said = learn(small, tmp_path, "bergen is in osaka\nhe is a nurse\nshe is a baker\n", valid_share=1e-9)
    assert said.code == 0 and note(said) == (2, 1, 1, 2, 1), said.err  # of the three, "he is a nurse" is held out


def test_equal_texts_are_never_on_both_sides(small, tmp_path):
    said = learn(small, tmp_path, "he is a nurse\n" * 5 + "she is a baker\n", valid_share=1e-9)
    assert said.code == 0 and note(said) == (1, 1, 1, 2, 5), said.err
    said = learn(small, tmp_path, "he is a nurse\n" * 5, overwrite=True)
    assert said.code == 2 and f"{tmp_path}/c.txt: expected two texts with words of the axis gender that differ in more than these, one to validate on; found one (or give --valid FILE)" in said.err


def test_the_share_held_out_is_by_hash_and_few_are_told(small, tmp_path):
    texts = small.corpus.read_text().splitlines()
    held_out = [f for f in families(texts, load_axis("gender")) if HeldOut(0.2)(f)]
    said = learn(small, tmp_path, "\n".join(texts), valid_share=0.2)
    assert note(said)[2] == len(texts) - len(held_out) and note(said)[4] == len(held_out) and 20 <= len(held_out) < 45
    assert "held out: only" not in said.err and "among these left out" not in said.err
    said = learn(small, tmp_path, "\n".join(texts), valid_share=0.01, overwrite=True)
    assert f"held out: only {note(said)[4]} families to choose the best step by; more come with --valid-share or a --valid file" in said.err.splitlines()


def test_no_more_texts_validate_than_are_asked_for(small, tmp_path):
    """Of the corpus's own and of a file's; the corpus's others stay held out all the same."""
    texts = small.corpus.read_text()
    said = learn(small, tmp_path, texts, valid_share=0.2, valid_texts=3)
    assert "held out: only 3 families to choose the best step by" in said.err and note(said)[4] >= 20
    said = learn(small, tmp_path, texts, valid=small.heldout, valid_texts=3, overwrite=True)
    assert "held out: only 3 families to choose the best step by" in said.err and note(said)[4] == 3


def test_both_sides_of_a_pair_are_on_one_side(small, tmp_path):
    said = learn(small, tmp_path, "he is a nurse\nshe is a nurse\n")
    assert said.code == 2 and "expected two texts with words of the axis gender that differ in more than these" in said.err
    (tmp_path / "v.txt").write_text("she is a nurse\n")
    said = learn(small, tmp_path, "he is a nurse\nshe is a baker\n", valid=tmp_path / "v.txt")
    assert said.code == 0 and "1 families of 2 texts to train on, 1 families held out, 1 that are among these left out" in said.err
    said = learn(small, tmp_path, "he is a nurse\n", valid=tmp_path / "v.txt", overwrite=True)
    assert said.code == 2 and f"c.txt: expected texts with words of the axis gender beside those of {tmp_path}/v.txt, found the same alone" in said.err


@pytest.mark.parametrize("flags", [{"from": "female"}, {"occurrences": "one", "max_variants": 2}, {"keep": "counterfactuals"}, {"keep": "originals"}, {"names": True},
                                   {"axis": "group", "keep": "counterfactuals", "max_variants": 1}])
def test_what_is_learnt_from_is_what_augment_writes(flags, small, tmp_path):
    (tmp_path / "c.txt").write_text("\n".join([*small.corpus.read_text().splitlines()[:40], "Mary and John met the muslim man and her christian son", "nothing at all"]) + "\n")
    axis = flags.get("axis", "gender")
    rest = {key: value for key, value in flags.items() if key != "axis"}
    (tmp_path / "v.txt").write_text("the woman and her father\na muslim and a christian\n")
    written = done("augment", tmp_path / "c.txt", *flags_of({"axis": axis, "format": "lines", "stats": tmp_path / "stats.json", **rest}))
    done("upstream", *small.learning(axis=axis, corpus=tmp_path / "c.txt", valid=tmp_path / "v.txt", out=tmp_path / "run", **rest))
    corpus, stats = lines(tmp_path / "run" / "metrics.jsonl")[-1]["corpus"], json.loads((tmp_path / "stats.json").read_text())
    assert corpus["members"] == len(written.out.splitlines()) > 10 and corpus["texts"] == stats["texts"] == 42 and corpus["touched"] == stats["touched"]
    saved = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert {key: saved[key] for key in rest} == {key: "shipped" if key == "names" else value for key, value in rest.items()}
    again = done("upstream", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again")
    assert sha256(tmp_path / "again" / "adapter" / "adapter.safetensors") == sha256(tmp_path / "run" / "adapter" / "adapter.safetensors"), again.err


def test_validation_texts_of_their_own(small, tmp_path):
    said = learn(small, tmp_path, "he is a nurse\nshe is a baker\n", valid=small.heldout)
    assert said.code == 0 and note(said) == (2, 2, 2, 4, 20) and "held out: only" not in said.err
    (tmp_path / "bad.txt").write_text("bergen is in osaka\n")
    said = learn(small, tmp_path, "he is a nurse\n", valid=tmp_path / "bad.txt", overwrite=True)
    assert said.code == 2 and f"{tmp_path}/bad.txt: expected words of the axis gender, found none in 1 texts" in said.err


def test_batches_are_the_same_bits_wherever_they_are_made(small, tmp_path):
    """Several windows, in this process, in a background one, and from a cache written on the way."""
    runs = {"here": {}, "there": {"workers": 1, "cache": tmp_path / "cache"}, "cached": {"workers": 0, "cache": tmp_path / "cache"}}
    for name, options in runs.items():
        said = done("upstream", *small.learning(out=tmp_path / name, shuffle_buffer=40, steps=30, **options))
        assert "corpus, as far as it was read: " in said.err or name == "cached"
        assert re.search(r"corpus: 1\d\d texts, 1\d\d with words of the axis gender; 1\d\d families", said.err), said.err  # after the first pass
    adapters = {sha256(tmp_path / name / "adapter" / "adapter.safetensors") for name in runs}
    first, *others = (without_times(tmp_path / name / "metrics.jsonl") for name in runs)
    assert len(adapters) == 1 and others == [first, first]
    final = first[-1]["corpus"]
    assert final["whole"] and final["texts"] + final["held_out"] == 150 == len(small.corpus.read_text().splitlines()) and final["families"] == final["texts"]


def test_what_was_read_is_said_at_the_end_of_a_run_within_the_first_pass(small, tmp_path):
    texts = small.corpus.read_text().splitlines(keepends=True)
    for i in range(3):  # what is read together ends with its file
        (tmp_path / f"{i}.txt").write_text("".join(texts[50 * i:50 * i + 50]))
    said = done("upstream", *small.learning(corpus=tmp_path / "?.txt", out=tmp_path / "run", shuffle_buffer=40))
    read = [int(n) for n in re.findall(r"corpus, as far as it was read: (\d+) texts", said.err)]
    assert len(read) == 2 and 40 <= read[0] <= 50 < read[1] <= 100, said.err
    assert not lines(tmp_path / "run" / "metrics.jsonl")[-1]["corpus"]["whole"]
    assert re.search(r" tokens/s, \d+\.\d % of the steps' time waiting for batches\n", said.out)


def test_every_setting_of_the_texts_is_handed_on(small, tmp_path, monkeypatch):
    made, path, axis = [], tmp_path / "c.csv", load_axis("gender").with_names()
    path.write_text("body\n" + small.corpus.read_text())
    monkeypatch.setattr(importlib.import_module("peftdebias.unlabelled"), "Recipe", lambda *given, **more: made.append(Recipe(*given, **more)) or made[-1])
    flags = {"batch_size": None, "batch_tokens": 90, "max_length": 12, "from": "female", "occurrences": "one", "max_variants": 3, "keep": "originals", "names": True,
             "column": "body", "unit": "sentence", "on_error": "skip", "shuffle_buffer": 50, "cache": tmp_path / "cache", "valid_share": 0.3, "attribute_weight": 7, "seed": 9,
             "steps": 1}
    done("upstream", *small.learning(corpus=path, out=tmp_path / "run", **flags))
    expected = Recipe((str(path),), axis, made[0].tokenizer, 12, 9, {"batch_tokens": 90}, "body", "sentence", "skip", Intervention(1, "one", 3, "originals"),
                      HeldOut(0.3, axis=axis), buffer=50, cache=str(tmp_path / "cache"), attribute_weight=7.0)
    assert made == [expected]
    assert {f.name for f in dataclasses.fields(Recipe) if getattr(expected, f.name) == f.default} == {"shard", "threads"}  # which no run sets: nothing else can be missed


def test_corrupt_lines_stop_the_run_or_are_left_out(small, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"he is a nurse\nshe is a baker\n\xff\n")
    (tmp_path / "b.jsonl").write_text('{"text": "he is a baker"}\n' + "{\n" * 6)
    corpus = {"corpus": tmp_path / "[ab].*", "valid": small.heldout, "out": tmp_path / "run"}
    said = cli("upstream", *small.learning(**corpus))
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: {tmp_path}/a.txt:3: expected utf-8, got 0xff at byte 1 of the line"
    said = done("upstream", *small.learning(**corpus, on_error="skip"))
    at = said.err.splitlines().index("corpus: 7 corrupt lines or records were left out; the first 5:")
    assert said.err.splitlines()[at + 1 : at + 3] == [f"  {tmp_path}/a.txt:3: expected utf-8, got 0xff at byte 1 of the line",
                                                      f"  {tmp_path}/b.jsonl:2: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"]
    assert note(said)[:4] == (3, 3, 3, 6) and lines(tmp_path / "run" / "metrics.jsonl")[-1]["corpus"]["skipped"] == 7
    saved = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert saved["corpus"] == [f"{tmp_path}/[ab].*"] and saved["on_error"] == "skip"
    said = done("upstream", *small.learning(corpus=small.corpus, valid=tmp_path / "b.jsonl", out=tmp_path / "valid", on_error="skip"))
    assert "held out: 6 corrupt lines or records were left out; the first 5:" in said.err
    said = cli("upstream", *small.learning(out=tmp_path / "x", corpus=tmp_path / "*.tsv"))
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: {tmp_path}/*.tsv: expected files that fit this pattern, found none"


def test_units_and_standard_input(small, tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("He is a nurse. She is a baker.\nHe is in osaka.\n\nShe is in bergen.\n")
    for unit, expected in (("line", 3), ("sentence", 4), ("document", 2)):
        said = done("upstream", *small.learning(out=tmp_path / unit, corpus=tmp_path / "c.txt", valid=small.heldout, unit=unit, steps=1))
        assert note(said)[0] == expected
    (tmp_path / "raw.txt").write_bytes(b"he is\n\nshe \xff\n" + 20 * b"she is a nurse\n")
    words = ["upstream", *small.learning(out=tmp_path / "stdin", corpus="-", valid=small.heldout, steps=1)]
    with open(tmp_path / "raw.txt") as raw, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", raw)
        said = cli(*words)
    assert said.code == 2 and "peftdebias: <stdin>:3: expected utf-8, got 0xff" in said.err and not (tmp_path / "stdin").exists(), said.err
    process = subprocess.run([sys.executable, "-m", "peftdebias", *words, "--on-error", "skip"], input=(tmp_path / "raw.txt").read_bytes(), capture_output=True)
    assert process.returncode == 0 and b"corpus: 21 texts" in process.stderr and b"<stdin>:3" in process.stderr and b"/peftdebias-" not in process.stderr, process.stderr
    assert lines(tmp_path / "stdin" / "metrics.jsonl")[-1]["corpus"]["first_skipped"][0].startswith("<stdin>:3: ")


def test_what_is_cut_is_counted_and_reported(small, tmp_path):
    #                                          [CLS] he is a nurse [SEP]: 6 tokens
    said = learn(small, tmp_path, "he is a nurse\n" + "".join(f"he is a nurse {'and baker ' * i}\n" for i in range(1, 9)), max_length=10, valid_share=1e-9)
    assert "corpus: 12 of 16 texts (counterfactuals counted) are longer than 10 tokens and were cut" in said.err, said.err  # 8, 10 | 12 ... 22
    assert said.err.count("and were cut") == 1  # the first text is held out
    said = learn(small, tmp_path, "he is a nurse and baker and baker\nshe is\n", max_length=9, valid_share=1e-9, overwrite=True)
    assert "held out: 2 of 2 texts (counterfactuals counted) are longer than 9 tokens and were cut" in said.err and "corpus: 0 of" not in said.err
    said = done("downstream", *small.task(out=tmp_path / "down", max_length=12))
    for path in (small.train, small.dev, small.test):
        texts = [json.loads(line)["hard_text"] for line in path.read_text().splitlines()]
        lengths = [len(e.ids) for e in weights.load(small.base).tokenizer.encode(texts)]
        cut = [n - 12 for n in lengths if n > 12]
        assert f"{path}: {len(cut)} of {len(texts)} texts are longer than 12 tokens and were cut ({sum(cut)} tokens left out)" in said.err
    assert "longer than" not in done("downstream", *small.task(out=tmp_path / "whole", epochs=1)).err
