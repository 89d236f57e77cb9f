"""`report`: what is read, computed and shown, against the files it comes from; what is left out; what does not fit; a file that needs nothing else.

How it looks and behaves in a browser is test_report_page.py's business.
"""

import dataclasses
import importlib.util
import json
import random
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from peftdebias import cli as command_line_module  # noqa: E402
from peftdebias import checkpoint, config, options  # noqa: E402
from peftdebias.metrics.compare import over_seeds, seed_difference  # noqa: E402
from peftdebias.report.words import duration, number  # noqa: E402
from peftdebias.report import figures, flips, page, recipe, reading, report, results as figures_of, runs, sections  # noqa: E402

from .reports import FEW, HOSTILE, flip_row, hostile_results, hostile_runs, measure, result_folder, results, run_folder, task_measures, task_runs  # noqa: E402
from .small import cli, done, tree  # noqa: E402


class Elements(HTMLParser):
    """tags: (name, attributes) of every element; texts: of every <name>, the text inside."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        for _, pieces in self.open:
            pieces.append(data)

    def handle_endtag(self, tag):
        while self.open:
            name, pieces = self.open.pop()
            self.texts.append((name, "".join(pieces)))
            if name == tag:
                return

    def all(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def written(folder, *paths, **flags):
    """(the page, metrics.json) of a report."""
    out = folder / "report.html"
    report(config.Report(paths=tuple(map(str, paths)), out=str(out), **flags))
    return out.read_text(encoding="utf-8"), json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def titles(text: str) -> list[str]:
    return [t for t in Elements(text).all("h2")]


def of(data: dict, system: str, name: str, stage: str = "downstream", source: int = 0) -> dict:
    (found,) = (m for r in data["sources"][source]["results"] if (r["system"], r["stage"]) == (system, stage) for m in r["measures"] if m["name"] == name)
    return found


# ---------------------------------------------------------------- runs

def test_runs_of_one_system_are_seeds_and_the_figures_are_those_of_the_files(tmp_path):
    folders = task_runs(tmp_path)
    text, data = written(tmp_path, *folders)
    values = {system: [{m["name"]: m["value"] for m in json.loads((tmp_path / f"{kind}-{seed}" / "metrics.jsonl").read_text().splitlines()[-1])["measures"]}
                       for seed in range(3)] for kind, system in (("plain", "plain fine-tuning"), ("lora", "lora, gender"))}
    for system, of_seed in values.items():
        for name in of_seed[0]:
            found, spread = of(data, system, name), over_seeds([v[name] for v in of_seed])
            assert [(v["seed"], v["value"]) for v in found["values"]] == [(s, v[name]) for s, v in enumerate(of_seed)]
            if name != "tpr-gap/rms-shuffled":  # alike under every seed: it keeps the interval over examples
                assert (found["mean"], found["sd"], found["low"], found["high"], found["interval"]) == (spread.mean, spread.sd, spread.low, spread.high, "seeds")
    alike = of(data, "lora, gender", "tpr-gap/rms-shuffled")
    assert (alike["mean"], alike["sd"], alike["low"], alike["high"], alike["interval"]) == (3.0, 0.0, 1.0, 5.0, "examples")
    cells = Elements(text).all("td")
    accuracy = of(data, "lora, gender", "accuracy")
    assert f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f}{accuracy['low']:.2f} to {accuracy['high']:.2f}" in cells


def test_differences_have_intervals_and_are_paired_by_seed(tmp_path):
    _, data = written(tmp_path, *task_runs(tmp_path))
    found = {d["name"]: d for d in data["sources"][0]["differences"]}
    assert set(found) == {"accuracy", "f1/macro", "tpr-gap/rms"}  # no class alone, no floor
    for name, d in found.items():
        plain, lora = ([v["value"] for v in of(data, system, name)["values"]] for system in ("plain fine-tuning", "lora, gender"))
        expected = seed_difference(plain, lora, name=name)
        assert (d["difference"], d["low"], d["high"], d["p"], d["test"]) == (expected.value, expected.low, expected.high, expected.p, "paired t over seeds")
        assert (d["system"], d["against"]) == ("lora, gender", "plain fine-tuning")


def test_one_seed_is_compared_by_examples_or_not_at_all(tmp_path):
    rng = random.Random(0)
    plain, lora = (run_folder(tmp_path / n, "downstream", method=m, final=task_measures(rng)) for n, m in (("plain", None), ("lora", "lora")))
    text, data = written(tmp_path, plain, lora)
    assert data["sources"][0]["differences"] == [] and "lora, gender: not compared with plain fine-tuning, since a difference needs two seeds or more of both" in text
    rows = [flip_row(text=f"he {i}", counterfactual=f"she {i}", after="nurse" if i % 3 else "guard", source=i) for i in range(30)]
    others = [flip_row(text=f"he {i}", counterfactual=f"she {i}", after="guard", source=i) for i in range(30)]
    for folder, kept in ((plain, rows), (lora, others)):
        (folder / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    _, data = written(tmp_path, plain, lora)
    found = {d["name"]: d for d in data["sources"][0]["differences"]}
    flips_ = found["counterfactual/flips"]
    assert flips_["difference"] == pytest.approx(-100 * 20 / 30) and flips_["low"] < flips_["difference"] < flips_["high"] < 0 and flips_["test"] == "paired bootstrap"
    (lora / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others[:-1]))
    text, data = written(tmp_path, plain, lora)  # other examples: a note, no difference
    assert data["sources"][0]["differences"] == [] and "expected the 30 examples of counterfactual" in text


def test_other_settings_are_other_systems_and_are_not_compared(tmp_path):
    rng = random.Random(0)
    folders = [run_folder(tmp_path / f"{n}-{s}", "downstream", s, method=m, final=task_measures(rng), config={"lr": lr})
               for s in (0, 1) for n, m, lr in (("plain", None, 1e-3), ("lora", "lora", 1e-3), ("fast", "lora", 1e-2))]
    text, data = written(tmp_path, *folders)
    assert {r["system"] for r in data["sources"][0]["results"]} == {"plain fine-tuning", "lora, gender (lora)", "lora, gender (fast)"}
    assert {d["system"] for d in data["sources"][0]["differences"]} == {"lora, gender (lora)"}
    assert "lora, gender (fast): not compared with plain fine-tuning, whose model, settings or data are others" in text
    again = run_folder(tmp_path / "again", "downstream", 0, method=None, final=task_measures(rng))
    _, data = written(tmp_path, folders[0], again)  # one seed twice: no spread is made of it
    assert {r["system"] for r in data["sources"][0]["results"]} == {"plain fine-tuning (plain-0)", "plain fine-tuning (again)"}
    _, data = written(tmp_path, folders[0], folders[0], str(folders[0]) + "/")
    assert [r["seeds"] for r in data["sources"][0]["results"]] == [[0]]


def test_systems_whose_folders_are_called_alike_are_told_apart(tmp_path):
    """By a number that is none of a seed, or by the folder above: otherwise one system would be made of both, and one figure lost."""
    def run(name, lr, value):
        return run_folder(tmp_path / name, "downstream", 0, final=[measure("accuracy", value)], config={"lr": lr})

    for names, labels in ((("lora-1", "lora-2"), ("lora-1", "lora-2")), (("a/bios", "b/bios"), ("a/bios", "b/bios")), (("lora-3", "x"), ("lora", "x")),
                          (("c/lora-1", "c/lora-2", "d/lora-1"), ("c/lora-1", "c/lora-2", "d/lora-1"))):
        _, data = written(tmp_path, *(run(name, lr, 70.0 + lr) for lr, name in enumerate(names)))
        assert {(r["system"], r["measures"][0]["mean"]) for r in data["sources"][0]["results"]} == {(f"lora, gender ({label})", 70.0 + lr) for lr, label in enumerate(labels)}
    _, data = written(tmp_path, run("e/bios", 5, 71.0), run("f/bios", 5, 72.0))  # the same twice
    assert {(r["system"], r["measures"][0]["mean"]) for r in data["sources"][0]["results"]} == {("lora, gender (e/bios)", 71.0), ("lora, gender (f/bios)", 72.0)}


def test_a_base_that_is_measured_beside_several_runs_is_one(tmp_path):
    """Under one seed or several: it is untrained, and files of it are no several measurements. Another model's is another base."""
    def run(name, seed, method, value, base, **config):
        return run_folder(tmp_path / name, "upstream", seed, method=method, config=config,
                          evaluations={"": [measure("mlm-loss", value, "nats", None)], "-base": [measure("mlm-loss", base, "nats", None), measure(f"crows-{name}", 50.0)]})

    same = run("lora-0", 0, "lora", 2.0, 3.0, lr=1e-3), run("bias-0", 0, "bias", 2.5, 3.0, lr=1e-4), run("lora-1", 1, "lora", 2.2, 3.0001, lr=1e-3)
    text, data = written(tmp_path, *same)
    base, = (r for r in data["sources"][0]["results"] if r["system"] == "base")
    assert base["seeds"] == [0] and {m["name"]: m["mean"] for m in base["measures"]} == {"mlm-loss": 3.0, "crows-lora-0": 50.0, "crows-bias-0": 50.0, "crows-lora-1": 50.0}
    assert [(d["system"], d["n"], pytest.approx(d["difference"])) for d in data["sources"][0]["differences"]] == [("lora, gender", 2, -0.9)]
    assert "bias, gender: not compared with base, since a difference needs two seeds" in text
    other = run("other-0", 0, "lora", 4.0, 6.0, lr=1e-3, model="/m/other")
    text, data = written(tmp_path, *same, other)
    assert {"base (tiny)", "base (other)"} < {r["system"] for r in data["sources"][0]["results"]}
    assert all(d["system"] == "lora, gender (lora)" and d["first"] == 3.0 for d in data["sources"][0]["differences"])
    assert "lora, gender (other): not compared with base (" in text and "whose model, settings or data are others" in text
    odd = run("odd-0", 0, "lora", 4.0, 3.5, lr=1e-3)  # the same model, measured on other texts
    _, data = written(tmp_path, same[0], odd)
    assert {"base (lora-0)", "base (odd-0)"} < {r["system"] for r in data["sources"][0]["results"]}


