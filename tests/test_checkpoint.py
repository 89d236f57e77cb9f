"""Adapter files and run folders: what is written comes back, only for the base it belongs to, and a run is there whole or not at all."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
import tomllib
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

import peftdebias
from peftdebias import checkpoint, methods, patch, weights
from peftdebias.checkpoint import load_adapter, load_run, save_adapter, versions, writing_run
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import AdapterError, ConfigError, ModelError

from .outside import one_thread  # noqa: F401
from .small import cli, done, lines, save_bert, tree

TINY = EncoderConfig(kind="bert", layers=2, hidden=14, heads=2, feed_forward=37, vocab=61, max_positions=19)


def model_of(config=TINY, seed=0) -> Model:
    model = Model(config)
    model.initialize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def lora(model: Model, seed=0, **options):
    method = methods.create("lora", model.config, options=options, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for parameter in method.parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return method


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of model_of()."""
    model = model_of()
    save_adapter(tmp_path / "adapter", lora(model, rank=3, alpha=5.0, targets=("query", "down")), "gender", checkpoint.describe_base(model))
    return tmp_path / "adapter"


# ---------------------------------------------------------------- adapters

def test_an_adapter_comes_back_as_it_was(saved):
    found = load_adapter(saved, model_of())
    assert found.axis == "gender" and found.method.config == type(found.method.config)(rank=3, alpha=5.0, targets=("query", "down"))
    expected = lora(model_of(), rank=3, alpha=5.0, targets=("query", "down")).state()
    assert list(found.method.state()) == list(expected) and all(torch.equal(t, expected[n]) for n, t in found.method.state().items())
    assert load_adapter(saved.parent, model_of()).folder == saved  # RUN stands for RUN/adapter


@pytest.mark.parametrize("stops", ["write_tensors", "write_text"])
def test_a_module_that_takes_anothers_place_is_never_mixed_with_it(stops, saved, monkeypatch):
    """Stopped in the tensors the one before is whole; behind them there is none."""
    before, other = saved.joinpath("adapter.safetensors").read_bytes(), lora(model_of(), seed=1, rank=3, alpha=5.0, targets=("query", "down"))  # of the same shapes

    def stopped(*given):
        if stops == "write_tensors":
            Path(given[1]).write_bytes(b"the beginning")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, stops, stopped)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(saved, other, "race", checkpoint.describe_base(model_of()))
    if stops == "write_tensors":
        assert load_adapter(saved, model_of()).axis == "gender" and saved.joinpath("adapter.safetensors").read_bytes() == before
    else:
        with pytest.raises(AdapterError):
            load_adapter(saved, model_of())
    assert not [path for path in saved.iterdir() if "partial" in path.name]
    monkeypatch.undo()
    save_adapter(saved, other, "race", checkpoint.describe_base(model_of()))
    assert load_adapter(saved, model_of()).axis == "race" and saved.joinpath("adapter.safetensors").read_bytes() != before


@pytest.mark.parametrize("changed, words", [
    ({"axis": Path("gender")}, "axis: expected a name without /, got PosixPath('gender')"), ({"axis": None}, "axis: expected a name without /, got None"),
    ({"axis": "a/b"}, "axis: expected a name without /, got 'a/b'"), ({"axis": ""}, "axis: expected a name without /, got ''"),
    ({"base": None}, "base: expected what describe_base says of the model, got None"), ({"base": {}}, "base: expected what describe_base says of the model, got {}"),
    ({"method": "lora"}, "expected a method with tensors of its own, got str"), ({"method": methods.create("full", TINY)}, "expected a method with tensors of its own, got full"),
    ({"base": checkpoint.describe_base(model_of()) | {"sha256": 3}}, "base: sha256: expected a text, got 3"),
    ({"method": methods.create("sparse", TINY, options={"k": 30})}, "sparse adapter: expected 30 values, got 0 in 0 tensors"),
    ({"about": [1]}, "about: expected a dict without format, method, axis, config, base, got [1]"),
    ({"about": {"axis": 3}}, "about: expected a dict without format, method, axis, config, base, got {'axis': 3}"),
    ({"folder": None}, "expected a path, got NoneType"), ({"folder": ""}, "expected a path, got an empty text"),
    ({"about": {"when": Path("x")}}, "expected what JSON can hold, got Object of type PosixPath is not JSON serializable")])
