"""Recipes: what is refused before anything is trained, and a small one from end to end, stopped, taken up again, and its table."""

import dataclasses
import json
import os
import re
import shutil
import tomllib
import types
from pathlib import Path

import pytest
import torch

from peftdebias import evaluation, options, recipe as recipes, recipe_table, runner
from peftdebias.config import Report, Run, Upstream
from peftdebias.errors import ConfigError, DataError, PeftDebiasError
from peftdebias.metrics.nli import SLOT
from peftdebias.metrics.compare import over_seeds, seed_difference
from peftdebias.report import report

from .outside import one_thread  # noqa: F401
from .small import cli, done, tree

ROOT = Path(__file__).resolve().parent.parent
TASK = '''
[[task]]
name = "jobs"
train = { file = ["train.jsonl"], text = "hard_text", label = "profession", group = "gender" }
dev = { file = ["dev.jsonl"], text = "hard_text", label = "profession", group = "gender" }
test = { file = ["test.jsonl"], text = "hard_text", label = "profession", group = "gender" }
epochs = 20
lr = 1e-3
measures = ["classification", "counterfactual"]
'''
RECIPE = '''
title = "small"
axis = "gender"
seeds = 2
[upstream]
train_of = "jobs"
steps = 30
valid_every = 20
lr = 1e-2
batch_size = 16
max_length = 100
measures = ["crows-pairs=PAIRS"]
''' + TASK + '''
[[task]]
name = "moved"
stage = "transfer"
train = { file = ["binary.csv"], text = "text", label = "is_health" }
test = { file = ["binary.csv"], text = "text", label = "is_health" }
dev = { file = ["binary.csv"], text = "text", label = "is_health" }
epochs = 10
lr = 1e-3

[[system]]
name = "FT"
[[system]]
name = "Full-Debias"
method = "full"
upstream = { lr = 1e-4 }
[[system]]
name = "LoRA"
method = "lora"
set = { rank = 2 }

[[column]]
stage = "upstream"
title = "CrowS"
measure = "crows-pairs/bias-bench/all"
paper = { BERT = 57.25, LoRA = 54 }
[[column]]
stage = "downstream"
title = "TPR-GAP"
measure = "tpr-gap/rms"
paper = { FT = 13.05 }
[[column]]
stage = "transfer"
title = "accuracy"
measure = "accuracy"
'''


