"""`report` of run folders: which are one system, what they are compared with, which evaluations stand beside each other."""

import dataclasses
import json
import random
import shlex
import shutil
from pathlib import Path

import pytest
import tomli_w

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from peftdebias import cli as command_line_module  # noqa: E402
from peftdebias import checkpoint, comparison, config, options  # noqa: E402
from peftdebias.metrics.compare import over_seeds, seed_difference  # noqa: E402
from peftdebias.report import reading, results, runs, tables, training  # noqa: E402

from .reports import Elements, flip_row, measure, of, run_folder, task_measures, task_runs, titles, written  # noqa: E402


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
    (plain / "examples.jsonl").write_text("")  # of one side alone
    assert "a difference needs two seeds" in results.differences(runs.source_of_runs([plain, lora]), "downstream", "")[1][0]
    rows = [flip_row(text=f"he {i}", counterfactual=f"she {i}", after="nurse" if i % 3 else "guard", source=i) for i in range(30)]
    others = [flip_row(text=f"he {i}", counterfactual=f"she {i}", after="guard", source=i) for i in range(30)]
    for folder, kept in ((plain, rows), (lora, others)):
        (folder / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    _, data = written(tmp_path, plain, lora)
    found = {d["name"]: d for d in data["sources"][0]["differences"]}
    flips_ = found["counterfactual/flips"]
    assert flips_["difference"] == pytest.approx(-100 * 20 / 30) and flips_["low"] < flips_["difference"] < flips_["high"] < 0 and flips_["test"] == "paired bootstrap"
    told = "lora, gender: differences are of seed 0 alone, the only one both have"  # where either side's means are over more
    more = [run_folder(tmp_path / f"{n}-{s}", "downstream", s, method=m, final=task_measures(rng)) for n, m, s in (("plain", None, 1), ("lora", "lora", 2))]
    for beside, notes in (([], []), (more[:1], [told]), (more[1:], [told]), (more, [told])):
        compared = results.differences(runs.source_of_runs([plain, lora, *beside]), "downstream", "")
        assert [d.name for d in compared[0]["lora, gender"]] == list(found) and compared[1] == notes
    for final in ([], [measure("accuracy", None)]):  # a seed without figures is in no mean
        assert results.differences(runs.source_of_runs([plain, lora, run_folder(tmp_path / f"none-{len(final)}", "downstream", 3, final=final)]), "downstream", "")[1] == []
    bare = run_folder(tmp_path / "bare", "downstream", 1, final=[measure("accuracy", None)])  # the other side has figures under this seed
    compared = results.differences(runs.source_of_runs([plain, lora, more[0], bare]), "downstream", "")
    assert [d.name for d in compared[0]["lora, gender"]] == list(found) and compared[1] == [told]
    classes = [run_folder(tmp_path / f"class-{n}", "downstream", 1, method=m, final=[measure("tpr-gap/class/nurse", 2.0)]) for n, m in (("plain", None), ("lora", "lora"))]
    assert [d.name for d in results.differences(runs.source_of_runs([plain, lora, *classes]), "downstream", "")[0]["lora, gender"]] == list(found)  # no figure that is compared
    assert results.differences(runs.source_of_runs(classes), "downstream", "")[0] == {}
    (lora / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others[:-1]))
    text, data = written(tmp_path, plain, lora)  # other examples: a note, no difference
    assert data["sources"][0]["differences"] == [] and "expected the 30 examples of counterfactual" in text


