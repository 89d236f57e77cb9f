"""LoRA read as a proof: nothing at the start, the dense formula, its gradients, merging, and what alone is trained."""

import copy
import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F

from peftdebias import methods, patch
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.errors import AdapterError, ConfigError
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.methods.lora import LoRA, LoRAConfig, lora_linear_ref
from peftdebias.sites import LINEARS, linear_shape, linear_sites

from . import outside
from .outside import one_thread

TINY = EncoderConfig(kind="bert", layers=3, hidden=21, heads=3, feed_forward=37, vocab=89, max_positions=23, dropout=0.0, attention_dropout=0.0)


def tiny_model(draw: int = 0, **changes) -> Model:
    model = Model(dataclasses.replace(TINY, **changes), mlm=True, labels=("a", "b", "c")).double().eval()
    generator = torch.Generator().manual_seed(3 + 1000 * draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def ragged_batch(lengths=(13, 1, 7), seed: int = 5):
    generator = numpy.random.default_rng(seed)
    return pack([Sample(generator.integers(5, 89, n), numpy.sort(generator.choice(n, size=min(n, 2), replace=False)), generator.integers(5, 89, min(n, 2)))
                 for n in lengths])


def trained_lora(model: Model, name: str = "gender", draw: int = 0, **options) -> LoRA:
    """Attached, with a B that is not zero."""
    method = methods.create("lora", model.config, options=options, seed=1 + draw)
    with torch.no_grad():
        for key, p in method.parameters().items():
            p.data = p.data.double()
            if key.endswith(".b"):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(key) + 1000 * draw))
    patch.attach(model, name, method)
    return method


def test_zero_b_changes_nothing():
    model, batch = tiny_model(), ragged_batch()
    before = model.mlm_logits(batch)
    patch.attach(model, "gender", methods.create("lora", model.config, options={"targets": tuple(k.split(".")[1] for k in LINEARS)}))
    model.double()
    torch.testing.assert_close(model.mlm_logits(batch), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank,out_width,in_width", [(1, 13, 7), (5, 37, 13), (8, 7, 37)])
def test_reference_is_the_dense_update(rank, out_width, in_width):
    x, w, b = torch.randn(11, in_width, dtype=torch.float64), torch.randn(out_width, in_width, dtype=torch.float64), torch.randn(out_width, dtype=torch.float64)
    low, up = torch.randn(rank, in_width, dtype=torch.float64), torch.randn(out_width, rank, dtype=torch.float64)
    torch.testing.assert_close(lora_linear_ref(x, w, b, low, up, 1.7), F.linear(x, w + 1.7 * up @ low, b), rtol=1e-12, atol=1e-12)


def test_reference_gradients():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (5, 7), (5,), (2, 7), (5, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b, low, up: lora_linear_ref(x, w, b, low, up, 0.6), tensors)


@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("output", "up", "down"), ("feed_forward.down", "attention.query")])
def test_attached_equals_dense_weights(targets):
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model, targets=targets)
    attached = model.mlm_logits(batch)
    dense = tiny_model()
    with torch.no_grad():
        for site in method.sites(dense.config):
            _, parameter, rows = patch.parameter_at(dense, site)
            parameter[rows] += method.config.scale * method.values[site + ".b"] @ method.values[site + ".a"]
    torch.testing.assert_close(attached, dense.mlm_logits(batch), rtol=1e-10, atol=1e-10)


def test_only_a_and_b_are_trained():
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model)
    patch.train_only(model, method.parameters().values())
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    with_gradient = {name for name, p in patch.all_parameters(model).items() if p.grad is not None}
    assert with_gradient == {f"methods.gender.{site}.{x}" for site in linear_sites(TINY, ("attention.query", "attention.value")) for x in "ab"}


def test_nothing_is_computed_below_the_lowest_trained_site():
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model)
    top = [p for name, p in method.parameters().items() if name.startswith("layers.2.")]
    patch.train_only(model, top)
    seen = []
    original = model.encoder._layer
    model.encoder._layer = lambda i, given, *rest: seen.append((i, given[0].requires_grad)) or original(i, given, *rest)
    F.cross_entropy(model.mlm_logits(batch), batch.targets).backward()
    assert seen == [(0, False), (1, False), (2, False)]
    assert all(p.grad is not None for p in top)