@pytest.fixture
def place(small, tmp_path):
    """(recipe file, data folder): texts of the splits differ, so that a split is never empty."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev", "test", "pairs"):
        source = getattr(small, name)
        (data / (source.name if name == "pairs" else f"{name}.jsonl")).write_bytes(source.read_bytes())
    header, *rows = small.binary.read_text().splitlines(keepends=True)
    for folder, part in (("a", rows[:50]), ("b", rows[50:70]), ("c", rows[70:])):
        (data / folder).mkdir()
        (data / folder / "binary.csv").write_text(header + "".join(part))
    text = RECIPE.replace("PAIRS", small.pairs.name)
    for folder in "acb":
        text = text.replace('"binary.csv"', f'"{folder}/binary.csv"', 1)
    file = tmp_path / "small.toml"
    file.write_text(text)
    return file, data


def test_the_shipped_recipes_are_whole():
    assert recipes.Learning() == recipes.Learning(steps=10000, valid_every=1000, lr=1e-5, batch_size=32, max_length=256)
    assert recipes.Task(name="x") == recipes.Task(name="x", stage="downstream", dev_share=0.1, epochs=10, lr=2e-5, batch_size=32, max_length=256, max_pairs=20000, metric="accuracy")
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
    assert names == ["biasbios", "bug", "ghc", "lhc", "mnli"]
    for name in names:
        found = recipes.load(name)
        assert found == recipes.load(str(ROOT / "recipes" / f"{name}.toml")) and found.systems == recipes.SYSTEMS and found.seeds == 3
        assert {s.name: (s.method, s.budget) for s in found.systems} == {"FT": (None, None), "Full-Debias": ("full", None), "Adapter": ("adapter", 0.01), "Prompt": ("prefix", 0.01),
                                                                         "LoRA": ("lora", 0.01), "SFT": ("sparse", 0.01)}
        assert found.upstream.steps == 10000 and found.upstream.lr == 1e-5 and all(task.lr == 2e-5 for task in found.tasks)
        for entry in (*found.upstream.measures, *(m for task in found.tasks for m in (*task.measures, *task.measures_without_examples))):
            assert entry.partition("=")[0] in evaluation.ON, entry
        for column in found.columns:
            assert column.paper is None or len(column.paper) in (6, 7), column.title


@pytest.mark.parametrize("old,new,words", [
    ('title = "small"', "", "title: expected a text, got None"),
    ('axis = "gender"', 'axis = "gender"\nfoo = 1', "unknown key 'foo'; expected title, axis"),
    ("seeds = 2", "seeds = 0", "seeds: expected at least 1, got 0"),
    ("seeds = 2", "seeds = true", "seeds: expected a whole number, got True"),
    ("steps = 30", "steps = -5", r"\[upstream\]: steps: expected at least 1, got -5"),
    ("valid_every = 20", "valid_every = 0", r"\[upstream\]: valid_every: expected at least 1, got 0"),
    ("lr = 1e-2", "lr = inf", r"\[upstream\]: lr: expected a finite number above 0, got inf"),
    ("max_length = 100", "max_length = 2", r"\[upstream\]: max_length: expected at least 3, got 2"),
    ("epochs = 10\n", "epochs = -3\n", r"\[\[task\]\] moved: epochs: expected at least 1, got -3"),
    ('name = "moved"', 'name = "moved"\nbatch_size = 0', r"\[\[task\]\] moved: batch_size: expected at least 1, got 0"),
    ('name = "moved"', 'name = "moved"\ndev_share = 0.0', r"\[\[task\]\] moved: dev_share: expected more than 0 and less than 1, got 0.0"),
    ('name = "moved"', 'name = "moved"\ndev_share = 1.0', r"\[\[task\]\] moved: dev_share: expected more than 0 and less than 1, got 1.0"),
    ("seeds = 2", 'seeds = "2"', "seeds: expected a whole number, got '2'"),
    (RECIPE, 'title = "x"', r"r.toml: expected a table \[upstream\], found none"), (RECIPE, "system = 3", r"r.toml: system: expected \[\[system\]\] tables, got 3"),
    ('title = "CrowS"\n', "", r"r.toml: \[\[column\]\]: missing: title"), ('file = ["train.jsonl"]', "file = []", r"\[\[task\]\] jobs, train: file: expected at least one name, got none"),
    ("paper = { FT = 13.05 }", 'paper = { FT = "13" }', "TPR-GAP: paper: expected a number for each of .*, got FT = '13'"),
    ('stage = "transfer"\ntitle', 'stage = "transfr"\ntitle', r"\[\[column\]\] accuracy: stage: expected one of upstream, downstream, transfer, got 'transfr'"),
    ('dev = { file = ["binary.csv"], text = "text", label = "is_health" }', 'dev = "b.csv"', r"\[\[task\]\] moved, dev: expected a table, got 'b.csv'"),
    ("steps = 30", 'steps = "many"', r"\[upstream\]: steps: expected a whole number, got 'many'"),
    ("steps = 30", "step = 30", r"\[upstream\]: unknown key 'step'"),
    ("steps = 30", "steps = 30\nmax_pairs = 7", r"\[upstream\]: unknown key 'max_pairs'"),
    ('name = "moved"', 'name = "moved"\nmax_pairs = -1', r"\[\[task\]\] moved: max_pairs: expected at least 0, got -1"),
    ('label = "profession", ', "", r"\[\[task\]\] jobs: expected a source `train` with a label"),
    ('test = { file = ["binary.csv"], text = "text", label = "is_health" }\n', "", r"\[\[task\]\] moved: expected a source `test` with a label"),
    ('train_of = "jobs"', "", r"\[upstream\]: expected either file or train_of"),
    ('train_of = "jobs"', 'train_of = "job"', r"\[upstream\]: train_of: expected one of jobs, moved, got 'job'"),
    ('name = "moved"', 'name = "jobs"', r"\[\[task\]\]: expected one or more, each with a name of its own, got jobs, jobs"),
    ('stage = "transfer"\ntrain', 'stage = "down"\ntrain', r"\[\[task\]\] moved: stage: expected one of downstream, transfer, got 'down'"),
    ('method = "lora"', 'method = "lorra"', r"r.toml: \[\[system\]\] LoRA: method: expected one of adapter, .*, got 'lorra'"),
    ("set = { rank = 2 }", 'set = ["rank"]', r"r.toml: \[\[system\]\]: set: expected KEY=VALUE, got 'rank'"), (RECIPE, 'task = ["jobs"]', r"\[\[task\]\]: expected a table, got 'jobs'"),
    ('name = "moved"', 'name = ["moved"]', r"name: expected a text, got \['moved'\]"),
    ('measure = "accuracy"', 'measure = "accuracy"\ntask = "x"', r"\[\[column\]\] accuracy: task: expected one of moved, got 'x'"),
    ('measure = "accuracy"', 'measure = "accuracy"\ntask = "jobs"', r"\[\[column\]\] accuracy: task: expected one of moved, got 'jobs'"),
    ('stage = "transfer"\ntrain', 'stage = "downstream"\ntrain', r"\[\[column\]\] TPR-GAP: task: expected one of jobs, moved, got 'none'"),
    ('stage = "upstream"\n', 'stage = "upstream"\ntask = "jobs"\n', r"task: expected none in this stage, got 'jobs'"),
    ("paper = { FT = 13.05 }", "paper = { FX = 13.05 }", r"\[\[column\]\] TPR-GAP: paper: expected a number for each of BERT, FT, Full-Debias, LoRA, got FX = 13.05"),
    *[("paper = { FT = 13.05 }", f"paper = {{ FT = {value} }}", f"paper: expected a number for each of .*, got FT = {value}") for value in ("nan", "inf")],
    ("[upstream]", "[upstream", "expected TOML, got"),
    ('name = "LoRA"', 'name = "../LoRA"', r"name: expected letters, digits, spaces and . _ \+ \( \) -, a letter or digit first, got '../LoRA'"),
    ('name = "jobs"', 'name = "/tmp/jobs"', "got '/tmp/jobs'"),
    ('name = "LoRA"', 'name = "full debias"', "expected systems, tasks, the base and upstream to have names that tell them apart, also as task-system, got 'Full-Debias' and 'full debias'"),
    ('name = "LoRA"', 'name = "BERT"', "got 'BERT' and 'BERT'"),
    ('name = "LoRA"', 'name = "moved"', "got 'moved' and 'moved'"),
    ('name = "moved"', 'name = "upstream"', "got 'upstream' and 'upstream'"),
    *[('name = "moved"', f'name = "{name}-Full"\nstage = "transfer"\ntrain = {{ file = ["a"], label = "b" }}\ntest = {{ file = ["a"], label = "b" }}\n[[system]]\nname = "Debias"\n'
       '[[task]]\nname = "moved"', f"got '{name}-full-debias' and '{name}-Full-debias'") for name in ("jobs", "upstream")],
])  # fmt: skip
def test_a_recipe_that_is_wrong_is_refused_in_one_line(old, new, words, tmp_path):
    assert old in RECIPE
    (tmp_path / "r.toml").write_text("\ufeff" + RECIPE.replace(old, new, 1), encoding="utf-8")  # the mark that some editors put first is no mistake
    with pytest.raises(ConfigError, match=words) as error:
        recipes.load(str(tmp_path / "r.toml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags,words", [
    (["nothing"], "nothing: expected a recipe file or one of biasbios, bug, ghc, lhc, mnli, found none"), ([""], "recipe: expected RECIPE, got an empty text"),
    (["--scale", "0"], "--scale: expected a finite number above 0, got 0.0"),
    (["--scale", "inf"], "--scale: expected a finite number above 0, got inf"),
    (["--systems", "LoRA", "X"], "--systems X: expected one of FT, Full-Debias, LoRA"),
    (["--upstream", "lt=1"], "--upstream lt: unknown key 'lt'"), (["--downstream", "lr"], "--downstream: expected KEY=VALUE, got 'lr'"),
    (["--downstream", "lr=fast"], "--downstream lr: lr: expected a number, got 'fast'"),
    (["--upstream", "jobs.lr=1.0"], "--upstream jobs.lr: expected NAME.KEY=VALUE with NAME one of FT, Full-Debias, LoRA"),
    (["--upstream", "Lora2.lr=1.0"], "--upstream Lora2.lr: expected NAME.KEY=VALUE with NAME one of FT, Full-Debias, LoRA"),
    (["--data", "nowhere"], "--data nowhere: expected a folder, found none"), (["--out", "/dev/null/x"], "--out /dev/null/x: cannot be written: Not a directory"),
    (["--out", __file__], f"--out {__file__}: exists and holds no results of a recipe; expected a new folder"),
    (["--model", "nowhere"], "model 'nowhere': no such folder"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, place, small, tmp_path):
    recipe, data = place
    argv = ["run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out"]
    said = cli(*(["run", *flags, *argv[2:]] if flags in (["nothing"], [""]) else [*argv, *flags]))
    assert said.code == 2 and words in said.err.splitlines()[-1] and not (tmp_path / "out").exists(), said.err


HATE = 'measures = ["classification", "fprd"]\nterms = "terms.txt"'


def measured(new: str, column: str = "accuracy") -> dict[str, str]:
    """The first task with `new` in the place of its measures, and a column that fits."""
    return {'measures = ["classification", "counterfactual"]': new, 'measure = "tpr-gap/rms"': f'measure = "{column}"'}


@pytest.mark.parametrize("changes,words", [
    (measured('measures = ["clasification"]'), r"small.toml: measure clasification: expected one of .*, got 'clasification'"),
    (measured('measures = ["classification", "iptts="]'), r"small.toml: measure iptts=: expected iptts=FILE, got no file"),
    (measured('measures = ["classification", ""]'), r"small.toml: \[\[task\]\] jobs: measures: expected a text, got an empty one"),
    (measured('metric = "f2"'), r"small.toml: \[\[task\]\] jobs: metric: expected one of accuracy, f1, macro-f1, got 'f2'"),
    (measured('class_weights = ""'), r"small.toml: \[\[task\]\] jobs: class_weights: expected a text, got an empty one"),
    ({'measures = ["crows-pairs=pairs.csv"]': 'measures = ["crows-pairs"]'}, r"small.toml: \[upstream\] measure crows-pairs: expected crows-pairs=FILE"),
    (measured(HATE), r"small.toml: \[\[task\]\] jobs: positive: expected the hateful label, one of .*nurse.*, got none"),
    (measured(HATE + '\npositive = "hate"'), r"\[\[task\]\] jobs: --positive: expected one of .*, got 'hate'"),
    (measured('metric = "f1"'), r"\[\[task\]\] jobs: --metric f1: expected --positive with one of .*nurse"),
    (measured('class_weights = "1=10"'), r"\[\[task\]\] jobs: --class-weights 1=10: expected LABEL=WEIGHT"),
    (measured('measures = ["iptts=terms.txt"]\npositive = "nurse"', "fprd-iptts"), r"\[\[task\]\] jobs: terms: expected a file of identity terms for iptts, or identity.csv beside it, got none"),
    (measured('measures = ["bias-nli=terms.txt"]', "bias-nli"), "terms.txt: expected a folder of word lists, got a file"),
    (measured('measures = ["bias-nli=lists"]', "bias-nli"), r"\[\[task\]\] jobs: neutral: expected the label that means neutral, one of .*, got none"),
    (measured('measures = ["fprd"]\npositive = "nurse"', "fprd"), r"\[\[task\]\] jobs: terms: expected a file of identity terms for fprd, got none"),
    ({'measure = "tpr-gap/rms"': 'measure = "tprgap/rms"'},
     r"\[\[column\]\] TPR-GAP: measure: expected accuracy, f1, tpr-gap, .*counterfactual or what begins so, which are measured there, got 'tprgap/rms'"),
    ({'measure = "crows-pairs/bias-bench/all"': 'measure = "accuracy"'}, r"\[\[column\]\] CrowS: measure: expected crows-pairs or what begins so"),
    ({'label = "is_health"': 'label = "is_healthy"'}, "is_healthy"),
    ({'test = { file = ["test.jsonl"]': 'test = { file = ["train.jsonl"]'},
     r"small.toml: \[\[task\]\] jobs: train: expected examples, got none \((\d+) of \1 examples whose text is in the test split were left out\)$"),
    ({'axis = "gender"': 'axis = "gendre"'}, "gendre"),
    ({"set = { rank = 2 }": "set = { rank = 0 }"}, r"small.toml: \[\[system\]\] LoRA: lora rank: expected at least 1, got 0"),
    ({"set = { rank = 2 }": "budget = 0.01\nset = { rank = 2 }"}, "LoRA: budget: chooses lora's rank; expected no rank beside it"),
])  # fmt: skip
def test_what_a_later_unit_would_trip_over_is_seen_before_the_first(changes, words, place, small, tmp_path, monkeypatch):
    recipe, data = place
    (data / "terms.txt").write_text("nurse\n")
    (data / "lists").mkdir()
    for name, word in (("occupations", "nurse"), ("gendered_words", "woman"), ("templates", "The [WORD] sang.".replace("[WORD]", SLOT))):
        (data / "lists" / name).write_text(word + "\n")
    text = recipe.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    for phase in ("upstream", "downstream"):
        monkeypatch.setattr(runner.phases, phase, lambda *_: pytest.fail("trained"))
    said = cli("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out")
    assert said.code == 2 and re.search(words, said.err.splitlines()[-1]) and not (tmp_path / "out").exists(), said.err


def test_a_label_that_training_lacks_is_seen_before_the_first_unit(place, small, tmp_path, monkeypatch):
    recipe, data = place
    rows = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(rows) + json.dumps(json.loads(rows[0]) | {"profession": "juggler"}) + "\n")
    for phase in ("upstream", "downstream"):
        monkeypatch.setattr(runner.phases, phase, lambda *_: pytest.fail("trained"))
    with pytest.raises(DataError, match=rf"^{data}/test.jsonl:{len(rows) + 1}: label 'juggler' is on no text to train on; expected one of "):
        runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out")))


def test_only_what_is_left_to_do_is_asked_for(place, small, tmp_path):
    """A positive label of one system's own; a text that no chosen system reads; a base that is gone when all is done; columns of the base of a run with modules."""
    recipe, data = place
    (data / "terms.txt").write_text("he\nshe\n")
    (data / "corp.csv").write_text("other\nshe is a nurse\n")
    text = recipe.read_text().replace('train_of = "jobs"', 'file = ["corp.csv"]\ntext = "body"').replace('measures = ["classification", "counterfactual"]', HATE)
    text = text[:text.index('[[task]]\nname = "moved"')] + text[text.index("[[system]]"):text.rindex("[[column]]")]  # one task
    recipe.write_text(text.replace('name = "FT"', 'name = "FT"\ndownstream = { positive = "nurse" }').replace('measure = "tpr-gap/rms"', 'measure = "base/fprd"'))
    shutil.copytree(small.base, tmp_path / "base")
    flags = ["run", recipe, "--model", tmp_path / "base", "--data", data, "--out", tmp_path / "out", "--scale", 0.02, "--seeds", 1, "--systems", "FT"]
    done(*flags)
    shutil.rmtree(tmp_path / "base")
    assert "2 of 2 units done" in done(*flags).out
    said = cli(*flags[:-2])
    assert said.code == 2 and "no such folder" in said.err.splitlines()[-1]


