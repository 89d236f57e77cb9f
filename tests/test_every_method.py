"""Each method through both phases as a user runs them: it learns, its files come back, and what is printed is what the files give."""

import dataclasses
import json

import pytest
import safetensors.torch

from peftdebias import checkpoint, patch, phases
from peftdebias.axes import load_axis
from peftdebias.methods import METHODS, create, overview
from peftdebias.weights import load, load_model

from .small import cli, done, lines, save_bert, sha256

MODULES = [name for name in METHODS if name != "full"]


def learn(small, out, method, **changes):
    return done("upstream", *small.learning(method=method, out=out, **{"set": None} | changes))


@pytest.mark.parametrize("method", MODULES)
def test_both_phases_and_back_from_the_files(method, small, tmp_path):
    said = learn(small, tmp_path / "up", method, budget=0.01 if create(method, load_model(small.base)[0].config).size else None)
    assert f"trained: {method}, " in said.err
    header = json.loads((tmp_path / "up" / "adapter" / "adapter.json").read_text())
    assert header["method"] == method and header["axis"] == "gender" and not (tmp_path / "up" / "model").exists()
    events = lines(tmp_path / "up" / "metrics.jsonl")
    assert events[0]["step"] == 0 and events[-1]["event"] == "final"

    run = checkpoint.load_run(small.base, (str(tmp_path / "up"),))
    again = run.model.methods["gender"]
    checkpoint.save_adapter(tmp_path / "again", again, "gender", header["base"], {"axis_sha256": load_axis("gender").digest()})
    for name in ("adapter.json", "adapter.safetensors"):
        assert sha256(tmp_path / "again" / name) == sha256(tmp_path / "up" / "adapter" / name)

    done("downstream", *small.task(adapter=tmp_path / "up", out=tmp_path / "down", epochs=1))
    printed = {m["name"]: m["value"] for m in lines(tmp_path / "down" / "metrics.jsonl")[-1]["measures"]}
    done("evaluate", tmp_path / "down", "--on", f"classification={small.test}", "--json", tmp_path / "m.json")
    reloaded = {m["name"]: m["value"] for m in json.loads((tmp_path / "m.json").read_text())["measures"]}
    assert printed == reloaded
    assert sha256(tmp_path / "down" / "adapter" / "adapter.safetensors") == sha256(tmp_path / "up" / "adapter" / "adapter.safetensors")


# ---------------------------------------------------------------- what trains

LINEARS = ("attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up", "feed_forward.down")
NORMS = ("attention.norm", "feed_forward.norm")
TABLES = {f"encoder.embeddings.{table}.weight" for table in ("word", "position", "segment")}
HEAD = {"mlm.dense.weight", "mlm.dense.bias", "mlm.norm.weight", "mlm.norm.bias", "mlm.bias"}


def each_layer(stem: str, *names: str) -> set[str]:
    return {f"{stem}layers.{i}.{name}" for i in range(2) for name in names}


PRODUCTS = each_layer("encoder.", *(f"{linear}.{last}" for linear in ("attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down") for last in ("weight", "bias")))
BASE = TABLES | PRODUCTS | {f"encoder.embeddings.norm.{last}" for last in ("weight", "bias")} | each_layer("encoder.", *(f"{n}.{last}" for n in NORMS for last in ("weight", "bias")))
OWN = "methods.gender."
# The names that train upstream, stage after stage; ... is what the sparse module chose, as its file has it.
TRAINED = {
    "adapter": [each_layer(OWN, *(f"feed_forward.{part}.{last}" for part in ("down", "up") for last in ("weight", "bias")))],
    "prefix": [each_layer(OWN, "key", "value")],
    "prefix reparametrised": [{OWN + name for name in ("embedding", "down.weight", "down.bias", "up.weight", "up.bias")}],
    "prompt": [{OWN + "vectors"}],
    "lora": [each_layer(OWN, *(f"attention.{linear}.{part}" for linear in ("query", "value") for part in "ab"))],
    "sparse": [TABLES | PRODUCTS, ...],
    "ia3": [each_layer(OWN, "attention.key", "attention.value", "feed_forward.down")],
    "bias": [each_layer(OWN, *(f"{site}.bias" for site in LINEARS + NORMS)) | {OWN + "embeddings.norm.bias"}],
    "full": [BASE | HEAD],
}


@pytest.fixture
def asked(monkeypatch):
    """For each training loop that was run, the names that asked for gradients, which must be the same in all its steps and those of the optimizer."""
    found, original = [], phases.train

    def train(model, task, parameters, *args, **kwargs):
        steps, loss = [], task.loss
        named = lambda: {name for name, p in patch.all_parameters(model).items() if p.requires_grad}  # noqa: E731
        monkeypatch.setattr(task, "loss", lambda *inputs: (steps.append(named()), loss(*inputs))[1])
        outcome = original(model, task, parameters, *args, **kwargs)
        monkeypatch.setattr(task, "loss", loss)
        given = {id(p) for p in parameters.values()}
        assert steps and all(step == {name for name, p in patch.all_parameters(model).items() if id(p) in given} for step in steps)
        found.append(steps[0])
        return outcome

    monkeypatch.setattr(phases, "train", train)
    return found


