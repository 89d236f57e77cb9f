"""The testbed end to end on a small scale: its units are the public commands on the world's files, its figures those of the metrics, nothing is computed twice,
a stopped run goes on, and a model whose bias is known measures as what it is."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from peftdebias import planted
from peftdebias.checkpoint import load_run
from peftdebias.demo import world_tokenizer
from peftdebias.methods import METHODS
from peftdebias.metrics import Measure
from peftdebias.metrics.compare import over_seeds, seed_difference
from peftdebias.planted import summary, units
from peftdebias.planted.units import NONE, Plan, Sizes, Unit
from peftdebias.testbed import GENDERED, World, write

from .small import cli, done, save_bert, tree
from .test_stream import gone

GIVEN = ("--scale", 0.01, "--seeds", 0, 1, "--text-strengths", 0.4, 0.8, "--label-strengths", 0, 1, "--method-strengths", 1, "--methods", "lora", "full")
SIZES = Sizes.scaled(0.01)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what was said, calls of pretrain, upstream and downstream with what each got)."""
    out, calls = tmp_path_factory.mktemp("testbed") / "runs" / "testbed", []
    out.mkdir(parents=True)
    (out / ".testbed.json.partial-0a1b2c").touch()  # of one that was killed before anything else
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((units, "pretrain"), (units.phases, "upstream"), (units.phases, "downstream")):
            def counted(*args, kept=getattr(owner, name), name=name):
                calls.append((name, args))
                return kept(*args)
            patch.setattr(owner, name, counted)
        said = done("testbed", *GIVEN, "--out", out)
    return out, said, calls


def test_every_method_has_a_learning_rate_in_this_world():
    assert set(METHODS) <= set(units.RATES)


def test_a_method_of_ones_own_has_none_and_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "lora2", "LoRA2")
    monkeypatch.setattr(planted.methods, "method_class", lambda name: METHODS[name])
    said = cli("testbed", "--methods", "lora2", "--out", tmp_path / "t")
    assert said.code == 2 and said.err.splitlines()[-1].startswith("peftdebias: --methods lora2: expected a method with a learning rate in this world, some of adapter, prefix,")
    assert not (tmp_path / "t").exists()
    assert {unit.method for unit in planted.units_of(planted.Testbed(out="t"))} == {NONE, *METHODS.keys() - {"lora2"}}


def found_in(out):
    return json.loads((out / "testbed.json").read_text())


def timeless(found: dict):
    """Without what differs from run to run: times, and what lies around the figures."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if k not in ("seconds", "cpu_seconds", "versions", "settings")}
    return [timeless(v) for v in found] if isinstance(found, list) else found


def tables(said) -> list[str]:
    """What was printed, less the line on seconds and commit."""
    return [line for line in said.out.splitlines() if " units in " not in line]


# ---------------------------------------------------------------- end to end

def test_the_folder_holds_every_unit_once(ran):
    out, said, calls = ran
    wanted = [("text", 0.4, NONE), *(("text", 0.8, m) for m in (NONE, "lora", "full")), ("labels", 0.0, NONE), *(("labels", 1.0, m) for m in (NONE, "lora", "full"))]
    found = found_in(out)
    assert [(r["place"], r["strength"], r["method"]) for r in found["rows"]] == wanted and found["units"] == 2 * len(wanted)
    assert all(r["seeds"] == [0, 1] for r in found["rows"])
    assert collections.Counter(name for name, _ in calls) == {"pretrain": 4, "upstream": 4, "downstream": 8}  # a base is pretrained once and shared
    assert found["settings"]["scale"] == 0.01 and found["versions"]["torch"] and found["cpu_seconds"] > 0
    assert said.out == (out / "table.md").read_text() + f"\nresult: {out}\n" and len(tables(said)) == len(said.out.splitlines()) - 1
    assert [line.split(":")[0] for line in said.err.splitlines()[1:17]] == [f"{i} of 16" for i in range(1, 17)]
    assert not [p for p in out.rglob("*partial*")] and not list(out.glob("units/labels-*/*/*/run"))  # classifiers are measured and not kept


def test_rows_are_the_units_and_their_spread(ran):
    out, _, _ = ran
    for row in found_in(out)["rows"]:
        for name, figure in row["figures"].items():
            values, plain = ([json.loads((Unit(row["place"], row["strength"], seed, method).folder(out) / "unit.json").read_text())["figures"][name]["value"] for seed in (0, 1)]
                             for method in (row["method"], NONE))
            spread = over_seeds(values)
            assert figure["values"] == values and (figure["mean"], figure["sd"], figure["low"], figure["high"]) == (spread.mean, spread.sd, spread.low, spread.high)
            if row["method"] == NONE:
                assert "change" not in figure
            else:
                change = seed_difference(plain, values)
                assert (figure["change"]["low"], figure["change"]["high"], figure["change"]["p"]) == (change.low, change.high, change.p)


def test_the_masked_lm_figures_are_those_of_evaluate(ran, tmp_path):
    """By hand: the same world's files, the kept base and module, `peftdebias evaluate`."""
    out, _, _ = ran
    unit = Unit("text", 0.8, 1, "lora")
    base = Unit("text", 0.8, 1).folder(out)
    files = write(World(text_link=0.8, seed=1), tmp_path / "world", corpus=SIZES.corpus, heldout=SIZES.heldout, pairs=SIZES.pairs, train=10, dev=10, test=10)
    assert (base / "corpus.txt").read_bytes() == files["corpus"].read_bytes()
    done("evaluate", base / "model", "--adapter", unit.folder(out) / "run", "--on", f"crows-pairs={files['pairs']}", "--on", f"perplexity={files['heldout']}",
         "--max-length", units.LONGEST, "--seed", 1, "--json", tmp_path / "m.json", "--examples", tmp_path / "e.jsonl")
    measured = {m["name"]: m["value"] for m in json.loads((tmp_path / "m.json").read_text())["measures"]}
    figures = {name: f["value"] for name, f in json.loads((unit.folder(out) / "unit.json").read_text())["figures"].items()}
    assert {name: figures[name] for name in ("mlm-loss", "perplexity")} == {name: measured[name] for name in ("mlm-loss", "perplexity")}
    assert figures["crows-pairs/bias-bench/all"] == measured["crows-pairs/bias-bench/all"]
    assert figures["stereotype-preference"] == abs(measured["crows-pairs/bias-bench/all"] / 100 - 0.5)
    rows = [row for row in map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines()) if row["measure"] == "crows-pairs/bias-bench"]
    assert figures["stereotype-log-odds"] == pytest.approx(np.mean([row["more"] - row["less"] for row in rows]), abs=1e-12)