def test_differences_are_to_the_base_and_paired_by_seed():
    def row(system, seed, stage, value):
        return {"system": system, "seed": seed, "stage": stage, "task": None if stage == "upstream" else "jobs", "measures": [{"name": "m", "value": value}]}

    up, down = ({"stage": stage, "task": None, "title": "M", "measure": "m", "unit": "%", "ideal": 0.0} for stage in ("upstream", "downstream"))
    table = {"base": "BERT", "baseline": "FT", "rows": [
        row("BERT", 0, "upstream", 50.0), row("LoRA", 0, "upstream", 47.0), row("LoRA", 1, "upstream", 48.0),
        row("FT", 1, "downstream", 10.0), row("FT", 0, "downstream", 20.0), row("LoRA", 0, "downstream", 21.0), row("LoRA", 1, "downstream", 14.0), row("LoRA", 2, "downstream", 99.0),
        row("FT", 2, "downstream", None)]}  # a figure that could not be had
    found = recipe_table.change(table, up, "LoRA")  # the untrained base is one, whatever the seed
    assert (found.first, found.second, found.value, found.n) == (50.0, 47.5, -2.5, 2) and found.low < -2.5 < found.high
    found = recipe_table.change(table, down, "LoRA")  # 1 and 4; the seed that plain fine-tuning has not is left out
    assert (found.first, found.second, found.value, found.n) == (15.0, 17.5, 2.5, 2)
    assert recipe_table.change(table, up, "BERT") is None and recipe_table.change(table, down, "FT") is None
    assert recipe_table.change({**table, "baseline": None}, down, "LoRA") is None
    one = [r for r in table["rows"] if (r["system"], r["seed"]) != ("FT", 1)]  # plain fine-tuning under one seed is no base
    assert recipe_table.change({**table, "rows": one}, down, "LoRA") is None
    whole = table | {"title": "T", "scale": 1.0, "model": "m", "settings": {}, "seeds": [0, 1, 2], "units": 8, "seconds": 60.0, "systems": ["BERT", "FT", "LoRA"], "paper": [],
                     "columns": [up, down], "versions": {"device": "d", "threads": 1, "torch": "2", "commit": None}}
    said, more, one = (recipe_table.markdown(whole | change) for change in ({}, {"columns": [up, down, down | {"measure": "none"}]}, {"rows": [r for r in table["rows"] if not r["seed"]]}))
    of_one = recipe_table.markdown(whole | {"seeds": [0]})
    assert "; 1 seed; " in of_one and "\nFigures of one seed, without a spread; intervals over the examples are in the rows.\n" in of_one and "Mean ±" in said and "; 3 seeds; " in said
    assert said.count(", 2 seeds |") == 2 and "(0 of" not in more and "Differences" not in one
    assert said.count("\n|---|---|---|\n") == 2 and "| BERT | 50 |  |" in said and "| FT |  | 15 ± 7.1 |" in said  # a system that a stage leaves out has its row all the same
    of_two = recipe_table.markdown(whole | {"columns": [up, down | {"task": "jobs"}, down | {"task": "moved"}, down | {"task": "moved", "title": "N"}]})
    assert of_two.count("\n| system | M (ideal 0) | M (jobs) (ideal 0) | M (moved) (ideal 0) | N (ideal 0) |\n") == 2


