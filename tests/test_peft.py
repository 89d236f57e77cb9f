"""peft's folders: the same numbers and the same outputs through files both ways, and each that cannot be read is named."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftdebias
from peftdebias import checkpoint, cli, interchange, patch
from peftdebias.errors import AdapterError
from peftdebias.interchange.folders import Fields
from peftdebias.interchange.peft import _prompt_learning, write as write_peft
from peftdebias.methods import create
from peftdebias.sites import EncoderConfig
from peftdebias.tokens import STYLES, wordpiece
from peftdebias.weights import save_model

from .outside import LAYERS, assert_close, attached, batch_for, class_logits, drawn_model, library, mlm_logits, twin, with_peft
from .outside import one_thread, ragged  # noqa: F401

POSITIONED = {"length": 5, "positioned": True}
TOKENIZER = wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "he", "she"])
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


# ---------------------------------------------------------------- both ways

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
    write_peft(tmp_path, module, model, "base")
    other = peft.PeftModel.from_pretrained(twin(model, head), str(tmp_path), autocast_adapter_dtype=False).double().eval()
    assert_close(*answers(model, other, head, name))
    again = interchange.read(tmp_path, model.config).method
    assert again.config == module.config and {n: t.tolist() for n, t in again.state().items()} == {n: t.tolist() for n, t in module.state().items()}


@pytest.mark.parametrize("options,alpha", [({"rank": 4}, 8), ({"rank": 4, "rank_stabilized": True}, 16)])
def test_the_alpha_that_a_lora_has_by_itself_is_written(options, alpha, tmp_path):
    model = drawn_model()
    module = attached(model, "gender", "lora", **options)
    write_peft(tmp_path, module, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == alpha
    assert interchange.read(tmp_path, model.config).method.config.scale == module.config.scale


def test_a_reparametrised_prefix_is_written_flat(tmp_path):
    model = drawn_model()
    module = attached(model, "gender", "prefix", **POSITIONED, reparametrised=True, inner=11)
    write_peft(tmp_path, module, model)
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
        write_peft(tmp_path / "out", attached(model, "gender", method, **options), model)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad folders

@pytest.fixture
def theirs(tmp_path):
    """(folder of a written LoRA, prefix, ... and a function that changes its configuration or tensors)."""
    def make(method="lora", changes=None, tensors=None, **options):
        model = drawn_model()
        folder = tmp_path / method
        write_peft(folder, attached(model, "gender", method, **options), model)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
        if tensors:
            save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder, model.config
    return make


@pytest.mark.parametrize("changes,words", [
    ({"peft_type": "P_TUNING"}, "peft_type: expected one of LORA, IA3, PREFIX_TUNING, PROMPT_TUNING, got 'P_TUNING'"),
    ({"target_modules": "all-linear"}, "target_modules: expected a list of names .*, got \"all-linear\""),
    ({"target_modules": ["query", 3]}, r"target_modules: expected a list of names .*, got \[\"query\", 3\]"),
    ({"target_modules": r".*\.query"}, "target_modules: expected a list of names"), ({"layers_to_transform": [0]}, r"layers_to_transform: expected \[0, 1, 2\], got \[0\]"),
    ({"rank_pattern": {"query": 4}}, "rank_pattern: expected none .*, got {\"query\": 4}"), ({"alpha_pattern": {"query": 4}}, "alpha_pattern: expected none"),
    ({"use_dora": True}, "use_dora: expected none .*, got true"), ({"bias": "lora_only"}, "bias: expected \"none\", got \"lora_only\""),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true or false or .*, got \"pissa\""), ({"new_thing": {"a": 1}}, "new_thing: expected none"),
    ({"r": "8"}, "r: expected int, got '8'"), ({"r": True}, "r: expected int, got True"), ({"r": 0}, "lora rank: expected at least 1, got 0"), ({"r": None}, "r: expected int, got None"),
    ({"lora_dropout": 1.5}, "lora dropout: expected a share"), ({"r": 4}, r"query.lora_A.weight: expected shape \[4, 21\], got \[2, 21\]"),
    ({"target_modules": ["query"]}, "expected 6 tensors of a LORA module as configured, got .*self.value.lora_A.weight besides"),
    ({"target_modules": ["query", "key", "value"]}, "expected the tensor .*self.key.lora_A.weight, found none"),
    ({"target_modules": ["layer.0.attention.self.query"]}, "target_modules: expected the same linears in every layer, got attention.query in layers 0 of 3"),
    ({"target_modules": ["nothing"]}, "lora targets: expected at least one linear, got none"), ({"target_modules": ["uery"]}, "lora targets: expected at least one linear, got none"),
])  # fmt: skip
def test_a_lora_configuration_that_cannot_be_read_is_named(changes, words, theirs):
    folder, config = theirs(changes=changes, rank=2)
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, config)
    assert str(error.value).startswith(str(folder / "adapter_")) and "\n" not in str(error.value)


def test_an_alpha_that_is_not_there_is_theirs(theirs):
    folder, config = theirs(changes={"lora_alpha": None}, rank=2)
    assert interchange.read(folder, config).method.config.scale == 8 / 2


@pytest.mark.parametrize("short", ["", "bert."])
def test_a_tensor_under_two_names_is_refused(short, theirs):
    """Which of the two is meant cannot be known."""
    def twice(tensors):
        return tensors | {name.replace("base_model.model.bert.", short): tensor + 1 for name, tensor in tensors.items() if name.endswith("layer.0.attention.self.query.lora_A.weight")}

    folder, config = theirs(tensors=twice, rank=2)
    with pytest.raises(AdapterError, match=f"^{folder}/adapter_model.safetensors: expected each tensor under one name, got bert.encoder.layer.0.attention.self.query.lora_A.weight under 2$"):
        interchange.read(folder, config)


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION", None])
def test_a_classifier_comes_along_with_the_task_that_answers_texts(task, theirs):
    folder, config = theirs(changes={"task_type": task}, tensors=lambda t: t | {"base_model.model.classifier.weight": torch.zeros(2, 21), "base_model.model.classifier.bias": torch.zeros(2)})
    assert set(interchange.read(folder, config).heads) == {"classifier.output.weight", "classifier.output.bias"}


@pytest.mark.parametrize("method,options,changes,words", [
    ("prefix", POSITIONED, {"num_layers": 4}, "num_layers: expected 3, got 4"), ("prefix", POSITIONED, {"token_dim": 8}, "token_dim: expected 21, got 8"),
    ("prefix", POSITIONED, {"num_attention_heads": 7}, "num_attention_heads: expected 3, got 7"),
    ("prefix", POSITIONED, {"num_virtual_tokens": 4}, r"prompt_embeddings: expected shape \[4, 126\], got \[5, 126\]"),
    ("prefix", POSITIONED, {"num_transformer_submodules": 2}, "num_transformer_submodules: expected 1, got 2"),
    ("prefix", POSITIONED, {"num_transformer_submodules": True}, "num_transformer_submodules: expected 1, got true"),
    ("prompt", POSITIONED | {"first_row": "prompt"}, {"num_virtual_tokens": 6}, r"prompt_embeddings: expected shape \[6, 21\], got \[5, 21\]"),
    ("ia3", {}, {"feedforward_modules": []}, r"output.dense.ia3_l: expected shape \[21, 1\], got \[1, 41\]"),
])  # fmt: skip
def test_other_configurations_that_do_not_fit(method, options, changes, words, theirs):
    folder, config = theirs(method, changes, **options)
    with pytest.raises(AdapterError, match=words):
        interchange.read(folder, config)


@pytest.mark.parametrize("method,options,changes,words", [
    ("lora", {}, {"r": 10**9}, r"query.lora_A.weight: expected shape \[1000000000, 21\], got \[8, 21\]"),
    ("lora", {}, {"r": 10**18}, "adapter_config.json: lora: expected sizes that a tensor can have, got LoRAConfig.rank=1000000000000000000,"),
    ("lora", {}, {"r": 10**400}, "adapter_config.json: lora: expected sizes that a tensor can have, got LoRAConfig.rank=1000"),
    ("lora", {}, {"lora_alpha": 10**400}, "adapter_config.json: lora_alpha: expected a finite number, got 1000"),
    ("lora", {}, {"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha: expected a finite number, got nan"),
    ("prefix", POSITIONED, {"num_virtual_tokens": 10**9}, "num_virtual_tokens: expected at most 50, which leave a text 3 of the model's 53 positions, got 10000000"),
    ("prompt", POSITIONED | {"first_row": "prompt"}, {"num_virtual_tokens": 10**9}, "num_virtual_tokens: expected at most 50, which leave a text 3 of the model's 53 positions, got 10000000"),
    ("prompt", POSITIONED | {"first_row": "prompt"}, {"num_virtual_tokens": 10**30}, "num_virtual_tokens: expected at most 50, which leave a text 3 of the model's 53 positions, got 10000000"),
])  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_made(method, options, changes, words, theirs, little_memory):
    folder, config = theirs(method, changes, **options)
    with pytest.raises(AdapterError, match=words) as error:
        interchange.read(folder, config)
    assert str(error.value).startswith(str(folder / "adapter_")) and "\n" not in str(error.value)


def test_a_small_file_of_absurd_shapes_is_refused(theirs, little_memory):
    """Strides of 0, or an empty dimension: the tensors agree with the configuration, and only the file's size says that they are not there."""
    folder, config = theirs("prompt", {"num_virtual_tokens": 10**9}, **POSITIONED, first_row="prompt")
    config = dataclasses.replace(config, max_positions=2 * 10**9)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": torch.zeros(1, 1).expand(10**9, 21)}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: prompt_embeddings: expected no more than the file's .* bytes, got shape \[1000000000, 21\] of 84,000,000,000"):
        interchange.read(folder, config)
    for tensor in (torch.zeros(10**9, 0), torch.zeros(5, 21, device="meta"), torch.zeros(5, 21).to_sparse()):
        torch.save({"prompt_embeddings": tensor}, folder / "adapter_model.bin")
        with pytest.raises(AdapterError, match="adapter_model.bin: .*expected (no more than the file's|tensors by name|plain tensors)"):
            interchange.read(folder, config)


