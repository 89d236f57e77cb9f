"""The padded graph against the packed encoder: every method attached, pairs, padding on either side, what the graph refuses; and exported by torch."""

import dataclasses

import pytest
import torch
from torch import Tensor

from peftdebias import methods, patch
from peftdebias.batches import Batch
from peftdebias.encoder import Model
from peftdebias.errors import AdapterError
from peftdebias.methods import Method
from peftdebias.padded import Padded, export_padded
from peftdebias.sites import linear_sites

from .outside import assert_close, attached, drawn_model, one_thread, ragged  # noqa: F401

MODULES = {
    "nothing": [],
    "lora": [("lora", dict(targets=("query", "key", "up")))],
    "ia3, inputs too": [("ia3", dict(inputs=("down", "output")))],
    "bias": [("bias", {})],
    "pfeiffer": [("adapter", dict(architecture="pfeiffer"))],
    "houlsby": [("adapter", dict(architecture="houlsby"))],
    "parallel": [("adapter", dict(architecture="parallel"))],
    "prefix": [("prefix", dict(length=3))],
    "prefix, reparametrised, positioned": [("prefix", dict(length=3, reparametrised=True, inner=5, positioned=True))],
    "prompt": [("prompt", dict(length=4))],
    "prompt, positioned, read at": [("prompt", dict(length=4, positioned=True, first_row="prompt"))],
    "two prompts, one read at": [("prompt", dict(length=2)), ("prompt", dict(length=3, positioned=True, first_row="prompt"))],
    "two prompts, both read at": [("prompt", dict(length=2, first_row="prompt")), ("prompt", dict(length=3, first_row="prompt"))],
    "all": [("lora", {}), ("ia3", {}), ("bias", {}), ("adapter", {}), ("adapter", dict(architecture="houlsby")), ("prefix", dict(length=2)),
            ("prefix", dict(length=3, positioned=True)), ("prompt", dict(length=2, positioned=True)), ("prompt", dict(length=1))],
}


def sparse(model: Model, name: str, k: int = 60):
    """A sparse module with values everywhere, the word embedding too."""
    method, generator = methods.create("sparse", model.config, options={"k": k}), torch.Generator().manual_seed(3)
    sites = method.sites(model.config)
    for i, site in enumerate(sites):
        size = patch.parameter_at(model, site)[1][patch.parameter_at(model, site)[2]].numel()
        share = k // len(sites) + (i < k % len(sites))
        method.indices[site] = torch.randperm(size, generator=generator)[:share]
        method.values[site] = torch.nn.Parameter(torch.randn(share, generator=generator, dtype=model.encoder.embeddings.word.weight.dtype))
    patch.attach(model, name, method)
    return method


def with_modules(kind: str, modules) -> Model:
    model = drawn_model(kind)
    for i, (name, options) in enumerate(modules):
        attached(model, f"axis-{i}", name, seed=i, **options)
    return model