def test_a_column_that_nobody_fills_is_named_and_the_table_claims_nothing_of_a_paper(place, small, tmp_path):
    recipe, data = place
    text = recipe.read_text().replace('measure = "tpr-gap/rms"', 'measure = "tpr-gap/class/judge"')
    recipe.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("paper = ")))
    said = done("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out", "--scale", 0.02, "--seeds", 2, "--systems", "LoRA")
    told = said.err.splitlines()
    (early, late), first = [i for i, line in enumerate(told) if line.startswith("[[column]]")], [line.split(",")[0] for line in told].index("2 of 6: jobs-lora-0")
    assert (early, late) == (first + 1, len(told) - 1)  # after the first unit of its kind, and at the end
    assert told[early] == told[late].replace("/judge;", "/judge so far;")
    assert told[late].startswith("[[column]] TPR-GAP: no unit has tpr-gap/class/judge; expected tpr-gap/rms, tpr-gap/rms-shuffled")
    kept = {name: sum(1 for _ in open(tmp_path / "out" / "data" / f"{name}-train.jsonl")) for name in ("jobs", "moved")}
    assert [f"  {name}: train: {kept[name]} examples, {share} % of it" in said.err.splitlines() for name, share in (("jobs", 40), ("moved", 20))] == [True, True]  # 20 and 10 epochs
    assert "Scale 0.02 of the recipe's schedule" in said.out and "over the seeds.\n" in said.out and "paper" not in said.out and "Differences" not in said.out and "None" not in said.out


def test_everything_that_is_read_is_looked_for_first(place, small, tmp_path):
    recipe, data = place
    (data / "b" / "binary.csv").unlink()
    (data / "a" / "binary.csv").rename(data / "a" / "other.csv")
    (data / "c" / "binary.csv").unlink()
    with pytest.raises(DataError, match="expected [abc]/binary.csv, found none"):
        runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def asked(place, small, tmp_path, monkeypatch):
    """asked(**settings of `run`): what the recipe's first training downstream is asked for; it is not begun."""
    def of(**settings):
        seen = []

        def downstream(asked_for, say):
            seen.append(asked_for)
            raise KeyboardInterrupt

        monkeypatch.setattr(runner.phases, "downstream", downstream)
        with pytest.raises(KeyboardInterrupt):
            runner.run(Run(recipe=str(place[0]), model=str(small.base), data=str(place[1]), out=str(tmp_path / "out"), **settings))
        (found,) = seen
        return found

    return of


