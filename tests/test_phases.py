"""Both phases on files: seeds repeat, what is frozen stays bit for bit, what is saved is what was trained, runs follow on each other only where that makes sense."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib

import numpy
import pytest
import safetensors.torch
import torch

from peftdebias import checkpoint, patch, phases, weights
from peftdebias.answers import encode_examples
from peftdebias.axes import load_axis
from peftdebias.checkpoint import load_run
from peftdebias.config import Downstream, Upstream
from peftdebias.errors import ConfigError, DataError, PeftDebiasError
from peftdebias.labelled import parse_class_weights, read_labelled
from peftdebias.tasks import class_probabilities, labelled_samples
from peftdebias.testbed import World
from peftdebias.training import Schedule

from .outside import one_thread  # noqa: F401
from .small import POSITIONS, cli, done, learn, lines, save_bert, sha256, tokenizer_of, tree, without_times


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """name -> run folder; each made once, by the command line."""
    out = tmp_path_factory.mktemp("runs")
    before = tree(small.root)
    done("upstream", *small.learning(out=out / "gender"))
    done("upstream", *small.learning(out=out / "full", method="full", set=None, lr=1e-3))
    done("downstream", *small.task(out=out / "plain"))
    done("downstream", *small.task(out=out / "debiased", adapter=out / "gender", weight_decay=0.1))
    assert tree(small.root) == before  # nothing that was read is written
    return {path.name: path for path in out.iterdir()}


def tensors(folder, file="model.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / file)




@pytest.fixture(scope="module")
def ready(small):
    """The test file's texts, tokenised."""
    from peftdebias.corpus import read_examples

    examples = read_examples(small.test, text="hard_text", label="profession")
    return labelled_samples(encode_examples(weights.load(small.base).tokenizer, examples, 64))


# ---------------------------------------------------------------- seeds

@pytest.mark.parametrize("name,file,command", [("gender", "adapter/adapter.safetensors", "learning"), ("debiased", "model/model.safetensors", "task")])
def test_a_seed_repeats_bit_for_bit_and_another_differs(name, file, command, small, runs, tmp_path):
    extra = {"adapter": runs["gender"], "weight_decay": 0.1} if name == "debiased" else {}
    verb = {"learning": "upstream", "task": "downstream"}[command]
    for seed in (0, 1):
        done(verb, *getattr(small, command)(out=tmp_path / str(seed), seed=seed, **extra))
    assert sha256(tmp_path / "0" / file) == sha256(runs[name] / file) != sha256(tmp_path / "1" / file)
    first, again, other = (without_times(run / "metrics.jsonl") for run in (runs[name], tmp_path / "0", tmp_path / "1"))
    assert first == again != other


class Stop(Exception):
    """Before a training begins."""


@pytest.fixture
def stopped(monkeypatch):
    """stopped(phase, settings) -> (model, task, ids of the first batch of two epochs) of its first training, which is not begun."""
    def train(model, task, *args, **kwargs):
        raise Stop(model, task, [next(task.epoch(number)).ids.tolist() for number in (0, 1)])

    def first(phase, settings):
        with pytest.raises(Stop) as found:
            phase(settings)
        return found.value.args

    monkeypatch.setattr(phases, "train", train)
    return first


def test_all_that_is_drawn_upstream_is_by_the_seed(small, stopped, tmp_path):
    bare, found = save_bert(tmp_path / "bare", tokenizer_of(World()), mlm=False), []
    for seed in (0, 0, 1):
        settings = Upstream(model=str(bare), axis="gender", method="prefix", corpus=(str(small.corpus),), fresh_head=1, seed=seed, out=str(tmp_path / "run"))
        model, task, batches = stopped(phases.upstream, settings)
        module = model.methods["gender"].state()
        found.append({"module": module["layers.1.key"].tolist(), "head": model.mlm.dense.weight.tolist(), "held out": [s.ids.tolist() for s in task.held_out], "batches": batches})
    assert found[0] == found[1] and [name for name in found[0] if found[0][name] == found[2][name]] == []


def test_all_that_is_drawn_downstream_is_by_the_seed(small, stopped, tmp_path):
    found = []
    for seed in (0, 0, 1):
        settings = Downstream(model=str(small.base), train=str(small.train), dev=str(small.dev), text="hard_text", label="profession", seed=seed, out=str(tmp_path / "run"))
        model, _, batches = stopped(phases.downstream, settings)
        found.append({"head": model.classifier.output.weight.tolist(), "batches": batches})
    assert found[0] == found[1] and [name for name in found[0] if found[0][name] == found[2][name]] == []
    assert found[0]["batches"][0] != found[0]["batches"][1]