def test_the_classifier_figures_are_those_of_downstream_and_predict(ran, tmp_path):
    out, _, _ = ran
    unit, module, files = Unit("labels", 1.0, 1, "lora"), Unit("text", 0.8, 1, "lora").folder(out) / "run", Unit("labels", 1.0, 1).folder(out)
    base = Unit("text", 0.8, 1).folder(out) / "model"
    done("downstream", "--model", base, "--adapter", module, *(w for name in ("train", "dev", "test") for w in (f"--{name}", files / f"{name}.jsonl")), "--text", "hard_text",
         "--label", "profession", "--group", "gender", "--epochs", SIZES.epochs, "--lr", units.RATES["downstream"], "--batch-size", SIZES.task_batch,
         "--max-length", units.LONGEST, "--seed", 1, "--out", tmp_path / "run")
    (final,) = (e for e in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if e["event"] == "final")
    measured = {m["name"]: m for m in final["measures"]}
    figures = json.loads((unit.folder(out) / "unit.json").read_text())["figures"]
    assert {name: figures[name] for name in units.KEPT} == {name: measured[name] for name in units.KEPT}
    pairs = World(seed=1).counterfactual_task_pairs(SIZES.pairs)
    (tmp_path / "pairs.txt").write_text("".join(f"{p.hard_text}\n{p.counterfactual}\n" for p in pairs))
    labels = [row["label"] for row in done("predict", tmp_path / "run", tmp_path / "pairs.txt").rows]
    assert figures["causal/changed"]["value"] == 100 * np.mean([a != b for a, b in zip(labels[::2], labels[1::2])]) and figures["causal/changed"]["n"] == SIZES.pairs


def test_test_texts_carry_no_link_and_what_is_learnt_does(ran):
    out, _, _ = ran
    towards = dict(World().occupations)

    def share(strength, name):
        rows = [json.loads(line) for line in (Unit("labels", strength, 0).folder(out) / f"{name}.jsonl").read_text().splitlines()]
        return np.mean([row["gender"] == towards[row["profession"]] for row in rows])

    assert share(1.0, "train") == share(1.0, "dev") == 1 and 0.4 < share(0.0, "train") < 0.6
    assert (Unit("labels", 0.0, 0).folder(out) / "test.jsonl").read_bytes() == (Unit("labels", 1.0, 0).folder(out) / "test.jsonl").read_bytes()
    assert 0.4 < share(1.0, "test") < 0.6