def test_a_setting_of_one_text_keeps_its_commas(asked):
    assert asked(downstream=("jobs.class_weights=nurse=2,teacher=1",)).class_weights == "nurse=2,teacher=1"


@pytest.mark.parametrize("said, lr", [
    (("lr=0.1",), 0.1), (("jobs.lr=0.2", "lr=0.1"), 0.2), (("FT.lr=0.3", "jobs.lr=0.2", "lr=0.1"), 0.3), (("lr=0.1", "jobs.lr=0.2", "FT.lr=0.3"), 0.3)])
def test_what_is_said_of_a_system_goes_before_what_is_said_of_a_task_and_of_all(said, lr, asked):
    assert asked(systems=("FT",), downstream=said).lr == lr


def test_all_that_a_recipe_says_of_the_measuring_is_asked_for(place, small, tmp_path, monkeypatch):
    recipe, data = place
    recipe.write_text(recipe.read_text().replace("lr = 1e-3\n", 'lr = 1e-3\nneutral = "nurse"\nmax_pairs = 7\nterms = "terms.txt"\n', 1))
    (data / "terms.txt").write_text("he\n")
    seen = []

    def asked(settings):
        if settings.on[0].startswith("classification"):
            seen.append(settings)
            raise KeyboardInterrupt
        return types.SimpleNamespace(measures=[], notes=[])

    monkeypatch.setattr(runner.phases, "downstream", lambda settings, say: None)
    monkeypatch.setattr(runner.evaluation, "evaluate", asked)
    with pytest.raises(KeyboardInterrupt):
        runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), systems=("FT",), device="cpu"))
    (found,) = seen
    assert (found.axis, found.neutral, found.max_pairs, found.terms, found.device) == ("gender", "nurse", 7, str(data / "terms.txt"), "cpu")
    assert found.model == str(tmp_path / "out" / "runs" / "jobs-ft-0") and found.examples == str(tmp_path / "out" / "examples" / "jobs-ft-0.jsonl")


def test_the_text_upstream_is_a_tasks_whole_training_split_at_every_scale(place, small, tmp_path, monkeypatch):
    recipe, data = place
    made = []

    def asked(settings, say):
        made.append(Path(settings.corpus[0]).read_text().splitlines())
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.phases, "upstream", asked)
    for scale in (1.0, 0.03):
        with pytest.raises(KeyboardInterrupt):
            runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / str(scale)), systems=("LoRA",), scale=scale))
    assert made[0] == made[1] and len(made[0]) > 80


def test_all_that_a_recipe_says_of_the_training_is_asked_for(place, small, tmp_path, monkeypatch):
    recipe, data = place
    own = 'lr = 1e-3\nbatch_size = 7\nmax_length = 50\nmetric = "f1"\npositive = "nurse"\nclass_weights = "nurse=2"\n'
    recipe.write_text(recipe.read_text().replace("lr = 1e-3\n", own, 1).replace("set = { rank = 2 }", "budget = 0.02"))
    seen = []

    def asked(settings, say):
        seen.append(settings)
        raise KeyboardInterrupt

    for system, phase in (("LoRA", "upstream"), ("FT", "downstream")):
        monkeypatch.setattr(runner.phases, phase, asked)
        with pytest.raises(KeyboardInterrupt):
            runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / system), systems=(system,), scale=0.09, device="cpu"))
    expected = ({"axis": "gender", "method": "lora", "budget": 0.02, "steps": 3, "valid_every": 2, "lr": 1e-2, "batch_size": 16, "max_length": 100, "seed": 0, "device": "cpu"},
                {"epochs": 2, "lr": 1e-3, "batch_size": 7, "max_length": 50, "metric": "f1", "positive": "nurse", "class_weights": "nurse=2", "group": "group", "seed": 0,
                 "device": "cpu"})  # 0.09 of 30 steps, 20 and 20 epochs, rounded
    assert [{name: getattr(one, name) for name in values} for one, values in zip(seen, expected)] == list(expected)
    (data / "corp.csv").write_text("other,body\nx,he is @you a nurse\ny,\nz,@only\n")
    before, made = recipe.read_text(), []
    monkeypatch.setattr(runner.phases, "upstream", asked)
    for own in ('file = ["corp.csv"]\ntext = "body"\nclean = true', 'train_of = "moved"'):  # the text: a file's, or that of the task that is named
        recipe.write_text(before.replace('train_of = "jobs"', own))
        with pytest.raises(KeyboardInterrupt):
            runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / own[:4]), systems=("LoRA",), device="cpu"))
        made.append([json.loads(line) for line in Path(seen[-1].corpus[0]).read_text().splitlines()])
    assert made[0] == [{"text": "he is a nurse"}] and all(row["text"] in (data / "a" / "binary.csv").read_text() for row in made[1])
    with pytest.raises(ConfigError, match=f"--out {tmp_path}/trai: holds results with model {small.base}; expected the same as before or another folder$"):
        runner.run(Run(recipe=str(recipe), model=str(data), data=str(data), out=str(tmp_path / "trai"), systems=("LoRA",), device="cpu"))


