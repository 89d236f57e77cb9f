"""The encoder equals transformers, a plain twin (plain.py), and itself: packed as padded, rows asked for as all rows."""

import dataclasses
import functools
import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import kernels
from peftdebias.batches import Sample, pack
from peftdebias.encoder import Encoder, Model, parameter_at
from peftdebias.errors import ModelError
from peftdebias.kernels.dropout_ref import attention_keep
from peftdebias.methods import base_parameters
from peftdebias.ops.dropout import Drop, dropout_ref
from peftdebias.patch import train_only
from peftdebias.sites import ACTIVATIONS, TABLES, block_sites, key_value_sites, linear_shape, linear_sites, parameter_size
from peftdebias.weights import load_model, to_foreign

from . import outside
from .outside import HEADS, HIDDEN, LABELS, LAYERS, LENGTHS, POSITIONS, VOCAB, assert_close, one_thread, ragged  # noqa: F401
from .plain import KINDS, config, model_of, plain, some

# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_mlm_logits_equal_transformers(kind, dtype, tmp_path):
    theirs, ours = outside.pair(kind, tmp_path, dtype=dtype)
    batch = some(kind)
    with torch.no_grad():
        assert_close(ours.encoder(batch, all_rows=True), outside.hidden(theirs, batch), "hidden states")
        assert_close(ours.mlm_logits(batch), outside.mlm_logits(theirs, batch), "logits", logits=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_classifier_logits_equal_transformers(kind, dtype, tmp_path):
    theirs, ours = outside.pair(kind, tmp_path, "ForSequenceClassification", dtype)
    batch = some(kind, rows="first")
    with torch.no_grad():
        assert_close(ours.class_logits(batch), outside.class_logits(theirs, batch), "logits", logits=True)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu", "swish", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_activations_equal_transformers(kind, activation, tmp_path):
    """Feed-forward and BERT's masked-LM head follow the configuration; RoBERTa's head is always GELU."""
    theirs, ours = outside.pair(kind, tmp_path, hidden_act=activation)
    batch = some(kind)
    with torch.no_grad():
        assert_close(ours.mlm_logits(batch), outside.mlm_logits(theirs, batch))


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_parameters_equal_transformers(kind, head, tmp_path):
    theirs, ours = outside.pair(kind, tmp_path, head)
    if head == "ForMaskedLM":
        batch = some(kind)
        losses = [F.cross_entropy(logits(model, batch), batch.targets) for model, logits in ((theirs, outside.mlm_logits), (ours, Model.mlm_logits))]
    else:
        batch, labels = some(kind, rows="first"), torch.arange(len(LENGTHS)) % len(LABELS)
        losses = [F.cross_entropy(logits(model, batch), labels) for model, logits in ((theirs, outside.class_logits), (ours, Model.class_logits))]
    assert_close(losses[1], losses[0], "loss")
    for loss in losses:
        loss.backward()
    found = to_foreign({name.removeprefix("encoder."): p.grad for name, p in ours.named_parameters()}, ours.config)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_stands_where_transformers_has_it(kind, tmp_path, monkeypatch):
    """transformers with our masks in place of its own, by the number of the call: any other place, order, rate or scale would differ."""
    def ours_instead(seed, heads, first=0):
        calls = itertools.count(first)

        def instead(x, p=0.5, training=True, inplace=False):
            if not training or not p:
                return x
            place, drop = next(calls), lambda rate, site: Drop(rate, seed, site)
            if x.dim() < 4:
                return dropout_ref(x.flatten(0, -2), *drop(p, place)).view(x.shape)
            batch, _, queries, keys = x.shape
            keep = attention_keep(torch.arange(batch * queries), 0, keys, heads, drop(p, place))  # [H, B * Sq, S]
            return torch.where(keep.view(heads, batch, queries, keys).transpose(0, 1), x * drop(p, place).scale, 0)

        monkeypatch.setattr(torch.nn.functional, "dropout", instead)

    def drawn(seed=0):
        torch.manual_seed(seed)
        return torch.randint(2 ** 62, (1,))

    rates = dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.4)
    batch = some(kind, lengths=(7, 7, 7), rows="first")
    theirs, ours = outside.pair(kind, tmp_path / "a", attn_implementation="eager", **rates)
    theirs.train(), ours.train()
    ours_instead(drawn(), HEADS)
    expected, found = outside.hidden(theirs, batch), seeded(lambda: ours.encoder(batch, all_rows=True))
    assert_close(found, expected, "hidden states")
    assert (found - ours.eval().encoder(batch, all_rows=True)).abs().max() > 0.1  # dropout did act
    # The head's own: theirs computes all rows of the last layer and ours one, so the encoder's dropout is off here.
    theirs, ours = outside.pair(kind, tmp_path / "b", "ForSequenceClassification", **rates | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    theirs.train(), ours.train()
    ours_instead(drawn(), HEADS, 3 * LAYERS + 1)
    if kind == "roberta":  # drops all rows of a text before it reads the first
        monkeypatch.setattr(theirs.classifier, "forward", functools.partial(_first_row_first, theirs.classifier))
    expected, found = (seeded(call) for call in (lambda: outside.class_logits(theirs, batch), lambda: ours.class_logits(batch)))
    assert_close(found, expected, "logits")
    assert (found - ours.eval().class_logits(batch)).abs().max() > 0.1


def _first_row_first(head, features):
    return type(head).forward(head, features[:, :1])


def seeded(call, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return call()


def test_the_real_model_equals_transformers(shared):
    folder = shared / "models" / "bert-tiny-mlm"
    theirs = outside.library("transformers").BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    model, report = load_model(folder)
    assert report.lines() == []
    batch = ragged((211, 1, 97, 13, 512), vocab=30522)
    with torch.no_grad():
        assert_close(model.encoder(batch, all_rows=True), outside.hidden(theirs, batch), "hidden states")
        assert_close(model.mlm_logits(batch), outside.mlm_logits(theirs, batch), "logits", logits=True)


# ---------------------------------------------------------------- against itself


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_equals_its_plain_twin(kind, activation):
    model, batch = model_of(kind, activation=activation), some(kind)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_each_text_alone(kind, dtype):
    model, batch = model_of(kind, dtype), some(kind)
    alone = [pack([Sample(ids.numpy(), numpy.zeros(0, int), segments=segments.numpy())])
             for ids, segments in zip(batch.ids.split(batch.lengths), batch.segments.split(batch.lengths))]
    with torch.no_grad():
        assert_close(model.encoder(batch, all_rows=True), torch.cat([model.encoder(one, all_rows=True) for one in alone]))


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("rows", ["some", "first", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_asked_for_equal_all_rows_in_values_and_gradients(kind, rows, layers):
    model, batch = model_of(kind, layers=layers), some(kind, rows=rows)
    asked, every = model.encoder(batch), model.encoder(batch, all_rows=True)
    assert every.shape == (sum(LENGTHS), HIDDEN) and asked.shape == (len(batch.rows), HIDDEN)
    assert_close(asked, every[batch.rows])
    weights = torch.randn(asked.shape, dtype=asked.dtype, generator=torch.Generator().manual_seed(1))
    parameters = dict(model.encoder.named_parameters())
    found, expected = (torch.autograd.grad((x * weights).sum(), list(parameters.values())) for x in (asked, every[batch.rows]))
    for name, one, other in zip(parameters, found, expected):
        assert_close(one, other, name)
        assert other.abs().max() > 1e-3, name


def test_no_rows_asked_for_give_none():
    model, batch = model_of(), pack([Sample(numpy.array([5, 6, 7]), numpy.zeros(0, int)), Sample(numpy.array([8]), numpy.zeros(0, int))])
    assert model.encoder(batch).shape == (0, HIDDEN)
    assert model.mlm_logits(batch).shape == (0, VOCAB)


def test_roberta_counts_positions_from_two():
    """The padding index is 1: rows 0 and 1 of the table are never read, the last text token reads row n + 1."""
    model, batch = model_of("roberta"), some("roberta", lengths=(3, 7))
    model.encoder(batch, all_rows=True).square().sum().backward()
    used = model.encoder.embeddings.position.weight.grad.abs().sum(1) > 0
    assert used.nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert len(used) == POSITIONS + 2


def test_an_untied_decoder_has_its_own_weight():
    model, batch = model_of(tied=False), some("bert")
    before = model.mlm_logits(batch)
    with torch.no_grad():
        model.mlm.decoder.weight[11] += 1.0
    changed = (model.mlm_logits(batch) - before).abs().amax(0) > 0
    assert changed.nonzero()[:, 0].tolist() == [11]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_longer_than_the_position_table_is_an_error(kind):
    model = model_of(kind)
    assert model.encoder(some(kind, lengths=(3, POSITIONS)), all_rows=True).isfinite().all()
    with pytest.raises(ModelError, match="text of 54 tokens: expected at most 53"):
        model.encoder(some(kind, lengths=(3, POSITIONS + 1)))


def test_heads_that_are_not_there_are_named():
    model, batch = Model(config()), some("bert", rows="first")
    with pytest.raises(ModelError, match="expected a model with a masked-LM head, got one without"):
        model.mlm_logits(batch)
    with pytest.raises(ModelError, match=r"expected a model with a classifier, got one without \(train one with `peftdebias downstream`\)"):
        model.class_logits(batch)


@pytest.mark.parametrize("changes, words", [
    (dict(kind="gpt2"), "model type: expected bert or roberta, got 'gpt2'"),
    (dict(heads=5), "hidden size 21: expected a multiple of the number of heads, got 5 heads"),
    (dict(activation="mish"), "activation: expected one of gelu, gelu_new, relu, silu, got 'mish'"),
    (dict(heads=0), "heads: expected a whole number of at least 1, got 0"),
    (dict(hidden="21"), "hidden: expected a whole number of at least 1, got '21'"),
    (dict(layers=None), "layers: expected a whole number of at least 1, got None"),
    (dict(max_positions=-1), "max_positions: expected a whole number of at least 1, got -1"),
    (dict(position_offset=-5), "position_offset: expected a whole number of at least 0, got -5"),
    (dict(position_offset=math.nan), "position_offset: expected a whole number of at least 0, got nan"),
    (dict(pad_id="x"), "pad_id: expected a whole number of at least -1, got 'x'"),
    (dict(tied=None), "tied: expected true or false, got None"),
])
def test_a_configuration_that_makes_no_sense_is_an_error(changes, words):
    with pytest.raises(ModelError, match=words):
        config(**changes)


def test_names_of_sites_are_names_of_the_model():
    c, encoder = config(), Encoder(config())
    assert linear_sites(c, ("attention.query",)) == ("layers.0.attention.query", "layers.1.attention.query", "layers.2.attention.query")
    assert len(linear_sites(c)) == 6 * LAYERS and len(block_sites(c)) == 2 * LAYERS and len(key_value_sites(c)) == LAYERS
    for site in linear_sites(c):
        name = site if site.rpartition(".")[2] in ("output", "up", "down") else site.rpartition(".")[0] + ".qkv"
        out, into = encoder.get_submodule(name).weight.shape
        assert linear_shape(c, site) == (out // (3 if name.endswith("qkv") else 1), into)
    for kind in KINDS:
        assert base_parameters(config(kind)) == sum(p.numel() for p in Encoder(config(kind)).parameters())


def test_fresh_weights_are_drawn_as_bert_draws_them():
    model = Model(config(hidden=211, heads=1, initializer_range=0.05), mlm=True)
    model.initialize(model.mlm, torch.Generator().manual_seed(0))
    drawn = model.mlm.dense.weight.detach().clone()
    n = drawn.numel()
    assert abs(drawn.mean()) < 4 * 0.05 / math.sqrt(n) and abs(drawn.std() - 0.05) < 4 * 0.05 / math.sqrt(2 * n)
    assert not model.mlm.dense.bias.any() and not model.mlm.norm.bias.any() and (model.mlm.norm.weight == 1).all()
    model.initialize(model.mlm, torch.Generator().manual_seed(0))
    assert torch.equal(model.mlm.dense.weight, drawn)


# ---------------------------------------------------------------- dropout


def test_dropout_is_off_in_eval_and_follows_the_seed_in_train():
    model, batch = model_of(), some("bert")
    quiet = model.encoder(batch)
    assert torch.equal(model.encoder(batch), quiet)
    model.train()
    one, same, other = seeded(lambda: model.encoder(batch)), seeded(lambda: model.encoder(batch)), seeded(lambda: model.encoder(batch), 1)
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, quiet)
    assert torch.equal(model.eval().encoder(batch), quiet)


# ---------------------------------------------------------------- frozen weights


def test_nothing_runs_backward_below_the_lowest_trained_layer(monkeypatch):
    model, batch = model_of(), some("bert")
    seen = []
    run = Encoder._layer
    monkeypatch.setattr(Encoder, "_layer", lambda self, i, given, *rest: seen.append((i, given[0].requires_grad)) or run(self, i, given, *rest))
    train_only(model, model.encoder.layers[1].parameters())
    loss = F.cross_entropy(model.mlm_logits(batch), batch.targets)
    assert seen == [(0, False), (1, False), (2, True)]
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("encoder.layers.1."), name


def test_a_frozen_linear_saves_no_input(monkeypatch):
    """Of all inputs of products, those of frozen weights are not kept for backward; a trained one's is."""
    model, batch = model_of(), some("bert")
    inputs, run = {}, F.linear

    def record(x, weight, bias=None):
        inputs.setdefault(weight.untyped_storage().data_ptr(), []).append(x)
        return run(x, weight, bias)

    def kept(trained):
        """For each linear of the encoder: whether an input of it is saved when `trained` is all that is trained, and layer 0 sends gradients up."""
        inputs.clear()
        train_only(model, [model.encoder.embeddings.norm.bias, *trained])
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add((t.data_ptr(), t.shape)) or t, lambda t: t):
            model.encoder(batch)
        return {name: any((x.data_ptr(), x.shape) in saved for x in inputs[module.weight.untyped_storage().data_ptr()])
                for name, module in model.encoder.named_modules() if isinstance(module, torch.nn.Linear)}

    monkeypatch.setattr(F, "linear", record)
    down = model.encoder.layers[1].feed_forward.down
    with kernels.use("torch"):
        frozen, one = kept([]), kept([down.weight])
    context = {f"layers.{i}.attention.output" for i in range(LAYERS)}  # what attention gives may be kept by attention itself
    assert len(frozen) == 4 * LAYERS and not any(saved for name, saved in frozen.items() if name not in context)
    assert [name for name, saved in one.items() if saved and name not in context] == ["layers.1.feed_forward.down"]


def test_a_classifier_reads_first_tokens_alone():
    model = outside.drawn_model()
    ids = numpy.arange(5, 14)
    for rows in (numpy.array([3]), numpy.arange(9)):
        with pytest.raises(ModelError, match="class_logits: expected a batch whose only rows are the texts' first"):
            model.class_logits(pack([Sample(ids, rows)]))
    batch = pack([Sample(ids, numpy.array([0])), Sample(ids[:3], numpy.array([0]))])
    assert torch.equal(model.class_logits(batch), model.class_logits(dataclasses.replace(batch, firsts=False)))  # made by hand
    assert model.class_logits(batch).shape == (2, len(LABELS)) and model.class_logits(pack([])).shape == (0, len(LABELS))


def test_a_batch_elsewhere_is_named():
    model = outside.drawn_model()
    with pytest.raises(ModelError, match=r"expected a batch on cpu, where the model is, got one on meta: batch.to\(model.device\)"):
        model.mlm_logits(pack([Sample(numpy.arange(5), numpy.arange(5))]).to("meta"))


def test_a_model_is_made_of_a_configuration():
    for given in (None, 3, Model(config())):
        with pytest.raises(ModelError, match=f"^Model: expected an EncoderConfig, got {type(given).__name__}$"):
            Model(given)


@pytest.mark.parametrize("labels", ["ab", ("a", "a"), ("a", 3), 1])
def test_labels_are_names(labels):
    with pytest.raises(ModelError, match="labels: expected names, each another one, got "):
        Model(outside.drawn_model().config, labels=labels)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_sizes_are_those_of_the_parameters(kind):
    model = outside.drawn_model(kind)
    for site in (*TABLES, *linear_sites(model.config), *(f"{site}.bias" for site in linear_sites(model.config))):
        _, parameter, rows = parameter_at(model, site)
        assert parameter_size(model.config, site) == parameter[rows].numel(), site
