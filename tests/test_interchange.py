"""`export` and `import` as a user runs them: runs that become folders of others and come back, merged folders as plain models, the card."""

import errno
import json
import os
import re
import shutil
import warnings

import pytest
import torch

import peftdebias
from peftdebias import checkpoint, weights
from peftdebias.errors import ConfigError
from peftdebias.interchange.peft import write as write_peft
from peftdebias.methods import create

from .outside import assert_close, class_logits, library, mlm_logits, one_thread, ragged  # noqa: F401
from .small import cli, done, save_bert, sha256, tree


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    options = {"lora": "rank=2", "prefix": ["length=3", "positioned=true"], "bias": None, "adapter": "bottleneck=2"}
    for name, chosen in options.items():
        done("upstream", *small.learning(method=name, set=chosen, steps=2), "--out", out / name)
    done("upstream", *small.learning(method="sparse", set="k=200", steps=2, lr=1e-2), "--out", out / "sparse")
    done("downstream", *small.task(epochs=1), "--out", out / "plain")
    done("downstream", *small.task(epochs=1, adapter=out / "lora"), "--out", out / "debiased")
    return out


def outputs(path, *, head="mlm"):
    run = checkpoint.load_run(path)
    run.model.double()
    batch = ragged((9, 4), vocab=run.model.config.vocab, rows="some" if head == "mlm" else "first")
    return getattr(run.model, f"{head}_logits")(batch).detach(), batch


def test_export_as_peft_and_import_again(runs, small, tmp_path):
    for name, head in (("lora", "mlm"), ("prefix", "mlm"), ("debiased", "class")):
        said = done("export", runs / name, "--as", "peft", "--out", tmp_path / name)
        assert said.out.splitlines()[-1] == f"result: {tmp_path / name}"
        assert set(tree(tmp_path / name)) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        base = runs / name / "model" if head == "class" else small.base
        done("import", tmp_path / name, "--model", base, "--axis", "gender", "--out", tmp_path / f"{name}-again")
        again = tmp_path / f"{name}-again"
        assert sha256(again / "adapter" / "adapter.safetensors") == sha256(runs / name / "adapter" / "adapter.safetensors")
        assert (again / "model").is_dir() == (head == "class")
        assert torch.equal(outputs(again, head=head)[0], outputs(runs / name, head=head)[0])
        header = json.loads((again / "adapter" / "adapter.json").read_text())
        assert header["base"] == json.loads((runs / name / "adapter" / "adapter.json").read_text())["base"] and header["origin"]["library"] == "peft"
    done("evaluate", tmp_path / "debiased-again", "--on", f"classification={small.test}", "--text", "hard_text", "--label", "profession")
    done("evaluate", small.base, "--adapter", tmp_path / "lora-again", "--on", f"perplexity={small.heldout}")


def test_downstream_keeps_where_a_module_came_from(runs, small, tmp_path):
    done("export", runs / "lora", "--as", "peft", "--out", tmp_path / "peft")
    done("import", tmp_path / "peft", "--model", small.base, "--axis", "gender", "--out", tmp_path / "again")
    done("downstream", *small.task(epochs=1, adapter=tmp_path / "again"), "--out", tmp_path / "task")
    done("downstream", *small.task(model=tmp_path / "task", epochs=1, adapter=tmp_path / "task"), "--out", tmp_path / "further")
    headers = [json.loads((tmp_path / run / "adapter" / "adapter.json").read_text()) for run in ("again", "task", "further")]
    assert [h["origin"] for h in headers] == [{"library": "peft", "kind": "LORA", "base": str(small.base.resolve())}] * 3
    assert [h.get("learnt_on") for h in headers] == [None, headers[0]["base"], headers[0]["base"]]
    assert "origin" not in json.loads((runs / "debiased" / "adapter" / "adapter.json").read_text())
    done("export", tmp_path / "further", "--as", "merged", "--out", tmp_path / "merged")
    assert "read from a folder of peft" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("name,head", [("lora", "mlm"), ("sparse", "mlm"), ("bias", "mlm"), ("debiased", "class")])