def test_merge_keeps_outputs_and_unmerge_gives_the_bits_back():
    model, batch = tiny_model(), ragged_batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model.mlm_logits(batch)
    trained_lora(model)
    attached = model.mlm_logits(batch)
    patch.merge(model)
    torch.testing.assert_close(model.mlm_logits(batch), attached, rtol=1e-10, atol=1e-10)
    with model.without("gender"):
        assert torch.equal(model.mlm_logits(batch), plain)
    torch.testing.assert_close(model.mlm_logits(batch), attached, rtol=1e-10, atol=1e-10)
    patch.unmerge(model)
    assert torch.equal(model.mlm_logits(batch), attached)
    patch.detach(model, "gender")
    assert torch.equal(model.mlm_logits(batch), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_two_axes_add_up():
    model, batch = tiny_model(), ragged_batch()
    first, second = trained_lora(model, "gender", rank=2), trained_lora(model, "race", rank=5, targets=("query", "down"))
    both = model.mlm_logits(batch)
    dense = tiny_model()
    with torch.no_grad():
        for method in (first, second):
            for site in method.sites(dense.config):
                _, parameter, rows = patch.parameter_at(dense, site)
                parameter[rows] += method.delta(site)
    torch.testing.assert_close(both, dense.mlm_logits(batch), rtol=1e-10, atol=1e-10)
    with model.without("gender"):
        alone = model.mlm_logits(batch)
    patch.detach(model, "gender")
    assert torch.equal(model.mlm_logits(batch), alone)


def test_state_survives_save_and_load_bit_for_bit():
    model = tiny_model()
    state = trained_lora(model).state()
    other = methods.create("lora", TINY, seed=9)
    for p in other.parameters().values():
        p.data = p.data.double()
    other.load(copy.deepcopy(state))
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state().items())
    other.load({name: tensor.t().contiguous().t() for name, tensor in state.items()})  # of whatever strides they come
    assert all(torch.equal(state[name], tensor) and tensor.is_contiguous() for name, tensor in other.state().items())
    for p in other.parameters().values():
        p.data = p.data.t().contiguous().t()
    assert all(torch.equal(state[name], tensor) and tensor.is_contiguous() for name, tensor in other.state().items())


def test_same_seed_same_module():
    one, two, three = (methods.create("lora", TINY, seed=s).state() for s in (4, 4, 5))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["layers.0.attention.query.a"], three["layers.0.attention.query.a"])


@pytest.mark.parametrize("budget", [0.003, 0.01, 0.1])
def test_budget_is_the_nearest_rank(budget):
    method = methods.create("lora", TINY, budget=budget)
    base = sum(p.numel() for p in Model(TINY).encoder.parameters())
    per_rank = sum(sum(linear_shape(TINY, s)) for s in method.sites(TINY))
    assert method.count() == method.config.rank * per_rank
    if method.config.rank > 1:
        assert abs(method.count() - budget * base) <= per_rank / 2 + 1
    else:
        assert budget * base <= 1.5 * per_rank + 1


@pytest.mark.parametrize("options,budget,words", [
    ({"rank": 0}, None, "lora rank: expected at least 1, got 0"),
    ({"targets": ("quary",)}, None, "lora targets: expected some of query, key, value, output, up, down, got 'quary'"),
    ({"targets": ()}, None, "lora targets: expected at least one linear, got none"),
    ({"alpha": 0.0}, None, "lora alpha: expected a finite number of more than 0, got 0.0"),
    ({"dropout": 1.0}, None, "lora dropout: expected a share from 0 up to but not 1, got 1.0"),
    ({"ranks": 3}, None, "lora options: unknown key 'ranks'; expected one of rank, alpha, targets, rank_stabilized, dropout"),
    ({"rank": 3}, 0.01, "budget: chooses lora's rank; expected no rank beside it"),
    ({}, 1.5, "budget: expected a share between 0 and 1, got 1.5"),
])
def test_errors(options, budget, words):
    with pytest.raises(ConfigError, match=words):
        methods.create("lora", TINY, options=options, budget=budget)