def test_the_intervals_of_a_run_are_drawn_by_its_seed(small, runs, tmp_path, monkeypatch):
    asked, original = [], phases.classification_measures
    monkeypatch.setattr(phases, "classification_measures", lambda *args, **kwargs: asked.append(kwargs["seed"]) or original(*args, **kwargs))
    done("downstream", *small.task(epochs=1, seed=7, out=tmp_path / "run"))
    assert asked == [7]


# ---------------------------------------------------------------- what is trained

@pytest.mark.parametrize(("command", "folder"), [("upstream", "gender"), ("downstream", "plain")])
def test_saving_memory_ends_in_the_same_files(command, folder, small, runs, tmp_path):
    done(command, *(small.learning if command == "upstream" else small.task)(out=tmp_path / "run", save_memory=True))
    files = [path for path in tree(runs[folder]) if path.endswith(".safetensors")]
    assert files and all(sha256(tmp_path / "run" / path) == sha256(runs[folder] / path) for path in files)
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["save_memory"] is True


def test_upstream_trains_the_module_alone(small, runs):
    model = weights.load(small.base).model
    header = json.loads((runs["gender"] / "adapter" / "adapter.json").read_text())
    assert header["base"]["sha256"] == patch.base_checksum(model)  # of the base as it came out of training
    found = tensors(runs["gender"] / "adapter", "adapter.safetensors")
    assert set(found) == {f"layers.{i}.attention.{kind}.{part}" for i in range(2) for kind in ("query", "value") for part in "ab"}
    assert all(t.any() for t in found.values())  # B starts at zero
    assert not (runs["gender"] / "model").exists()


def test_full_trains_the_whole_base_and_its_head(small, runs):
    before, after = tensors(small.base), tensors(runs["full"] / "model")
    assert before.keys() == after.keys() and not (runs["full"] / "adapter").exists()
    assert {name for name in before if torch.equal(before[name], after[name])} == set()


def test_downstream_trains_base_and_head_and_leaves_the_module_alone(small, runs):
    before, after = tensors(small.base), tensors(runs["debiased"] / "model")
    stems = {name for name in after if name.startswith("bert.") and not name.startswith("bert.pooler")}
    assert stems == {name for name in before if name.startswith("bert.")}
    assert {name for name in stems if torch.equal(before[name], after[name])} == set()
    assert {name for name in after if name not in stems} == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert sha256(runs["debiased"] / "adapter" / "adapter.safetensors") == sha256(runs["gender"] / "adapter" / "adapter.safetensors")
    upstream, downstream = (json.loads((runs[name] / "adapter" / "adapter.json").read_text()) for name in ("gender", "debiased"))
    assert downstream["learnt_on"] == upstream["base"] and downstream["base"]["sha256"] == patch.base_checksum(weights.load(runs["debiased"] / "model").model)
    assert {k: v for k, v in downstream.items() if k not in ("base", "learnt_on")} == {k: v for k, v in upstream.items() if k != "base"}


def test_what_is_frozen_asks_for_no_gradient(small, runs, tmp_path, monkeypatch):
    asked, original = [], phases.train

    def train(model, task, parameters, *args, **kwargs):
        trained = {id(p) for p in parameters.values()}
        asked.append([name for name, p in patch.all_parameters(model).items() if p.requires_grad != (id(p) in trained)])
        return original(model, task, parameters, *args, **kwargs)

    monkeypatch.setattr(phases, "train", train)
    done("upstream", *small.learning(out=tmp_path / "up", adapter=runs["gender"], steps=1))
    done("downstream", *small.task(out=tmp_path / "down", adapter=[runs["gender"]], epochs=1))
    assert asked == [[], []]


def test_a_frozen_part_that_moved_is_found_out(small, tmp_path, monkeypatch):
    original = phases.train

    def train(model, *args, **kwargs):
        model.encoder.layers[0].attention.norm.bias.data[0] += 1e-7
        return original(model, *args, **kwargs)

    monkeypatch.setattr(phases, "train", train)
    with pytest.raises(PeftDebiasError, match="base: expected to stay frozen bit for bit"):
        phases.upstream(Upstream(model=str(small.base), axis="gender", corpus=(str(small.corpus),), out=str(tmp_path / "run"), steps=1))
    assert tree(tmp_path) == {}