def values_of(data: dict, name: str = "accuracy") -> dict:
    """system -> {seed: value}."""
    return {r["system"]: {v["seed"]: v["value"] for v in m["values"]} for r in data["sources"][0]["results"] for m in r["measures"] if m["name"] == name}


def told(run: Path) -> Path:
    """The run, whose versions.json says what it was made of, as the phases write it."""
    versions = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps(versions | {"made_of": checkpoint.made_of(checkpoint.read_config(run))}))
    return run


def test_what_a_run_was_made_of_tells_systems_apart(tmp_path):
    """Modules or bases that were trained otherwise are no seeds of one system; those that differ in their seed alone are. It is known after they were moved, too."""
    def up(name, seed, **config):
        return told(run_folder(tmp_path / name, "upstream", seed, method=config.pop("method", "lora"), config=config))

    def down(name, seed, base=None, module=None, value=70.0):
        config = ({"model": str(base)} if base else {}) | ({"adapter": [str(module)]} if module else {})
        return told(run_folder(tmp_path / name, "downstream", seed, method="lora" if module else None, final=[measure("accuracy", value)], config=config))

    modules = up("a-0", 0), up("a-1", 1), up("b-1", 1, steps=4000)
    _, data = written(tmp_path, down("d0", 0, module=modules[0]), down("d1", 1, module=modules[1], value=72.0), down("e1", 1, module=modules[2], value=90.0))
    assert sorted(map(len, values_of(data).values())) == [1, 2] and {0: 70.0, 1: 72.0} in values_of(data).values()
    full, race = up("full", 0, method="full"), up("race", 0, method="full", lr=1.0)
    runs_ = down("f0", 0, base=full), down("f1", 1, base=race, value=50.0), down("g0", 0, base=tmp_path / "d0" / "model", value=60.0), down("p0", 0, value=65.0)
    for moved in (full, race, tmp_path / "d0"):
        moved.rename(moved.with_name(moved.name + "-moved"))
    text, data = written(tmp_path, *runs_)
    found = values_of(data)
    assert len(found) == 4 and found["plain fine-tuning"] == {0: 65.0} and found["plain fine-tuning of model"] == {0: 60.0}
    assert {(name.partition(" (")[0], *values.values()) for name, values in found.items() if name.startswith("full")} == {("full, gender", 70.0), ("full, gender", 50.0)}


