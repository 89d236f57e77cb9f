"""Recipes: what is refused before anything is trained, what a training and a measuring are asked for, and the table."""

import json
import re
import shutil
import tomllib
import types
from pathlib import Path

import pytest

from peftdebias import evaluation, options, recipe as recipes, recipe_table, runner
from peftdebias.config import Report, Run, Upstream
from peftdebias.errors import ConfigError, DataError, PeftDebiasError
from peftdebias.metrics.nli import SLOT
from peftdebias.report import report

from .outside import one_thread  # noqa: F401
from .small import cli, done
from .small_recipe import RECIPE

ROOT = Path(__file__).resolve().parent.parent


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


def test_what_an_empty_column_is_told():
    rows = [{"stage": "task", "task": "jobs", "system": "FT", "seed": 0, "measures": [{"name": name, "value": value} for name, value in (("tpr-gap/rms", None), ("base/perplexity (a.txt)", 3.0))]}]
    for measure, words in (("tpr-gap/rms", "tpr-gap/rms could be computed for no unit so far"), ("tpr-gap/worst", "no unit has tpr-gap/worst so far; expected tpr-gap/rms"),
                           ("perplexity (b.txt)", "no unit has perplexity (b.txt) so far; expected base/perplexity (a.txt)"), ("f1", "no unit has f1 so far"), ("base/perplexity (a.txt)", None)):
        column = {"title": "G", "stage": "task", "task": None, "measure": measure}
        assert runner._empty({"systems": ["FT"], "rows": rows}, [column], " so far") == ([] if words is None else [f"[[column]] G: {words}"])


def test_below_one_epoch_a_share_of_the_training_file_is_taken(place, small, tmp_path):
    recipe, data = place
    found = runner.run(Run(recipe=str(recipe), model=str(small.base), data=str(data), out=str(tmp_path / "out"), scale=0.02, seeds=1, systems=("FT",))).table
    assert {p["system"] for p in found["paper"]} <= set(found["systems"]) == {"BERT", "FT"}
    report(Report(paths=(str(tmp_path / "out"),), out=str(tmp_path / "page.html")))  # of some systems of the recipe
    row = next(row for row in found["rows"] if row["task"] == "moved")
    trained = (tmp_path / "out" / "data" / "moved-train.jsonl").read_text().splitlines()
    assert len(trained) == round(0.2 * 50) and tomllib.loads((tmp_path / "out" / row["run"] / "config.toml").read_text())["epochs"] == 1
    assert [row["stage"] for row in found["rows"]] == ["upstream", "downstream", "transfer"] and recipe_table.change(found, found["columns"][1], "FT") is None


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
