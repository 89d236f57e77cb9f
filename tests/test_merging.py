"""Merging into the weights and back bit for bit, folded or turned off meanwhile, and what attach and merge refuse."""

import pytest
import torch
import torch.nn.functional as F

from peftdebias.checkpoint import describe_base
from peftdebias.errors import AdapterError
from peftdebias.methods import Method
from peftdebias.patch import attach, detach, fold, merge, unmerge
from peftdebias.weights import load_model, save_model

from .outside import assert_close, one_thread  # noqa: F401
from .plain import plain
from .toys import MERGEABLE, SOME_LINEARS, TABLES, Toy, adapter, batch, dense, model  # noqa: F401  (batch and model are fixtures)


@pytest.fixture(params=list(MERGEABLE))
def mergeable(request):
    return MERGEABLE[request.param]()


def outputs(model, batch):
    return torch.cat([model.encoder(batch, all_rows=True).flatten(), model.mlm_logits(batch).flatten()])


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_tensors(model, before):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_merged_equals_unmerged_and_unmerging_is_bitwise(model, batch, mergeable):  # noqa: F811
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


def test_without_on_a_merged_model(model, batch, mergeable):  # noqa: F811
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


def test_what_merging_keeps_moves_with_the_model(model, batch):  # noqa: F811
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


def test_a_tied_decoder_keeps_the_base_table(model, batch):  # noqa: F811
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


def test_a_merged_model_is_saved_as_it_answers(model, batch, tmp_path):  # noqa: F811
    """Its decoder is the base's table still; of one that is not merged the module is no part."""
    attach(model, "toy", dense(("embeddings.word",)))
    with model.without("toy"):
        bare = model.mlm_logits(batch)
    save_model(model, tmp_path / "bare")
    merge(model)
    save_model(model, tmp_path / "merged")
    for name, expected in (("bare", bare), ("merged", model.mlm_logits(batch))):
        again = load_model(tmp_path / name, dtype=torch.float64)[0]
        assert_close(again.mlm_logits(batch), expected)
        assert (again.mlm.decoder is None) == (name == "bare")
    assert model.mlm.decoder is None


def test_a_merged_base_is_the_base_that_modules_are_bound_to(model, mergeable):  # noqa: F811
    before = describe_base(model)
    attach(model, "toy", mergeable)
    merge(model)
    assert describe_base(model) == before
    with torch.no_grad():
        next(p for p, *_ in model.encoder.hooks.merged.tensors).mul_(2)  # what is written is no part of it
    assert describe_base(model) == before
    unmerge(model)
    assert describe_base(model) == before


def test_what_is_merged_inside_of_inference_mode_can_be_trained_beside(model, batch, mergeable):  # noqa: F811
    attach(model, "toy", mergeable)
    with torch.inference_mode():
        merge(model)
    model.mlm.bias.requires_grad_()
    model.mlm_logits(batch).sum().backward()
    assert model.mlm.bias.grad is not None


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
def test_without_on_a_partly_merged_model(two_merged, batch, names):  # noqa: F811
    model, expected = two_merged
    for _ in range(2):
        with model.without(*names):
            assert_close(outputs(model, batch), expected[names])
        assert_close(outputs(model, batch), expected[()])


@pytest.mark.parametrize("outer, inner", [("one", "two"), ("one", "three"), ("three", "one"), ("one", "one")])
def test_without_inside_without(two_merged, batch, outer, inner):  # noqa: F811
    model, expected = two_merged
    with model.without(outer):
        with model.without(inner):
            assert_close(outputs(model, batch), expected[tuple(sorted({outer, inner}, key=["one", "two", "three"].index))])
        assert_close(outputs(model, batch), expected[outer,])
    assert_close(outputs(model, batch), expected[()])


def test_blocks_that_end_in_another_order_leave_nothing_off(two_merged, batch):  # noqa: F811
    model, expected = two_merged
    for names in (("one", "three"), ("three", "one"), ("three", "three")):
        first, second = (model.without(name) for name in names)
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert_close(outputs(model, batch), expected[names[1],])
        second.__exit__(None, None, None)
        assert_close(outputs(model, batch), expected[()])


