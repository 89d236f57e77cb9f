"""The encoder equals transformers, a plain twin, and itself: packed as padded, rows asked for as all rows; each hook of the Protocol as its definition.

`plain` below is the encoder in plain words, one text at a time: no packing, no rows, no hooks. What a toy method does through a hook, `plain` does in the
open (a changed weight, a changed block output, a longer text), and both must agree in outputs and gradients.
"""

import dataclasses
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from peftdebias import kernels
from peftdebias.batches import Sample, Spans, cumulative, pack
from peftdebias.encoder import Encoder, Model, attention, attention_padded, attention_ref
from peftdebias.errors import AdapterError, ModelError
from peftdebias.methods import Method, base_parameters
from peftdebias.patch import attach, detach, merge, train_only, unmerge
from peftdebias.sites import ACTIVATIONS, BLOCKS, EMBED_SITE, LINEARS, EncoderConfig, block_sites, key_value_sites, linear_shape, linear_sites
from peftdebias.weights import load_model, to_foreign

from . import outside
from .outside import FEED_FORWARD, HEAD_WIDTH, HEADS, HIDDEN, LABELS, LAYERS, LENGTHS, POSITIONS, VOCAB, assert_close, one_thread, ragged, randomize

KINDS = ("bert", "roberta")


def config(kind="bert", **changes) -> EncoderConfig:
    return EncoderConfig(**dict(kind=kind, layers=LAYERS, hidden=HIDDEN, heads=HEADS, feed_forward=FEED_FORWARD, vocab=VOCAB, max_positions=POSITIONS,
                                segments=1 if kind == "roberta" else 2, position_offset=2 if kind == "roberta" else 0) | changes)


def model_of(kind="bert", dtype=torch.float64, seed=0, **changes) -> Model:
    return randomize(Model(config(kind, **changes), mlm=True, labels=LABELS), seed).to(dtype).eval()


def some(kind, **options):
    return ragged(segments=1 if kind == "roberta" else 2, **options)