def test_every_examples_file_is_compared_and_read_once(tmp_path, monkeypatch):
    """The baseline's for all systems of its seed; another seed's in its place, for no more than two files are held."""
    rows = [flip_row(text=f"he {i}", counterfactual=f"she {i}", after="nurse" if i % 3 else "guard", source=i) for i in range(9)]

    def run(name, method, seed=0):
        return run_folder(tmp_path / name, "downstream", seed, method=method, final=task_measures(random.Random(seed)), examples={"": rows})

    folders, opened = [run("plain-0", None), run("a", "lora"), run("b", "bias"), run("plain-1", None, 1), run("c", "sparse", 1)], []
    lines, compare = comparison.Lines, results.compare_examples
    monkeypatch.setattr(comparison, "Lines", lambda path: opened.append(Path(path).parent.name) or lines(path))
    monkeypatch.setattr(results, "compare_examples", lambda *a, **more: opened.append("compared") or compare(*a, **more))
    text, data = written(tmp_path, *folders)
    assert opened == ["plain-0", "compared", "a", "compared", "b", "plain-1", "compared", "c"]
    told = [d for d in data["sources"][0]["differences"] if d["name"] == "counterfactual/flips"]
    systems = [f"{method}, gender" for method in ("lora", "bias", "sparse")]
    assert [(d["system"], d["difference"]) for d in told] == [(system, 0.0) for system in systems]
    assert [c for c in Elements(text).all("caption") if "difference" in c] == [f"{system}: difference from plain fine-tuning" for system in systems]


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
    other = run("other-0", 0, "lora", 4.0, 3.0, lr=1e-3, model="/m/other")  # the same figures by chance
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
    assert "not compared with plain fine-tuning: no seed with a figure that both have" in text


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
    assert "2 of 3 seeds" in text and "3 of 3 seeds" not in text and "Seeds of each system: 3." in text and {d["name"]: d["n"] for d in data["sources"][0]["differences"]} == {"accuracy": 3, "f1": 2}
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
    assert checkpoint._origins_of(run) == {}


def test_trainings_that_follow_each_other_are_told_apart(tmp_path):
    folder = run_folder(tmp_path / "two", "upstream")
    events = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(events[:-1] + events) + "\n")
    run = reading.read_run(folder)
    assert [[step for step, _ in s.steps] for s in run.stretches] == [[10, 20, 30, 40]] * 2 and [s.kept for s in run.stretches] == [40, 40]
    text, _ = written(tmp_path, folder)
    rows = Elements(text).all("th")
    assert [r for r in rows if r in ("0", "20", "40", "60", "80")] == ["0", "20", "40", "60", "80"]  # end to end in the table of validations
    assert dict(training._table("t", [run]).rows)["40"] == "2.9000"  # where the first ends, not where the second begins


def test_bases_measured_on_other_numbers_of_texts_are_two(tmp_path):
    runs = [run_folder(tmp_path / name, "upstream", evaluations={"": [measure("mlm-loss", 2.0)], "-base": [measure("mlm-loss", 3.0, n=n)]}) for name, n in (("a", 500), ("b", 400))]
    _, data = written(tmp_path, *runs)
    assert {"base (a)", "base (b)"} < {r["system"] for r in data["sources"][0]["results"]}


def test_what_the_small_print_is_and_figures_of_other_test_sets_are_told(tmp_path):
    folders = [run_folder(tmp_path / f"{name}-{seed}", "downstream", seed, method=method, final=[measure("accuracy", 50.0 + seed), measure("f1", 40.0 + seed, n=500 + bool(method) * seed)])
               for name, method in (("p", None), ("l", "lora")) for seed in (0, 1, 2)]
    source = runs.source_of_runs(folders)
    found, notes = results.differences(source, "downstream", "")
    assert [(d.name, d.n) for d in found["lora, gender"]] == [("accuracy", 3)]
    assert notes == ["lora, gender: f1: not compared with plain fine-tuning under every seed: another number of examples, unit or ideal on either side"]
    of = results.lines(source.of("downstream", "")["plain fine-tuning"])
    one_seed = runs.source_of_runs(task_runs(tmp_path / "more", [0]))
    names = [row[0] for s in tables.tables(one_seed, results.compared(one_seed)) for row in s.blocks[0].rows]
    assert names == ["accuracy, %", "f1/macro, %", "tpr-gap/rms, points", "tpr-gap/rms-shuffled, points"]  # classes have a section of their own
    seeds, one = tables._how({"p": of}, {"p": 3}), dataclasses.replace(of["f1"], sd=None, interval="examples")
    assert seeds == "± is the standard deviation over seeds; below it the 95 % interval of the mean over seeds (Student's t). Seeds of each system: 3."
    assert "Without ±: one seed, or all alike" in tables._how({"p": of | {"f1": one}}, {"p": 3}) and "Below each figure its 95 % bootstrap interval" in tables._how({"p": {"f1": one}}, {"p": 1})
    assert training._kept(reading.read_run(folders[0]), "accuracy") == [(40, 45.0)]
    assert [training._table("t", [reading.read_run(f)]).rows[-1] for f in (folders[0], run_folder(tmp_path / "u", "upstream"))] == [("40", "45.00"), ("40", "2.9000")]


