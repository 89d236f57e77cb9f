"""Each hook of the Protocol as its definition, driven by a toy method, alone and beside others; taking off gives the base back.

What a toy method does through a hook, `plain` does in the open, and both must agree in outputs and gradients.
"""

import pytest
import torch
import torch.nn.functional as F

from peftdebias.errors import AdapterError, ModelError
from peftdebias.patch import attach, detach, train_only

from .outside import POSITIONS, assert_close, one_thread  # noqa: F401
from .plain import model_of, plain, some
from .toys import SMALL_PARTS, SOME_LINEARS, TABLES, TOYS, Adapter, Dense, Prompt, Shift, Toy, adapter, batch, change, copied, dense, model, part, prefix, prompt, scale, sparse  # noqa: F401  (batch and model are fixtures)


@pytest.fixture(params=list(TOYS))
def toy(request):
    return TOYS[request.param]()


def test_every_hook_does_what_it_says(model, batch, toy):  # noqa: F811
    expected = plain(model, batch, **toy.oracle(model, toy.values))
    base = plain(model, batch)
    attach(model, "toy", toy)
    found = model.encoder(batch, all_rows=True)
    assert_close(found, expected)
    assert found.shape != base.shape or (found - base).abs().max() > 1e-3


def test_every_hook_gives_its_parameters_their_gradients_and_the_base_none(model, batch, toy):  # noqa: F811
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


def test_rows_asked_for_equal_all_rows_through_every_hook(model, batch, toy):  # noqa: F811
    attach(model, "toy", toy)
    every, inserted = model.encoder(batch, all_rows=True), 3 if isinstance(toy, Prompt) else 0
    owners = torch.repeat_interleave(torch.tensor(batch.row_lengths))
    assert_close(model.encoder(batch), every[batch.rows + (owners + 1) * inserted])


def test_attaching_changes_no_tensor_and_detaching_gives_the_outputs_back(model, batch, toy):  # noqa: F811
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


def test_without_turns_a_method_off_inside_the_block_only(model, batch, toy):  # noqa: F811
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


def test_deltas_of_two_methods_add(model, batch):  # noqa: F811
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

    def linear(self, site, x, weight, bias, seed=None):
        self.products.append(site)
        return F.linear(x, weight + self.values[site], bias)


@pytest.mark.parametrize("kind", [Dense, Both])
@pytest.mark.parametrize("first", ["delta", "product"])
def test_a_product_without_a_delta_takes_the_weight_with_the_deltas_of_the_others(model, batch, first, kind):  # noqa: F811
    """In either order of attachment."""
    added, scaled = kind(SOME_LINEARS, dense(SOME_LINEARS).values), scale()
    weights = added.oracle(model, added.values)["weights"]
    for site, s in scaled.values.items():
        change(weights, site, lambda w: w * s[:, None])
        change(weights, site + ".bias", lambda b: b * s)
    for name, method in (("a", added), ("b", scaled)) if first == "delta" else (("b", scaled), ("a", added)):
        attach(model, name, method)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, weights=weights))


def test_two_products_without_a_delta_are_an_error(model, batch):  # noqa: F811
    attach(model, "one", scale())
    attach(model, "two", scale(("layers.2.attention.output",)))
    with pytest.raises(AdapterError, match="layers.2.attention.output: scale and scale both compute this product; expected at most one without a delta"):
        model.encoder(batch)


def test_a_method_with_product_and_delta_gives_way_to_another(model, batch):  # noqa: F811
    """Two of the same kind (LoRA of two axes): the last computes its product, the first adds its delta."""
    site = ("layers.1.feed_forward.up",)
    one, two = (Both(site, dense(site, seed=seed).values) for seed in (0, 1))
    weights = copied(model)
    change(weights, site[0], lambda w: w + one.values[site[0]] + two.values[site[0]])
    attach(model, "one", one)
    attach(model, "two", two)
    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, weights=weights))
    assert (one.products, two.products) == ([], list(site))


def test_a_site_where_a_method_has_nothing_to_add_stays_as_it_is(model, batch):  # noqa: F811
    class Nothing(Toy):
        pass

    output = model.mlm_logits(batch)
    attach(model, "toy", Nothing(("layers.0.attention.query", "layers.1.feed_forward.up", "embeddings.word", "layers.2.attention.norm.bias"), {}))
    assert_close(model.mlm_logits(batch), output)


def test_stacked_blocks_run_in_the_order_of_attachment(model, batch):  # noqa: F811
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