# ---------------------------------------------------------------- what is saved

def test_the_saved_base_with_its_module_is_the_model_at_the_end(small, runs, tmp_path, monkeypatch, ready):
    kept, save = [], weights.save_model
    monkeypatch.setattr(phases.weights, "save_model", lambda model, *rest: (kept.append(model), save(model, *rest))[1])
    done("downstream", *small.task(out=tmp_path / "run", adapter=runs["gender"]))
    at_the_end = class_probabilities(kept[0], ready)
    assert numpy.array_equal(at_the_end, class_probabilities(load_run(tmp_path / "run").model, ready))
    by_hand = weights.load(tmp_path / "run" / "model").model
    alone = class_probabilities(by_hand, ready)
    checkpoint.attach_adapters(by_hand, (str(tmp_path / "run" / "adapter"),))
    assert numpy.array_equal(at_the_end, class_probabilities(by_hand, ready))
    patch.merge(by_hand)
    assert class_probabilities(by_hand, ready) == pytest.approx(at_the_end, abs=1e-5)
    assert abs(alone - at_the_end).max() > 1e-3  # the module matters


def test_folded_and_unfolded_runs_end_in_the_same_base(small, runs, tmp_path, ready):
    done("downstream", *small.task(out=tmp_path / "run", adapter=runs["gender"], weight_decay=0.1, no_fold=True))
    before, folded, unfolded = tensors(small.base), tensors(runs["debiased"] / "model"), tensors(tmp_path / "run" / "model")
    for name in before.keys() & folded.keys():
        if name.endswith("key.bias"):
            continue  # no gradient but rounding: attention does not see it
        moved = (folded[name] - before[name]).norm()
        assert (folded[name] - unfolded[name]).norm() < 0.02 * moved, name  # float32 rounding through Adam; test_fold.py has it exact
    assert not torch.equal(folded["bert.encoder.layer.0.attention.self.query.weight"], unfolded["bert.encoder.layer.0.attention.self.query.weight"])
    assert class_probabilities(load_run(tmp_path / "run").model, ready) == pytest.approx(class_probabilities(load_run(runs["debiased"]).model, ready), abs=2e-3)