def plain(model, batch, *, weights=None, adapt=lambda site, x: x, prefix=lambda layer: None, vectors=None, shift=0):
    """[T, D] of all texts, one after the other. weights: by our names instead of the model's. adapt(site, x): a block's output before its residual.
    prefix(layer): keys and values [P, H, W] before each text's own. vectors [P, D]: before each text's words. shift: of all positions."""
    c, p = model.config, weights or dict(model.encoder.named_parameters())

    def linear(name, x):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    outputs = []
    for ids, segments in zip(batch.ids.split(batch.lengths), batch.segments.split(batch.lengths)):
        x = p["embeddings.word.weight"][ids]
        if vectors is not None:
            x, segments = torch.cat([vectors, x]), F.pad(segments, (len(vectors), 0))
        n = len(x)
        x = x + p["embeddings.position.weight"][torch.arange(n) + c.position_offset + shift] + p["embeddings.segment.weight"][segments]
        x = norm("embeddings.norm", x)
        for i in range(c.layers):
            block = f"layers.{i}.attention"
            query, key, value = linear(block + ".qkv", x).view(n, 3, c.heads, c.head_width).unbind(1)
            if prefix(i) is not None:
                key, value = (torch.cat(both) for both in zip(prefix(i), (key, value)))
            scores = torch.einsum("qhw,khw->hqk", query, key) / c.head_width**0.5
            context = torch.einsum("hqk,khw->qhw", scores.softmax(-1), value).flatten(1)
            x = norm(block + ".norm", x + adapt(block, linear(block + ".output", context)))
            block = f"layers.{i}.feed_forward"
            x = norm(block + ".norm", x + adapt(block, linear(block + ".down", ACTIVATIONS[c.activation](linear(block + ".up", x)))))
        outputs.append(x)
    return torch.cat(outputs)


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


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
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
def test_dropout_stands_where_transformers_has_it(kind, tmp_path):
    """In train mode, with the same seed, texts of equal lengths draw the same dropout masks in the same order: any other place or rate would differ."""
    rates = dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.4)
    batch = some(kind, lengths=(7, 7, 7), rows="first")
    theirs, ours = outside.pair(kind, tmp_path / "a", attn_implementation="eager", **rates)
    theirs.train(), ours.train()
    with kernels.use("torch"):
        expected, found = (seeded(call) for call in (lambda: outside.hidden(theirs, batch), lambda: ours.encoder(batch, all_rows=True)))
        assert_close(found, expected, "hidden states")
        assert (found - ours.eval().encoder(batch, all_rows=True)).abs().max() > 0.1  # dropout did act
    # The head's own: theirs computes all rows of the last layer and ours one, so the encoder's dropout is off here.
    theirs, ours = outside.pair(kind, tmp_path / "b", "ForSequenceClassification", **rates | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    theirs.train(), ours.train()
    expected, found = (seeded(call) for call in (lambda: outside.class_logits(theirs, batch), lambda: ours.class_logits(batch)))
    assert_close(found, expected, "logits")
    assert (found - ours.eval().class_logits(batch)).abs().max() > 0.1


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


# ---------------------------------------------------------------- attention

SPANS = {
    "ragged": Spans((13, 1, 7), (13, 1, 7)),
    "equal": Spans((7, 7), (7, 7)),
    "fewer queries": Spans((2, 1, 3), (13, 1, 7)),
    "no queries in one": Spans((2, 0, 1), (13, 5, 7)),
    "no queries at all": Spans((0, 0), (13, 7)),
    "an empty text": Spans((3, 0, 7), (13, 0, 7)),
    "one text": Spans((11,), (11,)),
}


def attention_inputs(spans, prefix, dtype=torch.float64, seed=0):
    """query, key, value [., H, W] and a prefix of that many rows, all requiring gradients; None without."""
    generator = torch.Generator().manual_seed(seed)
    rows = [sum(spans.query_lengths), sum(spans.key_lengths), sum(spans.key_lengths)] + ([] if prefix is None else [prefix, prefix])
    tensors = [torch.randn(n, HEADS, HEAD_WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for n in rows]
    return tensors[:3], None if prefix is None else tuple(tensors[3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prefix", [None, 0, 1, 5])
@pytest.mark.parametrize("spans", list(SPANS.values()), ids=list(SPANS))
def test_padded_attention_equals_the_reference(spans, prefix, dtype):
    """Values, and the gradients of query, key, value and prefix."""
    tensors, pre = attention_inputs(spans, prefix, dtype)
    leaves = [*tensors, *(pre or ())]
    expected, found = attention_ref(*tensors, spans, pre), attention_padded(*tensors, spans, pre)
    assert found.shape == (sum(spans.query_lengths), HEADS, HEAD_WIDTH)
    assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * weights).sum(), leaves) for x in (expected, found)]
    for name, one, other in zip(("query", "key", "value", "prefix key", "prefix value"), gradients[1], gradients[0]):
        assert_close(one, other, name)


def test_the_reference_is_attention_within_each_text():
    """Uniform scores give means of the text's own values and the prefix; nothing leaks between texts."""
    spans, value = Spans((1, 2), (2, 3)), torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0]).view(5, 1, 1)
    zeros = torch.zeros(3, 1, 1), torch.zeros(5, 1, 1)
    assert attention_ref(*zeros, value, spans).flatten().tolist() == [2, 6, 6]
    assert attention_ref(*zeros, value, spans, (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 10.0))).flatten().tolist() == pytest.approx([14 / 3, 7, 7])


def test_attention_runs_the_implementation_that_kernels_chooses(monkeypatch):
    (query, key, value), pre = attention_inputs(SPANS["ragged"], 1)
    with kernels.use("torch"):
        assert torch.equal(attention(query, key, value, SPANS["ragged"], pre), attention_padded(query, key, value, SPANS["ragged"], pre))
    monkeypatch.setitem(kernels._registry, ("attention", "native"), lambda *inputs: "native")
    with kernels.use("native"):
        assert attention(query, key, value, SPANS["ragged"], pre) == "native"


