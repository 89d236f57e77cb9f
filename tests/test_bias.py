"""Bias training read as a proof: every bias of the encoder and no other, added, merged and folded. What holds for every method: test_methods.py."""

import pytest

from peftdebias import patch
from peftdebias.methods import create

from .outside import assert_close, assert_spelled_out, attached, batch_for, changed_weights, drawn_model, one_thread


@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_it_is_every_bias_moved(kind, head):
    model = drawn_model(kind)
    method = attached(model, "gender", "bias")
    assert_spelled_out(model, batch_for(model, head), head, weights=changed_weights(model, method.values))


def test_it_holds_every_bias_of_the_encoder_and_nothing_else():
    """Q, K and V are one bias in the model and three here."""
    model = drawn_model()
    found = {}
    for site, delta in create("bias", model.config).parameters().items():
        name, parameter, rows = patch.parameter_at(model, site)
        assert parameter[rows].shape == delta.shape and not delta.any()
        found[name] = found.get(name, 0) + delta.numel()
    assert found == {name: p.numel() for name, p in model.encoder.named_parameters() if name.endswith(".bias")}


def test_two_add_up():
    model = drawn_model()
    one, two = attached(model, "gender", "bias", 1), attached(model, "race", "bias", 2)
    both = {site: one.values[site] + two.values[site] for site in one.values}
    assert_spelled_out(model, batch_for(model, "mlm"), "mlm", weights=changed_weights(model, both))


def test_a_keys_bias_shows_only_beside_a_prefix():
    """softmax(q (k + d)^T) = softmax(q k^T + q d^T): the same number for all keys of a query, unless some keys, a prefix's, do not get d."""
    model = drawn_model()
    batch = batch_for(model, "mlm")
    before = model.mlm_logits(batch)
    method = attached(model, "gender", "bias", untrained=True)
    for site, delta in method.values.items():
        if site.endswith("key.bias"):
            delta.data += 1
    assert_close(model.mlm_logits(batch), before)
    prefixed = drawn_model()
    attached(prefixed, "race", "prefix", 2)
    before = prefixed.mlm_logits(batch)
    patch.attach(prefixed, "gender", method)
    assert (prefixed.mlm_logits(batch) - before).abs().max() > 1e-3


def test_folded_it_gives_the_same_outputs_and_unfolded_the_same_base():
    model = drawn_model()
    attached(model, "gender", "bias")
    batch, base = batch_for(model, "class"), {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model.class_logits(batch)
    folded = patch.fold(model)
    assert folded.names == ("gender",) and not model.encoder.hooks.at("layers.0.attention.query.bias")
    assert_close(model.class_logits(batch), expected)
    folded.unfold()
    assert_close(model.class_logits(batch), expected)
    for name, p in model.named_parameters():
        assert_close(p, base[name], name)