def test_a_base_that_was_trained_under_each_seed_is_one_way_to_make_it(tmp_path):
    """Its folder is another under every seed, and so is what a module learnt on it says of its base; a module learnt beside another is not one learnt alone."""
    def made(name, command, seed, **config):
        run = run_folder(tmp_path / f"{name}-{seed}", command, seed, method=config.pop("method", None), final=[measure("accuracy", 60.0 + seed)], config=config)
        if len(config.get("adapter", [])) == 2:
            shutil.copytree(run / "adapter", run / "adapter-2")
        return str(told(run))

    found = {name: [] for name in ("on full", "full on full", "beside", "alone")}
    for seed in (1, 2):
        full = made("full", "upstream", seed, method="full")
        found["on full"].append(made("don", "downstream", seed, model=full, method="lora", adapter=[made("on", "upstream", seed, model=full, method="lora")]))
        found["full on full"].append(made("dff", "downstream", seed, model=made("ff", "upstream", seed, model=full, method="full")))
        first = made("first", "upstream", seed, method="lora")
        for name, more in (("beside", {"adapter": [first]}), ("alone", {})):
            found[name].append(made(f"d{name}", "downstream", seed, method="bias", adapter=[first, made(name, "upstream", seed, method="bias", **more)]))
    names = {name: runs._system_names([reading.read_run(Path(run)) for run in found[name]]) for name in found}
    assert names == {"on full": ["full, gender + lora, gender"] * 2, "full on full": ["full, gender"] * 2, "beside": ["bias, gender + bias, gender"] * 2,
                     "alone": ["bias, gender + bias, gender"] * 2}
    assert len(set(runs._system_names([reading.read_run(Path(run)) for run in (found["beside"][0], found["alone"][1])]))) == 2