@pytest.mark.parametrize("run", [attention_ref, attention_padded])
def test_dropout_of_probabilities_keeps_its_share(run):
    """Uniform probabilities 1/n over one-hot values: the output shows which were kept, scaled by 1 / (1 - rate)."""
    n, rate = 211, 0.3
    spans, zeros = Spans((n, n), (n, n)), torch.zeros(2 * n, 1, n)
    value = torch.eye(n).repeat(2, 1)[:, None, :]
    torch.manual_seed(0)
    out = run(zeros, zeros, value, spans, dropout=rate)
    kept = out > 0
    assert torch.allclose(out[kept], torch.tensor(1 / n / (1 - rate)), rtol=1e-5)
    assert abs(kept.double().mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / kept.numel())
    torch.manual_seed(0)
    assert torch.equal(run(zeros, zeros, value, spans, dropout=rate), out)
    assert not torch.equal(run(zeros, zeros, value, spans, dropout=rate), out)  # the next draw
    assert torch.allclose(run(zeros, zeros, value, spans), torch.full_like(out, 1 / n))


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
    monkeypatch.setattr(Encoder, "_layer", lambda self, i, hidden, *rest: seen.append((i, hidden.requires_grad)) or run(self, i, hidden, *rest))
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


# ---------------------------------------------------------------- hooks: toy methods


class Toy(Method):
    """Takes hold of the sites that it is given and owns the values that it is given."""

    name = "toy"
    mergeable = foldable = True

    def __init__(self, sites, values):
        super().__init__(None, None)
        self.places = tuple(sites)
        self.values = {name: Parameter(value) for name, value in values.items()}

    def sites(self, encoder_config):
        return self.places


class Scale(Toy):
    """A product of its own: s * (x W^T + b), a value s [out] for each site."""

    name = "scale"
    mergeable = foldable = False

    def linear(self, site, x, weight, bias):
        return self.values[site] * F.linear(x, weight, bias)

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, s in values.items():
            change(weights, site, lambda w: w * s[:, None])
            change(weights, site + ".bias", lambda b: b * s)
        return dict(weights=weights)


class Dense(Toy):
    """A dense delta for each site."""

    name = "dense"

    def delta(self, site):
        return self.values[site]

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, delta in values.items():
            change(weights, site, lambda w: w + delta)
        return dict(weights=weights)


class Sparse(Toy):
    """(indices, values) at every fifth entry from the second."""

    name = "sparse"

    def delta(self, site):
        return torch.arange(len(self.values[site])) * 5 + 1, self.values[site]

    @staticmethod
    def oracle(model, values):
        weights = copied(model)
        for site, delta in values.items():
            full = torch.zeros(part(model, site).numel(), dtype=delta.dtype)
            full[1::5][:len(delta)] = delta
            change(weights, site, lambda w: w + full.view_as(w))
        return dict(weights=weights)


class Adapter(Toy):
    """hidden + tanh(hidden A), A [D, D] for each block."""

    name = "adapter"
    mergeable = foldable = False

    def block(self, site, hidden, residual, norm):
        return self.adapt(self.values, site, hidden)

    @staticmethod
    def adapt(values, site, x):
        return x + torch.tanh(x @ values[site]) if site in values else x

    @staticmethod
    def oracle(model, values):
        return dict(adapt=lambda site, x: Adapter.adapt(values, site, x))


class Prefix(Toy):
    """Keys and values `k0`, `v0` [P, H, W] for layer 0 and so on."""

    name = "prefix"
    mergeable = foldable = False

    def key_value(self, layer):
        return (self.values[f"k{layer}"], self.values[f"v{layer}"]) if f"k{layer}" in self.values else None

    @staticmethod
    def oracle(model, values):
        return dict(prefix=lambda layer: (values[f"k{layer}"], values[f"v{layer}"]) if f"k{layer}" in values else None)


class Prompt(Toy):
    """`vectors` [P, D] before the words of every text, which moves on by P positions."""

    name = "prompt"
    mergeable = foldable = False

    @property
    def position_shift(self):
        return len(self.values["vectors"])

    def embed(self, hidden, batch, positioned):
        vectors = self.values["vectors"]
        p, lengths = len(vectors), tuple(n + len(vectors) for n in batch.lengths)
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(batch.row_lengths))
        vectors = positioned(vectors, torch.arange(p))
        return torch.cat([x for words in hidden.split(batch.lengths) for x in (vectors, words)]), dataclasses.replace(
            batch, rows=batch.rows + (owners + 1) * p, lengths=lengths, cu_seqlens=cumulative(lengths), max_length=max(lengths))

    @staticmethod
    def oracle(model, values):
        return dict(vectors=values["vectors"])


