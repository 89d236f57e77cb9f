"""Adapters read as a proof: the three architectures spelled out, their gradients, stacking, and names. What holds for every method: test_methods.py."""

import pytest
import torch
import torch.nn.functional as F

from peftdebias.errors import ConfigError
from peftdebias.methods import create
from peftdebias.methods.adapter import ARCHITECTURES, AdapterConfig, adapter_compiled, adapter_ref
from peftdebias.ops import Drop, compiled, dropout
from peftdebias.sites import ACTIVATIONS

from .outside import HIDDEN, LAYERS, assert_close, assert_spelled_out, attached, batch_for, drawn_model, one_thread


def spelled(method, hidden_to_input):
    """block(site, hidden, residual, norm) of an adapter in plain arithmetic; hidden_to_input(h, x, norm) is what its architecture sends down."""
    c, v = method.config, method.values

    def block(site, hidden, residual, norm):
        if f"{site}.down.weight" not in v:
            return hidden
        inner = hidden_to_input(hidden, residual, norm) @ v[f"{site}.down.weight"].T + v[f"{site}.down.bias"]
        inner = {"relu": lambda x: x.clamp(min=0), "silu": lambda x: x / (1 + (-x).exp()), "gelu": F.gelu}[c.activation](inner)
        return hidden + c.scale * (inner @ v[f"{site}.up.weight"].T + v[f"{site}.up.bias"])

    return block


READS = {"pfeiffer": lambda h, x, norm: norm(x + h), "houlsby": lambda h, x, norm: h, "parallel": lambda h, x, norm: x}


@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_is_its_formula(architecture, kind, head):
    model = drawn_model(kind)
    method = attached(model, "gender", "adapter", architecture=architecture, bottleneck=5)
    assert_spelled_out(model, batch_for(model, head), head, block=spelled(method, READS[architecture]))


def test_the_norm_adds_the_residual_itself():
    """Else a pass over both of them would be torch's."""
    model, handed = drawn_model(), []
    method, site = attached(model, "gender", "adapter", architecture="pfeiffer", bottleneck=5), "layers.0.feed_forward"
    hidden, residual = torch.ones(3, model.config.hidden, dtype=torch.float64), torch.zeros(3, model.config.hidden, dtype=torch.float64)
    method.block(site, hidden, residual, lambda x, residual=None: handed.append((x, residual)) or x)
    assert [(x is hidden, r is residual) for x, r in handed] == [(True, True)]


def test_activation_and_scale_can_be_chosen():
    model = drawn_model()
    method = attached(model, "gender", "adapter", architecture="houlsby", bottleneck=3, activation="gelu", scale=0.7)
    assert_spelled_out(model, batch_for(model, "mlm"), "mlm", block=spelled(method, READS["houlsby"]))


def test_a_block_s_output_is_dropped_before_it_is_read_and_not_again():
    model = drawn_model()
    method, site, generator = attached(model, "gender", "adapter", architecture="houlsby", bottleneck=5), "layers.0.attention", torch.Generator().manual_seed(0)
    hidden, residual = (torch.randn(11, HIDDEN, dtype=torch.float64, generator=generator) for _ in range(2))
    norm, drop = model.encoder._norm(f"{site}.norm", model.encoder.layers[0].attention.norm), Drop(0.5, torch.tensor([7]), 2)
    found = model.encoder.hooks.block(site, hidden, residual, norm, drop)[0]
    assert_close(found, norm(method.block(site, dropout(hidden, drop), residual, norm), residual))


def test_two_stack_in_the_order_of_attachment():
    """The second reads what the first gave, through the same LayerNorm; the other order is another function."""
    def stack(*seeds):
        model = drawn_model()
        parts = {seed: spelled(attached(model, str(seed), "adapter", seed, architecture="pfeiffer" if seed == 1 else "houlsby", bottleneck=5),
                               READS["pfeiffer" if seed == 1 else "houlsby"]) for seed in seeds}
        return model, parts

    model, parts = stack(1, 2)
    batch = batch_for(model, "mlm")
    assert_spelled_out(model, batch, "mlm", block=lambda site, h, x, norm: parts[2](site, parts[1](site, h, x, norm), x, norm))
    assert (model.mlm_logits(batch) - stack(2, 1)[0].mlm_logits(batch)).abs().max() > 1e-3
    with model.without("1"):
        assert_close(model.mlm_logits(batch), stack(2)[0].mlm_logits(batch))


def test_reference_gradients():
    shapes = ((3, 7), (3, 7), (5, 7), (5,), (7, 5), (7,))
    tensors = [torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *t: adapter_ref(*t, "silu", 0.6), tensors)