def test_merged_is_one_plain_model(name, head, runs, tmp_path):
    transformers = library("transformers")
    out = tmp_path / "merged"
    done("export", runs / name, "--as", "merged", "--out", out)
    expected, batch = outputs(runs / name, head=head)
    found, _ = outputs(out, head=head)
    assert_close(found.float(), expected.float(), logits=True)  # written in float32
    automatic = transformers.AutoModelForMaskedLM if head == "mlm" else transformers.AutoModelForSequenceClassification
    other = automatic.from_pretrained(out).double().eval()
    assert_close((mlm_logits if head == "mlm" else class_logits)(other, batch), found)
    if name == "sparse":
        assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert (weights.read_tensors(out)["cls.predictions.decoder.weight"] != weights.read_tensors(out)["bert.embeddings.word_embeddings.weight"]).any()
    assert transformers.AutoTokenizer.from_pretrained(out)("nurse")["input_ids"]


def test_a_module_that_no_weight_can_hold_is_not_merged(runs, small, tmp_path):
    """Read back, the model would be refused."""
    done("export", runs / "lora", "--as", "peft", "--out", tmp_path / "peft")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 1e300}))
    done("import", tmp_path / "peft", "--model", small.base, "--axis", "gender", "--out", tmp_path / "again")
    said = cli("export", tmp_path / "again", "--as", "merged", "--out", tmp_path / "merged")
    assert said.code == 2 and not (tmp_path / "merged").exists()
    assert re.fullmatch(r"peftdebias: encoder\.layers\.\d+\.\S+, with the module in it: expected finite numbers, got \d+ of \d+ that are NaN or infinite", said.err.splitlines()[-1])


def test_hf_is_the_runs_model(runs, tmp_path):
    """With what others have put there."""
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "model" / "onnx").mkdir()
    (tmp_path / "run" / "model" / "onnx" / "model.onnx").write_text("other")
    done("export", tmp_path / "run", "--as", "hf", "--out", tmp_path / "hf")
    assert {n: s for n, s in tree(tmp_path / "hf").items() if n != "README.md"} == tree(tmp_path / "run" / "model")