def test_tensors_that_do_not_fit(theirs):
    first = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    for tensors, words in ((lambda t: t | {"base_model.model.bert.pooled.x": torch.zeros(1)}, "expected 12 tensors .*, got bert.pooled.x besides"),
                           (lambda t: t | {"base_model.model.bert.pooler.dense.lora_A.weight": torch.zeros(1)},
                            "adapter_model.safetensors: expected modules of the encoder and whole heads, got bert.pooler.dense.lora_A.weight"),
                           (lambda t: {n: x for n, x in t.items() if n != first}, "expected the tensor bert.encoder.*query.lora_A.weight, found none"),
                           (lambda t: t | {first: t[first].int()}, "expected floating-point numbers, got int32")):
        folder, config = theirs(tensors=tensors)
        with pytest.raises(AdapterError, match=words):
            interchange.read(folder, config)


def test_files_that_cannot_be_read(theirs, tmp_path):
    folder, config = theirs()
    path, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = settings.read_text()
    for text, words in (("{", "expected JSON"), ('{"r": ' + "1" * 5000 + "}", "expected JSON"), ("[" * 10**5, "expected JSON"), ("[]", "expected a JSON object, got list"), ("{}", "expected peft's peft_type, or AdapterHub's config and model_type; got no keys")):
        settings.write_text(text)
        with pytest.raises(AdapterError, match=words):
            interchange.read(folder, config)
    settings.write_text(kept)
    torch.save(load_file(path), folder / "adapter_model.bin")
    tensors = load_file(path)
    spoilt = next(iter(tensors))
    save_file({name: t.fill_(float("inf")) if name == spoilt else t for name, t in tensors.items()}, path)
    with pytest.raises(AdapterError, match=rf"adapter_model.safetensors: {spoilt.removeprefix('base_model.model.')}: expected finite numbers, got {tensors[spoilt].numel()} of {tensors[spoilt].numel()} that are"):
        interchange.read(folder, config)
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