def test_the_pretraining_text_carries_the_link_of_its_unit(ran):
    out, _, _ = ran
    for strength in (0.4, 0.8):
        assert (Unit("text", strength, 1).folder(out) / "corpus.txt").read_text().splitlines() == World(text_link=strength, seed=1).pretraining_texts(SIZES.corpus)


def test_every_unit_is_made_with_its_own_seed_and_the_settings_that_are_said(ran):
    _, _, calls = ran
    given = {name: [args for called, args in calls if called == name] for name in ("pretrain", "upstream", "downstream")}
    bases = [(folder.parts[-4:-2], seed, tiny) for _, _, folder, seed, tiny in given["pretrain"]]
    tiny = units.Tiny(units.HIDDEN, SIZES.pretraining, units.RATES["pretraining"], units.SPREAD)
    assert sorted(bases) == [((f"text-{strength}", f"seed-{seed}"), seed, tiny) for strength in (0.4, 0.8) for seed in (0, 1)]
    learnt = [(Path(c.out).parts[-4:-1], c.seed, c.method, c.steps, c.lr, c.batch_size, c.max_length, c.attribute_weight, c.budget) for (c,) in given["upstream"]]
    assert sorted(learnt) == sorted((("text-0.8", f"seed-{seed}", method), seed, method, SIZES.upstream, units.RATES[method], SIZES.batch, units.LONGEST, 10.0, budget)
                                    for seed in (0, 1) for method, budget in (("lora", units.BUDGET), ("full", None)))
    assert all((Path(c.corpus[0]).parent, Path(c.model).parent) == 2 * (Path(c.out).parents[1] / NONE,) for (c,) in given["upstream"])
    for (c,) in given["downstream"]:
        (place, seed, method), base = Path(c.out).parts[-4:-1], Unit("text", 0.8, c.seed).folder(Path(c.out).parents[4])
        made, files = base.parent / method / "run", Path(c.out).parents[1] / NONE
        assert place.startswith("labels-") and seed == f"seed-{c.seed}" and [Path(path).parent for path in (c.train, c.dev, c.test)] == 3 * [files]
        assert (c.model, c.adapter) == ((str(made), ()) if method == "full" else (str(base / "model"), () if method == NONE else (str(made),)))


# ---------------------------------------------------------------- going on

def test_a_second_run_computes_nothing_and_a_lost_unit_comes_back_bit_for_bit(ran, monkeypatch):
    out, said, _ = ran
    before, computed = found_in(out), []
    kept = Plan.run
    monkeypatch.setattr(Plan, "run", lambda plan, unit: computed.append(unit) or kept(plan, unit))
    again = done("testbed", *GIVEN, "--out", out)
    assert computed == [] and tables(again) == tables(said) and f"{out}: 16 of 16 units are there" in again.err and timeless(found_in(out)) == timeless(before)
    lost = Unit("text", 0.8, 0, "lora")
    (lost.folder(out) / "unit.json").unlink()
    done("testbed", *GIVEN, "--out", out)
    assert computed == [lost] and timeless(found_in(out)) == timeless(before)


def test_a_stopped_run_keeps_what_was_done(tmp_path, monkeypatch):
    given = ("testbed", "--scale", 0.01, "--seeds", 0, "--text-strengths", 0.8, "--label-strengths", 0.5, "--methods", "bias", "--out", tmp_path / "t")
    kept, computed = Plan.run, []

    def run(plan, unit):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(unit)
        return kept(plan, unit)

    monkeypatch.setattr(Plan, "run", run)
    said = cli(*given)
    assert said.code == 130 and len(computed) == 2 and found_in(tmp_path / "t")["rows"] is None
    monkeypatch.setattr(Plan, "run", lambda plan, unit: computed.append(unit) or kept(plan, unit))
    done(*given)
    assert [str(unit) for unit in computed] == ["text 0.8, seed 0, none", "text 0.8, seed 0, bias", "labels 0.5, seed 0, none", "labels 0.5, seed 0, bias"]
    row = found_in(tmp_path / "t")["rows"][-1]
    assert all(figure["sd"] is None and "change" not in figure for figure in row["figures"].values())  # one seed has no spread


def test_what_another_process_made_while_this_one_waited_is_not_made_again(ran, tmp_path, monkeypatch):
    shutil.copytree(ran[0], tmp_path / "t")
    unit = Unit("text", 0.8, 0, "lora")
    made = unit.folder(tmp_path / "t") / "unit.json"
    made.rename(tmp_path / "unit.json")

    @contextlib.contextmanager
    def waited(path, name):
        (tmp_path / "unit.json").rename(made)
        yield

    monkeypatch.setattr(planted, "alone", waited)
    monkeypatch.setattr(Plan, "run", lambda plan, unit: pytest.fail(f"{unit} is made again"))
    assert "16 of 16 units are there" in done("testbed", *GIVEN, "--out", tmp_path / "t").err