def test_prefixes_of_two_methods_are_seen_together(model, batch):  # noqa: F811
    one, two = prefix(), prefix(seed=50, length=1, layers=(1, 2))
    attach(model, "one", one)
    attach(model, "two", two)

    def both(layer):
        found = [kv for m in (one, two) if (kv := m.key_value(layer)) is not None]
        return [torch.cat(part) for part in zip(*found)]

    assert_close(model.encoder(batch, all_rows=True), plain(model, batch, prefix=both))


def test_prompts_of_two_methods_stand_one_before_the_other(model, batch):  # noqa: F811
    one, two = prompt(), prompt(seed=50, length=2)
    attach(model, "one", one)
    attach(model, "two", two)
    expected = plain(model, batch, vectors=torch.cat([one.values["vectors"], two.values["vectors"]]))
    assert_close(model.encoder(batch, all_rows=True), expected)
    owners = torch.repeat_interleave(torch.tensor(batch.row_lengths))
    assert_close(model.encoder(batch), expected[batch.rows + (owners + 1) * 5])


def test_all_hooks_at_once(model, batch):  # noqa: F811
    """A delta, an adapter, a prefix, a prompt and a shift, each as it would act alone on what the others give."""
    methods = [Shift((), {}), dense(SOME_LINEARS + TABLES), adapter(), prefix(), prompt()]
    expected = plain(model, batch, **{key: value for method in methods for key, value in method.oracle(model, method.values).items()})
    for i, method in enumerate(methods):
        attach(model, str(i), method)
    assert_close(model.encoder(batch, all_rows=True), expected)


def test_shifts_add_and_shorten_the_longest_text(model):  # noqa: F811
    for name in ("one", "two"):
        attach(model, name, Shift((), {}))
    fits = some("bert", lengths=(POSITIONS - 6,))
    assert_close(model.encoder(fits, all_rows=True), plain(model, fits, shift=6))
    with pytest.raises(ModelError, match="text of 48 tokens: expected at most 47"):
        model.encoder(some("bert", lengths=(POSITIONS - 5,)))
    with model.without("one"):
        assert model.encoder(some("bert", lengths=(POSITIONS - 5,)), all_rows=True).isfinite().all()


def test_a_prompt_counts_towards_the_longest_text(model):  # noqa: F811
    attach(model, "toy", prompt())
    with pytest.raises(ModelError, match="text of 51 tokens: expected at most 50"):
        model.encoder(some("bert", lengths=(POSITIONS - 2,)))


def test_heads_read_the_text_behind_a_prompt(model):  # noqa: F811
    batch, toy = some("bert", rows="first"), prompt()
    hidden = plain(model, batch, vectors=toy.values["vectors"])
    first = torch.cat([x[3:4] for x in hidden.split([n + 3 for n in batch.lengths])])
    expected = model.classifier.output(torch.tanh(model.classifier.dense(first)))
    attach(model, "toy", toy)
    assert_close(model.class_logits(batch), expected)


def test_a_frozen_method_stays_in_eval_mode(model):  # noqa: F811
    one, two = adapter(), adapter(seed=50)
    attach(model, "one", one)
    attach(model, "two", two)
    train_only(model, two.parameters().values())
    model.train()
    assert (one.training, two.training) == (False, True)
    model.eval()
    assert (one.training, two.training) == (False, False)


def test_an_attached_method_is_in_the_mode_of_its_model(model):  # noqa: F811
    """One that was trained elsewhere would go on dropping."""
    toy = adapter()
    for training in (True, False, True):
        toy.training = not training
        attach(model.train(training), "toy", toy)
        assert toy.training == training
        detach(model, "toy")


def test_methods_move_with_the_model(model, batch):  # noqa: F811
    attach(model, "toy", prefix())
    model.encoder(batch).sum().backward()
    model.float()
    assert {p.dtype for p in model.methods["toy"].parameters().values()} == {p.grad.dtype for p in model.methods["toy"].parameters().values()} == {torch.float32}
    assert model.encoder(batch).dtype == torch.float32


def test_a_method_takes_the_dtype_of_the_model_that_it_is_attached_to(model, batch):  # noqa: F811
    toy = prefix()
    attach(model.bfloat16(), "toy", toy)
    assert {p.dtype for p in toy.parameters().values()} == {torch.bfloat16} and model.encoder(batch).dtype == torch.bfloat16


def test_a_method_that_takes_hold_of_a_site_needs_its_hook(model, batch):  # noqa: F811
    attach(model, "toy", Toy(("layers.0.attention",), {}))
    with pytest.raises(AdapterError, match="toy: no block at layers.0.attention"):
        model.encoder(batch)