def test_a_recipe_stopped_and_taken_up_again(place, small, tmp_path, monkeypatch):
    recipe, data = place
    out = tmp_path / "out"
    flags = ["run", recipe, "--model", small.base, "--data", data, "--out", out, "--downstream", "moved.epochs=3", "--scale", "0.1", "--downstream", "LoRA.batch_size=8"]
    trained, original = [], runner.phases.downstream
    out.mkdir()
    (out / ".recipe.json.partial-0a1b2c").touch()  # of one that was killed before anything else

    def stops_at_the_fourth(settings, say):
        trained.append(settings)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return original(settings, say)

    monkeypatch.setattr(runner.phases, "downstream", stops_at_the_fourth)
    said = cli(*flags)
    assert said.code == 130 and said.err.splitlines()[-2:] == [f"{out}: what is done is kept; the same command goes on from there", "peftdebias: stopped"]
    assert not list(out.glob(".*"))
    before = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    half = json.loads((out / "results.json").read_text())
    assert len(before) == len(half["rows"]) == 5 and half["units"] == 17  # 2 seeds x (3 systems x 2 tasks + 2 learnt bases or modules), and the base once
    monkeypatch.setattr(runner.phases, "downstream", original)
    said = done(*flags)
    assert all((out / "rows" / name).stat().st_mtime_ns == then for name, then in before.items())
    table = json.loads((out / "results.json").read_text())
    assert len(table["rows"]) == 17 and table["scale"] == 0.1 and table["systems"] == ["BERT", "FT", "Full-Debias", "LoRA"] and table["seeds"] == [0, 1]
    assert said.out.startswith("# small\n\nScale 0.1 of the paper's schedule; downstream: moved epochs 3, LoRA batch_size 8; base base; 2 seeds; 17 of 17 units done") and "result: " in said.out

    settings = {row["run"]: tomllib.loads((out / row["run"] / "config.toml").read_text()) for row in table["rows"] if row["run"]}
    assert {(s["steps"], s["batch_size"], s["max_length"]) for name, s in settings.items() if "upstream" in name} == {(3, 16, 100)}
    assert settings["runs/upstream-full-debias-0"]["lr"] == 1e-4 and settings["runs/upstream-lora-1"]["lr"] == 1e-2
    assert {s["epochs"] for name, s in settings.items() if name.startswith("runs/jobs")} == {2} and {s["epochs"] for name, s in settings.items() if "moved" in name} == {3}
    assert settings["runs/jobs-lora-0"]["batch_size"] == 8 and settings["runs/jobs-ft-0"]["batch_size"] == 32
    full, lora = settings["runs/jobs-full-debias-1"], settings["runs/moved-lora-1"]
    assert full["model"].endswith("upstream-full-debias-1") and full["adapter"] == [] and lora["adapter"][0].endswith("upstream-lora-1") and lora["seed"] == 1
    assert all((out / row["examples"]).is_file() and row["versions"]["torch"] == torch.__version__ for row in table["rows"])

    flips = {row["system"] for row in table["rows"] for m in row["measures"] if m["name"] == "counterfactual/flips"}
    assert flips == {"FT", "Full-Debias", "LoRA"}  # the axis is the recipe's, whether or not a run has a module

    gap = table["columns"][1]
    assert gap["unit"] == "points" and gap["ideal"] == 0.0
    values = recipe_table.figures(table, gap, "LoRA")
    assert values == {row["seed"]: m["value"] for row in table["rows"] if row["run"] in ("runs/jobs-lora-0", "runs/jobs-lora-1") for m in row["measures"] if m["name"] == "tpr-gap/rms"}
    assert f"| {over_seeds(list(values.values()))} |" in said.out and " [13.05] |" in said.out
    plain, found = recipe_table.figures(table, gap, "FT"), recipe_table.change(table, gap, "LoRA")
    assert found == seed_difference([plain[0], plain[1]], [values[0], values[1]], name="tpr-gap/rms", unit="points", ideal=0.0)
    crows = table["columns"][0]
    assert len(recipe_table.figures(table, crows, "BERT")) == 1 and recipe_table.change(table, crows, "LoRA").n == 2 and recipe_table.change(table, crows, "BERT") is None

    said = cli(*flags[:-4], "--scale", "0.2")
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: --out {out}: holds results with scale 0.1; expected the same as before or another folder"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    said = cli(*flags[:7], tmp_path / "else", *flags[8:])
    assert said.code == 2 and said.err.endswith(f"--out {tmp_path}/else: exists and holds no results of a recipe; expected a new folder\n")


def test_what_was_prepared_before_the_first_unit_was_done_is_kept_too(place, small, tmp_path, monkeypatch):
    recipe, data = place
    settings = Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("FT",))

    def stopped(settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(runner.evaluation, "evaluate", stopped)
        runner.run(settings)
    assert (tmp_path / "out" / "recipe.json").exists()
    assert len(runner.run(settings).table["rows"]) == 3


def test_what_an_empty_column_is_told():
    rows = [{"stage": "task", "task": "jobs", "system": "FT", "seed": 0, "measures": [{"name": name, "value": value} for name, value in (("tpr-gap/rms", None), ("base/perplexity (a.txt)", 3.0))]}]
    for measure, words in (("tpr-gap/rms", "tpr-gap/rms could be computed for no unit so far"), ("tpr-gap/worst", "no unit has tpr-gap/worst so far; expected tpr-gap/rms"),
                           ("perplexity (b.txt)", "no unit has perplexity (b.txt) so far; expected base/perplexity (a.txt)"), ("f1", "no unit has f1 so far"), ("base/perplexity (a.txt)", None)):
        column = {"title": "G", "stage": "task", "task": None, "measure": measure}
        assert runner._empty({"systems": ["FT"], "rows": rows}, [column], " so far") == ([] if words is None else [f"[[column]] G: {words}"])


def test_results_of_a_recipe_that_said_more_go_on(place, small, tmp_path):
    """Keys that recipes had once, and names under which a file was looked for; a key of today with another value is another recipe."""
    recipe, data = place
    settings = Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("FT",))
    runner.run(settings)
    path = tmp_path / "out" / "recipe.json"
    told = json.loads(path.read_text())
    told["recipe"]["upstream"]["max_pairs"] = 20000
    for source in told["recipe"]["sources"].values():
        source["file"] = ["earlier.csv", *source["file"], "later.csv"]
    told["recipe"] |= {"path": "called otherwise", "seeds": 7}  # none of which makes another unit
    path.write_text(json.dumps(told))
    assert {row["seed"] for row in runner.run(dataclasses.replace(settings, seeds=2)).table["rows"]} == {0, 1}
    files = [source["file"] for source in told["recipe"]["sources"].values()]
    assert len({str(names) for names in files}) > 1
    for part, key, value in (("upstream", "steps", 7), ("tasks", "epochs", 3), ("sources", "text", "other"), ("sources", "file", files[-1]), ("sources", "file", ["none.csv"])):
        other = json.loads(json.dumps(told))
        table = other["recipe"][part]
        (table if part == "upstream" else table[0] if part == "tasks" else next(iter(table.values())))[key] = value
        path.write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=rf"holds results with another recipe \({part} differ"):
            runner.run(settings)
    for broken in ([], {"recipe": 3}, {"recipe": {"upstream": 3, "tasks": 3, "sources": [], "text": 1}}, {"recipe": {"tasks": [3]}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ConfigError):
            runner.run(settings)


def test_files_that_changed_are_not_mixed_with_what_was_learnt_on_them(place, small, tmp_path):
    recipe, data = place
    shutil.copytree(small.base, tmp_path / "base")
    (tmp_path / "base" / "more.bin").write_bytes(b"weights")
    settings = Run(recipe=str(recipe), model=str(tmp_path / "base"), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("FT",))
    runner.run(settings)
    more = dataclasses.replace(settings, seeds=2)
    for changed in (tmp_path / "base" / "model.safetensors", tmp_path / "base" / "more.bin", data / "test.jsonl", data / small.pairs.name):
        before = changed.read_bytes()
        changed.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ConfigError, match=re.escape(f"--out {tmp_path}/out: holds results with another {changed} than there is now; expected the same as before or another folder")):
            runner.run(more)
        changed.write_bytes(before)
    assert {row["seed"] for row in runner.run(more).table["rows"]} == {0, 1}


