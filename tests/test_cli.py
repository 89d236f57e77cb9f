"""The command line from end to end: what it prints and leaves behind, and for every kind of bad input one line, exit code 2 and nothing half-written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import numpy
import pytest
import tomli_w
import torch

from peftdebias import cli as command_line
from peftdebias import demo as demonstration
from peftdebias import kernels, outputs
from peftdebias.metrics import Measure
from peftdebias.report import available
from peftdebias.testbed import write

from .outside import one_thread  # noqa: F401
from .small import cli, done, flags_of, lines, save_bert, sha256, tokenizer_of, tree

RUN = {"config.toml", "versions.json", "metrics.jsonl"}
ADAPTER = {"adapter", "adapter/adapter.json", "adapter/adapter.safetensors"}
MODEL = {"model", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json"}


@pytest.fixture(scope="module")
def chain(small, tmp_path_factory):
    """(name -> run folder, name -> what was said)."""
    out = tmp_path_factory.mktemp("chain")
    said = {name: done(*argv, "--out", out / name) for name, argv in {
        "gender": ["upstream", *small.learning(seed=1)],
        "full": ["upstream", *small.learning(method="full", set=None)],
        "plain": ["downstream", *small.task()],
        "debiased": ["downstream", *small.task(adapter=out / "gender")],
        "unfolded": ["downstream", *small.task(adapter=out / "gender", no_fold=True)],
    }.items()}
    return {name: out / name for name in said}, said


# ---------------------------------------------------------------- what is left behind, what is printed

@pytest.mark.parametrize("name,files", [("gender", ADAPTER), ("full", MODEL), ("plain", MODEL), ("debiased", MODEL | ADAPTER), ("unfolded", MODEL | ADAPTER)])
def test_a_run_folder_is_what_contracts_say(name, files, chain):
    out = chain[0][name]
    assert set(tree(out)) == RUN | files
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(chain[0])  # and nothing beside it
    events = lines(out / "metrics.jsonl")
    assert {e["event"] for e in events} == {"validation", "step", "final"} and events[0]["step"] == 0 and events[-1]["event"] == "final"
    best = max if "accuracy" in events[0] else min
    key = "accuracy" if "accuracy" in events[0] else "loss"
    kept = best((e for e in events if e["event"] == "validation" and e["step"]), key=lambda e: e[key])
    assert events[-1]["step"] == kept["step"] and kept["kept"]
    versions = json.loads((out / "versions.json").read_text())
    assert versions["torch"] and versions["device"] and versions["peftdebias"] and (versions["precision"], versions["step"]) == ("float32", "eager")


@pytest.mark.parametrize("name", ["gender", "full", "plain", "debiased"])
def test_each_command_prints_what_it_resolved_and_ends_with_where_the_result_lies(name, chain):
    runs, said = chain
    resolved, *notes = said[name].err.splitlines()
    saved = tomllib.loads((runs[name] / "config.toml").read_text())
    assert resolved.startswith(f"{saved.pop('command')}: ") and f" out={runs[name]}" in resolved and f" lr={saved['lr']}" in resolved
    assert {word.split("=")[0] for word in resolved.split()[1:] if "=" in word} >= {key for key, value in saved.items() if value not in ([], {})}
    assert any(note.startswith("trained: ") and note.endswith("everything else is frozen") for note in notes) and "device: cpu, float32" in notes
    assert said[name].out.splitlines()[-1] == f"result: {runs[name]}"
    assert len(said[name].err.splitlines()) <= 12 and "\r" not in said[name].err  # no progress bar, which is for terminals


def test_upstream_says_how_far_the_loss_fell(chain):
    runs, said = chain
    events = lines(runs["gender"] / "metrics.jsonl")
    before, best = events[0]["loss"], min(e["loss"] for e in events if e["event"] == "validation")
    assert said["gender"].out.startswith(f"validation loss {before:.4f} -> {best:.4f} nats a masked token at step {events[-1]['step']}; ") and best < before


def test_downstream_prints_the_measures_of_the_reloaded_run(small, chain):
    runs, said = chain
    for name in ("plain", "debiased", "unfolded"):
        table = said[name].out.split(f"on {small.test}, from the saved files:\n")[1].split("\nresult:")[0]
        assert done("evaluate", runs[name], "--on", f"classification={small.test}").out.split("\nresult:")[0] == table
        measure = lines(runs[name] / "metrics.jsonl")[-1]["measures"][0]
        assert table.splitlines()[1].split()[:2] == ["accuracy", f"{measure['value']:.4g}"]


def test_the_configuration_of_a_run_makes_it_again(chain, tmp_path):
    runs, _ = chain
    for command, name, file in (("upstream", "gender", "adapter/adapter.safetensors"), ("downstream", "debiased", "model/model.safetensors")):
        done(command, "--config", runs[name] / "config.toml", "--out", tmp_path / name)
        assert sha256(tmp_path / name / file) == sha256(runs[name] / file)
        one, two = (tomllib.loads((folder / "config.toml").read_text()) for folder in (runs[name], tmp_path / name))
        assert one.pop("out") != two.pop("out") and one == two
    said = cli("downstream", "--config", runs["gender"] / "config.toml")
    assert said.code == 2 and "expected the configuration of `downstream`, got one of `upstream`" in said.err
    said = cli("upstream", "--config", runs["gender"] / "config.toml")
    assert said.code == 2 and f"--out {runs['gender']}: exists" in said.err


def test_evaluate_writes_measures_and_examples(small, chain, tmp_path):
    said = done("evaluate", small.base, "--adapter", chain[0]["gender"], "--on", f"perplexity={small.heldout}", "--on", f"crows-pairs={small.pairs}",
                "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    found = json.loads((tmp_path / "m.json").read_text())
    assert list(found) == ["measures", "settings", "files"] and all(list(m) == ["name", "value", "unit", "ideal", "low", "high", "n"] for m in found["measures"])
    assert found["files"] == {str(path): sha256(path) for path in (small.heldout, small.pairs)}
    (tmp_path / "again.toml").write_text(tomli_w.dumps(found["settings"] | {"json": str(tmp_path / "again.json")}))
    done("evaluate", "--config", tmp_path / "again.toml")
    assert json.loads((tmp_path / "again.json").read_text())["measures"] == found["measures"]
    rows = lines(tmp_path / "e.jsonl")
    assert [r["measure"] for r in rows] == ["mlm-loss"] * 20 + ["crows-pairs/nangia"] * 12 + ["crows-pairs/bias-bench"] * 12
    table, last = said.out.splitlines()[:-1], said.out.splitlines()[-1]
    assert [row.split()[0] for row in table] == ["measure", *(m["name"] for m in found["measures"])] and last == f"result: {tmp_path}/m.json and {tmp_path}/e.jsonl"
    assert len({len(row) for row in table}) == 1  # columns stand under each other
    assert done("evaluate", small.base, "--on", f"crows-pairs={small.pairs}").out.splitlines()[-1] == "result: above (--json FILE keeps it)"


# ---------------------------------------------------------------- bad input

def file(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


class Bad:
    """Makes bad files in a folder of their own; `up`, `down` and `on` are the commands around them, with --out in an untouched place."""

    def __init__(self, small, runs, folder, out):
        self.small, self.runs, self.folder, self.out = small, runs, folder, out

    def file(self, name, content):
        return file(self.folder, name, content)

    def up(self, *more, **changes):
        return ["upstream", *self.small.learning(**{"out": self.out / "new" / "run"} | changes), *more]

    def down(self, *more, **changes):
        return ["downstream", *self.small.task(**{"out": self.out / "new" / "run"} | changes), *more]

    def on(self, *entries, model=None, **changes):
        return ["evaluate", model or self.small.base, *flags_of({"on": list(entries), "json": self.out / "m.json", "examples": self.out / "e.jsonl"} | changes)]

    def labelled(self, name, rows, header="hard_text,profession,gender"):
        return self.file(name, header + "\n" + "".join(row + "\n" for row in rows))

    def scored(self, name, predicted, probabilities):
        row = {"measure": "classification", "place": "t:1", "text": "he", "label": "a", "group": None, "predicted": predicted, "probabilities": probabilities, "positive": None}
        return self.file(name, json.dumps(row) + "\n")

    def model(self, name, **changes):
        return save_bert(self.folder / name, tokenizer_of(demonstration.World(seed=3)), **changes)

    def without(self, name, *files):
        """A copy of the base that lacks `files`."""
        shutil.copytree(self.small.base, self.folder / name)
        for one in files:
            (self.folder / name / one).unlink()
        return self.folder / name


SWEEP = {
    # --- texts
    "missing corpus": (lambda b: b.up(corpus=b.folder / "none.txt"), "none.txt: no such file"),
    "corpus is a folder": (lambda b: b.up(corpus=b.folder), "expected a file, got a folder"),
    "corpus of another kind": (lambda b: b.up(corpus=b.file("c.docx", "x")), "c.docx: expected a file named .txt, .csv, .tsv, .jsonl"),
    "missing column": (lambda b: b.up(corpus=b.file("c.csv", "body\nhe is\n")), "c.csv:1: no column 'text'; columns: body"),
    "missing column of a flag": (lambda b: b.up(corpus=b.file("c.csv", "body\nhe is\n"), column="txt"), "c.csv:1: no column 'txt'; columns: body"),
    "empty corpus": (lambda b: b.up(corpus=b.file("c.txt", "\n \n")), "no text in .*c.txt"),
    "no attribute word": (lambda b: b.up(corpus=b.file("c.txt", "bergen\nosaka\n")), "c.txt: expected words of the axis gender, found none in 2 texts"),
    "no attribute word to validate on": (lambda b: b.up(valid=b.file("v.txt", "bergen\n")), "v.txt: expected words of the axis gender, found none in 1 texts"),
    "standard input twice": (lambda b: b.up(corpus="-", valid="-"), "--corpus and --valid: expected standard input, -, once, since it is read once; got it 2 times$"),
    "wrong encoding": (lambda b: b.up(corpus=b.file("c.txt", b"he is\nshe caf\xe9\n")), "c.txt:2: expected utf-8, got 0xe9 at byte 8"),
    "malformed JSON": (lambda b: b.up(corpus=b.file("c.jsonl", '{"text": "he"}\n{"text": \n')), "c.jsonl:2: not JSON: "),
    "JSON that is no object": (lambda b: b.up(corpus=b.file("c.jsonl", '["he"]\n')), "c.jsonl:1: expected a JSON object, got a list"),
    "a number for a text": (lambda b: b.up(corpus=b.file("c.jsonl", '{"text": 3}\n')), "c.jsonl:1: expected a text in column 'text', got a number"),
    "a folder of settings": (lambda b: ["upstream", "--config", b.small.root], "--config .*: cannot be read: Is a directory"),
    "broken gzip": (lambda b: b.up(corpus=b.file("c.txt.gz", b"\x1f\x8bno")), "c.txt.gz: cannot be read to its end"),
    # --- labels
    "label unseen in training, dev": (lambda b: b.down(dev=b.labelled("d.csv", ["he is,nurse,m", "she is,pilot,f"])),
                                      "d.csv:3: label 'pilot' was not seen in training; expected one of "),
    "label unseen in training, test": (lambda b: b.down(test=b.labelled("t.csv", ["she is,pilot,f"])), "t.csv:2: label 'pilot' was not seen in training"),
    "label unseen, evaluate": (lambda b: b.on(f"classification={b.labelled('t.csv', ['he is,pilot,m'])}", model=b.runs["plain"]),
                               "t.csv:2: label 'pilot' was not seen in training"),
    "one label only": (lambda b: b.down(train=b.labelled("t.csv", ["he is,nurse,m", "she is,nurse,f"])),
                       "t.csv: expected at least two labels in the column profession, got 'nurse' alone"),
    "measurements for labels": (lambda b: b.down(train=b.labelled("t.csv", [f"he is,{i / 4:.3f},m" for i in range(21)])),
                                "t.csv: expected classes in the column profession, got 21 numbers such as 0.250; what is trained is no regression$"),
    "a column twice": (lambda b: b.down(label="hard_text"), "--text, --text-pair, --label: expected columns of their own, got hard_text twice"),
    "missing text column": (lambda b: b.down(text="body"), "train.jsonl:1: no column 'body'; columns: hard_text, profession, gender"),
    "missing label column": (lambda b: b.down(label="job"), "train.jsonl:1: no column 'job'"),
    "missing group column": (lambda b: b.down(test=b.labelled("t.csv", ["he,nurse"], "hard_text,profession")),
                             "t.csv:1: no column 'gender'; columns: hard_text, profession"),
    "empty label": (lambda b: b.down(dev=b.labelled("d.csv", ["he is,,m"])), "d.csv:2: empty label in column 'profession'"),
    "a row too short": (lambda b: b.down(dev=b.labelled("d.csv", ["he is,nurse"])), "d.csv:2: expected 3 fields, got 2"),
    "no rows": (lambda b: b.down(dev=b.labelled("d.csv", [])), "no text in .*d.csv"),
    "malformed JSON, train": (lambda b: b.down(train=b.file("t.jsonl", "{}\n{\n")), "t.jsonl:1: no column 'hard_text'"),
    "one group": (lambda b: b.down(test=b.labelled("t.csv", ["he is,nurse,m"])), "t.csv: expected 2 groups, got 1: m"),
    "missing dev": (lambda b: b.down(dev=b.folder / "none.csv"), "none.csv: no such file"),
    # --- models
    "no such model": (lambda b: b.up(model="someone/none"), "model 'someone/none': no such folder, and not in the Hugging Face cache .*fetch it with `hf download"),
    "no such model folder": (lambda b: b.up(model=b.folder / "none"), "model '.*none': no such folder$"),
    "no such model folder here": (lambda b: b.up(model="./none"), "model './none': no such folder$"),
    "a file for a model": (lambda b: b.up(model=b.small.corpus), "model '.*txt': expected a folder, got a file$"),
    "a folder for an axis": (lambda b: b.up(axis=b.folder), "axis file .*: expected a file, got a folder$"),
    "an axis of two parts": (lambda b: b.up(axis=b.file("a.toml", 'name = "a/b"' + chr(10) + 'keep_untouched = true' + chr(10) + 'groups = [["x", "y"]]')),
                             "key 'name': expected a name without /, got 'a/b'"),
    "an axis of two parts, import": (lambda b: ["import", b.folder, "--model", b.small.base, "--axis", "a/b", "--out", b.out / "r"], "--axis: expected a name without /, got 'a/b'"),
    "the same file compared": (lambda b: ["compare", "--seeds", b.file("m.json", "{}"), b.folder / "." / "m.json"], "m.json: given twice; expected each file once"),
    "a prediction by number": (lambda b: ["compare", b.scored("a.jsonl", "a", {"a": 1.0, "b": 0.0}), b.scored("b.jsonl", 0, {"a": 1.0, "b": 0.0})], r"b.jsonl:1: predicted: expected a label as text, got 0$"),
    "a list of probabilities": (lambda b: ["compare", b.scored("a.jsonl", "a", {"a": 1.0, "b": 0.0}), b.scored("b.jsonl", "a", [{"a": 1.0}])], r"b.jsonl:1: probabilities: expected an object, got \[\{.*\}\]$"),
    "a missing file compared": (lambda b: ["compare", b.folder / "a.jsonl", b.folder / "b.jsonl"], "a.jsonl: no such file$"),
    "a full device": (lambda b: ["augment", "--axis", "gender", b.small.corpus, "--out", "/dev/full"], ": /dev/full: No space left on device$"),
    "a column of no table": (lambda b: b.up(column="body"), "--column body: expected a csv, tsv or jsonl file to take it from, got txt alone"),
    "a column of no table, augment": (lambda b: ["augment", "--axis", "gender", b.small.corpus, "--column", "body"], "--column body: expected a csv, tsv or jsonl file"),
    "a second text for single ones": (lambda b: ["predict", b.runs["plain"], b.small.test, "--text-pair", "gender"],
                                      "plain: the run was trained on single texts; expected such, got text pairs"),
    "one measure twice": (lambda b: b.on(*[f"perplexity={b.small.heldout}"] * 2), "--on perplexity=.*heldout.txt: given twice; expected it once"),
    "one module twice": (lambda b: b.on(f"perplexity={b.small.heldout}", adapter=[b.runs["gender"], b.runs["gender"] / "adapter"]),
                         "gender/adapter: attached twice; expected each module once"),
    "model without config": (lambda b: b.up(model=b.without("m", "config.json")), "m: expected a Hugging Face model folder with config.json, found none"),
    "model without weights": (lambda b: b.down(model=b.without("m", "model.safetensors")), "m: expected model.safetensors, .* found none"),
    "model without tokenizer": (lambda b: b.down(model=b.without("m", "tokenizer.json")),
                                "m: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt; found none"),
    "model without MLM head": (lambda b: b.up(model=b.model("m", mlm=False)),
                               r"m: expected a masked-LM head \(cls.predictions or lm_head\), found none; upstream training needs one"),
    "evaluate a folder without config": (lambda b: b.on(f"perplexity={b.small.heldout}", model=b.folder),
                                         "expected a Hugging Face model folder with config.json, found none"),
    "predict on a model without classifier": (lambda b: ["predict", b.small.base, b.small.heldout, "--out", b.out / "p.jsonl"],
                                              "base: expected a downstream run with a classifier, got a model without"),
    "predict on an upstream run": (lambda b: ["predict", b.runs["gender"], b.small.heldout, "--out", b.out / "p.jsonl"],
                                   "gender: expected a downstream run with a classifier"),
    "predict without its column": (lambda b: ["predict", b.runs["plain"], b.file("t.csv", "text\nhe\n"), "--out", b.out / "p.jsonl"],
                                   "t.csv:1: no column 'hard_text'; columns: text"),
    "predict on nothing": (lambda b: ["predict", b.runs["plain"], b.file("t.txt", ""), "--out", b.out / "p.jsonl"], "no text in .*t.txt"),
    # --- adapters
    "no such adapter": (lambda b: b.down(adapter=b.folder / "none"), "adapter '.*none': no such folder"),
    "adapter of a wider model": (lambda b: b.down(model=b.model("m", hidden=36), adapter=b.runs["gender"]),
                                 "gender/adapter: made for bert of 2 layers, hidden 32, vocabulary .*; expected bert of 2 layers, hidden 36"),
    "adapter of a deeper model": (lambda b: b.down(model=b.model("m", layers=3), adapter=b.runs["gender"]),
                                  "made for bert of 2 layers.*; expected bert of 3 layers"),
    "adapter of other values": (lambda b: b.down(model=b.model("m", seed=9), adapter=b.runs["gender"]),
                                "gender/adapter: made for the base with checksum [0-9a-f]{12}; expected [0-9a-f]{12}, the model given"),
    "adapter, evaluate": (lambda b: b.on(f"perplexity={b.small.heldout}", model=b.model("m", seed=9), adapter=b.runs["gender"]),
                          "gender/adapter: made for the base with checksum"),
    "a base for an adapter": (lambda b: b.down(adapter=b.runs["full"]), "full: a run without a module \\(its base was trained\\); expected it in the place of the base model"),
    "a model folder for an adapter": (lambda b: b.down(adapter=b.small.base), "base: expected an adapter or run folder with adapter.json, found none"),
    # --- settings
    "out exists": (lambda b: b.up(out=b.runs["plain"]), r"--out .*plain: exists; expected a new folder \(or --overwrite\)"),
    "out exists, downstream": (lambda b: b.down(out=b.runs["plain"]), "--out .*plain: exists"),
    "out is no run": (lambda b: b.up("--overwrite", out=b.small.base), "--out .*base: exists and is no run folder; it is not replaced"),
    "out cannot be written": (lambda b: b.up(out=b.file("f", "") / "run"), "--out .*f/run: cannot be written: Not a directory"),
    "json cannot be written": (lambda b: b.on(f"perplexity={b.small.heldout}", json=b.folder / "no" / "m.json"),
                               "no/m.json: cannot be written: No such file or directory"),
    "out is a folder": (lambda b: ["predict", b.runs["plain"], b.small.heldout, "--out", b.folder], "expected a file to write, got a folder"),
    "unknown config key": (lambda b: b.up("--config", b.file("c.toml", "stepz = 3\n")), "c.toml: unknown key 'stepz'; expected one of "),
    "wrong type in TOML": (lambda b: b.up("--config", b.file("c.toml", 'steps = "3"\n')), "c.toml: steps: expected a whole number, got '3'"),
    "wrong value in TOML": (lambda b: b.up("--config", b.file("c.toml", "attribute-weight = 0\n")), "c.toml: attribute_weight: expected a number from 1 to 1000, got 0"),
    "wrong value over TOML": (lambda b: b.up("--config", b.file("c.toml", "attribute-weight = 2\n"), **{"attribute-weight": 0}), "peftdebias: --attribute-weight: expected a number"),
    "two that clash in TOML": (lambda b: b.up("--config", b.file("c.toml", "batch-size = 2\nbatch-tokens = 9\n"), batch_size=None), "peftdebias: --batch-size and --batch-tokens: expected one of them, got both"),
    "TOML that is none": (lambda b: b.up("--config", b.file("c.toml", "steps\n")), r"--config .*c.toml: expected TOML, got .*line 1"),
    "missing TOML": (lambda b: b.up("--config", b.folder / "none.toml"), "none.toml: no such file"),
    "nothing given": (lambda b: ["upstream"], "missing: --axis, --model, --corpus, --out "),
    "missing flags": (lambda b: ["downstream", "--model", b.small.base], "missing: --train, --dev, --text, --label, --out "),
    "missing run": (lambda b: ["predict"], "missing: RUN "),
    "missing model": (lambda b: ["evaluate", "--on", "perplexity=f"], "missing: DIR_OR_RUN "),
    "missing axis": (lambda b: ["augment", b.small.corpus], "missing: --axis "),
    "unknown axis": (lambda b: b.up(axis="colour"), "unknown axis 'colour': expected one of age, gender, group, race, religion, or the path of a .toml file"),
    "missing axis file": (lambda b: b.up(axis=b.folder / "mine.toml"), "axis file .*mine.toml: no such file"),
    "unknown method": (lambda b: b.up(method="lorra"), "method: expected one of .*lora.*, got 'lorra'"),
    "unknown option": (lambda b: b.up(set="rnak=2"), "--set, lora: unknown key 'rnak'; expected one of rank, alpha, targets"),
    "option of another type": (lambda b: b.up(set="rank=two"), "--set, lora: rank: expected a whole number, got 'two'"),
    "option out of range": (lambda b: b.up(set="rank=0"), "lora rank: expected at least 1, got 0"),
    "unknown target": (lambda b: b.up(set="targets=querry"), "lora targets: expected some of query, key, value, output, up, down, got 'querry'"),
    "option without a value": (lambda b: b.up(set="rank"), "--set: expected KEY=VALUE, got 'rank'"),
    "an option where there is none": (lambda b: b.up(method="full"), "--set, full: unknown key 'rank'; expected none"),
    "budget with a size": (lambda b: b.up(budget=0.01), "budget: chooses lora's rank; expected no rank beside it"),
    "budget of nothing": (lambda b: b.up(budget=0, set=None), "budget: expected a share between 0 and 1, got 0"),
    "budget without a size": (lambda b: b.up(budget=0.1, set=None, method="full"), "budget: full has a fixed size; expected no budget"),
    "both batch flags": (lambda b: b.up(batch_tokens=9), "--batch-size and --batch-tokens: expected one of them, got both"),
    "steps of none": (lambda b: b.up(steps=0), "--steps: expected at least 1, got 0"),
    "negative seed": (lambda b: b.down(seed=-1), "--seed: expected a whole number from 0 to 9223372036854775807, got -1"),
    "a seed that no generator takes": (lambda b: b.down(seed=10**20), "--seed: expected a whole number from 0 to 9223372036854775807, got 100000000000000000000"),
    "a module larger than its base": (lambda b: b.up(set="rank=1000000"), "lora: expected a module of at most 16,777,216 parameters, got 256,000,000, by LoRAConfig"),
    "no number": (lambda b: b.up(set="alpha=nan"), "lora alpha: expected a finite number of more than 0, got nan"),
    "more weights than there are": (lambda b: b.up(method="sparse", set="k=99999999999"), "sparse k: expected at most [0-9]+, the weights there are, got 99999999999"),
    "no room for a text": (lambda b: b.up(max_length=2), "--max-length: expected at least 3, got 2"),
    "class weights of another label": (lambda b: b.down(class_weights="nurse=2,pilot=3"),
                                       "--class-weights pilot=3: expected LABEL=WEIGHT with LABEL one of baker, .*, got 'pilot'"),
    "class weights malformed": (lambda b: b.down(class_weights="nurse"), "--class-weights nurse: expected LABEL=WEIGHT"),
    "class weights of no number": (lambda b: b.down(class_weights="nurse=x"), "--class-weights nurse=x: expected a positive number, 1e-30 to 1e30, got 'x'"),
    "unknown positive label": (lambda b: b.down(positive="pilot"), "--positive: expected one of baker, .*, got 'pilot'"),
    "bad device": (lambda b: b.up(device="gpu"), "--device: expected cpu, cuda, cuda:1, ... or auto, got 'gpu'"),
    "bad device, evaluate": (lambda b: b.on(f"perplexity={b.small.heldout}", device="tpu"), "--device: expected cpu, cuda"),
    "bad device, predict": (lambda b: ["predict", b.runs["plain"], b.small.heldout, "--device", "tpu"], "--device: expected cpu, cuda"),
    # --- measures
    "unknown measure": (lambda b: b.on("crows=f"), "--on crows=f: expected NAME=FILE with NAME one of crows-pairs, stereoset, seat, perplexity, classification.*, got 'crows'"),
    "measure without a file": (lambda b: b.on("perplexity"), "--on perplexity: expected perplexity=FILE, got no file"),
    "measure of a missing file": (lambda b: b.on("perplexity=none.txt"), r"none.txt: no such file \(from --on perplexity=none.txt\)"),
    "no measure": (lambda b: b.on(), "--on: expected at least one NAME=FILE"),
    "CrowS-Pairs of other columns": (lambda b: b.on(f"crows-pairs={b.file('p.csv', 'more,less,type' + chr(10) + 'a,b,c' + chr(10))}"),
                                     "p.csv:1: no column 'sent_more'; columns: more, less, type"),
    "CrowS-Pairs of another category": (lambda b: b.on(f"crows-pairs={b.small.pairs}", bias_type="age"),
                                        "pairs.csv: expected --bias-type to be one of gender, got 'age'"),
    "perplexity of an empty text": (lambda b: b.on(f"perplexity={b.file('t.txt', '')}"), "no text in .*t.txt"),
    "classifying without a classifier": (lambda b: b.on(f"classification={b.small.test}"), "expected a model with a classifier"),
    # --- argparse's own
    "no command": (lambda b: [], "the following arguments are required: COMMAND"),
    "unknown command": (lambda b: ["downsteam"], "invalid choice: 'downsteam'"),
    "unknown flag": (lambda b: b.up("--warm", 3), r"unrecognized arguments: --warm 3 \(see `peftdebias upstream --help`\)$"),  # and no abbreviations
    "a flag that no command knows": (lambda b: ["--warm", "doctor"], r"unrecognized arguments: --warm \(see `peftdebias --help`\)$"),
    "a word for a number": (lambda b: b.up("--lr", "high"), "argument --lr: invalid float value: 'high'"),
    "a flag without a value": (lambda b: b.up("--axis"), "argument --axis: expected one argument"),
    "unknown choice": (lambda b: b.up("--precision", "fp8"), "argument --precision: invalid choice: 'fp8'"),
    # --- augment, demo
    "augment a missing file": (lambda b: ["augment", "--axis", "gender", b.folder / "none.txt", "--out", b.out / "a.jsonl"], "none.txt: no such file"),
    "augment without a word": (lambda b: ["augment", "--axis", "gender", b.file("c.txt", "bergen\n"), "--out", b.out / "a.jsonl"],
                               "c.txt: expected words of the axis gender, found none in 1 texts"),
    "augment half a file": (lambda b: ["augment", "--axis", "gender", b.file("c.txt", b"he is\n\xff\n"), "--out", b.out / "a.jsonl"], "c.txt:2: expected utf-8"),
    "augment to nowhere": (lambda b: ["augment", "--axis", "gender", b.small.corpus, "--out", b.out / "no" / "a.jsonl"], "no/a.jsonl: cannot be written"),
    "demo on something else": (lambda b: ["demo", "--out", b.small.base], "--out .*base: exists and is no earlier demo; expected a new folder"),
    "demo of no world": (lambda b: ["demo", "--out", b.out / "demo", "--strength", 2], "--strength: expected a strength from 0 to 1, got 2.0"),
}


@pytest.mark.parametrize("case", SWEEP)
def test_bad_input_gets_one_line_exit_code_2_and_leaves_nothing(case, small, chain, tmp_path):
    make, words = SWEEP[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    argv = make(Bad(small, chain[0], tmp_path / "in", tmp_path / "out"))
    before = tree(tmp_path), tree(small.root), tree(chain[0]["plain"].parent)
    said = cli(*argv)
    assert said.code == 2 and said.out == "", said
    told = said.err.splitlines()
    if len(told) == 2 and told[0].startswith(f"{argv[0]}: "):  # what was resolved
        told = told[1:]
    assert len(told) == 1 and told[0].startswith("peftdebias: ") and re.search(words, told[0]), said.err
    assert (tree(tmp_path), tree(small.root), tree(chain[0]["plain"].parent)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody else")
def test_a_folder_that_may_not_be_entered_is_named(small, chain, tmp_path):
    """pytest's folders are its owner's alone."""
    os.seteuid(65534)
    try:
        out = cli("upstream", *small.learning(out=tmp_path / "theirs" / "run"))
        read = cli("evaluate", small.base, "--on", f"perplexity={small.heldout}")
    finally:
        os.seteuid(0)
    assert out.code == 2 and out.err.splitlines()[-1] == f"peftdebias: --out {tmp_path}/theirs/run: cannot be written: Permission denied"
    assert read.code == 2 and read.err.splitlines()[-1] == f"peftdebias: {small.heldout}: Permission denied"


def test_a_standard_input_that_is_closed_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    said = cli("augment", "--axis", "gender")
    assert said.code == 2 and said.err.splitlines()[-1] == "peftdebias: standard input: expected texts, got none: it is closed; name a FILE"


def test_a_warning_is_one_line_too(small, chain, tmp_path):
    shutil.copytree(chain[0]["gender"] / "adapter", tmp_path / "adapter")
    header = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    del header["base"]["sha256"]  # as modules from elsewhere
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(header))
    said = done("evaluate", small.base, "--adapter", tmp_path / "adapter", "--on", f"perplexity={small.heldout}")
    assert said.err.splitlines()[1:] == [f"warning: {tmp_path}/adapter: carries no checksum of its base; whether it belongs to this model cannot be checked"]


def test_a_bug_keeps_its_traceback(small, monkeypatch, tmp_path):
    from peftdebias import unlabelled

    def broken(*args):
        raise KeyError("a bug")

    monkeypatch.setattr(unlabelled, "encode_families", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli("upstream", *small.learning(out=tmp_path / "deep" / "run"))
    assert tree(tmp_path) == {}
    monkeypatch.setattr(unlabelled, "encode_families", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    said = cli("upstream", *small.learning(out=tmp_path / "deep" / "run"))
    assert said.code == 130 and said.err.splitlines()[-1] == "peftdebias: stopped; nothing of the training is kept" and tree(tmp_path) == {}


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def buffered(request, monkeypatch):
    """With and without Python's buffers before the standard streams, whatever is set where the tests run."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