def test_a_method_that_is_a_base_is_named():
    with pytest.raises(ConfigError, match="budget: full has a fixed size"):
        methods.create("full", TINY, budget=0.01)
    with pytest.raises(AdapterError, match="full is a base model, not a module; expected it as --model"):
        patch.attach(tiny_model(), "gender", methods.create("full", TINY))


def test_load_names_the_shape_that_differs():
    method = methods.create("lora", TINY)
    state = method.state() | {"layers.1.attention.value.b": torch.zeros(21, 7)}
    with pytest.raises(AdapterError, match=r"layers.1.attention.value.b: expected shape \[21, 8\], got \[21, 7\]"):
        method.load(state)
    with pytest.raises(AdapterError, match="expected tensors 12 by name, got 11; first that differs: layers.1.attention.value.b"):
        method.load({k: v for k, v in state.items() if k != "layers.1.attention.value.b"})
    with pytest.raises(AdapterError, match="expected tensors 12 by name, got 13; first that differs: layers.1.attention.key.b"):
        method.load(method.state() | {"layers.1.attention.key.b": torch.zeros(21, 8)})
    assert method.file_bytes() == sum(t.numel() * t.element_size() for t in method.state().values())


def test_the_table_of_methods_counts_four_bytes_a_parameter():
    rows = {row[0]: row for row in methods.overview(TINY, 0.1)}
    base, method = methods.base_parameters(TINY), methods.create("lora", TINY, budget=0.1)
    assert rows["full"][2:5] == (f"{base:,}", "100.00 %", f"{base * 4 / 1024:,.0f}")
    assert rows["lora"][1:5] == (f"rank {method.config.rank}", f"{method.count():,}", f"{100 * method.count() / base:.2f} %", f"{method.count() * 4 / 1024:,.0f}")


def test_single_target_and_scale():
    assert LoRAConfig(rank=4, alpha=6).scale == 1.5
    assert LoRAConfig(rank=4).scale == 2.0
    assert LoRAConfig(targets=("value", "query")).targets == ("attention.query", "attention.value")


# ---------------------------------------------------------------- scaling and dropout