def test_an_axis_or_names_of_ones_own_that_changed_are_not_mixed_either(place, small, tmp_path, monkeypatch):
    recipe, data = place
    monkeypatch.chdir(tmp_path)
    axis, table = tmp_path / "own.TOML", tmp_path / "town.toml"
    axis.write_text('keep_untouched = false\ncolumns = ["male", "female"]\ngroups = [["he", "she"], ["his", "her"]]\n')
    table.write_text('columns = ["male", "female"]\ngroups = [["jo", "zoe"]]\n')
    recipe.write_text(recipe.read_text().replace('axis = "gender"', 'axis = "own.TOML"'))
    settings = Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("LoRA",), upstream=("names=town.toml",))
    runner.run(settings)
    for changed in (axis, table):
        before = changed.read_text()
        changed.write_text(before.replace("]]", '], ["man", "woman"]]'))
        with pytest.raises(ConfigError, match=f"holds results with another {changed.name} than there is now"):
            runner.run(dataclasses.replace(settings, seeds=2))
        changed.write_text(before)
    assert {row["seed"] for row in runner.run(dataclasses.replace(settings, seeds=2)).table["rows"]} == {0, 1}


def test_the_same_files_by_another_path_go_on(place, small, tmp_path, monkeypatch):
    recipe, data = place
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked").symlink_to(data)
    flags = ["run", recipe, "--model", small.base, "--scale", 0.02, "--systems", "FT"]
    monkeypatch.chdir(tmp_path)
    done(*flags, "--data", "data", "--out", "out", "--seeds", 1)
    done(*flags, "--data", data, "--out", "out", "--seeds", 2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    done(*flags, "--data", "../data", "--out", "../out", "--seeds", 3)
    assert "4 seeds" in done(*flags, "--data", "linked", "--out", "../out", "--seeds", 4).out
    shutil.copytree(data, tmp_path / "copied")
    for changed, what in ((("--data", "../copied"), f"data {os.path.realpath(data)}"), (("--data", "linked", "--upstream", "lr=0.5"), "upstream {}")):
        said = cli(*flags, "--out", "../out", *changed)
        assert said.code == 2 and f"--out ../out: holds results with {what}; expected the same as before" in said.err


def test_what_is_damaged_in_its_own_folder_is_named_or_made_again(place, small, tmp_path):
    recipe, data = place
    flags = ["run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out", "--scale", 0.02, "--systems", "FT"]
    done(*flags, "--seeds", 1)
    row = next(path for path in (tmp_path / "out" / "rows").iterdir() if path.name.startswith("jobs"))
    for path in (tmp_path / "out" / "recipe.json", tmp_path / "out" / "read.json", row):
        whole = path.read_bytes()
        for damaged in (b"", whole[:40]):
            path.write_bytes(damaged)
            said = cli(*flags, "--seeds", 2)
            assert said.code == 2 and said.err.splitlines()[-1].startswith(f"peftdebias: {path}: expected JSON, got "), said.err
        path.write_bytes(whole)
    prepared = [tmp_path / "out" / "data" / f"jobs-{name}.jsonl" for name in ("train", "dev")]
    made = [path.read_bytes() for path in prepared]
    prepared[0].write_bytes(made[0].partition(b"\n")[2])
    prepared[1].write_bytes(b"")
    said = done(*flags, "--seeds", 2)
    assert [path.read_bytes() for path in prepared] == made and all(said.err.count(f"{path}: is not as it was made; made again") == 1 for path in prepared)


def test_a_run_that_was_trained_is_kept_where_nothing_was_measured(tmp_path):
    for folder in ("data", "rows", "runs/upstream-lora-0"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    runner._Runner.give_back(types.SimpleNamespace(out=tmp_path / "out", made=True, claimed=True))
    assert (tmp_path / "out/runs/upstream-lora-0").is_dir()


def test_what_a_user_put_beside_the_work_of_a_stopped_call_stays_where_the_next_one_fails(place, small, tmp_path, monkeypatch):
    recipe, data = place
    settings = Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, systems=("FT",))

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runner._Runner, "do", stopped)
        runner.run(settings)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tree(tmp_path / "out")
    assert "data/jobs-train.jsonl" in before
    with pytest.raises(PeftDebiasError, match="cuda"):
        runner.run(dataclasses.replace(settings, device="cuda:97"))
    assert tree(tmp_path / "out") == before


def test_what_stops_a_unit_names_it(place, small, tmp_path):
    recipe, data = place
    with pytest.raises(PeftDebiasError, match=r"^jobs-ft-0: step \d+: the loss is nan; expected a finite one \(a lower --lr may help\)$"):
        runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, systems=("FT",), downstream=("lr=1e38",)))


def test_an_empty_folder_of_the_users_stays_where_nothing_was_done(place, small, tmp_path):
    recipe, data = place
    (tmp_path / "out").mkdir()
    with pytest.raises(PeftDebiasError):
        runner.run(Run(recipe=str(recipe), model=str(tmp_path), data=str(data), out=str(tmp_path / "out")))
    assert list((tmp_path / "out").iterdir()) == []