def test_strengths_that_six_digits_do_not_tell_apart_have_two_folders():
    folders = [Unit("text", strength, 0).folder(Path("t")).parts[2] for strength in (0.1234567, 0.1234568, 0.8, 1, 0.3)]
    assert folders == ["text-0.1234567", "text-0.1234568", "text-0.8", "text-1", "text-0.3"]


def test_a_call_that_computes_nothing_keeps_what_it_was_computed_by(ran, tmp_path, monkeypatch):
    shutil.copytree(ran[0], tmp_path / "t")
    before = found_in(tmp_path / "t")["versions"]
    monkeypatch.setattr(planted.checkpoint, "versions", lambda: {"torch": "another"})
    done("testbed", *GIVEN, "--out", tmp_path / "t")
    assert found_in(tmp_path / "t")["versions"] == before


def test_units_of_several_programs_are_told(ran, tmp_path, monkeypatch):
    """One of an earlier version does not say what made it: then the table of before does."""
    shutil.copytree(ran[0], tmp_path / "t")
    for method, change in (("none", {"versions": {"device": "d", "torch": "another", "commit": None}}), ("lora", {})):
        path = Unit("text", 0.8, 0, method).folder(tmp_path / "t") / "unit.json"
        unit = json.loads(path.read_text())
        del unit["versions"]
        path.write_text(json.dumps(unit | change))
    before = found_in(tmp_path / "t")["versions"]
    said = done("testbed", *GIVEN, "--out", tmp_path / "t")
    found = found_in(tmp_path / "t")["versions"]
    assert sorted(found["torch"].split(", ")) == sorted([before["torch"], "another"]) and found["python"] == before["python"] and f"torch {found['torch']}, commit" in said.out


def test_no_unit_before_what_it_needs():
    from peftdebias.config import Testbed

    plan = Plan(out=None, start=0.8, sizes=SIZES)
    found = planted.units_of(Testbed())
    assert len(set(found)) == len(found) == 5 * (2 + 6) * 9
    for i, unit in enumerate(found):
        assert set(plan.needs(unit)) <= set(found[:i])
    assert plan.needs(Unit("labels", 0.2, 1, "lora")) == [Unit("labels", 0.2, 1), Unit("text", 0.8, 1, "lora")]


def test_a_weight_changes_what_was_learnt_and_not_the_base():
    one, other = (Plan(out=None, start=0.8, sizes=SIZES, attribute_weight=weight) for weight in (1.0, 10.0))
    assert [one.made_of(Unit("text", 0.8, 0, m)) == other.made_of(Unit("text", 0.8, 0, m)) for m in ("none", "lora")] == [True, False]


def test_a_unit_is_made_of_all_that_its_figures_follow_from_and_of_no_more():
    """Another number of texts or steps, another weight or base: the units that it changes are made again."""
    made = [Unit("text", 0.8, 0), Unit("text", 0.8, 0, "lora"), Unit("labels", 0.8, 0), Unit("labels", 0.8, 0, "lora")]
    plan = Plan(out=None, start=0.8, sizes=SIZES)

    def changed(**changes):
        other = dataclasses.replace(plan, **changes)
        return [plan.made_of(unit) != other.made_of(unit) for unit in made]

    every, learnt, labels = [True] * 4, [False, True, False, True], [False, False, True, True]
    expected = dict.fromkeys(("corpus", "heldout", "pairs", "pretraining"), every) | dict.fromkeys(("upstream", "batch"), learnt)
    expected |= dict.fromkeys(("train", "dev", "test", "epochs", "task_batch"), labels)
    assert expected.keys() == {field.name for field in dataclasses.fields(Sizes)}
    assert {name: changed(sizes=dataclasses.replace(SIZES, **{name: 7777})) for name in expected} == expected
    assert changed(attribute_weight=3.0) == learnt and changed(start=0.4) == labels