class Shift(Toy):
    """Texts begin three positions later."""

    name = "shift"
    mergeable = foldable = False
    position_shift = 3

    @staticmethod
    def oracle(model, values):
        return dict(shift=3)


def copied(model):
    return dict(model.encoder.named_parameters())


def slice_of(site):
    """(our parameter, its part 0, 1 or 2 of three, or None) of a site, in the words of CONTRACTS.md."""
    stem, last = (site[:-5], "bias") if site.endswith(".bias") else (site, "weight")
    head, _, kind = stem.rpartition(".")
    if kind in ("query", "key", "value"):
        return f"{head}.qkv.{last}", ("query", "key", "value").index(kind)
    return f"{stem}.{last}", None


def change(weights, site, function):
    name, third = slice_of(site)
    thirds = list(weights[name].split(HIDDEN)) if third is not None else [weights[name]]
    thirds[third or 0] = function(thirds[third or 0])
    weights[name] = torch.cat(thirds)


def part(model, site):
    name, third = slice_of(site)
    parameter = copied(model)[name]
    return parameter if third is None else parameter[third * HIDDEN:(third + 1) * HIDDEN]


def drawn(*shape, seed):
    return 0.3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Every kind of linear, not every layer: layer 1 has query and value free, layer 2 the key.
SOME_LINEARS = ("layers.0.attention.query", "layers.0.attention.value", "layers.1.attention.key", "layers.2.attention.query", "layers.2.attention.value",
                "layers.1.attention.output", "layers.2.attention.output", "layers.0.feed_forward.up", "layers.2.feed_forward.up",
                "layers.1.feed_forward.down", "layers.2.feed_forward.down")
SMALL_PARTS = ("layers.0.attention.key.bias", "layers.2.attention.query.bias", "layers.2.attention.value.bias", "layers.1.attention.output.bias",
               "layers.2.feed_forward.up.bias", "layers.1.feed_forward.down.bias", "layers.0.attention.norm", "layers.0.attention.norm.bias",
               "layers.2.feed_forward.norm", "layers.2.feed_forward.norm.bias")
TABLES = ("embeddings.word", "embeddings.position", "embeddings.segment", "embeddings.norm", "embeddings.norm.bias")


def dense(sites, seed=0):
    model = model_of()
    return Dense(sites, {site: drawn(*part(model, site).shape, seed=seed + i) for i, site in enumerate(sites)})