def test_the_card(runs, tmp_path):
    done("export", runs / "debiased", "--as", "merged", "--out", tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    for words in ("a run of `downstream`, its modules merged into the weights.\n", "# Debiasing: gender", "module: lora (rank 2", "learnt on the axis gender", "- base: ", "train.jsonl",
                  "- accuracy: ", "## Limits", "never its absence", "Gender is treated as binary", "word lists are narrow"):
        assert words in text, words
    assert re.search(r"\n- accuracy: \d+(\.\d+)? % \(95 % interval \d+(\.\d+)? to \d+(\.\d+)?\)\n", text) and not re.search(r"\d\.\d{6}", text)
    described = r"bert, \d layers, hidden \d+, sha256 [0-9a-f]{12}"
    base = checkpoint.read_config(runs / "lora")["model"]
    assert f"\n- base: {base}\n" in text and "\n- texts: the run cuts them at " in text and "beside" not in text  # what the module's header describes is the run's model
    done("export", runs / "debiased", "--as", "peft", "--out", tmp_path / "c")
    assert re.search(rf"\n- base: {runs / 'debiased' / 'model'} \({described}\), trained from {base}\n", (tmp_path / "c" / "README.md").read_text())
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    done("export", runs / "lora", "--as", "peft", "--out", tmp_path / "b")
    assert re.search(rf"\n- base: {base} \({described}\)\n", (tmp_path / "b" / "README.md").read_text())
    assert re.search(r"\n- masked-LM loss on held-out texts, nats a masked token: \d\.\d{4} before, \d\.\d{4} at step \d+\n", (tmp_path / "b" / "README.md").read_text())
    text = (tmp_path / "b" / "README.md").read_text()
    assert "corpus" in text and "a run of `upstream`.\n" in text and "learnt and measured beside" not in text
    shutil.copytree(runs / "lora", tmp_path / "bare")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    done("export", tmp_path / "bare", "--as", "peft", "--out", tmp_path / "d")
    assert "## Figures\n\nNone recorded.\n" in (tmp_path / "d" / "README.md").read_text()


@pytest.mark.parametrize("damaged", [b"[]\n", b"\xff\n", b'{"event": "final", "loss": 3}\n', b'{"event": "final", "loss": "x", "step": 3}\n', b'{"event": "final", "measures": [{}]}\n', b"3\n"])
def test_a_card_of_a_run_whose_record_is_damaged_has_no_figures(damaged, runs, tmp_path):
    shutil.copytree(runs / "lora", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(damaged)
    done("export", tmp_path / "run", "--as", "peft", "--out", tmp_path / "out")
    assert "## Figures\n\nNone recorded.\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_has_the_loss_of_the_last_training_alone(runs, tmp_path):
    """That of a new head comes before it."""
    shutil.copytree(runs / "lora", tmp_path / "run")
    events = [{"event": "validation", "step": 0, "loss": 9.0}, {"event": "validation", "step": 4, "loss": 7.0, "kept": True}, {"event": "validation", "step": 0, "loss": 6.5},
              {"event": "validation", "step": 2, "loss": 5.25, "kept": True}, {"event": "final", "step": 2, "loss": 5.25}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done("export", tmp_path / "run", "--as", "peft", "--out", tmp_path / "out")
    assert "\n- masked-LM loss on held-out texts, nats a masked token: 6.5000 before, 5.2500 at step 2\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_where_a_run_cuts_texts_that_the_model_has_positions_for(runs, tmp_path):
    shutil.copytree(runs / "lora", tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(re.sub(r"(?m)^max_length = \d+$", "max_length = 24", path.read_text()))
    done("export", tmp_path / "run", "--as", "merged", "--out", tmp_path / "out")
    assert "\n- texts: the run cuts them at 24 tokens (`truncation=True, max_length=24`)\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_names_what_a_module_was_learnt_beside(runs, small, tmp_path):
    done("upstream", *small.learning(method="bias", set=None, adapter=runs / "prefix", steps=2), "--out", tmp_path / "onto")
    done("export", tmp_path / "onto", "--as", "merged", "--out", tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert f"\n- learnt and measured beside: {runs / 'prefix'}, not part of this folder\n" in text
    longest = json.loads((small.base / "config.json").read_text())["max_position_embeddings"]  # of 256 that were allowed
    assert f"\n- texts: the run cuts them at {longest} tokens (`truncation=True, max_length={longest}`)\n" in text


def test_the_card_says_how_long_a_text_can_be(runs, small, tmp_path):
    """A positioned prefix of 3 takes three positions of the model's."""
    positions = json.loads((small.base / "config.json").read_text())["max_position_embeddings"]
    done("upstream", *small.learning(method="prefix", set=["length=3", "positioned=true"], max_length=positions, steps=2), "--out", tmp_path / "long")
    done("export", tmp_path / "long", "--as", "peft", "--out", tmp_path / "a")
    assert f"the run cuts them at {positions - 3} tokens" in (tmp_path / "a" / "README.md").read_text()
    done("upstream", *small.learning(method="lora", set="rank=2", steps=2), "--out", tmp_path / "lora")
    done("export", tmp_path / "lora", "--as", "merged", "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["model_max_length"] == positions


def test_a_disk_that_is_full_is_one_line(runs, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    said = cli("export", runs / "plain", "--as", "hf", "--out", tmp_path / "out")
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: {tmp_path}/out/config.json: No space left on device" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil,words", [
    (lambda model: (model / "model.safetensors").unlink(), "model: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, found none"),
    (lambda model: (model / "model.safetensors").write_bytes(b"xx"), "model.safetensors: "), (shutil.rmtree, "model")])
def test_a_damaged_model_is_not_handed_on(spoil, words, runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    spoil(tmp_path / "run" / "model")
    said = cli("export", tmp_path / "run", "--as", "hf", "--out", tmp_path / "out")
    assert said.code == 2 and f"{tmp_path}/run/model" in said.err.splitlines()[-1] and words in said.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name,onto", [("lora", "AutoModelForMaskedLM"), ("debiased", "AutoModelForSequenceClassification"), ("prefix", "AutoModel")])
def test_a_peft_folder_is_loaded_as_its_card_says(name, onto, runs, tmp_path):
    transformers, peft = library("transformers"), library("peft")
    done("export", runs / name, "--as", "peft", "--out", tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    called = re.search(r"\n- load: `PeftModel.from_pretrained\((\w+).from_pretrained\('(.+)', dtype=torch.float32\), FOLDER\)`;", card)
    assert called[1] == onto
    base = called[2]
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"] == base and f"base_model: {json.dumps(base)}\n" in card
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        other = peft.PeftModel.from_pretrained(getattr(transformers, onto).from_pretrained(base, dtype=torch.float32), tmp_path / "b").double().eval()
    assert not any("adapter keys" in str(warning.message) for warning in heard)
    if name != "prefix":
        head, theirs = ("mlm", mlm_logits) if name == "lora" else ("class", class_logits)
        expected, batch = outputs(runs / name, head=head)
        assert_close(theirs(other, batch), expected.double(), logits=True)


@pytest.mark.parametrize("name,form,words", [
    ("lora", "hf", "a model folder cannot hold its lora; expected --as merged (in the weights) or --as peft (a module)"),
    ("adapter", "hf", "a model folder cannot hold its adapter; no form of others does, the run folder alone (peftdebias.load reads it, and exports it as a .pt2 file)"),
    ("bias", "hf", "a model folder cannot hold its bias; expected --as merged (in the weights)"), ("prefix", "hf", "its prefix; expected --as peft (a module made with --set positioned=true)"),
    ("debiased", "hf", "a model folder cannot hold its lora"), ("plain", "peft", "expected a run with a module, found none; --as hf writes its model"),
    ("plain", "merged", "expected a run with a module, found none"), ("adapter", "merged", "merge 'gender': adapter cannot be written into the weights with the same outputs"),
    ("prefix", "merged", "merge 'gender': prefix cannot be written into the weights"), ("adapter", "peft", "adapter: peft has no such module"),
    ("nothing", "peft", "expected a run folder with config.toml, found none"),
])  # fmt: skip
def test_what_a_form_cannot_hold_is_refused_and_leaves_nothing(name, form, words, runs, tmp_path):
    said = cli("export", runs / name, "--as", form, "--out", tmp_path / "out")
    assert said.code == 2 and words in said.err.splitlines()[-1] and said.err.splitlines()[-1].startswith("peftdebias: ")
    assert list(tmp_path.iterdir()) == []


def test_out_is_replaced_only_when_asked_and_only_an_export(runs, tmp_path):
    argv = ["export", runs / "lora", "--as", "peft", "--out", tmp_path / "out"]
    done(*argv)
    assert cli(*argv).err.splitlines()[-1].endswith("exists; expected a new folder (or --overwrite)")
    with pytest.raises(ConfigError, match="exists; expected a new folder"):
        peftdebias.export_adapter(runs / "lora", "peft", tmp_path / "out")
    done(*argv, "--overwrite")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("x")  # of something else
    assert "is no exported folder; it is not replaced" in cli(*argv, "--overwrite").err
    (tmp_path / "out" / "config.json").write_text("{}")  # somebody's model
    assert "is no exported folder; it is not replaced" in cli(*argv, "--overwrite").err
    assert set(tree(tmp_path / "out")) == {"README.md", "config.json"}


def test_an_export_does_not_take_the_place_of_what_it_is_made_of(runs, small, tmp_path):
    """Not of a base that was exported itself, and lies under a module."""
    base = tmp_path / "base"
    shutil.copytree(small.base, base)
    (base / "README.md").write_text("Written by peftdebias 0 from a run.")
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(small.base), str(base)))
    before = tree(tmp_path)
    said = cli("export", run, "--as", "merged", "--out", base, "--overwrite")
    assert said.code == 2 and said.err.splitlines()[-1] == f"peftdebias: --out {base}: is read, as {base}; expected another place, so that nothing is lost"
    assert tree(tmp_path) == before


def test_import_for_another_base(runs, small, tmp_path):
    done("export", runs / "prefix", "--as", "peft", "--out", tmp_path / "p")
    other = save_bert(tmp_path / "other", weights.load(small.base).tokenizer, layers=3)
    said = cli("import", tmp_path / "p", "--model", other, "--axis", "gender", "--out", tmp_path / "out")
    assert said.code == 2 and "num_layers: expected 3, got 2" in said.err and not (tmp_path / "out").exists()


def test_a_base_that_a_folder_does_not_name_is_told_of(runs, small, tmp_path):
    done("export", runs / "lora", "--as", "peft", "--out", tmp_path / "p")
    tokenizer = weights.load(small.base).tokenizer
    other, same = save_bert(tmp_path / "other", tokenizer, seed=5), shutil.copytree(small.base, tmp_path / "same")
    for base, told in ((other, True), (same, False), (small.base, False)):
        said = done("import", tmp_path / "p", "--model", base, "--axis", "gender", "--out", tmp_path / "out", "--overwrite")
        assert ("warning: " in said.err) == told
        assert not told or re.search(f"warning: {tmp_path}/p: names the base {small.base}, with checksum [0-9a-f]{{12}}; bound to {other}, with [0-9a-f]{{12}}$", said.err, re.M)


def test_public_names(runs, small, tmp_path, monkeypatch):
    peftdebias.export_adapter(runs / "lora", "peft", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["inference_mode"]
    monkeypatch.chdir(small.base.parent)
    assert peftdebias.import_adapter(tmp_path / "a", small.base.name, "gender", tmp_path / "b") == tmp_path / "b"
    assert checkpoint.read_config(tmp_path / "b")["model"] == str(small.base.resolve())  # from whatever folder it is read
    for axis in ("a/b", " "):
        with pytest.raises(ConfigError, match=f"^--axis: expected a name without /, got '{axis}'$"):
            peftdebias.import_adapter(tmp_path / "a", small.base, axis, tmp_path / "c")
    with pytest.raises(ConfigError, match="--as: expected one of hf, peft, merged, got 'onnx'"):
        peftdebias.export_adapter(runs / "lora", "onnx", tmp_path / "c")


def test_a_classifier_that_came_along_needs_the_pooler_it_was_trained_on(small, tmp_path):
    """peft saves BERT's classifier without its pooler: the base must have that."""
    tokenizer = weights.load(small.base).tokenizer
    config = weights.load_model(small.base)[0].config
    for pooler in (True, False):
        model = weights.Model(config, labels=("a", "b", "c"))
        model.initialize(model, torch.Generator().manual_seed(1))
        folder, base = tmp_path / f"peft-{pooler}", tmp_path / f"base-{pooler}"
        write_peft(folder, create("lora", config), model)
        head, model.classifier = model.classifier, None
        if pooler:
            model.carried = {f"classifier.dense.{n}": p.detach() for n, p in head.dense.named_parameters()}
        weights.save_model(model, base, tokenizer)
        said = cli("import", folder, "--model", base, "--axis", "gender", "--out", tmp_path / f"out-{pooler}")
        if not pooler:
            assert said.code == 2 and f"{base}: expected a model with classifier.dense.weight: it is neither there nor beside the adapter" in said.err
            continue
        again = checkpoint.load_run(tmp_path / "out-True").model.classifier
        assert again.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and all(torch.equal(p, q) for p, q in zip(again.parameters(), head.parameters(), strict=True))