def test_below_one_epoch_a_share_of_the_training_file_is_taken(place, small, tmp_path):
    recipe, data = place
    found = runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("FT",))).table
    assert {p["system"] for p in found["paper"]} <= set(found["systems"]) == {"BERT", "FT"}
    report(Report(paths=(str(tmp_path / "out"),), out=str(tmp_path / "page.html")))  # of some systems of the recipe
    row = next(row for row in found["rows"] if row["task"] == "moved")
    trained = (tmp_path / "out" / "data" / "moved-train.jsonl").read_text().splitlines()
    assert len(trained) == round(0.2 * 50) and tomllib.loads((tmp_path / "out" / row["run"] / "config.toml").read_text())["epochs"] == 1
    assert [row["stage"] for row in found["rows"]] == ["upstream", "downstream", "transfer"] and recipe_table.change(found, found["columns"][1], "FT") is None


def test_a_folder_of_an_earlier_version_notes_the_tables_and_goes_on(place, small, tmp_path, monkeypatch):
    recipe, data = place
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text('keep_untouched = false\ncolumns = ["male", "female"]\ngroups = [["he", "she"], ["his", "her"]]\n')
    recipe.write_text(recipe.read_text().replace('axis = "gender"', 'axis = "own.toml"'))
    settings = Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("LoRA",))
    runner.run(settings)
    path = tmp_path / "out/read.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if not name.endswith("own.toml")}))
    runner.run(dataclasses.replace(settings, seeds=2))
    assert json.loads(path.read_text()) == told
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds results with another"):
        runner.run(dataclasses.replace(settings, seeds=3))


def test_a_model_of_the_hub_is_the_same_in_every_folder(place, small, tmp_path, monkeypatch):
    recipe, data = place
    shutil.copytree(small.base, tmp_path / "hub/models--me--tiny/snapshots/1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "elsewhere").mkdir()
    flags = ["run", recipe, "--model", "me/tiny", "--scale", 0.02, "--systems", "FT", "--data", data, "--out", tmp_path / "out"]
    monkeypatch.chdir(tmp_path)
    done(*flags, "--seeds", 1)
    monkeypatch.chdir(tmp_path / "elsewhere")
    done(*flags, "--seeds", 2)
    path = tmp_path / "out/recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": str(tmp_path / "elsewhere/me/tiny")}))  # of an earlier version
    done(*flags, "--seeds", 3)


@pytest.mark.parametrize("setting, words", [('axis = "no/such.toml"', "axis file no/such.toml: no such file"), ('names = "none.toml"', "names file none.toml: no such file"), ("workers = -1", "--workers: expected at least 0, got -1")])
def test_what_a_system_s_own_settings_ask_for_is_looked_for_first(setting, words, place, small, tmp_path):
    recipe, data = place
    recipe.write_text(recipe.read_text().replace("upstream = { lr = 1e-4 }", f"upstream = {{ {setting} }}"))
    said = cli("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out", "--scale", 0.02)
    assert said.code == 2 and words in said.err.splitlines()[-1] and "jobs-ft-0" not in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting, words", [("axis = 5", "axis: expected a text, got 5"), ("names = true", "names: expected a text, got True"), ('names = ["a"]', "names: expected a text, got ['a']")])
def test_a_system_s_own_axis_that_is_no_text_is_one_line(setting, words, place, small, tmp_path):
    recipe, data = place
    recipe.write_text(recipe.read_text().replace("upstream = { lr = 1e-4 }", f"upstream = {{ {setting} }}"))
    said = cli("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out", "--scale", 0.02)
    assert said.code == 2 and f"[[system]] Full-Debias: upstream: {words}" in said.err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_column_by_its_number_is_a_text():
    assert options.checked(Upstream, options.parse_settings(["from=2"], options.texts_of(Upstream))) == {"from_": "2"}


@pytest.mark.parametrize("flags, words", [
    (["--upstream", "seed=5"], "--upstream seed: expected a setting that a recipe leaves free, got seed, which follows from its data, systems and seeds"),
    (["--upstream", "LoRA.adapter=x"], "--upstream LoRA.adapter: expected a setting that a recipe leaves free, got adapter,"),
    (["--downstream", "jobs.label=x"], "--downstream jobs.label: expected a setting that a recipe leaves free, got label,"),
    (["--downstream", "out=x"], "--downstream out: expected a setting that a recipe leaves free, got out,"),
])  # fmt: skip
def test_what_follows_from_the_recipe_is_no_override(flags, words, place, small, tmp_path):
    recipe, data = place
    said = cli("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out", *flags)
    assert said.code == 2 and said.err.splitlines()[-1].startswith(f"peftdebias: {words}") and not (tmp_path / "out").exists()
    recipe.write_text(recipe.read_text().replace("upstream = { lr = 1e-4 }", "upstream = { lr = 1e-4, seed = 3 }"))
    said = cli("run", recipe, "--model", small.base, "--data", data, "--out", tmp_path / "out")
    assert said.code == 2 and said.err.splitlines()[-1].startswith(f"peftdebias: {recipe}: [[system]] Full-Debias: upstream: expected a setting that a recipe leaves free, got seed,")


def test_identity_terms_that_lie_beside_the_templates_are_among_the_files(place, small, tmp_path, monkeypatch):
    recipe, data = place
    (data / "terms.csv").write_text("Text,bin_label\n"), (data / "identity.csv").write_text("Text\nold\n")
    recipe.write_text(recipe.read_text().replace('measures = ["classification", "counterfactual"]', 'measures = ["iptts=terms.csv"]\npositive = "nurse"', 1).replace("tpr-gap/rms", "fprd-iptts"))
    made = runner._Runner(recipes.load(str(recipe)), Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out")), lambda line: None)
    made._same_files()
    noted = json.loads((tmp_path / "out" / "read.json").read_text())
    assert str(data / "identity.csv") in noted
    without = {name: value for name, value in noted.items() if not name.endswith("identity.csv")}
    (tmp_path / "out" / "read.json").write_text(json.dumps(without))  # as an earlier version left it
    made._same_files()
    assert json.loads((tmp_path / "out" / "read.json").read_text()) == noted
    (data / "identity.csv").write_text("Text\nyoung\n")
    with pytest.raises(PeftDebiasError, match="holds results with another .*identity.csv than there is now"):
        made._same_files()