def sparse(sites, seed=0):
    model = model_of()
    return Sparse(sites, {site: drawn((part(model, site).numel() - 1) // 5, seed=seed + i) for i, site in enumerate(sites)})


def adapter(seed=0, kinds=BLOCKS):
    return Adapter(block_sites(config(), kinds), {site: drawn(HIDDEN, HIDDEN, seed=seed + i) for i, site in enumerate(block_sites(config(), kinds))})


def prefix(seed=0, length=5, layers=(0, 2)):
    values = {f"{kind}{i}": drawn(length, HEADS, HEAD_WIDTH, seed=seed + 2 * i + j) for i in layers for j, kind in enumerate("kv")}
    return Prefix(key_value_sites(config()), values)


def prompt(seed=0, length=3):
    return Prompt([EMBED_SITE], {"vectors": drawn(length, HIDDEN, seed=seed)})


def scale(sites=SOME_LINEARS):
    return Scale(sites, {site: 1 + drawn(linear_shape(config(), site)[0], seed=i) for i, site in enumerate(sites)})


TOYS = {
    "linear": scale,
    "delta dense": lambda: dense(SOME_LINEARS),
    "delta sparse": lambda: sparse(SOME_LINEARS),
    "delta dense of all linears": lambda: dense(linear_sites(config())),
    "delta of biases and norms": lambda: dense(SMALL_PARTS),
    "sparse delta of biases and norms": lambda: sparse(SMALL_PARTS),
    "delta of embeddings": lambda: dense(TABLES),
    "sparse delta of embeddings": lambda: sparse(TABLES),
    "block": adapter,
    "key_value": prefix,
    "key_value of one": lambda: prefix(length=1, layers=(1,)),
    "embed": prompt,
    "position_shift": lambda: Shift((), {}),
}
MERGEABLE = {name: make for name, make in TOYS.items() if "delta" in name}


@pytest.fixture(params=list(TOYS))
def toy(request):
    return TOYS[request.param]()


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def batch():
    return some("bert")


def test_every_hook_does_what_it_says(model, batch, toy):
    expected = plain(model, batch, **toy.oracle(model, toy.values))
    base = plain(model, batch)
    attach(model, "toy", toy)
    found = model.encoder(batch, all_rows=True)
    assert_close(found, expected)
    assert found.shape != base.shape or (found - base).abs().max() > 1e-3


def test_every_hook_gives_its_parameters_their_gradients_and_the_base_none(model, batch, toy):
    expected = plain(model, batch, **toy.oracle(model, toy.values))
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), list(toy.values.values())) if toy.values else ()
    attach(model, "toy", toy)
    train_only(model, toy.parameters().values())
    found = model.encoder(batch, all_rows=True)
    assert found.requires_grad == bool(toy.values)
    if toy.values:
        (found * weights).sum().backward()
    for (name, parameter), gradient in zip(toy.values.items(), wanted):
        assert_close(parameter.grad, gradient, name)
    assert all(p.grad is None for p in model.parameters())


def test_rows_asked_for_equal_all_rows_through_every_hook(model, batch, toy):
    attach(model, "toy", toy)
    every, inserted = model.encoder(batch, all_rows=True), 3 if isinstance(toy, Prompt) else 0
    owners = torch.repeat_interleave(torch.tensor(batch.row_lengths))
    assert_close(model.encoder(batch), every[batch.rows + (owners + 1) * inserted])


def test_attaching_changes_no_tensor_and_detaching_gives_the_outputs_back(model, batch, toy):
    before, output = {name: p.detach().clone() for name, p in model.named_parameters()}, model.mlm_logits(batch)
    attach(model, "toy", toy)
    assert not torch.equal(model.mlm_logits(batch), output)
    assert detach(model, "toy") is toy
    assert torch.equal(model.mlm_logits(batch), output)
    attach(model, "toy", toy)
    with model.without("toy"):
        detach(model, "toy")
        attach(model, "toy", toy)  # a new attachment acts at once
        assert not torch.equal(model.mlm_logits(batch), output)
        detach(model, "toy")
    assert torch.equal(model.mlm_logits(batch), output)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()) and model.methods == {}


def test_without_turns_a_method_off_inside_the_block_only(model, batch, toy):
    output = model.mlm_logits(batch)
    attach(model, "toy", toy)
    on = model.mlm_logits(batch)
    with model.without("toy") as same:
        assert same is model
        assert torch.equal(model.mlm_logits(batch), output)
    assert torch.equal(model.mlm_logits(batch), on)
    with pytest.raises(ZeroDivisionError), model.without("toy"):
        1 / 0
    assert torch.equal(model.mlm_logits(batch), on)
    with pytest.raises(AdapterError, match=r"without\('race'\): expected one of toy attached methods"), model.without("race"):
        pass


@pytest.mark.parametrize("name", [name for name in TOYS if "embeddings" not in name])  # RoBERTa's tables have other sizes
def test_hooks_work_on_roberta_too(name):
    model, batch, toy = model_of("roberta"), some("roberta"), TOYS[name]()
    expected = plain(model, batch, **toy.oracle(model, toy.values))
    attach(model, "toy", toy)
    assert_close(model.encoder(batch, all_rows=True), expected)


# ---------------------------------------------------------------- hooks: several methods


def test_deltas_of_two_methods_add(model, batch):
    one, two = dense(SOME_LINEARS + SMALL_PARTS), sparse(SOME_LINEARS[3:] + TABLES, seed=50)
    weights = two.oracle(model, two.values)["weights"]
    for site, delta in one.values.items():
        change(weights, site, lambda w: w + delta)
    attach(model, "one", one)
    attach(model, "two", two)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, weights=weights))