@pytest.mark.parametrize("name", ["plain", "debiased"])
def test_what_was_printed_is_what_the_reloaded_run_gives(name, small, runs, tmp_path):
    final = lines(runs[name] / "metrics.jsonl")[-1]
    said = done("evaluate", runs[name], "--on", f"classification={small.test}", "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["measures"] == final["measures"] and final["on"] == "test"
    names = [m["name"] for m in final["measures"]]
    assert {"accuracy", "f1/macro", "tpr-gap/rms", "tpr-gap/rms-shuffled"} < set(names) and all(f"\n{name} " in said.out for name in names)


def test_without_a_test_file_the_dev_file_is_reported(small, tmp_path):
    said = done("downstream", *small.task(out=tmp_path / "run", test=None, group=None))
    events = lines(tmp_path / "run" / "metrics.jsonl")
    best = next(e for e in events if e["event"] == "validation" and e.get("kept") and e["step"] == events[-1]["step"])
    assert events[-1]["on"] == "dev" and f"on {small.dev}, from the saved files:" in said.out
    assert events[-1]["measures"][0]["value"] == pytest.approx(best["accuracy"])  # validation in the loop, and from the files


def test_labels_that_are_numbers_keep_their_order(small, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "".join(f"he {'is ' * i},{label}\n" for i, label in enumerate(["10", "2", "1", "0001", "01", "001", "-3", "b", "a", "²"] * 2)))
    done("downstream", "--model", small.base, "--train", path, "--dev", path, "--text", "text", "--label", "label", "--epochs", 1, "--out", tmp_path / "run")
    labels = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"]
    assert [labels[str(i)] for i in range(10)] == ["-3", "0001", "001", "01", "1", "2", "10", "a", "b", "²"]  # equal numbers too


def test_a_label_in_several_columns_pairs_and_f1(small, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,hd,cv\n" + "".join(f"he is,she is {'a ' * i},{i % 2},{int(i % 3 == 0)}\n" for i in range(12)))
    done("downstream", "--model", small.base, "--train", path, "--dev", path, "--text", "a", "--text-pair", "b", "--label", "hd,cv", "--metric", "f1",
         "--class-weights", "1=10", "--epochs", 2, "--batch-tokens", 40, "--out", tmp_path / "run")
    events = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["name"] for m in events[-1]["measures"]] == ["accuracy", "f1/macro", "f1/1"] and all("f1" in e for e in events if e["event"] == "validation")
    assert done("evaluate", tmp_path / "run", "--on", f"classification={path}").out.splitlines()[1:4]


def test_equal_settings_but_class_weights_train_differently(small, tmp_path):
    flags = ["--model", small.base, "--train", small.binary, "--dev", small.binary, "--text", "text", "--label", "is_health", "--epochs", 1, "--lr", 1e-3]
    for name, more in (("none", []), ("ones", ["--class-weights", "0=1,1=1"]), ("rare", ["--class-weights", "1=9"])):
        done("downstream", *flags, *more, "--out", tmp_path / name)
    none, ones, rare = (tensors(tmp_path / name / "model")["classifier.bias"] for name in ("none", "ones", "rare"))
    torch.testing.assert_close(none, ones, rtol=0, atol=1e-5)
    assert rare[1] - rare[0] > none[1] - none[0]  # pushed towards the rare label


@pytest.mark.parametrize("text,expected", [(None, None), ("a=2", [2.0, 1.0]), ("b=0.5,a=3", [3.0, 0.5])])
def test_class_weights_are_read_in_the_order_of_the_labels(text, expected):
    assert parse_class_weights(text, ("a", "b")) == expected


def test_class_weights_take_labels_with_an_equals_sign():
    assert parse_class_weights("a=b=2", ("a=b", "c")) == [2.0, 1.0]


@pytest.mark.parametrize("text,words", [
    ("c=1", "--class-weights c=1: expected LABEL=WEIGHT with LABEL one of a, b, got 'c'"), ("a", "expected LABEL=WEIGHT"), ("a=1,", "got ''"),
    ("a=", "expected a positive number, 1e-30 to 1e30, got ''"), ("a=x", "expected a positive number, 1e-30 to 1e30, got 'x'"), ("a=0", "got '0'"), ("a=-1", "got '-1'"),
    ("a=nan", "got 'nan'"), ("a=inf", "got 'inf'"), ("a=1e38,b=1e38", "--class-weights a=1e38: .*got '1e38'"), ("a=1e-50", "got '1e-50'"),  # whose sums are none in float32
    ("a=1,a=2", "--class-weights a=2: expected each label once, got 'a' twice"),
])  # fmt: skip
def test_class_weights_that_make_no_sense(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_class_weights(text, ("a", "b"))


# ---------------------------------------------------------------- one run after another

def test_a_full_debias_run_is_a_base(small, runs, tmp_path):
    done("downstream", *small.task(out=tmp_path / "run", model=runs["full"]))
    assert not (tmp_path / "run" / "adapter").exists()
    from_base, from_full = (weights.load(folder / "model").model for folder in (runs["plain"], tmp_path / "run"))
    assert patch.base_checksum(from_base) != patch.base_checksum(from_full)
    said = cli("downstream", *small.task(out=tmp_path / "x", adapter=runs["full"]))
    assert said.code == 2 and f"{runs['full']}: a run without a module (its base was trained); expected it in the place of the base model" in said.err
    done("upstream", *small.learning(out=tmp_path / "on top", model=runs["full"]))  # a module on a debiased base
    assert load_run(tmp_path / "on top").model.methods.keys() == {"gender"}


def test_a_base_without_the_module_it_was_trained_with_is_not_taken_unsaid(small, runs, tmp_path):
    def refused(words, **changes):
        said = cli("downstream", *small.task(out=tmp_path / "x", **changes))
        assert said.code == 2 and words in said.err, said.err

    refused(f"--model {runs['gender']}: a run with a module alone; expected the base it was learnt on as --model, and the run as --adapter", model=runs["gender"])
    done("downstream", *small.task(model=runs["debiased"], adapter=runs["debiased"] / "adapter", epochs=1), "--out", tmp_path / "by-its-module")
    refused(f"--model {runs['debiased']}: its base works with the module beside it; expected --adapter {runs['debiased']} too, or --model {runs['debiased']}/model",
            model=runs["debiased"])
    refused("made for the base with checksum", model=runs["debiased"] / "model", adapter=runs["gender"])  # the base has moved on since
    done("downstream", *small.task(out=tmp_path / "both", model=runs["debiased"], adapter=runs["debiased"]))
    done("downstream", *small.task(out=tmp_path / "alone", model=runs["debiased"] / "model"))
    assert (tmp_path / "both" / "adapter").is_dir() and not (tmp_path / "alone" / "adapter").exists()
    said = cli("upstream", *small.learning(out=tmp_path / "x", model=runs["plain"]))
    assert said.code == 2 and "expected a masked-LM head" in said.err and str(runs["plain"] / "model") in said.err


def test_modules_stack_and_all_of_them_are_saved(small, runs, tmp_path):
    done("upstream", *small.learning(out=tmp_path / "second", adapter=runs["gender"], seed=5))
    (tmp_path / "second" / "adapter" / "adapter.json").write_text((tmp_path / "second" / "adapter" / "adapter.json").read_text().replace('"axis": "gender"', '"axis": "race"'))
    done("downstream", *small.task(out=tmp_path / "run", adapter=[runs["gender"], tmp_path / "second"]))
    assert list(load_run(tmp_path / "run").model.methods) == ["gender", "race"]
    for folder, source in (("adapter", runs["gender"]), ("adapter-2", tmp_path / "second")):
        assert sha256(tmp_path / "run" / folder / "adapter.safetensors") == sha256(source / "adapter" / "adapter.safetensors")
    final = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    done("evaluate", tmp_path / "run", "--on", f"classification={small.test}", "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())["measures"]
    assert [m for m in found if not m["name"].startswith(("base/", "only-"))] == final["measures"]
    said = cli("upstream", *small.learning(out=tmp_path / "x", adapter=runs["gender"], method="full", set=None))
    assert said.code == 2 and "--method full: trains the base itself; expected no --adapter beside it" in said.err


# ---------------------------------------------------------------- the corpus

def test_an_axis_of_the_users_is_kept_by_its_place(small, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text('keep_untouched = false\ngroups = [["he", "she"]]\n')
    monkeypatch.chdir(tmp_path)
    done("upstream", *small.learning(axis="mine.toml", out="run"))
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["axis"] == str(tmp_path / "mine.toml")
    said = cli("upstream", *small.learning(out="other", **{"from": "neither"}))
    assert said.code == 2 and "neither" in said.err.splitlines()[-1] and not (tmp_path / "other").exists()


def test_modules_that_leave_no_position_for_a_text_are_refused(small, tmp_path):
    said = cli("upstream", *small.learning(method="prompt", set=[f"length={POSITIONS - 2}", "positioned=true"], out=tmp_path / "run"))
    assert said.code == 2 and said.err.splitlines()[-1] == (
        f"peftdebias: modules: expected room for a text of 3 tokens, the special ones among them, got 2: they take {POSITIONS - 2} of the model's {POSITIONS} positions")
    done("upstream", *small.learning(method="prompt", set=[f"length={POSITIONS - 3}", "positioned=true"], steps=1, out=tmp_path / "run"))


def test_a_fresh_head_does_not_depend_on_the_module_beside_it(small, tmp_path):
    """A prefix is drawn: it moves what it is attached to before it has learnt anything."""
    bare, heads = save_bert(tmp_path / "bare", tokenizer_of(World()), mlm=False), []
    for name, options in (("lora", "rank=2"), ("prefix", "length=3")):
        done("upstream", *small.learning(model=bare, out=tmp_path / name, method=name, set=options, fresh_head=4, steps=1))
        with safetensors.safe_open(tmp_path / name / "model" / "model.safetensors", "pt") as file:
            heads.append({key: file.get_tensor(key) for key in file.keys() if key.startswith("cls.")})
    assert len(heads[0]) > 3 and all(torch.equal(tensor, heads[1][key]) for key, tensor in heads[0].items())


def test_a_first_stage_has_a_rate_of_its_own_and_seconds_are_those_of_all_trainings(small, tmp_path, monkeypatch):
    original, rates = phases.train, []

    def train(model, task, parameters, schedule, *args, **kwargs):
        rates.append(schedule.lr)
        return dataclasses.replace(original(model, task, parameters, schedule, *args, **kwargs), seconds=4.0)

    monkeypatch.setattr(phases, "train", train)
    said = done("upstream", *small.learning(out=tmp_path / "sparse", method="sparse", set=["k=50", "first_rate=0.25"], steps=1))
    assert rates == [0.0025, 0.01]
    assert lines(tmp_path / "sparse" / "metrics.jsonl")[-1]["seconds"] == 8.0
    assert "seconds: of 2 trainings; tokens a second and the share of waiting are the last one's" in said.err


def test_norms_rest_downstream_beside_a_sparse_module(small, runs, tmp_path):
    """As while it learnt (PAPER: SFT); beside another they train."""
    done("upstream", *small.learning(out=tmp_path / "sparse", method="sparse", set="k=50"))
    moved = {}
    for name, adapter in (("sparse", tmp_path / "sparse"), ("lora", runs["gender"])):
        done("downstream", *small.task(out=tmp_path / f"task-{name}", adapter=adapter, epochs=1))
        before, after = (dict(load_run(folder).model.named_parameters()) for folder in (small.base, tmp_path / f"task-{name}"))
        moved[name] = {key for key, p in before.items() if key.startswith("encoder.") and not torch.equal(p, after[key])}
    norms = {key for key in moved["lora"] if ".norm." in key}
    assert len(norms) >= 8 and moved["sparse"] == moved["lora"] - norms


# ---------------------------------------------------------------- said in time

def test_to_replace_a_folder_is_said_each_time(small, tmp_path):
    """Not by the config.toml of a run that once replaced another."""
    assert learn(small, tmp_path, "he is a nurse\nshe is a baker\n", valid_share=1e-9, overwrite=True).code == 0
    said = cli("upstream", "--config", tmp_path / "run" / "config.toml")
    assert said.code == 2 and said.err.endswith("run: exists; expected a new folder (or --overwrite)\n"), said.err


def test_a_budget_that_texts_leave_no_room_for_is_told(small, tmp_path):
    said = learn(small, tmp_path, "he is a nurse\nshe is a baker\n", method="prompt", budget=0.1, set=None, valid_share=0.5)
    assert re.search(r"--budget: 0\.1 of the base comes to prompt length \d+, 1 taken: beside texts of --max-length tokens the base has no positions for more", said.err), said.err


def test_the_models_own_limit_counts_too(small, tmp_path):
    said = learn(small, tmp_path, f"he is {'a ' * 70}\nshe is\n", max_length=256, valid_share=0.5)
    assert re.search(r"2 of 2 texts \(counterfactuals counted\) are longer than 64 tokens", said.err), said.err


def never(*args, **kwargs):
    raise AssertionError("training began")


@pytest.mark.parametrize("column,words", [
    ("group of one", "expected 2 groups, got 1: f"),
    ("group by label", "expected a class with positives in both groups 'f' and 'm', got none of 2 classes"),
])  # fmt: skip
def test_what_cannot_be_measured_at_the_end_is_said_before_training(column, words, small, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "train", never)
    path = tmp_path / "t.csv"
    path.write_text("text,label,group,group of one,group by label\n" + "".join(f"he is,{'ab'[i % 2]},{'fmx'[i % 3]},f,{'fm'[i % 2]}\n" for i in range(6)))
    settings = Downstream(model=str(small.base), train=str(path), dev=str(path), text="text", label="label", group=column, out=str(tmp_path / "run"))
    with pytest.raises(DataError, match=f"^{path}: {words}"):
        phases.downstream(settings)
    assert list(tree(tmp_path)) == ["t.csv"]


def test_every_setting_of_a_schedule_is_handed_on():
    asked = dict(lr=3e-4, warmup=0.25, weight_decay=0.05, clip=0.3, save_memory=True, seed=9)
    for settings in (Upstream(model="m", axis="gender", corpus=("c",), out="o", **asked), Downstream(model="m", train="t", dev="d", text="a", label="b", out="o", **asked)):
        found = phases._schedule(settings, 70, 20, "bf16", "compiled")
        assert found == Schedule(steps=70, validate_every=20, precision="bf16", step="compiled", **asked)


def test_f1_as_the_metric_needs_a_positive_label_in_every_split(small, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "train", never)
    (tmp_path / "t.csv").write_text("text,label\nhe is,0\nshe is,1\n")
    (tmp_path / "d.csv").write_text("text,label\nhe is,0\n")
    settings = dict(model=str(small.base), train=str(tmp_path / "t.csv"), dev=str(tmp_path / "d.csv"), text="text", label="label", metric="f1", out=str(tmp_path / "run"))
    for split in ({}, {"dev": str(tmp_path / "t.csv"), "test": str(tmp_path / "d.csv")}):
        with pytest.raises(DataError, match="d.csv: expected examples with the label '1' for --metric f1, found none"):
            phases.downstream(Downstream(**settings | split))
    (tmp_path / "t.csv").write_text("text,label\nhe is,a\nshe is,b\n")
    (tmp_path / "d.csv").write_text("text,label\nhe is,a\n")
    with pytest.raises(ConfigError, match="--metric f1: expected --positive with one of a, b"):
        phases.downstream(Downstream(**settings))
    for positive, words in (("c", "expected one of a, b, got 'c'"), ("macro", "expected a label of another name than 'macro': f1/macro is the mean over all labels")):
        with pytest.raises(ConfigError, match=f"^--positive: {words}$"):
            phases.downstream(Downstream(**settings, positive=positive))


def test_files_without_the_positive_label_are_measured_without_its_f1(small, tmp_path):
    rows = "text,label\nhe is,0\nshe is,1\nhe was,0\n"
    (tmp_path / "t.csv").write_text(rows)
    (tmp_path / "d.csv").write_text(rows.replace("she is,1\n", ""))
    settings = dict(model=str(small.base), train=str(tmp_path / "t.csv"), text="text", label="label", epochs=1)
    for name, dev, has in (("without", "d.csv", False), ("with", "t.csv", True)):
        result = phases.downstream(Downstream(**settings, dev=str(tmp_path / dev), out=str(tmp_path / name)))
        assert [("f1" in scores, "accuracy" in scores, "macro-f1" in scores) for scores in (result.outcome.before, result.outcome.best)] == [(has, True, True)] * 2
        assert ("f1/1" in {m.name for m in result.measures}) is has and (f"{tmp_path / dev}: no F1 of '1', which no example has" in result.notes) is not has


def test_notes_are_said_before_training_begins(small, tmp_path, monkeypatch):
    said, before = [], []
    original = phases.train
    monkeypatch.setattr(phases, "train", lambda *a, **k: (before.extend(said), original(*a, **k))[1])
    result = phases.upstream(Upstream(model=str(small.base), axis="gender", corpus=(str(small.corpus),), out=str(tmp_path / "run"), steps=1), said.append)
    assert said == before == result.notes
    assert said[0].startswith("corpus: ") and said[-2] == "device: cpu, float32" and said[-1].startswith("trained: lora, 2,048 parameters in 8 tensors, ")


def test_downstream_says_what_it_read_before_it_tokenises(small, tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("text,label\nhe is,0\nshe is,1\nhe was,0\n")
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"he is,{i % 9}\n" for i in range(18)))
    said, before = [], []
    original = phases.encode_examples
    monkeypatch.setattr(phases, "encode_examples", lambda *a: (before.append(list(said)), original(*a))[1])
    phases.downstream(Downstream(model=str(small.base), train=str(tmp_path / "t.csv"), dev=str(tmp_path / "t.csv"), text="text", label="label", epochs=1, out=str(tmp_path / "a")), said.append)
    assert before[0][:2] == [f"{name}: {tmp_path / 't.csv'}, 3 examples, 2 with the label 0, 1 with the label 1" for name in ("train", "dev")]
    assert said[:len(before[0])] == before[0] and len(said) == len(set(said))
    settings = Downstream(model="m", train=str(tmp_path / "d.csv"), dev=str(tmp_path / "d.csv"), text="text", label="label", out="o")
    assert read_labelled(settings).lines()[1] == f"dev: {tmp_path / 'd.csv'}, 18 examples, 9 labels"


def test_a_module_worse_than_none_is_told(small, tmp_path):
    said = done("upstream", *small.learning(lr=3.0, steps=4, valid_every=4, out=tmp_path / "worse"))
    assert "no step had a lower validation loss than before training: what is saved is that of step 4" in said.out
    said = done("upstream", *small.learning(out=tmp_path / "better"))
    assert "no step had a lower" not in said.out


DEFAULTS = """
import sys, torch, transformers
from peftdebias import attach_to, cli, load
set_to, out, number, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
if set_to == "meta":
    torch.set_default_device("meta")
elif set_to == "inference":
    torch.inference_mode().__enter__()
    torch.autocast("cpu", torch.bfloat16).__enter__()
elif set_to:
    torch.set_default_dtype(getattr(torch, set_to))
learning, task = world[:world.index("--")], world[world.index("--") + 1:world.index("bare")]
for method, options in (("lora", ["rank=2", "dropout=0.1"]), ("prefix", ["length=3"]), ("sparse", ["k=50"]), ("adapter", ["bottleneck=2"]))[:number]:
    assert cli.main(["upstream", *learning, "--method", method, *(w for o in options for w in ("--set", o)), "--out", f"{out}/{method}"]) == 0
assert cli.main(["downstream", *task, "--adapter", f"{out}/lora", "--out", f"{out}/task"]) == 0
model, plain = load(f"{out}/task"), load(world[world.index("--model") + 1], [f"{out}/lora"])
print("answers", model.predict(["she is a nurse"]), plain.fill_mask("[MASK] is a nurse"), plain.encode(["she is a nurse"], pooling="mean").sum().item())
if number == 1:
    raise SystemExit
model.export(f"{out}/task.pt2")
bare = world[-1]
assert cli.main(["upstream", *(bare if word == learning[learning.index("--model") + 1] else word for word in learning), "--fresh-head", "2", "--set", "rank=2", "--out", f"{out}/fresh"]) == 0
with torch.device("cpu"):
    host = transformers.BertModel.from_pretrained(bare)
attach_to(host, f"{out}/fresh/adapter")
"""


@pytest.mark.parametrize("modes,number", [(("meta",), 1), pytest.param(("meta", "bfloat16", "inference"), 4, marks=pytest.mark.slow)])
def test_torchs_defaults_change_nothing(modes, number, small, tmp_path):
    """Its default device, as notebooks set it, dtype, and the mode of whoever only wants answers: the same files and answers, bit for bit; of so many methods."""
    said, bare = {}, save_bert(tmp_path / "bare", tokenizer_of(World()), mlm=False)
    for set_to in ("", *modes):
        words = [sys.executable, "-c", DEFAULTS, set_to, tmp_path / f"run-{set_to}", number, *small.learning(set=None, steps=4), "--", *small.task(epochs=1), "bare", bare]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        answers = next(line for line in done.stdout.splitlines() if line.startswith("answers"))
        said[set_to] = answers, {name: sha for name, sha in tree(tmp_path / f"run-{set_to}").items() if name.endswith(".safetensors")}
    assert len(said[""][1]) == 2 + number + 2 * (number > 1)  # the task's module and model, what was learnt, and with a new head the model too
    for mode in modes:
        assert said[mode][1] == said[""][1] and (said[mode][0] == said[""][0] or mode == "inference")  # whose answers follow the caller's autocast


def test_a_run_is_repeated_from_anywhere(small, tmp_path, monkeypatch):
    """A cache that the run itself makes, a pattern in a folder whose name is one, a table of names without an ending; and a flag in place of the file's."""
    place, other = tmp_path / "m[1]", tmp_path / "other"
    place.mkdir(), other.mkdir()
    (place / "a.txt").write_bytes(small.corpus.read_bytes())
    (place / "mynames").write_text('columns = ["male", "female"]\ngroups = [["xaver", "xenia"]]\n')
    monkeypatch.chdir(place)
    done("upstream", *small.learning(corpus="*.txt", cache="cache", names="mynames", steps=2, out="run"))
    monkeypatch.chdir(other)
    said = done("upstream", "--config", place / "run" / "config.toml", "--out", "run")
    assert f"{place.resolve() / 'cache'}/" in said.err and "is read" in said.err and [p.name for p in other.iterdir()] == ["run"]
    assert sha256(other / "run" / "adapter" / "adapter.safetensors") == sha256(place / "run" / "adapter" / "adapter.safetensors")
    done("upstream", "--config", place / "run" / "config.toml", "--batch-tokens", 300, "--out", "run2")
    config = tomllib.loads((other / "run2" / "config.toml").read_text())
    assert config["batch_tokens"] == 300 and "batch_size" not in config
    said = cli("augment", "--axis", "gender", "--names", place / "mynames", small.corpus, "--out", place / "mynames")
    assert said.code == 2 and "is read" in said.err
    monkeypatch.chdir(place)
    said = cli("augment", "--axis", "gender", "--names", "mynames", small.corpus, "--out", "mynames")
    assert said.code == 2 and "is read" in said.err and (place / "mynames").read_text().startswith("columns")


@pytest.mark.parametrize("left", [None, 'keep_untouched = true\ngroups = [["king", "queen"]]\n'])
def test_an_axis_file_that_changes_while_a_run_trains_is_not_asked_again(left, small, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('keep_untouched = true\ngroups = [["he", "she"], ["his", "her"]]\n')
    words = load_axis(file).digest()

    def meanwhile(line):
        file.write_text(left) if left else file.unlink(missing_ok=True)

    phases.upstream(Upstream(model=str(small.base), axis=str(file), corpus=(str(small.corpus),), out=str(tmp_path / "run"), steps=1), meanwhile)
    assert json.loads((tmp_path / "run/adapter/adapter.json").read_text())["axis_sha256"] == words
