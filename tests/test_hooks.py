"""Each hook of the Protocol as its definition, driven by a toy method, alone and beside others; merging and taking off give the base back.

What a toy method does through a hook, `plain` does in the open (a changed weight, a changed block output, a longer text), and both must agree in outputs
and gradients.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from peftdebias.batches import cumulative
from peftdebias.errors import AdapterError, ModelError
from peftdebias.methods import Method
from peftdebias.patch import attach, detach, fold, merge, train_only, unmerge
from peftdebias.sites import BLOCKS, EMBED_SITE, block_sites, key_value_sites, linear_shape, linear_sites

from .outside import HEAD_WIDTH, HEADS, HIDDEN, POSITIONS, assert_close, one_thread  # noqa: F401
from .plain import config, model_of, plain, some

# ---------------------------------------------------------------- toy methods


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
    with pytest.raises(AdapterError, match=r"without: expected an attached method \(toy\), got 'race'"), model.without("race"):
        pass


@pytest.mark.parametrize("name", [name for name in TOYS if "embeddings" not in name])  # RoBERTa's tables have other sizes
def test_hooks_work_on_roberta_too(name):
    model, batch, toy = model_of("roberta"), some("roberta"), TOYS[name]()
    expected = plain(model, batch, **toy.oracle(model, toy.values))
    attach(model, "toy", toy)
    assert_close(model.encoder(batch, all_rows=True), expected)


# ---------------------------------------------------------------- several methods


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
    model.encoder(batch).sum().backward()
    model.float()
    assert {p.dtype for p in model.methods["toy"].parameters().values()} == {p.grad.dtype for p in model.methods["toy"].parameters().values()} == {torch.float32}
    assert model.encoder(batch).dtype == torch.float32


def test_a_method_takes_the_dtype_of_the_model_that_it_is_attached_to(model, batch):
    toy = prefix()
    attach(model.bfloat16(), "toy", toy)
    assert {p.dtype for p in toy.parameters().values()} == {torch.bfloat16} and model.encoder(batch).dtype == torch.bfloat16


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


def test_blocks_that_end_in_another_order_leave_nothing_off(two_merged, batch):
    model, expected = two_merged
    for names in (("one", "three"), ("three", "one"), ("three", "three")):
        first, second = (model.without(name) for name in names)
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert_close(outputs(model, batch), expected[names[1],])
        second.__exit__(None, None, None)
        assert_close(outputs(model, batch), expected[()])


def test_merging_waits_for_the_end_of_a_block(two_merged, batch):
    """Inside one the weights are not what they are outside: what would be kept or put back is another's."""
    model, expected = two_merged
    before = snapshot(model)
    for name in ("one", "three"):
        with model.without(name), pytest.raises(AdapterError, match=r"unmerge: expected to be outside of `with model.without\(...\)`"):
            unmerge(model)
    assert same_tensors(model, before)
    unmerge(model)
    with model.without("one"), pytest.raises(AdapterError, match="merge: expected to be outside"):
        merge(model)
    assert_close(outputs(model, batch), expected[()])


def test_a_folded_method_stays_off_through_a_block(model, batch):
    attach(model, "toy", dense(SOME_LINEARS))
    expected = outputs(model, batch)
    folded = fold(model)
    with model.without("toy"):
        assert_close(outputs(model, batch), expected)
    assert_close(outputs(model, batch), expected)
    folded.unfold()
    assert_close(outputs(model, batch), expected)


def test_a_name_given_twice_is_merged_once_and_nothing_is_merged_of_nothing(model, batch):
    merge(model)
    attach(model, "toy", dense(SOME_LINEARS))
    expected = outputs(model, batch)
    merge(model, "toy", "toy")
    assert_close(outputs(model, batch), expected)


def test_a_merged_model_takes_no_other_weights(model, batch):
    """Unmerging would put the old ones back."""
    attach(model, "toy", dense(SOME_LINEARS))
    merge(model)
    with pytest.raises(AdapterError, match="load_state_dict: expected an unmerged model; unmerge it first"):
        model.load_state_dict(model.state_dict())
    unmerge(model)
    assert model.load_state_dict(model.state_dict()).missing_keys == []


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
    with pytest.raises(AdapterError, match="attach 'x': expected a method of its own, got the one that is attached as 'gender'"):
        attach(model, "x", model.methods["gender"])
    for name in ("", "a/b", 3):
        with pytest.raises(AdapterError, match=f"attach: expected a name without '/', got {name!r}"):
            attach(model, name, adapter())
    with pytest.raises(AdapterError, match=r"attach 'x': expected a model of this package, as load\(...\).run.model is, got Linear \(attach_to takes others\)"):
        attach(torch.nn.Linear(2, 2), "x", adapter())
    for site in ("layers.3.attention.query", "layers.0.attention.qkv.query", "layers.0.intermediate", "pooler"):
        with pytest.raises(AdapterError, match=f"site '{site}': no such linear, embedding or norm in this model"):
            attach(model, "x", Toy((site,), {}))
    with pytest.raises(AdapterError, match=r"detach: expected an attached method \(gender, race\), got 'x'"):
        detach(model, "x")
    for call in (detach, merge):
        with pytest.raises(AdapterError, match=rf"{call.__name__}: expected an attached method \(gender, race\), got \['race'\]"):
            call(model, ["race"])
    with pytest.raises(AdapterError, match="merge 'race': adapter cannot be written into the weights with the same outputs"):
        merge(model)
    with pytest.raises(AdapterError, match=r"merge: expected an attached method \(gender, race\), got 'x'"):
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