class Both(Dense):
    """Acts by product or by delta, as LoRA does; remembers by which."""

    def __init__(self, sites, values):
        super().__init__(sites, values)
        self.products = []

    def linear(self, site, x, weight, bias):
        self.products.append(site)
        return F.linear(x, weight + self.values[site], bias)


@pytest.mark.parametrize("kind", [Dense, Both])
@pytest.mark.parametrize("first", ["delta", "product"])
def test_a_product_without_a_delta_takes_the_weight_with_the_deltas_of_the_others(model, batch, first, kind):
    """In either order of attachment."""
    added, scaled = kind(SOME_LINEARS, dense(SOME_LINEARS).values), scale()
    weights = added.oracle(model, added.values)["weights"]
    for site, s in scaled.values.items():
        change(weights, site, lambda w: w * s[:, None])
        change(weights, site + ".bias", lambda b: b * s)
    for name, method in (("a", added), ("b", scaled)) if first == "delta" else (("b", scaled), ("a", added)):
        attach(model, name, method)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, weights=weights))


def test_two_products_without_a_delta_are_an_error(model, batch):
    attach(model, "one", scale())
    attach(model, "two", scale(("layers.2.attention.output",)))
    with pytest.raises(AdapterError, match="layers.2.attention.output: scale and scale both compute this product; expected at most one without a delta"):
        model.encoder(batch)


def test_a_method_with_product_and_delta_gives_way_to_another(model, batch):
    """Two of the same kind (LoRA of two axes): the last computes its product, the first adds its delta."""
    site = ("layers.1.feed_forward.up",)
    one, two = (Both(site, dense(site, seed=seed).values) for seed in (0, 1))
    weights = copied(model)
    change(weights, site[0], lambda w: w + one.values[site[0]] + two.values[site[0]])
    attach(model, "one", one)
    attach(model, "two", two)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, weights=weights))
    assert (one.products, two.products) == ([], list(site))


def test_a_site_where_a_method_has_nothing_to_add_stays_as_it_is(model, batch):
    class Nothing(Toy):
        pass

    output = model.mlm_logits(batch)
    attach(model, "toy", Nothing(("layers.0.attention.query", "layers.1.feed_forward.up", "embeddings.word", "layers.2.attention.norm.bias"), {}))
    assert_close(model.mlm_logits(batch), output)


def test_stacked_blocks_run_in_the_order_of_attachment(model, batch):
    one, two = adapter(), adapter(seed=50, kinds=("feed_forward",))

    def stacked(*methods):
        def adapt(site, x):
            for method in methods:
                x = Adapter.adapt(method.values, site, x)
            return x
        return plain(model, batch, adapt=adapt)

    expected, other = stacked(one, two), stacked(two, one)
    attach(model, "b", one)
    attach(model, "a", two)
    assert list(model.methods) == ["b", "a"]
    found = model.encoder(batch, all_rows=True)
    assert_close(found, expected)
    assert (found - other).abs().max() > 1e-3
    with model.without("b"):
        assert_close(model.encoder(batch, all_rows=True), stacked(two))


def test_prefixes_of_two_methods_are_seen_together(model, batch):
    one, two = prefix(), prefix(seed=50, length=1, layers=(1, 2))
    attach(model, "one", one)
    attach(model, "two", two)

    def both(layer):
        found = [kv for m in (one, two) if (kv := m.key_value(layer)) is not None]
        return [torch.cat(part) for part in zip(*found)]

    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, prefix=both))


def test_prompts_of_two_methods_stand_one_before_the_other(model, batch):
    one, two = prompt(), prompt(seed=50, length=2)
    attach(model, "one", one)
    attach(model, "two", two)
    expected = plain(model, batch, vectors=torch.cat([one.values["vectors"], two.values["vectors"]]))
    assert_close(model.encoder(batch, all_rows=True), expected)
    owners = torch.repeat_interleave(torch.tensor(batch.row_lengths))
    assert_close(model.encoder(batch), expected[batch.rows + (owners + 1) * 5])