def test_differences_are_of_the_figures_beside_them(tmp_path):
    """Examples of other data, of all modules for one alone, figures of another number of examples: a note, no difference."""
    def run(name, method, value, seed=0, n=30, more=(), rows=None):
        examples = None if rows is None else {"": [{"measure": "classification", "text": f"text {i}", "label": "a", "group": None, "place": f"f:{i}", "predicted": "a" if i < rows else "b",
                                                      "probabilities": {"a": 0.5, "b": 0.5}, "positive": None} for i in range(30)]}
        return run_folder(tmp_path / name, "downstream", seed, method=method, final=[measure("accuracy", value, n=n), *more], examples=examples)

    _, data = written(tmp_path, run("p", None, 100 * 20 / 30, rows=20), run("l", "lora", 100 * 25 / 30, rows=25))
    assert [(d["name"], round(d["difference"], 2)) for d in data["sources"][0]["differences"] if d["name"] == "accuracy"] == [("accuracy", 16.67)]
    text, data = written(tmp_path, run("p2", None, 90.0, rows=20), run("l2", "lora", 60.0, rows=25))
    assert "accuracy" not in [d["name"] for d in data["sources"][0]["differences"]] and "the examples are of other data than the figures" in text
    parts = [measure("base/accuracy", 10.0), measure("only-race/accuracy", 20.0)]
    text, data = written(tmp_path, run("p3", None, 100 * 20 / 30, rows=20), run("l3", "lora", 100 * 25 / 30, more=parts, rows=25))
    assert {d["system"] for d in data["sources"][0]["differences"]} == {"lora, gender"} and values_of(data)["lora, gender: all switched off"] == {0: 10.0}
    assert "lora, gender: race alone: not compared with plain fine-tuning" in text
    text, data = written(tmp_path, *(run(f"{m or 'p'}4-{s}", m, 60.0 + s + 5 * bool(m), s, n) for m in (None, "lora") for s, n in ((0, 500 if m is None else 9000), (1, 20))))
    assert data["sources"][0]["differences"] == [] and "another number of examples, unit or ideal on either side" in text
    assert next(m["n"] for r in data["sources"][0]["results"] for m in r["measures"]) is None
    text, _ = written(tmp_path, run("p5", None, 60.0, 0), run("l5", "lora", 60.0, 1))
    assert "not compared with plain fine-tuning: no seed in common" in text


def test_another_tasks_baseline_stands_in_no_plot_and_dev_figures_are_told(tmp_path):
    def run(name, method, train, on="test"):
        folder = run_folder(tmp_path / name, "downstream", 0, method=method, final=task_measures(random.Random(1)), config={"train": train})
        (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace('"on": "test"', f'"on": "{on}"'))
        return folder

    text, _ = written(tmp_path, run("p", None, "a.csv"), run("l", "lora", "a.csv"))
    assert "tpr-gap by class, plain fine-tuning beside lora, gender" in text and "without a test file" not in text
    text, _ = written(tmp_path, tmp_path / "p", run("m", "lora", "b.csv", "dev"))
    assert "plain fine-tuning beside" not in text and "m: their own figures are of the dev file, which the epoch was chosen by" in text