def test_streams_that_nobody_reads_end_no_work(small, tmp_path, monkeypatch):
    """Standard output or error closed by the caller, or lines for people that find no place."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    words = [sys.executable, "-m", "peftdebias", "evaluate", small.base, "--on", f"perplexity={small.heldout}", "--json"]
    line = " ".join(f"'{word}'" for word in words)
    for number, stream in enumerate((">&-", "2>&-", ">&- 2>&-", *(["2>/dev/full"] if os.path.exists("/dev/full") else []))):
        ran = subprocess.run(["sh", "-c", f"{line} '{tmp_path / str(number)}' {stream}"], capture_output=True, text=True)
        assert ran.returncode == 0 and (tmp_path / str(number)).exists(), (stream, ran)
        assert "Traceback" not in ran.stderr and not ran.stdout.startswith("evaluate: ")


def test_a_result_for_a_standard_output_that_is_closed_is_refused(small, tmp_path):
    """Where it would be lost; one that goes to a file is not."""
    def ran(words: list, stream: str) -> subprocess.CompletedProcess:
        line = " ".join(f"'{word}'" for word in [sys.executable, "-m", "peftdebias", *words])
        return subprocess.run(["sh", "-c", f"{line} {stream}"], capture_output=True, text=True)

    corpus = tmp_path / "c.txt"
    corpus.write_text("he is a nurse\n")
    said = ran(["augment", "--axis", "gender", corpus], ">&-")
    assert said.returncode == 2 and said.stderr == "peftdebias: standard output: expected it open, for the result, got it closed; name a file with --out\n"
    assert ran(["augment", "--axis", "gender", corpus, "--out", tmp_path / "out.jsonl"], ">&-").returncode == 0 and "she is a nurse" in (tmp_path / "out.jsonl").read_text()
    measuring, hint = ["evaluate", small.base, "--on", f"perplexity={small.heldout}"], "; name a file with --json"
    for words, hint in ((["doctor"], ""), (["methods", "--model", small.base], ""), (measuring, hint), ([*measuring, "--examples", tmp_path / "e.jsonl"], hint),
                        ([*measuring, "--json", tmp_path / "m.json", "--examples", "-"], "; name a file with --examples"),
                        (["augment", "--axis", "gender", corpus, "--out", tmp_path / "o.jsonl", "--stats", "-"], "; name a file with --stats")):
        said = ran(words, ">&-")
        assert said.returncode == 2 and said.stderr == f"peftdebias: standard output: expected it open, for the result, got it closed{hint}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_error_that_finds_no_place_keeps_its_code(small, tmp_path, buffered):
    for words in (f"augment --axis nope '{small.heldout}'", f"augment --axis gender '{tmp_path}/none.txt'", "augment --nope"):
        assert subprocess.run(["sh", "-c", f"'{sys.executable}' -m peftdebias {words} 2>/dev/full"], capture_output=True).returncode == 2, words


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", ["--version", "upstream --help", "doctor"])
def test_a_short_result_that_finds_no_place_is_told_in_one_line(words, buffered):
    """It is all in the buffer still when the command ends."""
    said = subprocess.run(["sh", "-c", f"'{sys.executable}' -m peftdebias {words} >/dev/full"], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.removeprefix("doctor: device=auto\n") == "peftdebias: the results cannot be written: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files here")
def test_unbuffered_output_is_written_whole_or_its_lack_is_told(small, tmp_path):
    """PYTHONUNBUFFERED makes standard output a raw file, of which the system may take a part of what is written and say so, as on a full disk."""
    words, out = ["augment", "--axis", "gender", str(small.corpus)], tmp_path / "o.jsonl"
    for most in (5000, 2 ** 30):
        with open(out, "wb") as file:
            said = subprocess.run([sys.executable, "-c", f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({most},) * 2); from peftdebias.cli import main; sys.exit(main())", *words],
                                  stdout=file, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        if most == 5000:
            assert said.returncode == 2 and said.stderr.endswith("peftdebias: the results cannot be written: File too large\n") and out.stat().st_size <= 5000
    assert said.returncode == 0 and out.stat().st_size > 5000 and out.read_text() == done(*words).out


def test_a_name_that_is_not_utf_8_is_one_line(small, tmp_path):
    said = cli("upstream", *small.learning(out=tmp_path / "d\udcff"))
    assert said.code == 2 and "expected names in UTF-8" in said.err.splitlines()[-1] and "d\\udcff" in said.err.splitlines()[-1] and tree(tmp_path) == {}


def test_a_kernel_that_is_not_there_is_one_line(small, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTDEBIAS_KERNELS", "triton")
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    for argv in (["evaluate", small.base, "--on", f"perplexity={small.heldout}"], ["upstream", *small.learning(out=tmp_path / "run")]):
        said = cli(*argv, "--device", "cpu")
        assert said.code == 2 and said.err.splitlines()[-1] == ("peftdebias: PEFTDEBIAS_KERNELS=triton: expected a device on which Triton runs, got cpu: Triton does not run "
                                                                "on cpu (auto takes what is there)")
    monkeypatch.setattr(kernels, "missing", lambda op, kind, where="cuda": "" if op == "norm" else "no such op here")
    said = cli("evaluate", small.base, "--on", f"perplexity={small.heldout}", "--device", "cpu")
    assert said.code == 2 and re.fullmatch(r"peftdebias: PEFTDEBIAS_KERNELS=triton: \w+: no such op here; no triton implementation here, expected one of .*",
                                           said.err.splitlines()[-1])
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- help

@pytest.mark.parametrize("command", ["", *command_line.COMMANDS])
def test_help_goes_to_standard_output(command):
    said = cli(*command.split(), "--help")
    assert said.code == 0 and said.err == "" and said.out.startswith(f"usage: peftdebias {command}".rstrip())
    assert "SUPPRESS" not in said.out and "None" not in said.out and "==" not in said.out


def test_version():
    from peftdebias import __version__

    assert cli("--version").out == f"peftdebias {__version__}\n"


# ---------------------------------------------------------------- demo, on a smaller world

def test_the_demo_s_world_and_folder(tmp_path, monkeypatch):
    worlds, out, kept = [], tmp_path / "demo", tmp_path / "kept"

    def stop(world, folder):
        worlds.append((world.text_link, world.label_link, world.seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration, "write", stop)
    out.mkdir(), kept.mkdir(), (kept / "notes.txt").write_text("mine")  # an empty folder will do
    for _ in range(2):
        assert cli("demo", "--out", out, "--strength", 0.7, "--label-strength", 0.2, "--seed", 5).code == 130
        (out / "base").is_symlink() or (out / "base").symlink_to(kept)
    assert worlds == [(0.7, 0.2, 5)] * 2
    assert cli("demo", "--out", out).code == 130 and not os.path.lexists(out / "base") and (kept / "notes.txt").exists()  # a link goes, not what it leads to
    with outputs.alone(out / "demo.json", "it"):
        found = cli("demo", "--out", out)
    assert found.code == 2 and found.err.splitlines()[-1] == f"peftdebias: --out {out}: another process is at work there; expected it to end first, or another folder"
    assert (out / "demo.json").read_text() == json.dumps({"strength": 0.8, "label_strength": 0.5, "seed": 0, "rows": None}, indent=2) + "\n"
    said = cli("demo", "--out", kept / "notes.txt" / "demo")
    assert said.code == 2 and re.fullmatch(r"peftdebias: --out .*/notes.txt/demo: cannot be written: Not a directory", said.err.splitlines()[-1])


@pytest.mark.parametrize("value", [42.0, 58.0])
def test_a_stereotype_is_preferred_or_its_opposite(value):
    one = Measure(demonstration.SCORING, value, "%", 50.0, None, None, 10)
    assert demonstration.stereotype_preference([one]) == pytest.approx(0.08)


def test_the_demo_ends_in_a_table_and_can_be_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "write", lambda world, folder: write(world, folder, corpus=260, heldout=20, train=64, dev=64, test=200, pairs=8))
    monkeypatch.setattr(demonstration, "PRETRAINING_STEPS", 3)
    monkeypatch.setattr(demonstration, "UPSTREAM_STEPS", 3)
    monkeypatch.setattr(demonstration, "EPOCHS", 1)
    monkeypatch.setattr(demonstration, "HIDDEN", 32)
    downstream, numbers = demonstration.phases.downstream, {}

    def numbered(settings):  # every measure has a value of its own, which so few steps do not give
        result = downstream(settings)
        measures = [dataclasses.replace(m, value=number + 0.5) for number, m in enumerate(result.measures)]
        numbers.update((m.name, m.value) for m in measures)
        return dataclasses.replace(result, measures=measures)

    monkeypatch.setattr(demonstration.phases, "downstream", numbered)
    out = tmp_path / "runs" / "demo"
    said = done("demo", "--out", out)
    table = said.out.splitlines()
    assert table[-1] == f"result: {out}" and [line.split()[0] for line in said.err.splitlines()] == ["demo:", "1", "2", "3", "4"]
    found = json.loads((out / "demo.json").read_text())
    assert [r["system"] for r in found["rows"]] == ["base", "base + LoRA", "plain fine-tuning", "LoRA, frozen"] and found["strength"] == 0.8
    for row in found["rows"]:
        (line,) = (line for line in table if line.startswith(f"  {row['system']}   "))
        figures = [row[k] for k in (("mlm_loss", "stereotype_preference") if "mlm_loss" in row else ("accuracy", "tpr_gap", "floor"))]
        assert [float(x) for x in line.split("  ")[-1:]] and all(f"{f:.3f}" in line or f"{f:.1f}" in line for f in figures)
    assert {p.name for p in out.iterdir()} == {"world", "base", "gender", "plain", "debiased", "demo.json", *(("report.html", "metrics.json") if available() else ())}
    assert table[-2].startswith(f"report: {out}/report.html" if available() else "report: pip install")
    for run, names in (("gender", ("evaluation.json", "evaluation-base.json", "examples.jsonl", "examples-base.jsonl")), ("plain", ("evaluation.json", "examples.jsonl"))):
        assert all((out / run / name).exists() for name in names)
    assert [line[2:].split("   ")[0] for line in table if line.startswith("  ")] == [row["system"] for row in found["rows"]]
    base, debiased, plain, frozen = found["rows"]
    assert base["mlm_loss"] != debiased["mlm_loss"]
    for row, run in ((plain, "plain"), (frozen, "debiased")):
        assert [row["accuracy"], row["tpr_gap"], row["floor"]] == [numbers[name] for name in ("accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled")]
        assert all(low <= high for low, high in row["intervals"].values()) and (out / run / "adapter").is_dir() == (run == "debiased")
    (out / "demo.json").write_text('{"rows": null}')  # as after Ctrl-C
    (out / "mine").mkdir()
    (out / "mine" / "notes.txt").write_text("mine")
    monkeypatch.setattr(demonstration, "pretrain", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    said = cli("demo", "--out", out)
    assert said.code == 130 and f"{out}: an earlier demo, replaced" in said.err and (out / "demo.json").exists()
    assert (out / "mine" / "notes.txt").read_text() == "mine" and {p.name for p in out.iterdir()} == {"mine", "world", "demo.json"}  # what is no demo's stays


# ---------------------------------------------------------------- real processes

def process(*argv, **options):
    """`python -m peftdebias`, on one thread."""
    return subprocess.run([sys.executable, "-m", "peftdebias", *map(str, argv)], capture_output=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}, **options)


def test_a_process_of_its_own_gives_the_same_bits(small, chain, tmp_path):
    """Another process, another order of sets: the same module; exit code 0, the run named last."""
    said = process("upstream", *small.learning(seed=1, out=tmp_path / "run"))
    assert said.returncode == 0 and said.stdout.decode().splitlines()[-1] == f"result: {tmp_path}/run"
    assert sha256(tmp_path / "run/adapter/adapter.safetensors") == sha256(chain[0]["gender"] / "adapter/adapter.safetensors")
    assert b"\r" not in said.stderr  # no progress bar
    said = process("upstream")
    assert said.returncode == 2 and said.stderr.decode() == "peftdebias: missing: --axis, --model, --corpus, --out (see `peftdebias upstream --help`)\n"


def test_standard_input_that_is_no_text(tmp_path, monkeypatch):
    with open(file(tmp_path, "c.txt", b"he is\nshe \xff\n")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        said = cli("augment", "--axis", "gender", "--out", tmp_path / "o.jsonl")
    assert (said.code, said.err.splitlines()[1:]) == (2, ["peftdebias: <stdin>:2: expected utf-8, got 0xff at byte 5 of the line"])
    assert list(tree(tmp_path)) == ["c.txt"]


@pytest.mark.parametrize("command", ["augment", "augment -", "upstream"])
def test_standard_input_without_words_of_the_axis(command, small, tmp_path, monkeypatch):
    flags = ["--axis", "gender"] if "augment" in command else small.learning(corpus="-", out=tmp_path / "run")
    with open(file(tmp_path, "c.txt", b"bergen\nosaka\n")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        said = cli(*command.split(), *flags)
    assert (said.code, said.err.splitlines()[-1]) == (2, "peftdebias: <stdin>: expected words of the axis gender, found none in 2 texts")
    assert list(tree(tmp_path)) == ["c.txt"]


def test_a_reader_that_goes_away_is_no_error_and_output_is_utf8_whatever_the_locale(tmp_path):
    """While rows are written (`head`), and before the last ones leave (`true`)."""
    for name, times in (("long.txt", 50_000), ("short.txt", 1)):
        file(tmp_path, name, "He said “no”.\n" * times)
    augment = f"'{sys.executable}' -m peftdebias augment --axis gender '{tmp_path}'"
    command = f"{augment}/long.txt | head -n 1; echo ${{PIPESTATUS[0]}}; {augment}/short.txt | true; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""})
    first, *codes = said.stdout.decode().splitlines()
    assert json.loads(first)["counterfactual"] == "She said “no”." and codes == ["141", "141"]
    told = [line.split(":")[0] for line in said.stderr.decode().splitlines()]
    assert told[:2] == ["augment", "augment"] and told[-1] == "result" and "Traceback" not in said.stderr.decode()


# ---------------------------------------------------------------- memory

def _too_much(settings):
    torch.empty(10 ** 15)


def _too_much_for_a_gpu(settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free. Including non-PyTorch "
                                 "memory, this process has 78.10 GiB memory in use.\nSee documentation")


def _too_much_for_python(settings):
    raise MemoryError


@pytest.mark.parametrize("command,does,words", [
    ("upstream", _too_much_for_a_gpu, "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free; less in --batch-size or --batch-tokens or "
                                      "--max-length takes less, and so does --save-memory"),
    ("upstream", _too_much_for_python, "the machine has none left; less in --batch-size or --batch-tokens or --max-length takes less, and so does --save-memory"),
    ("doctor", _too_much, r"DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes. .*"),
])
def test_memory_that_is_not_there_is_one_line(command, does, words, small, monkeypatch):
    monkeypatch.setitem(command_line.COMMANDS, command, (does, *command_line.COMMANDS[command][1:]))
    got = cli(command, *(small.learning(out="o") if command == "upstream" else []))
    assert got.code == 2 and re.fullmatch(f"peftdebias: out of memory: {words}\n", got.err), got.err


def test_memory_that_is_not_there_for_the_arguments(monkeypatch):
    monkeypatch.setattr(command_line, "parser", lambda: numpy.empty(2 ** 60, numpy.int8))
    got = cli("doctor")
    assert got.code == 2 and re.fullmatch("peftdebias: out of memory: Unable to allocate .*\n", got.err), got.err


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    def wrong(settings):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setitem(command_line.COMMANDS, "doctor", (wrong, *command_line.COMMANDS["doctor"][1:]))
    with pytest.raises(RuntimeError, match="scalar type"):
        cli("doctor")


def test_methods_of_a_run_are_those_of_its_base(small, chain):
    tables = [done("methods", "--model", folder).out for folder in (small.base, chain[0]["gender"], chain[0]["plain"])]
    assert tables[0] == tables[1] == tables[2]