def test_all_hooks_at_once(model, batch):
    """A delta, an adapter, a prefix, a prompt and a shift, each as it would act alone on what the others give."""
    methods = [Shift((), {}), dense(SOME_LINEARS + TABLES), adapter(), prefix(), prompt()]
    expected = plain(model, batch, **{key: value for method in methods for key, value in method.oracle(model, method.values).items()})
    for i, method in enumerate(methods):
        attach(model, str(i), method)
    assert_close(model.encoder(batch, all_rows=True), expected)


def test_shifts_add_and_shorten_the_longest_text(model):
    for name in ("one", "two"):
        attach(model, name, Shift((), {}))
    fits = some("bert", lengths=(POSITIONS - 6,))
    assert_close(model.encoder(fits, all_rows=True), plain(model, fits, shift=6))
    with pytest.raises(ModelError, match="text of 48 tokens: expected at most 47"):
        model.encoder(some("bert", lengths=(POSITIONS - 5,)))
    with model.without("one"):
        assert model.encoder(some("bert", lengths=(POSITIONS - 5,)), all_rows=True).isfinite().all()


def test_a_prompt_counts_towards_the_longest_text(model):
    attach(model, "toy", prompt())
    with pytest.raises(ModelError, match="text of 51 tokens: expected at most 50"):
        model.encoder(some("bert", lengths=(POSITIONS - 2,)))


def test_heads_read_the_text_behind_a_prompt(model):
    batch, toy = some("bert", rows="first"), prompt()
    hidden = plain(model, batch, vectors=toy.values["vectors"])
    first = torch.cat([x[3:4] for x in hidden.split([n + 3 for n in batch.lengths])])
    expected = model.classifier.output(torch.tanh(model.classifier.dense(first)))
    attach(model, "toy", toy)
    assert_close(model.class_logits(batch), expected)


def test_a_frozen_method_stays_in_eval_mode(model):
    one, two = adapter(), adapter(seed=50)
    attach(model, "one", one)
    attach(model, "two", two)
    train_only(model, two.parameters().values())
    model.train()
    assert (one.training, two.training) == (False, True)
    model.eval()
    assert (one.training, two.training) == (False, False)


def test_methods_move_with_the_model(model, batch):
    attach(model, "toy", prefix())
    model.float()
    assert {p.dtype for p in model.methods["toy"].parameters().values()} == {torch.float32}
    assert model.encoder(batch).dtype == torch.float32


# ---------------------------------------------------------------- merging


@pytest.fixture(params=list(MERGEABLE))
def mergeable(request):
    return MERGEABLE[request.param]()


def outputs(model, batch):
    return torch.cat([model.encoder(batch, all_rows=True).flatten(), model.mlm_logits(batch).flatten()])


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_tensors(model, before):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_merged_equals_unmerged_and_unmerging_is_bitwise(model, batch, mergeable):
    attach(model, "toy", mergeable)
    before, expected = snapshot(model), outputs(model, batch)
    merge(model)
    assert not same_tensors(model, before)
    assert_close(outputs(model, batch), expected)
    assert not any(model.encoder.hooks.at(site) for site in mergeable.places)  # the base itself holds the delta now
    unmerge(model)
    assert same_tensors(model, before)
    assert torch.equal(outputs(model, batch), expected)
    unmerge(model)  # nothing to do
    assert same_tensors(model, before)


def test_without_on_a_merged_model(model, batch, mergeable):
    base = outputs(model, batch)
    attach(model, "toy", mergeable)
    before = snapshot(model)
    merge(model)
    merged = outputs(model, batch)
    with model.without("toy"):
        assert same_tensors(model, before) and torch.equal(outputs(model, batch), base)
    assert torch.equal(outputs(model, batch), merged)
    unmerge(model)
    assert same_tensors(model, before)


def test_what_merging_keeps_moves_with_the_model(model, batch):
    attach(model, "toy", dense(SOME_LINEARS))
    before = snapshot(model)
    merge(model)
    model.float()
    merged = outputs(model, batch)
    assert merged.dtype == torch.float32
    with model.without("toy"):
        assert same_tensors(model, {name: t.float() for name, t in before.items()})
    assert torch.equal(outputs(model, batch), merged)
    unmerge(model)
    assert same_tensors(model, {name: t.float() for name, t in before.items()})