def test_an_interval_with_one_end_is_none(tmp_path):
    run = run_folder(tmp_path / "a", "upstream", evaluations={"": [measure("perplexity", 3.0) | {"high": None}]})
    found = of(written(tmp_path, run)[1], "lora, gender", "perplexity", "upstream")
    assert (found["mean"], found["low"], found["high"], found["interval"]) == (3.0, None, None, None)


def test_what_only_says_where_and_how_fast_makes_no_other_system(tmp_path):
    rng = random.Random(0)
    folders = [run_folder(tmp_path / f"r-{seed}", "downstream", seed, final=task_measures(rng), config=config) for seed, config in
               enumerate(({"workers": 2, "cache": "a"}, {"fold": False, "device": "cuda"}, {"force": True}))]
    _, data = written(tmp_path, *folders)
    assert [(r["system"], r["seeds"]) for r in data["sources"][0]["results"]] == [("lora, gender", [0, 1, 2])]


def test_an_evaluation_of_a_run_is_its_last_word(tmp_path):
    """Downstream one called `base` is of other data like any other; the time is that of the training."""
    run = run_folder(tmp_path / "a", "downstream", final=[measure("accuracy", 70.0), measure("f1", 50.0)],
                     evaluations={"": [measure("accuracy", 80.0)], "-base": [measure("accuracy", 90.0)]})
    _, data = written(tmp_path, run)
    assert [(r["task"], {m["name"]: m["mean"] for m in r["measures"]}) for r in data["sources"][0]["results"]] == [("", {"accuracy": 80.0, "f1": 50.0}), ("base", {"accuracy": 90.0})]
    assert [(a.task, a.seconds) for a in runs.source_of_runs([run]).answered] == [("", 75.0), ("base", 75.0)]


def test_bases_that_differ_by_a_hundredth_are_two(tmp_path):
    folders = [run_folder(tmp_path / name, "upstream", evaluations={"-base": [measure("mlm-loss", value)]}) for name, value in (("a", 3.0), ("b", 3.03), ("c", 3.001))]
    _, data = written(tmp_path, *folders)
    assert sorted(r["system"] for r in data["sources"][0]["results"] if r["system"].startswith("base")) == ["base (a)", "base (b)"]


def test_the_model_is_what_a_trained_base_began_from(tmp_path):
    full = run_folder(tmp_path / "full", "upstream", method="full", config={"model": "/models/small"})
    down = run_folder(tmp_path / "down", "downstream", method=None, final=task_measures(random.Random(0)), config={"model": str(full)})
    assert written(tmp_path, down)[1]["sources"][0]["about"]["model"] == "small"


def test_the_baseline_is_plain_fine_tuning_in_whatever_order_the_runs_are_given(tmp_path):
    source = runs.source_of_runs(task_runs(tmp_path, [0])[::-1])
    assert source.baselines == {"downstream": "plain fine-tuning"} and source.systems == ["plain fine-tuning", "lora, gender"]