def test_every_method_says_what_trains():
    assert {name.split()[0] for name in TRAINED} == set(METHODS)


@pytest.mark.parametrize("name", TRAINED)
def test_exactly_its_own_parameters_train(name, small, tmp_path, asked):
    """Upstream the method's, downstream the base and the classifier, whatever module is attached, but for LayerNorms beside sparse; by name, in every step."""
    method, *more = name.split()
    learn(small, tmp_path / "up", method, steps=2, set=["reparametrised=true", "inner=8"] if more else None)
    expected = list(TRAINED[name])
    if ... in expected:
        state = safetensors.torch.load_file(tmp_path / "up" / "adapter" / "adapter.safetensors")
        expected[expected.index(...)] = {OWN + key.removesuffix(".values") for key in state if key.endswith(".values")}
    assert asked == expected
    asked.clear()
    base = {"model": tmp_path / "up"} if method == "full" else {"adapter": tmp_path / "up"}
    done("downstream", *small.task(out=tmp_path / "down", epochs=1, **base))
    rest = {name for name in BASE if ".norm." in name} if method == "sparse" else set()
    assert asked == [BASE - rest | {f"classifier.{part}.{last}" for part in ("dense", "output") for last in ("weight", "bias")}]


def test_a_fresh_head_trains_alone_and_then_rests(small, tmp_path, asked):
    bare = save_bert(tmp_path / "bare", load(small.base).tokenizer, mlm=False)
    done("upstream", *small.learning(model=bare, out=tmp_path / "up", fresh_head=2, steps=2))
    assert asked == [HEAD, *TRAINED["lora"]]


def test_the_time_of_a_run_is_that_of_all_its_trainings_and_before_is_before_the_last(small, tmp_path, monkeypatch):
    bare, spent, kept = save_bert(tmp_path / "bare", load(small.base).tokenizer, mlm=False), [], phases.train

    def train(*given, **more):
        found = kept(*given, **more)
        spent.append(dataclasses.replace(found, seconds=10.0 ** len(spent)))
        return spent[-1]

    monkeypatch.setattr(phases, "train", train)
    said = done("upstream", *small.learning(model=bare, out=tmp_path / "up", method="sparse", set="k=50", fresh_head=2, steps=2))
    assert "; 111 s, " in said.out and "seconds: of 3 trainings; tokens a second and the share of waiting are the last one's" in said.err and lines(tmp_path / "up" / "metrics.jsonl")[-1]["seconds"] == 111.0
    done("export", tmp_path / "up", "--as", "merged", "--out", tmp_path / "card")
    assert f"nats a masked token: {spent[-1].before['loss']:.4f} before, " in (tmp_path / "card" / "README.md").read_text() and spent[0].before != spent[-1].before


# ---------------------------------------------------------------- what is special

def test_sparse_learns_in_two_stages(small, tmp_path):
    said = learn(small, tmp_path / "up", "sparse", set="k=50")
    trained = [line for line in said.err.splitlines() if line.startswith("trained: sparse")]
    assert len(trained) == 2 and "50 parameters" in trained[1]


def test_a_reparametrised_prefix_is_saved_flat(small, tmp_path):
    done("upstream", *small.learning(method="prefix", out=tmp_path / "up", set=["reparametrised=true", "length=3", "inner=8"]))
    header = json.loads((tmp_path / "up" / "adapter" / "adapter.json").read_text())
    assert header["config"]["reparametrised"] is False and header["config"]["length"] == 3


def test_different_kinds_compose_downstream(small, tmp_path):
    for method in ("lora", "adapter", "prefix"):
        learn(small, tmp_path / method, method)
    done("downstream", *small.task(adapter=[tmp_path / m for m in ("lora", "adapter", "prefix")], out=tmp_path / "down", epochs=1))
    run = checkpoint.load_run(tmp_path / "down")
    assert [m.name for m in run.model.methods.values()] == ["lora", "adapter", "prefix"] and list(run.model.methods) == ["gender", "gender-2", "gender-3"]


def test_evaluate_shows_what_each_module_does_alone(small, tmp_path):
    for method in ("lora", "adapter"):
        learn(small, tmp_path / method, method)
    both = ["--adapter", tmp_path / "lora", "--adapter", tmp_path / "adapter"]

    which = [f"module gender: {tmp_path}/lora/adapter", f"module gender-2: {tmp_path}/adapter/adapter"]

    def values(name, *modules):
        said = done("evaluate", small.base, *modules, "--on", f"perplexity={small.heldout}", "--json", tmp_path / name)
        assert [line for line in said.err.splitlines() if line.startswith("module ")] == (which if len(modules) > 2 else [])
        return {m["name"]: m["value"] for m in json.loads((tmp_path / name).read_text())["measures"]}

    found, base, lora = values("both.json", *both), values("base.json"), values("lora.json", *both[:2])
    assert set(found) == {f"{system}{name}" for system in ("", "base/", "only-gender/", "only-gender-2/") for name in ("mlm-loss", "perplexity")}
    assert found["base/mlm-loss"] == base["mlm-loss"] and found["only-gender/mlm-loss"] == lora["mlm-loss"] != base["mlm-loss"]
    assert len({round(v, 9) for n, v in found.items() if n.endswith("mlm-loss")}) == 4