def test_merging_waits_for_the_end_of_a_block(two_merged, batch):  # noqa: F811
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


def test_a_folded_method_stays_off_through_a_block(model, batch):  # noqa: F811
    attach(model, "toy", dense(SOME_LINEARS))
    expected = outputs(model, batch)
    folded = fold(model)
    with model.without("toy"):
        assert_close(outputs(model, batch), expected)
    assert_close(outputs(model, batch), expected)
    folded.unfold()
    assert_close(outputs(model, batch), expected)


def test_a_name_given_twice_is_merged_once_and_nothing_is_merged_of_nothing(model, batch):  # noqa: F811
    merge(model)
    attach(model, "toy", dense(SOME_LINEARS))
    expected = outputs(model, batch)
    merge(model, "toy", "toy")
    assert_close(outputs(model, batch), expected)


def test_a_merged_model_takes_no_other_weights(model, batch):  # noqa: F811
    """Unmerging would put the old ones back."""
    attach(model, "toy", dense(SOME_LINEARS))
    merge(model)
    with pytest.raises(AdapterError, match="load_state_dict: expected an unmerged model; unmerge it first"):
        model.load_state_dict(model.state_dict())
    unmerge(model)
    assert model.load_state_dict(model.state_dict()).missing_keys == []


def test_detaching_a_merged_method_unmerges_first(model, batch):  # noqa: F811
    before, base = snapshot(model), outputs(model, batch)
    attach(model, "toy", dense(SOME_LINEARS))
    merge(model)
    detach(model, "toy")
    assert same_tensors(model, before) and torch.equal(outputs(model, batch), base)


def test_a_model_that_torch_compiles_is_taken(model, batch):  # noqa: F811
    compiled, plain = torch.compile(model, backend="eager"), outputs(model, batch)
    attach(compiled, "toy", dense(SOME_LINEARS))
    attached = outputs(model, batch)
    merge(compiled)
    assert_close(outputs(model, batch), attached)
    unmerge(compiled)
    detach(compiled, "toy")
    assert model.methods == {} and torch.equal(outputs(model, batch), plain) and not torch.equal(attached, plain)


def test_errors_of_attaching_and_merging_say_what_was_expected(model):  # noqa: F811
    attach(model, "gender", dense(SOME_LINEARS))
    attach(model, "race", adapter())
    with pytest.raises(AdapterError, match="attach: 'gender' is attached already; expected another name"):
        attach(model, "gender", adapter())
    with pytest.raises(AdapterError, match="attach 'x': expected a method of its own, got the one that is attached as 'gender'"):
        attach(model, "x", model.methods["gender"])
    for name in ("", " ", "a/b", 3):
        with pytest.raises(AdapterError, match=f"attach: expected a name without /, got {name!r}"):
            attach(model, name, adapter())
    with pytest.raises(AdapterError, match="attach: expected a model, a name and a method, in this order, got a method for the name: adapter$"):
        attach(model, adapter(), "x")
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
    detach(model, "race")

    class Product(Method):
        """It says that it merges and has neither delta nor scale: what would be written is the plain base."""

        name, mergeable = "product", True

        def sites(self, encoder_config):
            return ("layers.0.attention.query",)

        def linear(self, site, x, weight, bias, seed=None):
            return 2 * F.linear(x, weight, bias)

    attach(model, "product", Product(None, None))
    with pytest.raises(AdapterError, match="merge 'product': product cannot be written into the weights with the same outputs"):
        merge(model, "product")
    merge(model, "gender")
    for call in (lambda: merge(model, "gender"), lambda: attach(model, "x", adapter())):
        with pytest.raises(AdapterError, match="expected an unmerged model; unmerge it first"):
            call()

    class Whole(Toy):
        name, trains_base = "whole", True

    unmerge(model)
    with pytest.raises(AdapterError, match="attach: whole is a base model, not a module; expected it as --model"):
        attach(model, "x", Whole((), {}))
