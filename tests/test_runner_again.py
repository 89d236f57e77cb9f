"""A recipe that was stopped, taken up again, or finds other files, settings or results than it left."""

import dataclasses
import json
import os
import re
import shutil
import tomllib
import types

import pytest
import torch

from peftdebias import recipe_table, runner
from peftdebias.config import Run
from peftdebias.errors import ConfigError, PeftDebiasError
from peftdebias.metrics.compare import over_seeds, seed_difference

from .outside import one_thread  # noqa: F401
from .small import cli, done, tree


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