def test_a_unit_takes_one_thread_and_its_own_time(tmp_path, monkeypatch):
    threads, walls, cpus = [], iter([10.0, 14.0]), iter([1.0, 4.0])
    monkeypatch.setitem(units.COMPUTE, "text", lambda plan, unit, folder: (threads.append(torch.get_num_threads()), ([], 3))[1])
    monkeypatch.setattr(units, "time", types.SimpleNamespace(perf_counter=lambda: next(walls), process_time=lambda: next(cpus)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = Plan(tmp_path, 0.8, SIZES).run(Unit("text", 0.8, 0))
        threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2] and (found["seconds"], found["cpu_seconds"], found["parameters"]) == (4, 3, 3)


def test_weight_and_steps_of_the_command_reach_every_unit(tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(Plan, "run", lambda plan, unit: plans.append(plan) or pytest.fail("stopped here"))
    for words in (("--attribute-weight", 3, "--upstream-steps", 5), ()):
        with pytest.raises(pytest.fail.Exception):
            cli("testbed", "--text-strengths", 0.4, 0.6, "--label-strengths", 0.5, "--scale", 0.01, *words, "--out", tmp_path / str(len(words)))
    assert [(plan.attribute_weight, plan.sizes.upstream, plan.start) for plan in plans] == [(3.0, 5, 0.6), (10.0, SIZES.upstream, 0.6)]


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_figures(ran, tmp_path):
    out, said, _ = ran
    done("testbed", *GIVEN, "--jobs", 3, "--out", tmp_path / "t")
    assert timeless(found_in(tmp_path / "t")) == timeless(found_in(out))


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_costs_no_other_unit(tmp_path):
    """The bases are left alone; once a method runs, its process is killed as the system does when memory ends."""
    command = [sys.executable, "-m", "peftdebias", "testbed", *map(str, GIVEN), "--jobs", "2", "--out", str(tmp_path / "t")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line.strip())
            if re.match("1 of 16: ", line):
                for child in children(process.pid):
                    with contextlib.suppress(ProcessLookupError):  # the pool ends the others when it misses one
                        os.kill(child, signal.SIGKILL)
        assert process.wait() == 2
    (told,) = (line for line in said if line.startswith("peftdebias: "))  # python's own warning on what the dead left behind may follow
    assert re.fullmatch(r"peftdebias: --jobs 2: a process was killed \(out of memory\?\) while .*, seed \d, \w+ ran; the same command goes on from there", told)
    left = [json.loads(path.read_text()) for path in (tmp_path / "t").rglob("unit.json")]
    assert left and all(found["figures"] for found in left)


ENDLESS = """
import os, time
from peftdebias import planted

class Endless:
    def needs(self, unit):
        return ()
    def run(self, unit):
        os.write(1, b"%d\\n" % os.getpid())  # at once: two write to one pipe
        time.sleep(60)

if __name__ == "__main__":
    planted.run_all(Endless(), [1, 2], 2, print)
"""


def test_processes_side_by_side_end_with_the_one_that_started_them(tmp_path):
    """However that ends: killed, it can tell them nothing."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    with subprocess.Popen([sys.executable, "endless.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        of = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
        assert all(map(gone, of))


def children(pid: int) -> list[int]:
    """Its processes that compute, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (path / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid) and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


# ---------------------------------------------------------------- bad input

ERRORS = {
    "strength": (["--text-strengths", 0.5, 1.5], "--text-strengths: expected strengths from 0 to 1, each once, got 0.5 1.5"),
    "no number": (["--label-strengths", "high"], "--label-strengths: expected strengths from 0 to 1, each once, got high"),
    "not a number": (["--label-strengths", "nan"], "--label-strengths: expected strengths from 0 to 1, each once, got nan"),
    "twice": (["--seeds", 1, 1], "--seeds: expected whole numbers from 0, each once, got 1 1"),
    "half a seed": (["--seeds", 0.5], "--seeds: expected whole numbers from 0, each once, got 0.5"),
    "not among them": (["--method-strengths", 0.3], "--method-strengths: expected some of --text-strengths and --label-strengths, got 0.3"),
    "scale": (["--scale", 0], "--scale: expected more than 0, up to 100, got 0.0"),
    "steps": (["--upstream-steps", 0], "--upstream-steps: expected at least 1, got 0"),
    "weight": (["--attribute-weight", 0], "--attribute-weight: expected a number from 1 to 1000, got 0.0"),
    "jobs": (["--jobs", 0], "--jobs: expected at least 1, got 0"),
    "method": (["--methods", "lorra"], "method: expected one of .*, got 'lorra'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_gets_one_line_and_leaves_nothing(case, tmp_path):
    words, message = ERRORS[case]
    said = cli("testbed", *words, "--out", tmp_path / "t")
    told = [line for line in said.err.splitlines() if not line.startswith("testbed: ")]
    assert (said.code, said.out) == (2, "") and len(told) == 1 and re.fullmatch(f"peftdebias: {message}", told[0]) and tree(tmp_path) == {}


def test_a_folder_of_something_else_or_of_other_settings_stays_as_it_is(ran, tmp_path):
    out, _, _ = ran
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("mine")
    before = tree(out)
    said = cli("testbed", "--out", tmp_path / "else")
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: --out {tmp_path}/else: exists and is no earlier testbed; expected a new folder"
    said = cli("testbed", *GIVEN, "--scale", 0.02, "--out", out)
    assert said.code == 2 and re.search(r"holds units of other settings; expected sizes {.*}, got {.*} in .*unit.json", said.err)
    said = cli("testbed", *GIVEN, "--upstream-steps", 4, "--out", out)  # the bases are right, what was learnt on them is not
    assert said.code == 2 and re.search(rf": --out {re.escape(str(out))}: holds units of other settings; expected sizes .* in .*text-0.8/seed-0/lora", said.err)
    said = cli("testbed", *GIVEN, "--text-strengths", 0.8, 0.4, "--out", out)  # other bases for the tasks
    assert said.code == 2 and re.search(r"holds units of other settings; expected start .*, got .* in .*labels-", said.err)
    assert tree(out) == before


def test_a_broken_unit_is_named(ran):
    out, _, _ = ran
    path = Unit("text", 0.4, 1).folder(out) / "unit.json"
    kept = path.read_text()
    found = json.loads(kept)
    name, figure = next(iter(found["figures"].items()))
    broken = f"peftdebias: {path}: expected the figures of a unit, got something else; delete it and it is made again"
    none = rf"peftdebias: .*{re.escape(name)}.*: expected a number for each seed, got .*"  # undefined: it would be made again as it is
    damaged = [found | {"made_of": None}, found | {"figures": {name: figure | {"value": "3"}}}, found | {"figures": {name: {"value": 3}}}]
    undefined = found | {"figures": found["figures"] | {name: figure | {"value": None}}}
    for text, words in [(kept[:40], re.escape(broken)), *((json.dumps(one), re.escape(broken)) for one in damaged), (json.dumps(undefined), none)]:
        try:
            path.write_text(text)
            said = cli("testbed", *GIVEN, "--out", out)
        finally:
            path.write_text(kept)
        assert said.code == 2 and re.fullmatch(words, said.err.splitlines()[-1]), said.err


# ---------------------------------------------------------------- the truth

@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """(a masked-LM that cannot tell a word from its counterpart, its folder's tokenizer): the rows of he and she, of his, him and her, ... are one."""
    folder = tmp_path_factory.mktemp("blind")
    tokenizer = world_tokenizer(World())
    run = load_run(save_bert(folder / "base", tokenizer))
    (folder / "heldout.txt").write_text("".join(text + "\n" for text in World().balanced_texts(20)))
    ids = {word: int(tokenizer.encode([word])[0].ids[1]) for word in (*GENDERED, *GENDERED.values())}
    with torch.no_grad():
        for same in (("he", "she"), ("his", "him", "her"), ("himself", "herself"), ("man", "woman")):
            rows = [ids[word] for word in same]
            run.model.encoder.embeddings.word.weight[rows] = run.model.encoder.embeddings.word.weight[rows[0]].clone()
            run.model.mlm.bias[rows] = run.model.mlm.bias[rows[0]].clone()
    return run, ids, folder / "heldout.txt"


def figures_of(run, heldout):
    return {m.name: m for m in units.masked_lm_measures(run, World(), heldout, 60, 0)}


def test_a_masked_lm_that_cannot_tell_genders_has_log_odds_zero(blind):
    run, _, heldout = blind
    found = figures_of(run, heldout)["stereotype-log-odds"]
    assert (found.value, found.low, found.high, found.n) == (0, 0, 0, 60)


def test_a_masked_lm_that_prefers_men_everywhere_has_no_stereotype_beyond_the_mix_of_occupations(blind):
    """Adding 1 nat to every masculine word: each pair differs by exactly 1, for or against the stereotype as the occupation has it."""
    run, ids, heldout = blind
    with torch.no_grad():
        kept = run.model.mlm.bias.clone()
        run.model.mlm.bias[[ids[word] for word in ("he", "his", "him", "himself", "man")]] += 1
        found = figures_of(run, heldout)
        run.model.mlm.bias.copy_(kept)
    towards_m = np.mean([dict(World().occupations)[p.profession] == "m" for p in World().stereotype_pairs(60)])
    assert found["crows-pairs/bias-bench/all"].value == pytest.approx(100 * towards_m)
    preference = found["stereotype-preference"]
    assert preference.value == pytest.approx(abs(towards_m - 0.5)) and preference.low <= preference.value <= preference.high <= 0.5
    assert found["stereotype-log-odds"].value == pytest.approx(2 * towards_m - 1, abs=2e-3)  # scores are rounded to 3 decimals


def test_an_interval_of_the_preference_is_folded_at_its_ideal(blind, monkeypatch):
    """Where it holds the ideal it reaches it; else its nearer end is the lower one."""
    run, _, heldout = blind
    for (value, low, high), expected in (((48.0, 40.0, 55.0), (0.02, 0.0, 0.1)), ((40.0, 30.0, 45.0), (0.1, 0.05, 0.2)), ((60.0, 52.0, 70.0), (0.1, 0.02, 0.2))):
        monkeypatch.setattr(units.crows_pairs, "measures", lambda *a, **more: [Measure("crows-pairs/bias-bench/all", value, "%", 50.0, low, high, 60)])
        found = figures_of(run, heldout)["stereotype-preference"]
        assert (found.value, found.low, found.high) == pytest.approx(expected)


# ---------------------------------------------------------------- what units say together

def result(figures: dict, parameters=7):
    about = {"unit": "1", "ideal": 0.0}
    return {"figures": {name: about | {"value": value} for name, value in figures.items()}, "parameters": parameters, "seconds": 2.0, "cpu_seconds": 1.0}


@pytest.mark.parametrize("preference, perplexity, removed, reached", [
    ([0.2, 0.2], [2.1, 2.1], 0.5, True), ([0.2, 0.21], [2.0, 2.0], 0.4875, False), ([0.0, 0.0], [2.2, 2.2], 1.0, False), ([0.5, 0.5], [1.9, 1.9], -0.25, False)])
def test_the_bar(preference, perplexity, removed, reached):
    made = [Unit("text", 0.8, seed, method) for seed in (3, 4) for method in (NONE, "lora")]
    results = {u: result({"stereotype-preference": 0.4, "perplexity": 2.0} if u.method == NONE
                         else {"stereotype-preference": preference[u.seed - 3], "perplexity": perplexity[u.seed - 3]}) for u in made}
    base, lora = summary.rows(made, results)
    assert "removed" not in base and base["seeds"] == lora["seeds"] == [3, 4] and lora["cpu_seconds"] == 2
    assert lora["removed"] == pytest.approx(removed) and lora["dearer"] == pytest.approx(np.mean(perplexity) / 2) and lora["reached"] is reached


def test_a_base_without_preference_has_nothing_to_remove():
    made = [Unit("text", 0.0, 0, method) for method in (NONE, "lora")]
    _, lora = summary.rows(made, {u: result({"stereotype-preference": 0.0, "perplexity": 2.0}) for u in made})
    assert lora["removed"] is None and lora["reached"] is False


def test_whether_the_gap_grows():
    made = [Unit("labels", s, seed) for seed in (0, 1) for s in (0.5, 0.0, 1.0)]  # in any order
    gaps = {0: {0.0: 1.0, 0.5: 3.0, 1.0: 2.0}, 1: {0.0: 1.0, 0.5: 2.0, 1.0: 9.0}}
    found = summary.monotone(summary.rows(made, {u: result({"tpr-gap/rms": gaps[u.seed][u.strength]}) for u in made}))
    assert found == {"strengths": [0.0, 0.5, 1.0], "means": [1.0, 2.5, 5.5], "spearman": 1.0, "spearman_of_each_seed": [0.5, 1.0]}
    assert summary.monotone([]) is None
    flat = summary.monotone(summary.rows(made, {u: result({"tpr-gap/rms": 1.0}) for u in made}))
    assert flat["spearman"] is None and json.dumps(flat, allow_nan=False)


def test_the_table_says_what_the_rows_say():
    """Every cell of each kind of row, who reaches the bar, the correlations, the seconds."""
    made = [Unit(place, 0.8, seed, method) for place in ("text", "labels") for method in (NONE, "lora", "bias") for seed in (0, 1)]
    text = {NONE: (0.4, 1.0, 2.0), "lora": (0.1, 0.25, 2.05), "bias": (0.3, 0.75, 2.25)}
    labels = {NONE: (70.0, 20.0, 5.0, 40.0, 30.0), "lora": (71.0, 10.0, 6.0, 41.0, 31.0), "bias": (72.0, 30.0, 7.0, 42.0, 32.0)}
    names = {"text": ("stereotype-preference", "stereotype-log-odds", "perplexity"), "labels": ("accuracy", "tpr-gap/rms", "tpr-gap/rms-shuffled", "causal/changed", "causal/shift")}
    of = {"text": text, "labels": labels}
    found = summary.rows(made, {u: result({name: value + 0.01 * u.seed for name, value in zip(names[u.place], of[u.place][u.method])}, 1234) for u in made})
    about = {"settings": {"seeds": [0, 1], "scale": 0.5}, "versions": {"device": "a machine", "torch": "2", "commit": "abc"}, "units": 12, "seconds": 24.0, "cpu_seconds": 12.0}
    table = summary.markdown(about | {"rows": found, "monotone": {"strengths": [0, 1], "means": [1.0, 2.0], "spearman": 1.0, "spearman_of_each_seed": [1.0, None]}}).splitlines()
    bare = [re.sub(r" \[[^]]*\]| ± [0-9.]+", "", line) for line in table]  # the means alone
    rows = ["| 0.8 | base | 1,234 | 0.405 | - | 1.00 | 2.005 | - | - |", "| 0.8 | lora | 1,234 | 0.105 | 74 % | 0.26 | 2.055 | 1.025 | yes |",
            "| 0.8 | bias | 1,234 | 0.305 | 25 % | 0.76 | 2.255 | 1.125 | no |",
            "| 0.8 | plain | 70.0 | 20.0 | 5.0 | 40.0 | 30.0 |", "| 0.8 | lora | 71.0 | 10.0 | 6.0 | 41.0 | 31.0 |",
            "| 0.8 | bias | 72.0 | 30.0 | 7.0 | 42.0 | 32.0 |"]
    assert [line for line in bare if line.startswith("| 0.8")] == rows and table[4].startswith("| 0.8 | base | 1,234 | 0.405 ± 0.007 | - |")
    assert any("fine-tuning's TPR-GAP, means over seeds: 1.000 over 2 strengths (each seed alone: 1.000, -)." in line for line in table)
    assert "Link 0.8 in the text: half of the stereotype preference removed at no more than 5 % worse perplexity by every method but bias." in table
    assert table[-1] == "12 units in 12 s of one core (24 s on the clock, added up), scale 0.5; a machine, torch 2, commit abc."
    assert [summary._but(short, ["a", "b"]) for short in ([], ["a"], ["a", "b"])] == ["every method", "every method but a", "no method"]


def test_a_change_has_the_ends_of_its_interval():
    assert summary._spread({"mean": 58.4, "sd": 2.1, "change": {"difference": -1.0, "low": -3.0, "high": 1.2}}, 1) == "58.4 ± 2.1 [-3.0 to +1.2]"


def test_the_gap_that_grows_is_plain_fine_tunings():
    made = [Unit("labels", s, 0, method) for s in (0.0, 1.0) for method in (NONE, "lora")]
    results = {u: result({"tpr-gap/rms": (1 + u.strength) if u.method == NONE else 9 - u.strength}) for u in made}
    assert summary.monotone(summary.rows(made, results)) == {"strengths": [0.0, 1.0], "means": [1.0, 2.0], "spearman": 1.0, "spearman_of_each_seed": [1.0]}


# ---------------------------------------------------------------- the drawing

def test_the_drawing_shows_what_was_measured(ran):
    pytest.importorskip("matplotlib")
    from peftdebias.report.planted import draw

    out, _, _ = ran
    found = found_in(out)
    axes = draw(found).axes
    assert len(axes) == 4 and [axis.get_title() for axis in axes[:2]] == ["lora", "full"]
    for axis, place, method in ((axes[0], "text", "lora"), (axes[3], "labels", "full")):
        name = {"text": "stereotype-preference", "labels": "tpr-gap/rms"}[place]
        for line, system in zip([container.lines[0] for container in axis.containers], (NONE, method)):
            rows = sorted((r["strength"], r["figures"][name]["mean"]) for r in found["rows"] if (r["place"], r["method"]) == (place, system))
            assert list(zip(*line.get_data())) == rows
    assert {p.name for p in out.glob("testbed.*")} == {"testbed.json", "testbed.svg", "testbed.png"}
    assert (out / "testbed.png").read_bytes()[:4] == b"\x89PNG" and "</svg>" in (out / "testbed.svg").read_text()


def test_without_matplotlib_the_table_and_the_figures_come_and_one_line_says_what_is_missing(ran, monkeypatch):
    out, said, _ = ran
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    again = done("testbed", *GIVEN, "--out", out)
    assert tables(again) == tables(said) and again.err.splitlines()[-1] == "no drawing: it needs matplotlib (pip install 'peftdebias[report]')"


def test_the_table_leaves_no_cell_open(ran):
    out, _, _ = ran
    heads = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    tables = "\n".join(heads).split("| link in the labels")
    for table in (tables[0], "| link in the labels" + tables[1]):
        widths = {line.count("|") for line in table.strip().splitlines()}
        assert len(widths) == 1 and "nan" not in table and "None" not in table
    assert math.isfinite(found_in(out)["monotone"]["means"][0])