def test_rank_stabilised_scaling():
    """alpha / sqrt(r); without an alpha it is 16, so that s falls as 1 / sqrt(r)."""
    assert LoRAConfig(rank=16, alpha=6, rank_stabilized=True).scale == 1.5
    assert [LoRAConfig(rank=r, rank_stabilized=True).scale for r in (1, 4, 64)] == [16.0, 8.0, 2.0]
    model = tiny_model()
    method = trained_lora(model, rank=4, alpha=6, rank_stabilized=True)
    site = "layers.1.attention.value"
    torch.testing.assert_close(method.delta(site), 3.0 * method.values[site + ".b"] @ method.values[site + ".a"], rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_update_alone_and_only_in_training():
    """The reference with the seed of the pass, without which nothing drops; the base's product sees all of x."""
    model = tiny_model()
    method = trained_lora(model, dropout=0.4)
    plain = tiny_model()
    trained_lora(plain)
    patch.train_only(model, method.parameters().values())
    site, x = "layers.1.attention.value", torch.randn(11, 21, dtype=torch.float64)
    _, weight, rows = patch.parameter_at(model, site)
    weight, bias = weight[rows], patch.parameter_at(model, site + ".bias")[1][rows]
    a, b = method.values[site + ".a"], method.values[site + ".b"]
    assert torch.equal(model.encoder.hooks.linear(site, x, weight, bias), lora_linear_ref(x, weight, bias, a, b, 2.0))
    assert torch.equal(model.mlm_logits(ragged_batch()), plain.mlm_logits(ragged_batch()))
    assert not method.drops and method.low_rank(site) == (a, b, 2.0)
    model.train()
    assert method.drops and method.low_rank(site) is None  # the delta does not say what it does now
    seed = torch.tensor([2 ** 61 + 3])
    assert torch.equal(model.encoder.hooks.linear(site, x, weight, bias), lora_linear_ref(x, weight, bias, a, b, 2.0))
    found = model.encoder.hooks.linear(site, x, weight, bias, seed)
    dropped = dropout_ref(x, 0.4, seed, method.places[site])
    assert (dropped == 0).any() and torch.equal(found, lora_linear_ref(x, weight, bias, a, b, 2.0, 0.4, seed, method.places[site]))
    torch.testing.assert_close(found, x @ weight.T + bias + 2.0 * dropped @ a.T @ b.T, rtol=1e-12, atol=1e-12)
    patch.train_only(model, model.encoder.parameters())  # downstream: the module is frozen, the base is trained
    assert model.training and torch.equal(model.encoder.hooks.linear(site, x, weight, bias, seed), lora_linear_ref(x, weight, bias, a, b, 2.0))
    patch.train_only(model, [a, b])
    a.requires_grad_(False), b.requires_grad_(False)  # frozen by hand
    assert model.training and torch.equal(model.encoder.hooks.linear(site, x, weight, bias, seed), lora_linear_ref(x, weight, bias, a, b, 2.0))


@pytest.mark.parametrize("trained", ["gender", "race"])
def test_the_module_that_is_trained_drops_and_the_frozen_one_does_not(trained):
    """Whichever was attached first: the frozen one gives its delta, the trained one computes the product."""
    model = tiny_model()
    both = {name: trained_lora(model, name, rank=rank, dropout=0.4) for name, rank in (("gender", 2), ("race", 3))}
    own, other = both[trained], both[{"gender": "race", "race": "gender"}[trained]]
    patch.train_only(model, own.parameters().values())
    model.train()
    site, x = "layers.0.attention.query", torch.randn(11, 21, dtype=torch.float64)
    weight, bias = torch.randn(21, 21, dtype=torch.float64), torch.randn(21, dtype=torch.float64)
    seed = torch.tensor([3])
    found = model.encoder.hooks.linear(site, x, weight, bias, seed)
    drops = 0.4, seed, own.places[site]
    expected = lora_linear_ref(x, weight + other.delta(site), bias, own.values[site + ".a"], own.values[site + ".b"], 2.0, *drops)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", [".a", ".b", "layers.1."])
def test_a_module_that_is_trained_in_part_drops(part):
    model = tiny_model()
    method = trained_lora(model, dropout=0.4)
    patch.train_only(model, [p for name, p in method.parameters().items() if part in name])
    model.train()
    assert method.drops


def test_what_is_trained_next_drops_in_a_model_that_is_in_training():
    model = tiny_model()
    gender, race = (trained_lora(model, name, rank=rank, dropout=0.4) for name, rank in (("gender", 2), ("race", 3)))
    patch.train_only(model, gender.parameters().values())
    model.train()
    for own, other in ((race, gender), (gender, race)):
        patch.train_only(model, own.parameters().values())
        assert own.drops and not other.drops
    model.eval()
    patch.train_only(model, gender.parameters().values())
    assert not gender.drops and not race.drops


def test_no_two_places_of_a_pass_drop_alike(monkeypatch):
    """One seed serves the whole pass, so every place has a number of its own: the encoder's, the classifier's, every linear's, whichever module drops there."""
    found = []
    for kind in ("bert", "roberta"):
        model = tiny_model(kind=kind)
        monkeypatch.setattr(model.encoder, "drop", lambda place, rate: found.append(place))
        for name, targets in (("gender", ("query", "key", "value")), ("race", ("attention.output", "feed_forward.up", "feed_forward.down"))):
            method = trained_lora(model, name, dropout=0.4, targets=targets)
            found += [method.places[site] for site in method.sites(model.config)]
        patch.train_only(model, [p for m in model.methods.values() for p in m.parameters().values()])
        model.train()
        model.class_logits(pack([Sample(numpy.array([5, 6, 7]), numpy.array([0]))]))
        assert len(set(found)) == len(found) == 1 + 3 * model.config.layers + 2 + 6 * model.config.layers
        found.clear()


def test_two_that_drop_at_one_site_are_an_error():
    model = tiny_model()
    methods_ = [trained_lora(model, name, dropout=0.4) for name in ("gender", "race")]
    patch.train_only(model, [p for m in methods_ for p in m.parameters().values()])
    model.train()
    with pytest.raises(AdapterError, match="layers.0.attention.query: lora and lora both compute this product; expected at most one without a delta"):
        model.mlm_logits(ragged_batch())


def test_a_module_with_dropout_merges_as_it_is_used():
    """Also while it is being trained: what is written is s B A."""
    model, batch = tiny_model(), ragged_batch()
    method = trained_lora(model, dropout=0.4)
    attached = model.mlm_logits(batch)
    patch.train_only(model, method.parameters().values())
    model.train()
    patch.merge(model)
    torch.testing.assert_close(model.eval().mlm_logits(batch), attached, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- peft

@pytest.mark.parametrize("kind,head,options,theirs", [
    ("bert", "mlm", {"rank": 5, "alpha": 7.0}, {"r": 5, "lora_alpha": 7, "target_modules": ["query", "value"]}),
    ("bert", "class", {"rank": 3, "alpha": 7.0, "rank_stabilized": True, "targets": ("key", "output", "up", "down")},
     {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["key", "output.dense", "intermediate.dense"], "task_type": "SEQ_CLS"}),
    ("roberta", "mlm", {"rank": 2, "targets": ("query", "key", "up")}, {"r": 2, "lora_alpha": 4, "target_modules": ["query", "key", "intermediate.dense"]}),
])
def test_equals_peft(kind, head, options, theirs):
    model = outside.drawn_model(kind)
    method = outside.attached(model, "gender", "lora", **options)
    wrapped = outside.with_peft(model, head, "LoraConfig", **theirs)
    pairs = {name: (p, lambda own: own, (method.values[f"{outside.our_site(model, name)}.{'a' if 'lora_A' in name else 'b'}"],))
             for name, p in wrapped.named_parameters() if "lora_" in name}
    assert len(pairs) == len(method.values)
    outside.assert_equals_peft(model, wrapped, pairs, head, outside.batch_for(model, head))


class OurDropout(torch.nn.Module):
    """As methods/lora.py drops, in peft's place: x [B, S, D] without padding."""

    def __init__(self, rate: float, seed: torch.Tensor, site: int):
        super().__init__()
        self.drop = rate, seed, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout_ref(x.flatten(0, 1), *self.drop).view_as(x)


def test_dropout_stands_where_peft_has_it():
    """Texts of one length, every row; peft's dropout modules draw our masks, each that of its site."""
    model = outside.drawn_model(dropout=0.0, attention_dropout=0.0)
    method = outside.attached(model, "gender", "lora", rank=3, alpha=7.0, dropout=0.3)
    patch.train_only(model, method.parameters().values())
    wrapped = outside.with_peft(model, "mlm", "LoraConfig", r=3, lora_alpha=7, lora_dropout=0.3, target_modules=["query", "value"])
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = method.values[f"{outside.our_site(model, name)}.{'a' if 'lora_A' in name else 'b'}"].detach()
    torch.manual_seed(11)
    seed = torch.randint(2 ** 62, (1,))  # the encoder's own
    for name, module in list(wrapped.named_modules()):
        if name.endswith("lora_dropout"):
            module["default"] = OurDropout(0.3, seed, method.places[outside.our_site(model, name)])
    batch = outside.ragged((9, 9, 9), rows="all")
    model.train()
    torch.manual_seed(11)
    found = model.encoder(batch, all_rows=True)
    outside.assert_close(found, outside.hidden(wrapped.base_model.model, batch))
    assert (found - model.eval().encoder(batch, all_rows=True)).abs().max() > 1e-3


def test_a_is_drawn_within_one_by_the_root_of_its_inputs():
    method = methods.create("lora", TINY, options={"rank": 30, "targets": ("query", "up", "down")})
    for site in method.sites(TINY):
        a = method.values[site + ".a"]
        assert 0.8 * a.shape[1] ** -0.5 < a.abs().max() <= a.shape[1] ** -0.5