def test_what_no_folder_could_give_back_is_refused_before_anything_is_written(changed, words, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    given = {"folder": saved, "method": lora(model_of(), rank=2), "axis": "race", "base": checkpoint.describe_base(model_of())} | changed
    with pytest.raises(AdapterError, match=f"^save_adapter: {re.escape(words)}$"):
        save_adapter(**given)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_numbers_that_are_none_in_float32_are_not_written(saved):
    before, method = saved.joinpath("adapter.safetensors").read_bytes(), lora(model_of(), rank=2)
    name, parameter = next(iter(method.parameters().items()))
    for value, dtype in ((math.nan, torch.float32), (1e300, torch.float64)):
        parameter.data = torch.full(parameter.shape, value, dtype=dtype)
        with pytest.raises(AdapterError, match=f"^save_adapter: lora adapter, {name}: expected finite numbers, got {parameter.numel()} of {parameter.numel()}"):
            save_adapter(saved, method, "race", checkpoint.describe_base(model_of()))
    assert saved.joinpath("adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("folder, model, words", [(None, None, "expected a path, got NoneType"), ("saved", None, "expected a model of this package, .*, got NoneType")])
def test_what_is_no_adapter_folder_or_no_model_is_a_line(folder, model, words, saved):
    with pytest.raises(AdapterError, match=f"^load_adapter: {words}$"):
        load_adapter(saved if folder else folder, model)


def test_a_module_in_sixteen_bits_is_written_in_float32(tmp_path):
    model = model_of()
    method = lora(model, rank=2)
    peftdebias.attach(model, "race", method)
    save_adapter(tmp_path, method, "race", checkpoint.describe_base(model_of()))
    whole = load_adapter(tmp_path, model_of()).method.state()
    save_adapter(tmp_path, copy.deepcopy(model).half().methods["race"], "race", checkpoint.describe_base(model_of()))
    found = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32} and all(found[name].equal(tensor.half().float()) for name, tensor in whole.items())


def test_versions_that_differ_are_all_told():
    assert checkpoint.all_versions([{"torch": "2", "threads": 1, "commit": None}, {"torch": "3", "threads": 1, "commit": None}, {"torch": "2", "device": "d"}]) == {
        "torch": "2, 3", "threads": 1, "commit": None, "device": "d"}


def test_another_base_is_taken_by_force_alone(saved):
    other = model_of()
    with torch.no_grad():
        other.encoder.layers[0].feed_forward.up.bias[0] += 1
    with pytest.raises(AdapterError, match="made for the base with checksum .*--force"):
        load_adapter(saved, other)
    with pytest.warns(UserWarning, match="made for the base with checksum .*; going on by force") as warned:
        found = load_adapter(saved, other, force=True)
    assert [one.filename for one in warned] == [__file__]  # the caller's line, not the package's
    assert found.method.count() == load_adapter(saved, model_of()).method.count()


def test_the_files_are_what_contracts_say(saved):
    header = json.loads((saved / "adapter.json").read_text())
    assert sorted(p.name for p in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert list(header) == ["format", "method", "axis", "config", "base"] and (header["format"], header["method"], header["axis"]) == (1, "lora", "gender")
    assert header["base"] == {"type": "bert", "layers": 2, "hidden": 14, "vocab": 61, "sha256": patch.base_checksum(model_of())}
    assert all(t.dtype == torch.float32 for t in safetensors.torch.load_file(saved / "adapter.safetensors").values())


@pytest.mark.parametrize("change,words", [
    ({"kind": "roberta", "position_offset": 2}, "made for bert of 2 layers, hidden 14, vocabulary 61; expected roberta of 2 layers, hidden 14, vocabulary 61, the model given"),
    ({"layers": 3}, "made for bert of 2 layers, .*; expected bert of 3 layers"),
    ({"hidden": 28}, "made for .*hidden 14.*; expected .*hidden 28"),
    ({"vocab": 62}, "made for .*vocabulary 61; expected .*vocabulary 62"),
])  # fmt: skip
def test_an_adapter_of_another_architecture_is_refused_with_both_names(change, words, saved):
    with pytest.raises(AdapterError, match=f"^{saved}: {words}"):
        load_adapter(saved, model_of(dataclasses.replace(TINY, **change)))


def test_an_adapter_of_a_base_with_other_values_is_refused_by_checksum(saved):
    own, other = (patch.base_checksum(model_of(seed=seed))[:12] for seed in (0, 1))
    with pytest.raises(AdapterError, match=f"made for the base with checksum {own}; expected {other}, the model given"):
        load_adapter(saved, model_of(seed=1))
    model = model_of()
    with torch.no_grad():
        model.encoder.layers[1].feed_forward.down.bias[3] += 1e-6  # one value
    with pytest.raises(AdapterError, match="checksum"):
        load_adapter(saved, model)


def test_heads_are_no_part_of_the_base(saved):
    model = Model(TINY, mlm=True, labels=("a", "b"))
    model.encoder.load_state_dict(model_of().encoder.state_dict())
    assert load_adapter(saved, model).axis == "gender"


def edited(folder, **changes):
    header = json.loads((folder / "adapter.json").read_text()) | changes
    (folder / "adapter.json").write_text(json.dumps({k: v for k, v in header.items() if v is not ...}))


def test_an_adapter_without_checksum_warns_once_and_loads(saved):
    base = json.loads((saved / "adapter.json").read_text())["base"]
    edited(saved, base={k: v for k, v in base.items() if k != "sha256"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_adapter(saved, model_of(seed=1)).axis == "gender"
    assert len(caught) == 1 and "carries no checksum of its base" in str(caught[0].message)


@pytest.mark.parametrize("changes,words", [
    ({"format": 2}, "expected format 1, got 2"), ({"axis": ...}, "expected the key 'axis', found none"), ({"base": ...}, "expected the key 'base'"),
    ({"base": 3}, "base: expected a JSON object, got 3"), ({"base": {"sha256": 3}}, "base: sha256: expected a text, got 3"), ({"config": []}, "config: expected a JSON object"), ({"method": "nope"}, "method: expected one of .*lora.*, got 'nope'"),
    ({"config": {"rank": 0}}, "lora rank: expected at least 1, got 0"), ({"config": {"depth": 1}}, "depth"),
])  # fmt: skip
def test_a_header_that_is_wrong_is_named_with_its_file(changes, words, saved):
    edited(saved, **changes)
    with pytest.raises(AdapterError, match=f"^{saved}/adapter.json: .*{words}"):
        load_adapter(saved, model_of())


@pytest.mark.parametrize("method,config,words", [
    ("lora", {"rank": 10**9, "targets": ["query", "down"]}, r"adapter.safetensors: lora adapter, layers.0.attention.query.a: expected shape \[1000000000, 14\], got \[3, 14\]"),
    ("lora", {"rank": 10**30}, "adapter.json: lora: expected sizes that a tensor can have, got LoRAConfig.rank=1000"),
    ("lora", {"rank": 2.5}, "adapter.json: config: rank: expected a whole number, got 2.5$"),
    ("lora", {"rank_stabilized": "yes"}, "adapter.json: config: rank_stabilized: expected true or false, got 'yes'$"),
    ("lora", {"length": 3}, "adapter.json: config: unknown key 'length'; expected one of rank, "),
    ("adapter", {"bottleneck": 10**9}, "adapter.safetensors: adapter adapter: expected tensors 8 by name, got 8; first that differs"),
    ("prefix", {"length": 3, "reparametrised": True, "inner": 10**9}, "adapter.safetensors: prefix adapter: expected tensors 5 by name"),
    ("sparse", {"k": 10**12}, "adapter.json: sparse k: expected at most 5002, the weights there are, got 1000000000000"),
])  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_made(method, config, words, saved, little_memory):
    edited(saved, method=method, config=config)
    with pytest.raises(AdapterError, match=f"^{saved}/{words}") as error:
        load_adapter(saved, model_of())
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_broken_are_named(saved, tmp_path):
    def fails(words, folder=saved):
        with pytest.raises(AdapterError, match=words):
            load_adapter(folder, model_of())

    fails("adapter '.*none': no such folder", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    fails("empty: expected an adapter or run folder with adapter.json, found none", tmp_path / "empty")
    tensors = saved / "adapter.safetensors"
    kept = safetensors.torch.load_file(tensors)
    safetensors.torch.save_file({n: t for n, t in kept.items() if "layers.1" not in n}, tensors)
    fails("lora adapter: expected tensors 8 by name, got 4; first that differs: layers.1.attention.query.a")
    safetensors.torch.save_file({n: t[:, :1].contiguous() for n, t in kept.items()}, tensors)
    fails(r"lora adapter, layers.0.attention.query.a: expected shape \[3, 14\], got \[3, 1\]")
    tensors.write_bytes(b"nonsense")
    fails("adapter.safetensors: cannot be read")
    tensors.unlink()
    fails("expected adapter.safetensors, found none")
    (saved / "adapter.json").write_text("{")
    fails("adapter.json: expected JSON, got ")
    (saved / "adapter.json").write_text("[]")
    fails("adapter.json: expected a JSON object, got list")


def test_adapters_are_attached_in_order_under_their_axis(tmp_path):
    model = model_of()
    base = checkpoint.describe_base(model)
    for i, axis in enumerate(("gender", "race", "gender")):
        save_adapter(tmp_path / f"run{i}" / "adapter", lora(model, seed=i, rank=2), axis, base)
    found = checkpoint.attach_adapters(model, tuple(str(tmp_path / f"run{i}") for i in range(3)))
    assert list(model.methods) == ["gender", "race", "gender-2"] and list(model.methods.values()) == [a.method for a in found]


def test_the_folder_of_each_module_is_told_by_its_name(tmp_path, small):
    model = load_run(small.base).model
    for axis in ("gender", "race"):
        save_adapter(tmp_path / axis, lora(model), axis, checkpoint.describe_base(model))
    assert load_run(small.base, [tmp_path / "race", tmp_path / "gender"]).sources == {axis: tmp_path / axis for axis in ("race", "gender")}
    with writing_run(tmp_path / "run", "import", {"model": str(small.base)}) as run:
        save_adapter(run.path / "adapter", lora(model, seed=2), "gender", checkpoint.describe_base(model))
    found = load_run(tmp_path / "run", [tmp_path / "gender", tmp_path / "race"])  # a run's own come first, and keep their names
    assert list(found.sources.items()) == [("gender", tmp_path / "run" / "adapter"), ("gender-2", tmp_path / "gender"), ("race", tmp_path / "race")]
    own = lora(model, seed=2).state()
    assert list(found.model.methods) == list(found.sources) and all(torch.equal(tensor, own[name]) for name, tensor in found.model.methods["gender"].state().items())


def test_a_run_of_several_modules_gives_all_of_them(tmp_path):
    model = model_of()
    base = checkpoint.describe_base(model)
    for i, (folder, axis) in enumerate((("adapter", "gender"), ("adapter-2", "race"), ("adapter-3", "religion"))):
        save_adapter(tmp_path / folder, lora(model, seed=i, rank=2), axis, base)
    checkpoint.attach_adapters(model, (str(tmp_path),))
    assert list(model.methods) == ["gender", "race", "religion"]


# ---------------------------------------------------------------- writing a run

def test_a_run_takes_its_name_when_all_is_there(tmp_path):
    out = tmp_path / "deep" / "er" / "run"
    with writing_run(out, "upstream", {"steps": 3, "set": {"rank": 2}}, device=torch.device("cpu"), precision="float32") as run:
        assert not out.exists() and run.path.parent == out.parent
        run.event(event="step", step=1, loss=0.5)
        run.event(event="final", step=1)
    assert sorted(tree(out)) == ["config.toml", "metrics.jsonl", "versions.json"] and tree(tmp_path / "deep" / "er").keys() == {"run", *(f"run/{n}" for n in tree(out))}
    assert tomllib.loads((out / "config.toml").read_text()) == {"command": "upstream", "steps": 3, "set": {"rank": 2}}
    assert lines(out / "metrics.jsonl") == [{"event": "step", "step": 1, "loss": 0.5}, {"event": "final", "step": 1}]
    versions = json.loads((out / "versions.json").read_text())
    assert {"peftdebias", "python", "platform", "torch", "tokenizers", "safetensors", "numpy", "triton", "commit", "device", "threads", "precision"} == set(versions)
    assert versions["torch"] == torch.__version__ and versions["device"] and versions["precision"] == "float32"


def test_the_device_on_record_is_the_one_that_ran(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU of {device}")
    assert not versions(torch.device("cpu"))["device"].startswith("GPU")
    assert versions(torch.device("cuda:1"))["device"] == "GPU of cuda:1" and versions()["device"] == "GPU of None"


@pytest.mark.parametrize("error", [ConfigError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_nothing_behind(error, tmp_path):
    with pytest.raises(type(error)), writing_run(tmp_path / "deep" / "er" / "run", "upstream", {}) as run:
        (run.path / "model").mkdir()
        (run.path / "model" / "file").write_text("half")
        raise error
    assert tree(tmp_path) == {}


def test_a_run_that_is_there_is_kept_unless_asked_and_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "run"
    with writing_run(out, "upstream", {"steps": 1}):
        pass
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--out {out}: exists; expected a new folder \(or --overwrite\)$"), writing_run(out, "upstream", {}):
        pass
    with pytest.raises(RuntimeError), writing_run(out, "upstream", {"steps": 2}, overwrite=True):
        raise RuntimeError
    assert tree(tmp_path) == before
    with writing_run(out, "upstream", {"steps": 3}, overwrite=True):
        pass
    assert tomllib.loads((out / "config.toml").read_text())["steps"] == 3


def test_only_runs_are_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, config in (("project", 'command = "upstream"'), ("server", 'command = "serve"'), ("broken", "command = ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(config + "\n")
        (tmp_path / name / "work.txt").write_text("years of it")
    (tmp_path / "server" / "versions.json").write_text("{}")
    (tmp_path / "broken" / "versions.json").write_text("{}")
    before = tree(tmp_path)
    for name in ("thesis", "file", "project", "server", "broken"):
        with pytest.raises(ConfigError, match="exists and is no run folder; it is not replaced"), writing_run(tmp_path / name, "upstream", {}, overwrite=True):
            pass
    assert tree(tmp_path) == before
    with writing_run(tmp_path / "empty", "upstream", {}, overwrite=True):
        pass


@pytest.mark.parametrize("key, name, asked", [
    *((key, "a.toml", "a.toml") for key in ("model", "corpus", "valid", "adapter", "train", "dev", "test", "cache", "axis", "names", "folder")),
    ("corpus", "a.toml", "?.toml"), ("corpus", "a[1].toml", "a[1].toml"),
])
def test_a_run_that_holds_what_the_new_one_is_made_from_is_not_replaced(key, name, asked, tmp_path):
    out = tmp_path / "run"
    with writing_run(out, "upstream", {}):
        pass
    (out / name).write_text("")
    values = {key: str(out / asked) if key in ("model", "axis", "names", "folder") else [str(out / asked)]}
    with pytest.raises(ConfigError, match=f"^--out {out}: is read, as "), writing_run(out, "upstream", values, overwrite=True):
        pass
    assert (out / name).exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", "/proc/nowhere/run"):
        with pytest.raises(ConfigError, match=f"^--out {out}: cannot be written: "), writing_run(out, "upstream", {}):
            pass
    assert list(tree(tmp_path)) == ["file"]


# ---------------------------------------------------------------- reading a run

def test_an_upstream_run_finds_its_base_and_says_when_that_is_gone(small, tmp_path):
    base = save_bert(tmp_path / "base", weights.load(small.base).tokenizer)
    done("upstream", *small.learning(model=base, out=tmp_path / "run"))
    run = load_run(tmp_path / "run")
    assert list(run.model.methods) == ["gender"] and run.config["command"] == "upstream" and not run.model.training
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"^{tmp_path}/run: a module, whose base was {base}: .*no such folder"):
        load_run(tmp_path / "run")
    save_bert(tmp_path / "base", run.tokenizer, seed=1)  # another base in its place
    with pytest.raises(AdapterError, match="checksum"):
        load_run(tmp_path / "run")


def test_a_plain_model_folder_is_a_run_without_configuration(small):
    run = load_run(small.base)
    assert run.config == {} and run.model.methods == {} and run.model.mlm is not None


def test_a_run_whose_module_is_gone_does_not_answer_without_it(small, tmp_path):
    done("upstream", *small.learning(out=tmp_path / "one"))
    done("upstream", *small.learning(seed=1, out=tmp_path / "two"))
    done("upstream", *small.learning(method="full", set=None, out=tmp_path / "full"))
    done("downstream", *small.task(adapter=[tmp_path / "one", tmp_path / "two"]), "--out", tmp_path / "jobs")
    assert checkpoint.adapter_folders(tmp_path / "full") == [] and len(checkpoint.adapter_folders(tmp_path / "jobs")) == 2
    shutil.rmtree(tmp_path / "jobs" / "adapter-2")
    shutil.rmtree(tmp_path / "one" / "adapter")
    for name, gone, told in (("jobs", "adapter-2", 2), ("one", "adapter", 1)):
        run = tmp_path / name
        words = f"{run / gone}: expected a module, since {run / 'config.toml'} tells of {told}, found none"
        with pytest.raises(AdapterError, match=f"^{words}$"):
            load_run(run)
        for argv in (["evaluate", small.base, "--adapter", run, "--on", f"perplexity={small.heldout}"], ["report", run, "--out", tmp_path / "r.html"],
                     ["export", run, "--as", "hf", "--out", tmp_path / "hf"]):
            said = cli(*argv)
            assert said.code == 2 and words in said.err
    for argv in (["predict", tmp_path / "jobs", small.heldout], ["downstream", *small.task(model=tmp_path / "jobs"), "--out", tmp_path / "more"]):
        said = cli(*argv)
        assert said.code == 2 and "adapter-2: expected a module" in said.err and said.out == ""


def test_a_downstream_run_without_its_model_does_not_answer_by_the_base(small, tmp_path):
    done("downstream", *small.task(), "--out", tmp_path / "jobs")
    shutil.rmtree(tmp_path / "jobs" / "model")
    said = cli("evaluate", tmp_path / "jobs", "--on", f"perplexity={small.heldout}")
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: model '{tmp_path}/jobs/model': no such folder"


def test_an_imported_run_without_its_module_is_named(tmp_path):
    (tmp_path / "config.toml").write_text('command = "import"\n')
    with pytest.raises(AdapterError, match=f"^{tmp_path}/adapter: expected a module, since {tmp_path}/config.toml tells of 1, found none$"):
        checkpoint.adapter_folders(tmp_path)


def test_a_model_folder_that_holds_another_is_itself(tmp_path):
    for folder in (tmp_path, tmp_path / "model"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
    assert weights.find_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("size", ["layers", "hidden", "vocab"])
def test_a_size_is_a_whole_number_and_no_truth(size):
    with pytest.raises(ModelError, match=f"^{size}: expected a whole number of at least 1, got True$"):
        dataclasses.replace(TINY, **{size: True})


@pytest.mark.parametrize("found", [
    5, {"model": 5}, {"adapter": {}}, {"adapter": [5]}, {"model": {"adapter": 5}}, {"model": {"made_of": 5}}, {"adapter": [{"made_of": {"model": 5}}]}])
def test_origins_that_are_none_are_not_told(found):
    assert checkpoint.told_origins({"made_of": found}) == {} == checkpoint.told_origins({})
    sound = {"model": {"command": "upstream", "made_of": {"model": {}}}, "adapter": [{"adapter": ["a"]}]}
    assert checkpoint.told_origins({"made_of": sound}) == sound


def test_the_base_of_a_run_is_its_own_model_or_the_one_it_found(tmp_path):
    (tmp_path / "config.toml").write_text('command = "downstream"\nmodel = "elsewhere"\n')
    assert checkpoint.base_of(tmp_path) == "elsewhere"
    (tmp_path / "model").mkdir()
    assert checkpoint.base_of(tmp_path) == tmp_path


def test_the_files_of_a_run_are_those_of_all_its_modules_and_no_others(tmp_path):
    for name in ("config.toml", "adapter/adapter.json", "adapter-2/adapter.json", "model/config.json", "thesis.tex", "notes/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert {str(path.relative_to(tmp_path)) for path in checkpoint.files_of(tmp_path)} == {"config.toml", "adapter/adapter.json", "adapter-2/adapter.json", "model/config.json"}


def test_a_run_whose_configuration_is_broken_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("a = ")
    with pytest.raises(ModelError, match=f"^{tmp_path}/config.toml: expected TOML, got "):
        load_run(tmp_path)
    with pytest.raises(ModelError, match="expected a run folder with config.toml, found none"):
        checkpoint.read_config(tmp_path / "none")


@pytest.mark.parametrize("text", ['title = "x', 'command = "build"', 'model = "bert"', 'command = "upstream"\nmodel = 5'])
def test_a_configuration_beside_a_model_that_is_no_runs_is_left_alone(text, tmp_path):
    """A settings file of the user's own, or of another program."""
    (tmp_path / "config.toml").write_text(text)
    for name in ("bert", "model", "adapter", "adapter-2"):
        assert checkpoint.made_of({"model": str(tmp_path / name), "adapter": [str(tmp_path / name), str(tmp_path)]}) == {}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('command = "upstream"\nseed = 3')
    found = {"command": "upstream", "seed": 3}
    assert checkpoint.made_of({"model": str(run / "model"), "adapter": [str(run), str(run / "adapter-2"), str(run / "other")]}) == {"model": found, "adapter": [found, found]}


@pytest.mark.parametrize("text", ['title = "x', "[tool]", 'command = "evaluate"\nmodel = "bert"'])
def test_a_model_beside_somebody_s_configuration_is_a_model(text, small, tmp_path):
    """One with a run's own beside it is a run, as before."""
    shutil.copytree(small.base, tmp_path / "base")
    (tmp_path / "base" / "config.toml").write_text(text)
    assert load_run(tmp_path / "base").config == {} and checkpoint.base_of(tmp_path / "base") == tmp_path / "base"
    done("upstream", *small.learning(model=tmp_path / "base", out=tmp_path / "run"))
    done("evaluate", tmp_path / "base", "--on", f"perplexity={small.heldout}")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert checkpoint.is_run(tmp_path / "run") and load_run(tmp_path / "run").config["command"] == "upstream"


def test_a_run_s_configuration_says_of_what_command(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ModelError, match=f"^{tmp_path}/config.toml: expected the configuration of a run, got one without a command$"):
        load_run(tmp_path)


def test_a_module_with_numbers_that_are_none_is_refused(saved):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    tensors["layers.0.attention.query.a"][0, 0] = math.nan
    safetensors.torch.save_file(tensors, saved / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"adapter.safetensors: lora adapter, layers.0.attention.query.a: expected finite numbers, got 1 of 42 that are NaN or infinite"):
        load_adapter(saved, model_of())


@pytest.mark.parametrize("written, words", [("model = 5", "model: expected a text, got 5"), ('max_length = "x"', "max_length: expected a whole number, got 'x'"),
                                            ("adapter = 3", "adapter: expected a list of texts, got 3"), ("adapter = [3]", r"adapter: expected a list of texts, got \[3\]")])
def test_a_run_s_configuration_is_of_the_kinds_that_are_read(written, words, tmp_path):
    (tmp_path / "config.toml").write_text(f'command = "upstream"\n{written}\n')
    with pytest.raises(ModelError, match=f"^{tmp_path}/config.toml: {words}$"):
        load_run(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_named(saved):
    for name, words in (("adapter.safetensors", "expected a file, got a folder"), ("adapter.json", "cannot be read: Is a directory")):
        (saved / name).unlink()
        (saved / name).mkdir()
        with pytest.raises(AdapterError, match=f"^{saved}/{name}: {words}"):
            load_adapter(saved, model_of())


@pytest.mark.parametrize("name, words", [("x" * 5000, "model: expected a path, got 'xxx.*: File name too long"), ("d\0x", r"model: expected a path, got 'd\\x00x': "), ("~/none", "model '~/none': no such folder$"),
                                         ("loop", "model '.*loop': cannot be read: Too many levels of symbolic links"), ("broken", "model '.*broken': no such folder$")])
def test_names_that_no_folder_can_have(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(ModelError, match=words):
        load_run(name)


def test_what_may_not_be_read_is_named(small):
    """root may read all, and becomes somebody else, in a folder that they may enter."""
    root = os.geteuid() == 0
    load_run(small.base)  # what it imports may lie where they may not read
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        if root and not all(path.stat().st_mode & 0o001 for path in Path(place).resolve().parents):
            pytest.skip(f"as root it needs a TMPDIR that others may enter, not {os.path.dirname(place)}")
        folder = Path(shutil.copytree(small.base, Path(place) / "base"))
        folder.chmod(0o755)
        for hidden, words in ((folder, "model '.*base': cannot be read: Permission denied$"), (folder / "config.json", "config.json: cannot be read: Permission denied$"),
                              (folder / "tokenizer.json", "cannot be read: Permission denied")):
            before = hidden.stat().st_mode
            hidden.chmod(0)
            if root:
                os.seteuid(65534)
            try:
                with pytest.raises(ModelError, match=words):
                    load_run(folder)
            finally:
                if root:
                    os.seteuid(0)
                hidden.chmod(before)


def test_an_axis_is_a_text(saved):
    edited(saved, axis=["x"])
    with pytest.raises(AdapterError, match=rf"^{saved}/adapter.json: axis: expected a text, got \['x'\]$"):
        load_adapter(saved, model_of())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_module_of_numbers_that_are_not_floating_point_is_refused(dtype, saved):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    safetensors.torch.save_file({n: t.to(dtype) for n, t in tensors.items()}, saved / "adapter.safetensors")
    with pytest.raises(AdapterError, match="expected floating-point numbers, got " + str(dtype).removeprefix("torch.")):
        load_adapter(saved, model_of())


def test_arguments_of_load_run_that_are_none_are_named(small):
    for options, words in ((dict(adapters=5), "adapters: expected a list of folders, got int"), (dict(dtype="float32"), "dtype: expected a floating-point torch.dtype, got 'float32'"),
                           (dict(dtype=torch.int64), "dtype: expected a floating-point torch.dtype, got torch.int64")):
        with pytest.raises(ConfigError, match=f"^{words}$"):
            load_run(small.base, **options)
    with pytest.raises(ConfigError, match="--device: expected cpu, cuda, cuda:1, ... or auto, got None"):
        peftdebias.load(small.base, device=None)


def test_the_checksum_is_that_of_files_written_before():
    """An adapter of an earlier version belongs to the same base: names, dtypes, shapes and bytes as ever."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int32)}
    assert patch.checksum(tensors) == "71ae10721836f2e4b7e5648887bc41ed6deff5587e998d89c2d4489756329631"
    assert len({patch.checksum({"a": t}) for t in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.float16))}) == 4


def test_a_module_by_another_spelling_is_the_same(tmp_path):
    model = model_of()
    save_adapter(tmp_path / "a", lora(model), "gender", checkpoint.describe_base(model))
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(AdapterError, match="b: attached twice; expected each module once$"):
        checkpoint.attach_adapters(model, (str(tmp_path / "a"), str(tmp_path / "b")))


def test_a_module_that_cannot_be_read_to_be_compared_is_told_of_where_it_is_loaded(tmp_path, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    model = model_of()
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, lora(model, seed), "gender", checkpoint.describe_base(model))
    monkeypatch.setattr(checkpoint, "digest", unreadable)
    checkpoint.attach_adapters(model, (str(tmp_path / "a"), str(tmp_path / "b")))
    assert list(model.methods) == ["gender", "gender-2"]


def test_a_copy_of_a_module_is_the_same_whatever_base_it_names(tmp_path):
    """As a downstream run's is, whose base was trained under it: by force it would act twice."""
    model = model_of()
    folders, base = [str(tmp_path / name) for name in "abc"], checkpoint.describe_base(model)
    for folder, axis, checksum in zip(folders, ("gender", "gender", "race"), (base["sha256"], "0" * 64, base["sha256"])):
        save_adapter(Path(folder), lora(model), axis, base | {"sha256": checksum})
    for force in (False, True):
        with pytest.raises(AdapterError, match=r"b: attached twice; expected each module once \(.*a is the same\)$"):
            checkpoint.attach_adapters(model, (folders[0], folders[1]), force)
    checkpoint.attach_adapters(model, (folders[0], folders[2]))  # equal numbers of another axis are another module
    assert list(model.methods) == ["gender", "race"]