# ---------------------------------------------------------------- heads that came along

@pytest.mark.parametrize("kind,head", [("bert", "cls"), ("roberta", "lm_head")])
def test_a_masked_lm_head_that_was_trained_beside_the_module_is_carried(kind, head, tmp_path):
    """peft trains a copy of the head, whose decoder is then no word embedding any more."""
    model = shrunk(drawn_model(kind, **{"pad_id": 1} if kind == "roberta" else {}), "mlm").float()
    save_model(model, tmp_path / "base", TOKENIZER)
    wrapped = with_peft(model, "mlm", "LoraConfig", r=2, modules_to_save=[head]).float()
    generator = torch.Generator().manual_seed(5)
    for _, p in sorted(wrapped.named_parameters()):
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "theirs")
    interchange.import_adapter(tmp_path / "theirs", tmp_path / "base", "gender", tmp_path / "run")
    run = checkpoint.load_run(tmp_path / "run")
    assert not torch.equal(run.model.mlm.decoder.weight, run.model.encoder.embeddings.word.weight)
    ours, expected = answers(run.model.double(), wrapped.double(), "mlm", "lora")
    assert_close(ours, expected)


def test_a_head_with_another_number_of_labels_has_no_names_from_the_base(theirs, tmp_path, capsys):
    folder, _ = theirs(tensors=lambda t: t | {"base_model.model.classifier.weight": torch.zeros(2, 21), "base_model.model.classifier.bias": torch.zeros(2)}, rank=2)
    save_model(drawn_model().float(), tmp_path / "base", TOKENIZER)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {str(i): "abcde"[i] for i in range(5)}}))
    assert cli.main(["import", str(folder), "--model", str(tmp_path / "base"), "--axis", "gender", "--out", str(tmp_path / "run")]) == 0
    assert f"the head beside the module came along: {tmp_path / 'base'} with it is {tmp_path / 'run' / 'model'}\n" in capsys.readouterr().out
    assert checkpoint.load_run(tmp_path / "run").model.classifier.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("values, words", [(torch.full((2,), float("nan")), "classifier.output.bias: expected finite numbers, got 2 of 2"),
                                           (torch.zeros(2, dtype=torch.int32), "classifier.output.bias: expected floating-point numbers, got int32")])