def test_every_system_of_an_evaluation_reads_the_same_tokens(small, tmp_path):
    """A positioned prompt leaves few positions; beside it the base and the other module, which have room for all of a text, are not measured on more of it."""
    learn(small, tmp_path / "prompt", "prompt", set=["length=56", "positioned=true"])
    learn(small, tmp_path / "lora", "lora")
    said = done("evaluate", small.base, "--adapter", tmp_path / "prompt", "--adapter", tmp_path / "lora", "--on", f"perplexity={small.heldout}", "--on", f"crows-pairs={small.pairs}",
                "--examples", tmp_path / "e.jsonl")
    tokens = {}
    for row in lines(tmp_path / "e.jsonl"):
        tokens.setdefault(row["measure"].partition("mlm-loss")[0], []).append(row.get("tokens"))
    tokens = {system: found for system, found in tokens.items() if "crows" not in system}
    assert set(tokens) == {"", "base/", "only-gender/", "only-gender-2/"} and len({tuple(found) for found in tokens.values()}) == 1
    assert said.err.count(" are longer than 8 tokens and were cut") == 2 and "longer than 64" not in said.err


def test_force_goes_on_where_shapes_allow_it(small, tmp_path):
    learn(small, tmp_path / "up", "lora")
    other = save_bert(tmp_path / "other", load(small.base).tokenizer, seed=5)
    wide = save_bert(tmp_path / "wide", load(small.base).tokenizer, hidden=48)
    on = ["--on", f"perplexity={small.heldout}", "--adapter", tmp_path / "up"]
    refused = cli("evaluate", other, *on)
    assert refused.code == 2 and "made for the base with checksum" in refused.err and "(--force, in Python force=True, goes on where shapes allow it)" in refused.err
    assert "going on by force" in done("evaluate", other, *on, "--force").err
    said = cli("evaluate", wide, *on, "--force")
    assert said.code == 2 and "expected shape" in said.err.splitlines()[-1]
    for words in (["upstream", *small.learning(steps=1)], ["downstream", *small.task(epochs=1)]):
        words += ["--model", other, "--adapter", tmp_path / "up", "--out", tmp_path / words[0]]
        refused = cli(*words)
        assert refused.code == 2 and "made for the base with checksum" in refused.err and not (tmp_path / words[0]).exists()
        assert "going on by force" in done(*words, "--force").err


def test_the_seed_is_that_of_what_is_drawn_anew(small, tmp_path, monkeypatch):
    """A module's first values and a classifier's."""
    seeds = []
    for where, name in ((phases.weights, "load"), (phases.methods, "create")):
        monkeypatch.setattr(where, name, lambda *given, of=getattr(where, name), name=name, **more: seeds.append((name, more.get("seed"))) or of(*given, **more))
    done("upstream", *small.learning(out=tmp_path / "up", steps=1, seed=9))
    done("downstream", *small.task(out=tmp_path / "down", epochs=1, seed=9))
    assert seeds[:3] == [("load", 9), ("create", 9), ("load", 9)]


def test_a_fresh_head_is_trained_with_the_encoder_frozen_and_saved(small, tmp_path):
    bare = save_bert(tmp_path / "bare", load(small.base).tokenizer, mlm=False)
    said = done("upstream", *small.learning(model=bare, out=tmp_path / "up", fresh_head=4))
    assert "trained: a new masked-LM head" in said.err
    before, after = load_model(bare)[0], load_model(tmp_path / "up" / "model", mlm=True)[0]
    assert all(p.equal(q) for p, q in zip(before.encoder.parameters(), after.encoder.parameters()))
    done("evaluate", tmp_path / "up", "--on", f"perplexity={small.heldout}")
    refused = cli("upstream", *small.learning(out=tmp_path / "two", fresh_head=4))
    assert refused.code == 2 and "--fresh-head" in refused.err and "has a masked-LM head; expected a model without one" in refused.err
    assert not (tmp_path / "two").exists()


def test_the_table_of_methods(small):
    said = done("methods", "--model", small.base, "--budget", "0.02", "--max-length", 40)
    rows = {line.split()[0]: line for line in said.out.splitlines()}
    assert set(METHODS) <= set(rows) and "rank" in rows["lora"] and "fixed" in rows["bias"] and "%" in rows["sparse"]
    config = load_model(small.base)[0].config
    asked, other_length, other_budget = (overview(config, *given) for given in ((0.02, 40), (0.02, 256), (0.01, 40)))
    assert [" ".join(rows[row[0]].split()) for row in asked] == [" ".join(row) for row in asked] and asked not in (other_length, other_budget)