def test_a_figure_of_fewer_seeds_says_so(tmp_path):
    def run(name, method, seed, **values):
        return run_folder(tmp_path / f"{name}-{seed}", "downstream", seed, method=method, final=[measure(n, v) for n, v in values.items()])

    rows = [run(name, m, s, accuracy=60.0 + s, **({"f1": 50.0 + s + bool(m)} if s or m else {})) for name, m in (("p", None), ("l", "lora")) for s in (0, 1, 2)]
    text, data = written(tmp_path, *rows)
    assert "2 of 3 seeds" in text and {d["name"]: d["n"] for d in data["sources"][0]["differences"]} == {"accuracy": 3, "f1": 2}
    alike = [run_folder(tmp_path / f"same-{s}", "downstream", s, final=[measure("accuracy", 0.2)]) for s in (0, 1, 2)]
    _, data = written(tmp_path, *alike)
    assert data["sources"][0]["results"][0]["measures"][0]["interval"] == "examples" and data["sources"][0]["results"][0]["measures"][0]["sd"] == 0


def test_full_debias_is_told_from_plain_fine_tuning_by_its_base(tmp_path):
    full = run_folder(tmp_path / "full", "upstream", method="full")
    down = run_folder(tmp_path / "down", "downstream", method=None, final=task_measures(random.Random(0)), config={"model": str(full)})
    next_ = run_folder(tmp_path / "next", "upstream", axis="race", config={"model": str(full)})
    assert [runs.system_of(reading.read_run(f)) for f in (full, down, next_)] == ["full, gender", "full, gender", "full, gender + lora, race"]


def test_an_upstream_run_beside_its_base(tmp_path):
    own = [measure("crows-pairs/bias-bench/gender", 53.0, ideal=50.0), measure("mlm-loss", 3.1, "nats", None, 0.1)]
    base = [measure("crows-pairs/bias-bench/gender", 56.0, ideal=50.0), measure("mlm-loss", 3.2, "nats", None, 0.1)]
    run = run_folder(tmp_path / "gender", "upstream", evaluations={"": own, "-base": base, "-wiki": own[1:]})
    text, data = written(tmp_path, run)
    assert of(data, "base", "mlm-loss", "upstream")["mean"] == 3.2
    assert [(r["system"], r["task"]) for r in data["sources"][0]["results"]] == [("base", ""), ("lora, gender", ""), ("lora, gender", "wiki")]
    assert "loss 3.300 → 2.900 at step 40" in text and "1 min 15 s" in text and "40 steps" in text
    assert [t for t in titles(text)] == ["What was run", "Upstream: the masked-LM", "Upstream: the masked-LM (wiki)", "Quality against bias", "Training", "What this cannot show"]


def test_an_evaluation_with_several_modules_is_several_systems(tmp_path):
    found = [measure("accuracy", 70.0), measure("base/accuracy", 60.0), measure("only-race/accuracy", 65.0)]
    run = run_folder(tmp_path / "both", "downstream", evaluations={"": found})
    _, data = written(tmp_path, run)
    assert {r["system"]: r["measures"][0]["mean"] for r in data["sources"][0]["results"]} == {
        "lora, gender": 70.0, "lora, gender: all switched off": 60.0, "lora, gender: race alone": 65.0}


def test_a_section_without_data_is_left_out(tmp_path):
    bare = run_folder(tmp_path / "bare", "upstream")
    for name in ("metrics.jsonl", "versions.json"):
        (bare / name).unlink()
    text, data = written(tmp_path, bare)
    assert titles(text) == ["What was run", "What this cannot show"] and "<svg" not in text and "Versions" not in text
    assert [s["measures"] for s in data["sources"][0]["results"]] == [[]]
    text, _ = written(tmp_path, *task_runs(tmp_path, [0]))
    assert titles(text) == ["What was run", "Downstream: the classifier", "Quality against bias", "True positive rate gaps, class by class", "Training", "What this cannot show"]


def test_what_was_run_is_all_there(tmp_path):
    text, _ = written(tmp_path, *task_runs(tmp_path))
    for words in ("tiny", "gender", "plain fine-tuning; lora, gender", "0, 1, 2", "a machine", "2.13.0", "2 epochs", "accuracy 5.00 → 45.00 at step 40",
                  "peftdebias downstream --model /models/tiny"):
        assert words in text, words
    for limit in ("they can show bias, never its absence", "Gender is treated as binary", "word lists of every axis are narrow"):
        assert limit in text