def test_a_head_of_wrong_numbers_is_named(values, words, theirs, tmp_path):
    folder, _ = theirs(tensors=lambda found: found | {"base_model.model.classifier.bias": values, "base_model.model.classifier.weight": torch.zeros(2, 21)}, rank=2)
    save_model(drawn_model().float(), tmp_path / "base", TOKENIZER)
    with pytest.raises(AdapterError, match=f"^{folder}: a head with {words}"):
        interchange.import_adapter(folder, tmp_path / "base", "gender", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels,options,words", [
    (3, dict(task_type="TOKEN_CLS"), "task_type: expected SEQ_CLS or none beside a classifier, which would answer texts, got 'TOKEN_CLS'"),
    (1, dict(task_type="SEQ_CLS"), "a head with classifier.output.weight: expected a row a label, two or more, got 1 (a regression)"),
])  # fmt: skip
def test_a_head_that_labels_no_texts_is_refused(labels, options, words, tmp_path):
    transformers, peft = library("transformers"), library("peft")
    small_config = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=30, max_position_embeddings=16)
    base = transformers.BertModel(transformers.BertConfig(**small_config))
    base.save_pretrained(tmp_path / "base")
    wordpiece([*STYLES["bert"].values(), "a", "b"]).save(tmp_path / "base")
    cls = transformers.BertForTokenClassification if labels == 3 else transformers.BertForSequenceClassification
    peft.get_peft_model(cls.from_pretrained(tmp_path / "base", num_labels=labels), peft.LoraConfig(r=2, target_modules=["query"], **options)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=re.escape(words)):
        peftdebias.import_adapter(tmp_path / "theirs", tmp_path / "base", "gender", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [13, 14])
def test_a_prefix_that_leaves_no_text_is_refused(length, tmp_path):
    fields = {"peft_type": "PREFIX_TUNING", "num_layers": 1, "token_dim": 8, "num_attention_heads": 2, "num_transformer_submodules": 1, "num_virtual_tokens": length}
    config = EncoderConfig(kind="bert", layers=1, hidden=8, heads=2, feed_forward=8, vocab=30, max_positions=16)
    if length == 13:
        assert _prompt_learning(Fields(tmp_path, fields), config) == 13
    else:
        with pytest.raises(AdapterError, match="num_virtual_tokens: expected at most 13, which leave a text 3 of the model's 16 positions, got 14"):
            _prompt_learning(Fields(tmp_path, fields), config)