def in_rectangle(batch: Batch, left: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, S] of a packed batch; where nothing is, ids are drawn: outputs would show it if they were seen."""
    there = torch.arange(batch.max_length)[None, :] < torch.tensor(batch.lengths)[:, None]
    there = there.flip(1) if left else there
    return torch.randint(5, 97, there.shape, generator=torch.Generator().manual_seed(seed)).masked_scatter(there, batch.ids), there


def packed_answers(model: Model, what: str, pooling: str = "first") -> tuple[Batch, Tensor]:
    """(a ragged batch that asks for every row, what the packed model says of it: [B, C], [T, V] or [B, D])."""
    every = ragged(rows="all")
    first = dataclasses.replace(every, rows=every.cu_seqlens[:-1].long(), row_lengths=(1,) * len(every.lengths), firsts=True)
    if what == "fill_mask":
        return every, model.mlm_logits(every)
    if what == "encode" and pooling == "mean":
        return every, torch.stack([rows.mean(0) for rows in model.encoder(every).split(every.lengths)])
    return every, model.class_logits(first) if what == "predict" else model.encoder(first)


def assert_same(graph, model: Model, what: str, pooling: str = "first", left: bool = False) -> None:
    batch, expected = packed_answers(model, what, pooling)
    ids, mask = in_rectangle(batch, left)
    for kind in (torch.bool, torch.int64):
        found = graph(ids, mask.to(kind))
        assert_close(found[mask] if what == "fill_mask" else found, expected, what, logits=what != "encode")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_padded_equals_packed(kind, modules):
    model = with_modules(kind, modules)
    plain = [packed_answers(drawn_model(kind), what)[1] for what in ("predict", "encode")]
    for what, pooling in (("predict", "first"), ("fill_mask", "first"), ("encode", "first"), ("encode", "mean")):
        for left in (False, True):
            assert_same(Padded(model, what, pooling=pooling), model, what, pooling, left)
    if modules:  # else the test would pass with modules that nobody applies
        assert all((found - packed_answers(model, what)[1]).abs().max() > 1e-3 for found, what in zip(plain, ("predict", "encode")))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_padded_sparse_keeps_the_tied_decoder(kind):
    model = drawn_model(kind)
    sparse(model, "gender")
    for what in ("predict", "fill_mask"):
        assert_same(Padded(model, what), model, what)
    patch.merge(model)
    assert_same(Padded(model, "fill_mask"), model, "fill_mask")


@torch.no_grad()
def test_padded_is_the_model_as_it_is_now():
    model = with_modules("bert", MODULES["all"])
    with model.without("axis-0", "axis-3", "axis-6", "axis-7"):
        assert_same(Padded(model, "predict"), model, "predict")
    untouched = {name: p.clone() for name, p in model.named_parameters()}
    graph, expected = Padded(model, "predict"), packed_answers(model, "predict")[1]
    for name, method in model.methods.items():
        patch.detach(model, name)
        for parameter in method.parameters().values():
            parameter.zero_()
    assert_close(graph(*in_rectangle(ragged(rows="all"))), expected)  # a copy: what happens to the model later is not its business
    assert all(p.equal(untouched[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_segments_of_pairs_come_from_the_first_separator():
    model, texts = drawn_model("bert"), ragged(segments=2, rows="all", lengths=(13, 7, 29))
    ids, cut = texts.ids.clone(), []
    for start, n, segments in zip(texts.cu_seqlens.tolist(), texts.lengths, texts.segments.split(texts.lengths)):
        cut += [start + max(0, n - int(segments.sum()) - 1), start + n - 1]
    ids[cut] = 3  # [CLS] a [SEP] b [SEP]
    segments = torch.cat([(torch.arange(n) > part.eq(3).long().argmax()).long() for n, part in zip(texts.lengths, ids.split(texts.lengths))])
    batch = dataclasses.replace(texts, ids=ids, segments=segments)
    for left in (False, True):
        rectangle, mask = in_rectangle(batch, left)
        assert_close(Padded(model, "fill_mask", separator=3)(rectangle, mask)[mask], model.mlm_logits(batch), logits=True)
    single = dataclasses.replace(batch, segments=torch.zeros_like(segments))
    assert_close(Padded(model, "fill_mask")(rectangle, mask)[mask], model.mlm_logits(single), logits=True)


@torch.no_grad()
def test_further_separators_and_those_of_padding_begin_no_segment():
    model, texts = drawn_model("bert"), ragged(segments=2, rows="all", lengths=(13, 7, 29))
    ids = texts.ids.clone()
    ids[(texts.cu_seqlens[:-1].long()[:, None] + torch.tensor([2, 4, 6])).flatten()] = 3
    segments = torch.cat([(torch.arange(n) > part.eq(3).long().argmax()).long() for n, part in zip(texts.lengths, ids.split(texts.lengths))])
    batch = dataclasses.replace(texts, ids=ids, segments=segments)
    for left in (False, True):
        rectangle, mask = in_rectangle(batch, left)
        found = Padded(model, "fill_mask", separator=3)(rectangle.masked_fill(~mask, 3), mask)
        assert_close(found[mask], model.mlm_logits(batch), logits=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_head_of_a_roberta_is_gelu_whatever_its_layers_use(kind):
    """That of a BERT is as its layers are."""
    model = drawn_model(kind, activation="relu")
    assert_same(Padded(model, "fill_mask"), model, "fill_mask")


@torch.no_grad()
def test_a_decoder_of_its_own_is_the_graph_s():
    model = drawn_model()
    model.mlm.decoder = torch.nn.Linear(*reversed(model.encoder.embeddings.word.weight.shape), bias=False, dtype=torch.float64)
    graph = Padded(model, "fill_mask")
    assert_same(graph, model, "fill_mask")
    assert not graph._at("mlm.decoder").equal(model.encoder.embeddings.word.weight)


def test_what_the_graph_cannot_hold_is_refused_by_name():
    class Own(Method):
        name = "own"

        def sites(self, config):
            return linear_sites(config, ("attention.query",))

        def linear(self, site, x, weight, bias, seed=None):
            return torch.relu(x) @ weight.T + bias

    class Shifts(Method):
        name = "shifts"

        def sites(self, config):
            return ("embeddings",)

        def embed(self, hidden, batch, positioned):
            return hidden + 1, batch

    for method, words in ((Own, "own computes the product at layers.0.attention.query itself"), (Shifts, "shifts changes the embedded text itself")):
        model = drawn_model()
        patch.attach(model, "axis", method(None, model.config))
        with pytest.raises(AdapterError, match=words):
            Padded(model, "predict")


@torch.no_grad()
def test_a_roberta_exports_with_everything_attached():
    model = with_modules("roberta", MODULES["all"] + [("prefix", dict(length=2, reparametrised=True, inner=5))])
    assert_same(export_padded(Padded(model, "fill_mask")).module(), model, "fill_mask")