def test_the_command_of_a_run_makes_its_configuration_again(tmp_path):
    chosen = config.Upstream(model="m b", axis="gender", corpus=("a.txt", "it's.txt"), out="o", set={"rank": 4, "targets": ("query", "value")}, adapter=("x", "y"), lr=1e-3, cache="c")
    folder = run_folder(tmp_path / "up", "upstream")
    (folder / "config.toml").write_text(tomli_w.dumps({"command": "upstream"} | options.as_plain(chosen)))
    words = shlex.split(reading.command_line(reading.read_run(folder)))
    given = vars(command_line_module.parser().parse_args(words[1:]))
    assert words[:2] == ["peftdebias", "upstream"] and options.resolve(config.Upstream, {k: v for k, v in given.items() if k != "command"}) == chosen
    chosen = dataclasses.replace(chosen, set={"positioned": True, "reparametrised": False, "length": 3})
    (folder / "config.toml").write_text(tomli_w.dumps({"command": "upstream"} | options.as_plain(chosen)))
    given = vars(command_line_module.parser().parse_args(shlex.split(reading.command_line(reading.read_run(folder)))[1:]))
    assert options.resolve(config.Upstream, {k: v for k, v in given.items() if k != "command"}) == chosen
    down = config.Downstream(model="m", train="a", dev="b", text="t", label="l", out="o", fold=False, class_weights="0=1,1=10")
    (folder / "config.toml").write_text(tomli_w.dumps({"command": "downstream"} | options.as_plain(down)))
    words = shlex.split(reading.command_line(reading.read_run(folder)))
    given = vars(command_line_module.parser().parse_args(words[1:]))
    assert "--no-fold" in words and options.resolve(config.Downstream, {k: v for k, v in given.items() if k != "command"}) == down


