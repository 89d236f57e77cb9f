"""Files of others: the same numbers and the same outputs through files both ways with peft, inwards from AdapterHub (recorded), and merged folders read back."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftdebias
from peftdebias import checkpoint, interchange, patch, weights
from peftdebias.batches import Sample, pack
from peftdebias.errors import AdapterError, ConfigError
from peftdebias.methods import create

from .outside import LAYERS, assert_close, attached, batch_for, class_logits, drawn_model, library, mlm_logits, one_thread, ragged, twin, with_peft  # noqa: F401
from .small import cli, done, save_bert, sha256, small, tree  # noqa: F401

FIXTURES = Path(__file__).parent / "fixtures"
POSITIONED = {"length": 5, "positioned": True}
# our method and options; theirs and its fields
KINDS = {
    "lora": ("lora", {"rank": 3, "alpha": 7.0, "targets": ("query", "value")}, "LoraConfig", {"r": 3, "lora_alpha": 7}),
    "lora rank-stabilised, wide": ("lora", {"rank": 3, "alpha": 16.0, "rank_stabilized": True, "targets": ("key", "output", "up", "down"), "dropout": 0.25}, "LoraConfig",
                                   {"r": 3, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.25, "target_modules": ["key", "output.dense", "intermediate.dense"]}),
    "lora, second linears": ("lora", {"rank": 2, "alpha": 4.0, "targets": ("down",)}, "LoraConfig",
                             {"r": 2, "lora_alpha": 4, "target_modules": [f"encoder.layer.{i}.output.dense" for i in range(LAYERS)]}),
    "ia3": ("ia3", {"inputs": ("output", "down")}, "IA3Config", {}),
    "ia3, the paper's": ("ia3", {}, "IA3Config", {"target_modules": ["key", "value", *(f"layer.{i}.output.dense" for i in range(LAYERS))],
                                                  "feedforward_modules": [f"layer.{i}.output.dense" for i in range(LAYERS)]}),
    "prefix": ("prefix", POSITIONED, "PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prefix projected": ("prefix", POSITIONED, "PrefixTuningConfig", {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 11}),
    "prompt": ("prompt", POSITIONED | {"first_row": "prompt"}, "PromptTuningConfig", {"num_virtual_tokens": 5}),
}
CASES = [(kind, head, name) for name in KINDS for kind in ("bert", "roberta") for head in ("class", "mlm") if (head == "class" or name.startswith(("lora", "prefix")))]
each = pytest.mark.parametrize("kind,head,name", CASES)


def task_of(head: str, name: str) -> dict:
    return {"task_type": "SEQ_CLS"} if head == "class" else {"task_type": "FEATURE_EXTRACTION"} if name.startswith("prefix") else {}


def shrunk(model, head: str):
    """The model with one head, in float32 values: files of float32 lose nothing."""
    setattr(model, {"class": "mlm", "mlm": "classifier"}[head], None)
    return model.float().double()


def answers(model, other, head: str, name: str):
    """(ours, theirs) on the same texts; their feature extraction drops segment ids."""
    batch = ragged(segments=1) if head == "mlm" and name.startswith("prefix") else batch_for(model, head)
    return getattr(model, f"{head}_logits")(batch), (class_logits if head == "class" else mlm_logits)(other, batch)


# ---------------------------------------------------------------- peft, both ways

@each
def test_what_peft_saves_is_read(kind, head, name, tmp_path):
    method, options, theirs, fields = KINDS[name]
    model = shrunk(drawn_model(kind), head)
    wrapped = with_peft(model, head, theirs, **task_of(head, name), **fields).float()
    generator = torch.Generator().manual_seed(5)
    for key, p in sorted(wrapped.named_parameters()):
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    found = interchange.read(tmp_path, model.config)
    assert found.method.config == create(method, model.config, options=options).config
    assert (set(found.heads) == set()) == (head == "mlm") and found.origin["library"].startswith("peft 0.")
    for key, tensor in found.heads.items():
        dict(model.named_parameters())[key].data.copy_(tensor)
    patch.attach(model, "gender", found.method)
    if name == "prefix projected":  # their files hold what the MLP gives, in float32
        wrapped = library("peft").PeftModel.from_pretrained(twin(model, head), str(tmp_path), autocast_adapter_dtype=False).eval()
    ours, expected = answers(model.double(), wrapped.double(), head, name)
    assert_close(ours, expected)
    with model.without("gender"):
        assert (answers(model, wrapped, head, name)[0] - expected).abs().max() > 1e-3


@each
def test_what_is_written_peft_reads(kind, head, name, tmp_path):
    peft = library("peft")
    method, options, _, _ = KINDS[name]
    model = shrunk(drawn_model(kind), head)
    module = attached(model, "gender", method, **options)
    model.float().double()
    interchange.write_peft(tmp_path, module, model, "base")
    other = peft.PeftModel.from_pretrained(twin(model, head), str(tmp_path), autocast_adapter_dtype=False).double().eval()
    assert_close(*answers(model, other, head, name))
    again = interchange.read(tmp_path, model.config).method
    assert again.config == module.config and {n: t.tolist() for n, t in again.state().items()} == {n: t.tolist() for n, t in module.state().items()}


def test_a_reparametrised_prefix_is_written_flat(tmp_path):
    model = drawn_model()
    module = attached(model, "gender", "prefix", **POSITIONED, reparametrised=True, inner=11)
    interchange.write_peft(tmp_path, module, model)
    again = interchange.read(tmp_path, model.config).method
    assert again.config.reparametrised is False
    assert all(torch.equal(t, module.state()[n].float()) for n, t in again.state().items())


@pytest.mark.parametrize("method,options,words", [
    ("prefix", {"length": 5}, "prefix: its texts keep their positions, and peft moves them on"),
    ("prompt", {"length": 5}, "prompt: peft's vectors take the first positions"),
    ("prompt", POSITIONED, "prompt: peft's vectors take the first positions"),
    ("adapter", {}, "adapter: peft has no such module; expected one of lora, ia3, prefix, prompt$"),
    ("bias", {}, "bias: peft has no such module; .*; --as merged writes it into the weights"),
])
def test_what_peft_cannot_say_is_refused_by_name(method, options, words, tmp_path):
    model = drawn_model()
    with pytest.raises(AdapterError, match=words):
        interchange.write_peft(tmp_path / "out", attached(model, "gender", method, **options), model)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- AdapterHub, as recorded by make_adapterhub_fixtures.py

@pytest.fixture(scope="module")
def hub():
    return json.loads((FIXTURES / "adapterhub.json").read_text()), load_file(FIXTURES / "adapterhub.safetensors")


def part(tensors, prefix: str):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def hub_folder(hub, name: str, folder: Path, binary: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(hub[0]["kinds"][name]["adapter_config"]))
    tensors = part(hub[1], f"{name}/adapter/")
    torch.save(tensors, folder / "pytorch_adapter.bin") if binary else save_file(tensors, folder / "adapter.safetensors")
    return folder


def hub_model(hub, kind: str, folder: Path):
    about, tensors = hub
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about["models"][kind]))
    save_file(part(tensors, f"{kind}/model/"), folder / "model.safetensors")
    return weights.load_model(folder, dtype=torch.float64)[0]


HUB = {"seq_bn": "adapter", "double_seq_bn": "adapter", "seq_bn_gelu": "adapter", "par_bn": "adapter", "lora": "lora", "prefix": "prefix", "prefix_roberta": "prefix"}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", HUB)
def test_what_adapterhub_saves_is_read(name, binary, hub, tmp_path):
    about, tensors = hub
    kind = about["kinds"][name]["model"]
    model = hub_model(hub, kind, tmp_path / "model")
    found = interchange.read(hub_folder(hub, name, tmp_path / "adapter", binary), model.config)
    assert found.method.name == HUB[name] and found.origin["library"] == "adapters.1.3.0"
    patch.attach(model, "gender", found.method)
    ids = tensors[f"{kind}/ids"]
    batch = pack([Sample(ids[b, :n].numpy(), numpy.arange(n), None) for b, n in enumerate(about["lengths"])])
    expected = tensors[f"{name}/logits"]
    assert_close(model.double().mlm_logits(batch), expected)
    with model.without("gender"):
        assert (model.mlm_logits(batch) - expected).abs().max() > 1e-2


def test_lora_of_before_their_scaling_was_mended(hub, tmp_path):
    """Before adapters 1.1 alpha did nothing; their own loader sets it to r."""
    config = drawn_for(hub, "bert")
    folder = hub_folder(hub, "lora", tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    assert interchange.read(folder, config).method.config.scale == 7 / 3
    (folder / "adapter_config.json").write_text(json.dumps(values | {"version": "adapters.1.0.1"}))
    assert interchange.read(folder, config).method.config.scale == 1


def drawn_for(hub, kind: str):
    c = hub[0]["models"][kind]
    return weights.EncoderConfig(kind=kind, layers=c["num_hidden_layers"], hidden=c["hidden_size"], heads=c["num_attention_heads"], feed_forward=c["intermediate_size"],
                                 vocab=c["vocab_size"], max_positions=c["max_position_embeddings"])


@pytest.mark.parametrize("name,changes,words", [
    ("seq_bn", {"ln_after": True}, "ln_after: expected none .there is no such thing here., got true"),
    ("seq_bn", {"use_gating": True}, "use_gating: expected none"), ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter: expected none .*, got \"nice\""),
    ("seq_bn", {"phm_layer": True}, "phm_layer: expected none"), ("seq_bn", {"leave_out": [1]}, "leave_out: expected none"),
    ("seq_bn", {"scaling": "learned"}, "scaling: expected int or float, got 'learned'"),
    ("seq_bn", {"residual_before_ln": False}, "residual_before_ln: expected true, got false"),
    ("seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity: expected one of relu, gelu, .*, got 'leakyrelu'"),
    ("seq_bn", {"reduction_factor": {"default": 2}}, "reduction_factor: expected int or float, got {'default': 2}"),
    ("seq_bn", {"reduction_factor": 0}, "reduction_factor: expected more than 0, got 0"),
    ("seq_bn", {"reduction_factor": 2}, r"output.adapters.NAME.adapter_down.0.weight: expected shape \[7, 14\], got \[4, 14\]"),
    ("seq_bn", {"mh_adapter": True}, "expected those of seq_bn, double_seq_bn or par_bn, got .True, True, True, False."),
    ("seq_bn", {"architecture": "loreft"}, "architecture: expected lora, prefix_tuning or none .a bottleneck., got 'loreft'"),
    ("lora", {"composition_mode": "scale"}, "composition_mode: expected \"add\", got \"scale\""), ("lora", {"use_dora": True}, "use_dora: expected none"),
    ("lora", {"attn_matrices": ["q", "o"]}, "attn_matrices: expected some of q, k, v, got 'o'"),
    ("lora", {"output_lora": False}, "expected 12 tensors of a lora module as configured, got .*output.dense.loras.NAME.lora_A besides"),
    ("prefix", {"flat": False}, "flat: expected true, got false; call eject_prefix_tuning"),
])  # fmt: skip
def test_what_adapterhub_says_and_we_cannot_is_refused(name, changes, words, hub, tmp_path):
    folder = hub_folder(hub, name, tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text())
    values["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, drawn_for(hub, "bert"))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_adapterhub_for_another_base(hub, tmp_path):
    with pytest.raises(AdapterError, match="model_type: expected \"roberta\", got \"bert\""):
        interchange.read(hub_folder(hub, "lora", tmp_path / "a"), drawn_for(hub, "roberta"))


# ---------------------------------------------------------------- bad peft folders

@pytest.fixture
def theirs(tmp_path):
    """(folder of a written LoRA, prefix, ... and a function that changes its configuration or tensors)."""
    def make(method="lora", changes=None, tensors=None, **options):
        model = drawn_model()
        folder = tmp_path / method
        interchange.write_peft(folder, attached(model, "gender", method, **options), model)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
        if tensors:
            save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder, model.config
    return make


@pytest.mark.parametrize("changes,words", [
    ({"peft_type": "P_TUNING"}, "peft_type: expected one of LORA, IA3, PREFIX_TUNING, PROMPT_TUNING, got 'P_TUNING'"),
    ({"target_modules": "all-linear"}, "target_modules: expected a list of names .*, got \"all-linear\""),
    ({"target_modules": r".*\.query"}, "target_modules: expected a list of names"), ({"layers_to_transform": [0]}, r"layers_to_transform: expected .*, got \[0\]"),
    ({"rank_pattern": {"query": 4}}, "rank_pattern: expected none .*, got {\"query\": 4}"), ({"alpha_pattern": {"query": 4}}, "alpha_pattern: expected none"),
    ({"use_dora": True}, "use_dora: expected none .*, got true"), ({"bias": "lora_only"}, "bias: expected \"none\", got \"lora_only\""),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true or false or .*, got \"pissa\""), ({"new_thing": {"a": 1}}, "new_thing: expected none"),
    ({"r": "8"}, "r: expected int, got '8'"), ({"r": True}, "r: expected int, got True"), ({"r": 0}, "lora rank: expected at least 1, got 0"), ({"r": None}, "r: expected int, got None"),
    ({"lora_dropout": 1.5}, "lora dropout: expected a share"), ({"r": 4}, r"query.lora_A.weight: expected shape \[4, 21\], got \[2, 21\]"),
    ({"target_modules": ["query"]}, "expected 6 tensors of a LORA module as configured, got .*self.value.lora_A.weight besides"),
    ({"target_modules": ["query", "key", "value"]}, "expected the tensor .*self.key.lora_A.weight, found none"),
    ({"target_modules": ["layer.0.attention.self.query"]}, "target_modules: expected the same linears in every layer, got attention.query in layers 0 of 3"),
    ({"target_modules": ["nothing"]}, "lora targets: expected at least one linear, got none"),
])  # fmt: skip
def test_a_lora_configuration_that_cannot_be_read_is_named(changes, words, theirs):
    folder, config = theirs(changes=changes, rank=2)
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, config)
    assert str(error.value).startswith(str(folder / "adapter_")) and "\n" not in str(error.value)


@pytest.mark.parametrize("method,options,changes,words", [
    ("prefix", POSITIONED, {"num_layers": 4}, "num_layers: expected 3, got 4"), ("prefix", POSITIONED, {"token_dim": 8}, "token_dim: expected 21, got 8"),
    ("prefix", POSITIONED, {"num_attention_heads": 7}, "num_attention_heads: expected 3, got 7"),
    ("prefix", POSITIONED, {"num_virtual_tokens": 4}, r"prompt_embeddings: expected shape \[4, 126\], got \[5, 126\]"),
    ("prefix", POSITIONED, {"num_transformer_submodules": 2}, "num_transformer_submodules: expected 1, got 2"),
    ("prompt", POSITIONED | {"first_row": "prompt"}, {"num_virtual_tokens": 6}, r"prompt_embeddings: expected shape \[6, 21\], got \[5, 21\]"),
    ("ia3", {}, {"feedforward_modules": []}, r"output.dense.ia3_l: expected shape \[21, 1\], got \[1, 41\]"),
])  # fmt: skip
def test_other_configurations_that_do_not_fit(method, options, changes, words, theirs):
    folder, config = theirs(method, changes, **options)
    with pytest.raises(AdapterError, match=words):
        interchange.read(folder, config)


def test_tensors_that_do_not_fit(theirs):
    first = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    for tensors, words in ((lambda t: t | {"base_model.model.bert.pooled.x": torch.zeros(1)}, "expected 12 tensors .*, got bert.pooled.x besides"),
                           (lambda t: t | {"base_model.model.bert.pooler.dense.lora_A.weight": torch.zeros(1)},
                            "expected modules of the encoder and whole heads, got bert.pooler.dense.lora_A.weight"),
                           (lambda t: {n: x for n, x in t.items() if n != first}, "expected the tensor bert.encoder.*query.lora_A.weight, found none"),
                           (lambda t: t | {first: t[first].int()}, "expected floating-point numbers, got int32")):
        folder, config = theirs(tensors=tensors)
        with pytest.raises(AdapterError, match=words):
            interchange.read(folder, config)


def test_files_that_cannot_be_read(theirs, tmp_path):
    folder, config = theirs()
    path, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = settings.read_text()
    for text, words in (("{", "expected JSON"), ("[]", "expected a JSON object, got list"), ("{}", "expected peft's peft_type, or AdapterHub's config and model_type; got no keys")):
        settings.write_text(text)
        with pytest.raises(AdapterError, match=words):
            interchange.read(folder, config)
    settings.write_text(kept)
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="adapter_model.safetensors: cannot be read"):
        interchange.read(folder, config)
    path.unlink()
    assert interchange.read(folder, config).method.name == "lora"  # the .bin
    torch.save({"a": Path}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin: expected plain tensors, got UnpicklingError"):
        interchange.read(folder, config)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="expected adapter_model.safetensors or adapter_model.bin, found none"):
        interchange.read(folder, config)
    with pytest.raises(AdapterError, match="expected a peft or AdapterHub folder with adapter_config.json, found none"):
        interchange.read(tmp_path / "nowhere", config)


def test_an_encoder_wrapped_without_a_head(theirs):
    """Their names then have no `bert.`."""
    folder, config = theirs()
    before = interchange.read(folder, config).method.state()
    path = folder / "adapter_model.safetensors"
    save_file({n.replace(".model.bert.", ".model."): t for n, t in load_file(path).items()}, path)
    assert all(torch.equal(t, before[n]) for n, t in interchange.read(folder, config).method.state().items())


# ---------------------------------------------------------------- commands

@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):  # noqa: F811
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


def test_export_as_peft_and_import_again(runs, small, tmp_path):  # noqa: F811
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


def test_hf_is_the_runs_model(runs, tmp_path):
    done("export", runs / "plain", "--as", "hf", "--out", tmp_path / "hf")
    assert {n: s for n, s in tree(tmp_path / "hf").items() if n != "README.md"} == tree(runs / "plain" / "model")


def test_the_card(runs, tmp_path):
    done("export", runs / "debiased", "--as", "merged", "--out", tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    for words in ("# Debiasing: gender", "module: lora (rank 2", "learnt on the axis gender", "- base: ", "train.jsonl", "- accuracy: ", "## Limits",
                  "never its absence", "Gender is treated as binary", "word lists are narrow"):
        assert words in text, words
    done("export", runs / "lora", "--as", "peft", "--out", tmp_path / "b")
    assert "- loss: " in (tmp_path / "b" / "README.md").read_text() and "corpus" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("name,form,words", [
    ("lora", "hf", "a model folder cannot hold its lora; expected --as merged (in the weights) or --as peft (a module)"),
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
    done(*argv, "--overwrite")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "is no exported folder; it is not replaced" in cli(*argv, "--overwrite").err
    assert set(tree(tmp_path / "out")) == {"mine"}


def test_import_for_another_base(runs, small, tmp_path):  # noqa: F811
    done("export", runs / "prefix", "--as", "peft", "--out", tmp_path / "p")
    other = save_bert(tmp_path / "other", weights.load(small.base).tokenizer, layers=3)
    said = cli("import", tmp_path / "p", "--model", other, "--axis", "gender", "--out", tmp_path / "out")
    assert said.code == 2 and "num_layers: expected 3, got 2" in said.err and not (tmp_path / "out").exists()


def test_public_names(runs, small, tmp_path):  # noqa: F811
    peftdebias.export_adapter(runs / "lora", "peft", tmp_path / "a")
    assert peftdebias.import_adapter(tmp_path / "a", small.base, "gender", tmp_path / "b") == tmp_path / "b"
    with pytest.raises(ConfigError, match="--as: expected one of hf, peft, merged, got 'onnx'"):
        peftdebias.export_adapter(runs / "lora", "onnx", tmp_path / "c")


def test_a_classifier_that_came_along_needs_the_pooler_it_was_trained_on(small, tmp_path):  # noqa: F811
    """peft saves BERT's classifier without its pooler: the base must have that."""
    tokenizer = weights.load(small.base).tokenizer
    config = weights.load_model(small.base)[0].config
    for pooler in (True, False):
        model = weights.Model(config, labels=("a", "b", "c"))
        model.initialize(model, torch.Generator().manual_seed(1))
        folder, base = tmp_path / f"peft-{pooler}", tmp_path / f"base-{pooler}"
        interchange.write_peft(folder, create("lora", config), model)
        head, model.classifier = model.classifier, None
        if pooler:
            model.carried = {f"classifier.dense.{n}": p.detach() for n, p in head.dense.named_parameters()}
        weights.save_model(model, base, tokenizer)
        said = cli("import", folder, "--model", base, "--axis", "gender", "--out", tmp_path / f"out-{pooler}")
        if not pooler:
            assert said.code == 2 and "expected a model with classifier.dense.weight: it is neither there nor beside the adapter" in said.err
            continue
        again = checkpoint.load_run(tmp_path / "out-True").model.classifier
        assert again.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and all(torch.equal(p, q) for p, q in zip(again.parameters(), head.parameters(), strict=True))