def test_a_tied_decoder_keeps_the_base_table(model, batch):
    """A delta of the word embeddings acts on the input side only, merged or not."""
    toy = dense(("embeddings.word",))
    base = model.encoder.embeddings.word.weight.detach().clone()
    attach(model, "toy", toy)

    def expected():
        head = model.mlm
        return head.norm(F.gelu(head.dense(model.encoder(batch)))) @ base.T + head.bias

    plain = expected()
    assert_close(model.mlm_logits(batch), plain)
    merge(model)
    assert not torch.equal(model.encoder.embeddings.word.weight, base)
    assert_close(model.mlm_logits(batch), plain)


@pytest.fixture
def two_merged(model, batch):
    """(a model with methods one and two merged and three not, its outputs without each set of names)."""
    for i, name in enumerate(("one", "two", "three")):
        attach(model, name, dense(SOME_LINEARS[i:] + TABLES[:i], seed=20 * i))
    expected = {}
    for names in ((), ("one",), ("two",), ("three",), ("one", "two"), ("one", "three"), ("one", "two", "three")):
        with model.without(*names):
            expected[names] = outputs(model, batch)
    merge(model, "one", "two")
    return model, expected


@pytest.mark.parametrize("names", [(), ("one",), ("two",), ("three",), ("one", "two"), ("one", "three"), ("one", "two", "three")])
def test_without_on_a_partly_merged_model(two_merged, batch, names):
    model, expected = two_merged
    for _ in range(2):
        with model.without(*names):
            assert_close(outputs(model, batch), expected[names])
        assert_close(outputs(model, batch), expected[()])


@pytest.mark.parametrize("outer, inner", [("one", "two"), ("one", "three"), ("three", "one"), ("one", "one")])
def test_without_inside_without(two_merged, batch, outer, inner):
    model, expected = two_merged
    with model.without(outer):
        with model.without(inner):
            assert_close(outputs(model, batch), expected[tuple(sorted({outer, inner}, key=["one", "two", "three"].index))])
        assert_close(outputs(model, batch), expected[outer,])
    assert_close(outputs(model, batch), expected[()])


def test_detaching_a_merged_method_unmerges_first(model, batch):
    before, base = snapshot(model), outputs(model, batch)
    attach(model, "toy", dense(SOME_LINEARS))
    merge(model)
    detach(model, "toy")
    assert same_tensors(model, before) and torch.equal(outputs(model, batch), base)


def test_errors_of_attaching_and_merging_say_what_was_expected(model):
    attach(model, "gender", dense(SOME_LINEARS))
    attach(model, "race", adapter())
    with pytest.raises(AdapterError, match="attach: 'gender' is attached already; expected another name"):
        attach(model, "gender", adapter())
    for site in ("layers.3.attention.query", "layers.0.attention.qkv.query", "layers.0.intermediate", "pooler"):
        with pytest.raises(AdapterError, match=f"site '{site}': no such linear, embedding or norm in this model"):
            attach(model, "x", Toy((site,), {}))
    with pytest.raises(AdapterError, match="detach: expected one of gender, race attached methods, got 'x'"):
        detach(model, "x")
    with pytest.raises(AdapterError, match="merge 'race': adapter cannot be written into the weights with the same outputs"):
        merge(model)
    with pytest.raises(AdapterError, match="merge: expected one of gender, race attached methods, got 'x'"):
        merge(model, "x")
    merge(model, "gender")
    for call in (lambda: merge(model, "gender"), lambda: attach(model, "x", adapter())):
        with pytest.raises(AdapterError, match="expected an unmerged model; unmerge it first"):
            call()

    class Whole(Toy):
        name, trains_base = "whole", True

    unmerge(model)
    with pytest.raises(AdapterError, match="attach: whole is a base model, not a module; expected it as --model"):
        attach(model, "x", Whole((), {}))


def test_a_method_that_takes_hold_of_a_site_needs_its_hook(model, batch):
    attach(model, "toy", Toy(("layers.0.attention",), {}))
    with pytest.raises(AdapterError, match="toy: no block at layers.0.attention"):
        model.encoder(batch)