def test_evaluations_with_other_options_or_files_are_told(tmp_path):
    """Of the options, those of a measure that was asked for; of the files, what is in them, wherever they lie. The commands stand beside those of the runs."""
    def asked(on, files, **more):
        return {"settings": options.as_plain(config.Evaluate(model="m", on=on, **more)), "files": files}

    for kind, evaluation in (("lora", asked(("perplexity=a.txt", "seat=s"), {"a.txt": "1", "s/one.jsonl": "2"})),
                             ("bias", asked(("seat=t/s", "perplexity=b.txt"), {"b.txt": "1", "t/s/one.jsonl": "2"}, label="job"))):
        folder = run_folder(tmp_path / kind, "upstream", method=kind)
        (folder / "evaluation.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)]} | evaluation))
    text, data = written(tmp_path, tmp_path / "lora", tmp_path / "bias")
    assert "measured unlike" not in data["sources"][0]["about"]
    for words in ("peftdebias evaluate m --on perplexity=a.txt --on seat=s", "peftdebias evaluate m --on seat=t/s --on perplexity=b.txt --label job"):
        assert words in text, words
    same = asked(("iptts=i", "perplexity=pipe"), {"i": "4", "u/t": "9"}, terms="u/t", force=True), asked(("iptts=./i", "perplexity=a"), {"i": "4", "t": "9", "a": "1"}, terms="./t")
    for kind, evaluation in zip(("lora", "bias"), same):  # the same terms by another path; what came through a pipe is not known
        (tmp_path / kind / "evaluation.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)]} | evaluation))
    text, data = written(tmp_path, tmp_path / "lora", tmp_path / "bias")
    assert "measured unlike" not in data["sources"][0]["about"] and "--terms u/t --force" in text
    (tmp_path / "lora" / "evaluation.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)]} | asked(("perplexity=a.txt", "seat=s"), {"a.txt": "1", "s/one.jsonl": "2"})))
    other = asked(("perplexity=b.txt", "seat=s"), {"b.txt": "3", "s/one.jsonl": "2"}, text="body", sentence_vector="mean")
    (tmp_path / "bias" / "evaluation.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)]} | other))
    _, data = written(tmp_path, tmp_path / "lora", tmp_path / "bias")
    both = "lora/evaluation.json unlike bias/evaluation.json"
    assert data["sources"][0]["about"]["measured unlike"] == f"--on perplexity: {both}; --sentence-vector: {both}; --text: {both}"
    for samples, words in ((50, f"--samples: {both}"), (1000, None)):  # every interval depends on it
        other = asked(("perplexity=a.txt", "seat=s"), {"a.txt": "1", "s/one.jsonl": "2"}, samples=samples)
        (tmp_path / "bias" / "evaluation.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)]} | other))
        assert written(tmp_path, tmp_path / "lora", tmp_path / "bias")[1]["sources"][0]["about"].get("measured unlike") == words
    (tmp_path / "bias" / "evaluation-base.json").write_text(json.dumps({"measures": [measure("mlm-loss", 3.0)], "settings": {"on": ["seat=s"]}, "files": {"s": 3}}))
    assert len(written(tmp_path, tmp_path / "lora", tmp_path / "bias")[1]["sources"][0]["results"]) == 3


def test_an_option_that_says_what_the_run_says_anyway_is_no_other(tmp_path):
    """What is not given is the run's own where the run was loaded, else the default of all; an axis is the module's."""
    def evaluated(folder, on, **more):
        (folder / "evaluation.json").write_text(json.dumps({"measures": [measure("accuracy", 0.5)], "files": {},
                                                            "settings": options.as_plain(config.Evaluate(**{"model": str(folder)} | more, on=(on,)))}))

    def unlike(*folders) -> str | None:
        return written(tmp_path, *folders)[1]["sources"][0]["about"].get("measured unlike")

    kinds = "lora", "bias"
    down = [run_folder(tmp_path / kind, "downstream", method=kind, config={"text": "hard_text", "max_length": 64}) for kind in kinds]
    up = [run_folder(tmp_path / f"up-{kind}", "upstream", method=kind) for kind in kinds]
    both = "lora/evaluation.json unlike bias/evaluation.json"
    evaluated(down[0], "counterfactual=c")
    for more, words in ({"text": "hard_text", "max_length": 64, "axis": "gender"}, None), ({"max_length": 256}, f"--max-length: {both}"), ({"text": "x"}, f"--text: {both}"):
        evaluated(down[1], "counterfactual=c", **more)
        assert unlike(*down) == words, more
    evaluated(up[0], "perplexity=c", model="base", adapter=(str(up[0]),))
    evaluated(up[1], "perplexity=c", model="base", adapter=(str(up[1]),), max_length=256)
    assert unlike(*up) is None


@pytest.mark.parametrize("told", [{"model": "x"}, {"adapter": "x"}, {"adapter": ["x"]}, {"adapter": [{"made_of": 3}]}, {"adapter": [{"adapter": 3}]}, 3,
                                  {"model": {"command": "upstream", "method": "full", "axis": "gender", "made_of": {"model": 3}}}])
def test_origins_that_are_none_are_passed_over(told, tmp_path):
    run = run_folder(tmp_path / "run", "downstream", method="lora")
    versions = json.loads((run / "versions.json").read_text())
    before = written(tmp_path, run)
    (run / "versions.json").write_text(json.dumps(versions | {"made_of": told}))
    assert written(tmp_path, run) == before
    assert checkpoint._told_of_origins(run) == {}


def test_trainings_that_follow_each_other_are_told_apart(tmp_path):
    folder = run_folder(tmp_path / "two", "upstream")
    events = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(events[:-1] + events) + "\n")
    run = reading.read_run(folder)
    assert [[step for step, _ in s.steps] for s in run.stretches] == [[10, 20, 30, 40]] * 2 and [s.kept for s in run.stretches] == [40, 40]
    text, _ = written(tmp_path, folder)
    rows = Elements(text).all("th")
    assert [r for r in rows if r in ("0", "20", "40", "60", "80")] == ["0", "20", "40", "60", "80"]  # end to end in the table of validations


# ---------------------------------------------------------------- recipes

def test_the_papers_table_has_ours_and_theirs(tmp_path):
    table = results()
    text, data = written(tmp_path, result_folder(tmp_path / "ghc", table))
    source = recipe.source_of_recipe(tmp_path / "ghc")
    (paper,) = (s for s in sections.sections_of(source, "x", 5) if s.id == "x-paper")
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


def test_differences_of_a_recipe_from_the_base_and_from_fine_tuning(tmp_path):
    table = results()
    data = {"sources": [figures_of.as_data(recipe.source_of_recipe(result_folder(tmp_path / "ghc", table)))]}

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
    (paper,) = (s for s in sections.sections_of(source, "x", 5) if s.id == "x-paper")
    assert not any("20.00" in str(row) for b in paper.blocks if b.kind == "table" for row in b.rows)
    for c in table["columns"]:
        c["task"] = None
    said = cli("report", result_folder(tmp_path / "unnamed", table), "--out", tmp_path / "report.html")
    assert said.code == 2 and "column 'F1' of stage downstream: expected one task with f1/1, got ghc, other" in said.err


def test_a_column_without_a_figure_is_left_out(tmp_path):
    table = results(FEW)
    for row in table["rows"]:
        row["measures"] = [m for m in row["measures"] if not m["name"].startswith(("stereoset", "fprd"))]
    source = recipe.source_of_recipe(result_folder(tmp_path / "ghc", table))
    (paper,) = (s for s in sections.sections_of(source, "x", 5) if s.id == "x-paper")
    heads = [b.head for b in paper.blocks if b.kind == "table" and not b.caption.startswith("Difference")]
    assert heads == [("system", "CrowS-Pairs, %"), ("system", "F1, %", "FPRD")]  # the paper has an FPRD
    source = recipe.source_of_recipe(result_folder(tmp_path / "none", table | {"rows": [], "paper": []}))
    assert [s.id for s in sections.sections_of(source, "x", 5)] == ["x-about"]


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


def test_bars_end_where_the_unit_does():
    def line(unit, low, high):
        return figures_of.Line("m", unit, 0.0, {0: 1.0}, 1.0, None, low, high, "seeds", 5)

    assert figures_of.drawn_ends(line("%", -40.0, 300.0)) == (0.0, 100.0) and figures_of.drawn_ends(line("%", 3.0, 4.0)) == (3.0, 4.0)
    assert figures_of.drawn_ends(line("points", -140.0, 30.0)) == (-100.0, 30.0) and figures_of.drawn_ends(line("1", -4.0, 300.0)) == (-4.0, 300.0)
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
    assert [m["name"] for r in data["sources"][0]["results"] for m in r["measures"]] == ["fprd"] and "0.500" in text and "nan" not in text.lower().replace("nangia", "")


def test_numbers():
    assert [number(v, u) for v, u in ((12.344, "%"), (-0.001, "points"), (0.01234, "1"), (145.44, "1"), (None, "%"))] == ["12.34", "\u22120.0010", "0.012", "145.4", "–"]
    assert number(1.5, "points", True) == "+1.50" and number(-1.5, "points", True) == "\u22121.50" and number(0.0, "points", True) == "0.00"
    assert [duration(s) for s in (3, 61, 3725)] == ["3 s", "1 min 01 s", "1 h 02 min"]


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
    "an event without a step": (lambda d: [changed(run_folder(d / "r", "upstream"), "metrics.jsonl", '{"event": "step"}\n')],
                                "metrics.jsonl:1: expected an event with a step"),
    "a run of something else": (lambda d: [changed(run_folder(d / "r", "upstream"), "config.toml", 'command = "demo"\n')],
                                "config.toml: expected a run of upstream or downstream, got 'demo'"),
    "a run without a seed": (lambda d: [changed(run_folder(d / "r", "upstream"), "config.toml", 'command = "upstream"\nmodel = "m"\n')],
                             "config.toml: expected seed, got None"),
    "a flip without its texts": (lambda d: [run_folder(d / "r", "downstream", final=[], examples={"": [{"measure": "counterfactual", "text": "x"}]}, evaluations={"": []})],
                                 "examples.jsonl:1: expected 'counterfactual' in a row of counterfactual, got measure, text"),
    "results of another kind": (lambda d: [result_folder(d / "r", {"kind": "bench"})], 'results.json: expected the results of a recipe, an object with kind "recipe"'),
    "another format": (lambda d: [result_folder(d / "r", results(format=2))], "results.json: expected format 1, got 2"),
    "no rows": (lambda d: [result_folder(d / "r", results(rows=None))], "results.json: expected 'rows' to be a list, got null"),
    "a row of nobody": (lambda d: [result_folder(d / "r", results(rows=[results()["rows"][0] | {"system": "X"}]))], "rows[0]: expected system to be one of BERT, FT"),
    "a row twice": (lambda d: [result_folder(d / "r", results(rows=results()["rows"][:1] * 2))],
                    "rows[1]: expected one row a system, seed, stage and task, got BERT, seed 0, upstream"),
    "an ideal that is no number": (lambda d: [result_folder(d / "r", results(columns=[results()["columns"][0] | {"ideal": "high"}]))],
                                   "columns[0]: expected 'ideal' to be a number or null, got \"high\""),
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