@pytest.mark.skipif(not compiled.FUNCTIONS, reason="no compiled ops here")
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_by_library_products_with_gradients_written_out(activation, trained, same):
    """Outputs and every gradient against the specification in float64; what is saved."""
    shapes = ((37, 29), (37, 29), (5, 29), (5,), (29, 5), (29,))
    drawn = [torch.randn(*s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    drawn[0][3], drawn[3][0], found = 0, 0, []  # z is 0 there, where ReLU has no slope
    for function, kind in ((adapter_compiled, torch.float32), (adapter_ref, torch.float64)):
        given, kept = [t.to(kind, copy=True).requires_grad_(trained or i < 2) for i, t in enumerate(drawn)], []
        given[1] = given[0] if same else given[1]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = function(*given, activation, 0.6)
        y.backward(torch.randn(37, 29, generator=torch.Generator().manual_seed(9)).to(kind))
        found.append(([y, *(t.grad for t in given if t.requires_grad)], kept))
    for mine, exact in zip(found[0][0], found[1][0]):
        assert (mine - exact).abs().max() <= 2e-6 * max(1.0, exact.abs().max())
    own = {(tuple(t.shape), t.dtype) for t in found[0][1]}
    assert ((37, 5), torch.bool if activation == "relu" and not trained else torch.float32) in own and (((37, 29), torch.float32) in own) == trained


def test_under_autocast_it_is_the_twin():
    given = [torch.randn(*s, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(((11, 29), (11, 29), (5, 29), (5,), (29, 5), (29,)))]
    with torch.autocast("cpu"):
        found, expected = (function(*given, "gelu", 0.6) for function in (adapter_compiled, adapter_ref))
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), given) for y in (found, expected)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not compiled.FUNCTIONS, reason="no compiled ops here")
@pytest.mark.parametrize("alone", range(6))
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_each_of_its_tensors_may_be_the_only_one_that_is_trained(activation, alone):
    shapes, found = ((11, 29), (11, 29), (5, 29), (5,), (29, 5), (29,)), []
    for function, kind in ((adapter_compiled, torch.float32), (adapter_ref, torch.float64)):
        given = [torch.randn(*s, generator=torch.Generator().manual_seed(i)).to(kind).requires_grad_(i == alone) for i, s in enumerate(shapes)]
        function(*given, activation, 0.6).square().sum().backward()
        found.append([t.grad for t in given])
    assert [i for i, gradient in enumerate(found[0]) if gradient is not None] == [alone]
    assert (found[0][alone] - found[1][alone]).abs().max() <= 2e-6 * max(1.0, found[1][alone].abs().max())


def test_untrained_up_is_zero_and_down_is_not():
    method = create("adapter", drawn_model().config, options={"architecture": "houlsby"})
    assert all(p.any() == name.endswith("down.weight") for name, p in method.parameters().items())


@pytest.mark.parametrize("architecture,blocks", [("pfeiffer", ["feed_forward"]), ("houlsby", ["attention", "feed_forward"]), ("parallel", ["feed_forward"])])
def test_names_and_shapes(architecture, blocks):
    method = create("adapter", drawn_model().config, options={"architecture": architecture, "bottleneck": 5})
    wanted = {}
    for site in (f"layers.{i}.{block}" for i in range(LAYERS) for block in blocks):
        wanted |= {f"{site}.down.weight": (5, HIDDEN), f"{site}.down.bias": (5,), f"{site}.up.weight": (HIDDEN, 5), f"{site}.up.bias": (HIDDEN,)}
    assert {name: tuple(p.shape) for name, p in method.parameters().items()} == wanted


@pytest.mark.parametrize("architecture,activation,scale", [("pfeiffer", "relu", 1.0), ("houlsby", "silu", 1.0), ("parallel", "relu", 4.0)])
def test_what_an_architecture_brings_is_written_into_the_config(architecture, activation, scale):
    config = AdapterConfig(architecture)
    assert (config.activation, config.scale) == (activation, scale)
    assert AdapterConfig(architecture, activation="gelu", scale=2.0).scale == 2.0


@pytest.mark.parametrize("options,words", [
    ({"architecture": "compacter"}, "adapter architecture: expected one of pfeiffer, houlsby, parallel, got 'compacter'"),
    ({"bottleneck": 0}, "adapter bottleneck: expected at least 1, got 0"),
    ({"activation": "swish"}, "adapter activation: expected one of gelu, gelu_new, relu, silu, got 'swish'"),
])
def test_errors(options, words):
    with pytest.raises(ConfigError, match=words):
        create("adapter", drawn_model().config, options=options)
