"""(IA)^3 read as a proof: its three formulas, merging by hand, composing, and equality with peft. What holds for every method: test_methods.py."""

import pytest
import torch

from peftdebias import patch
from peftdebias.errors import ConfigError
from peftdebias.methods import create
from peftdebias.methods.ia3 import IA3Config, ia3_linear_ref

from .outside import (FEED_FORWARD, HIDDEN, LAYERS, assert_close, assert_equals_peft, assert_spelled_out, attached, batch_for, drawn_model, one_thread,
                      our_site, with_peft)

OPTIONS = {
    "paper": ({}, {"attention.key", "attention.value"}, {"feed_forward.down"}),
    "peft": ({"inputs": ("output", "down")}, {"attention.key", "attention.value"}, {"attention.output", "feed_forward.down"}),
    "elsewhere": ({"outputs": ("query", "down"), "inputs": ("up",)}, {"attention.query", "feed_forward.down"}, {"feed_forward.up"}),
    "inputs alone": ({"outputs": (), "inputs": ("key", "output")}, set(), {"attention.key", "attention.output"}),
}
each = pytest.mark.parametrize("options,outputs,inputs", OPTIONS.values(), ids=OPTIONS)


def spelled(method, outputs, inputs):
    """linear(site, x, W, b) with the scales in the open."""
    def linear(site, x, weight, bias):
        kind = site.split(".", 2)[2]
        if kind in inputs:
            x = x @ torch.diag(method.values[site])
        y = x @ weight.T + bias
        return y @ torch.diag(method.values[site]) if kind in outputs else y

    return linear


@pytest.mark.parametrize("head", ["mlm", "class"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@each
def test_it_scales_what_it_says(options, outputs, inputs, kind, head):
    model = drawn_model(kind)
    method = attached(model, "gender", "ia3", **options)
    assert_spelled_out(model, batch_for(model, head), head, linear=spelled(method, outputs, inputs))


def test_two_multiply():
    model = drawn_model()
    one, two = attached(model, "gender", "ia3", 1), attached(model, "race", "ia3", 2, inputs=("output", "down"))

    def linear(site, x, weight, bias):
        scale = one.values.get(site, 1) * two.values.get(site, 1)
        return (x @ weight.T + bias) * scale if site.endswith(("key", "value")) else (x * scale) @ weight.T + bias

    assert_spelled_out(model, batch_for(model, "mlm"), "mlm", linear=linear)


@each
def test_merging_writes_the_scaled_weights_and_biases(options, outputs, inputs):
    model, plain = drawn_model(), drawn_model()
    method = attached(model, "gender", "ia3", **options)
    patch.merge(model)
    with torch.no_grad():
        for site, scale in method.values.items():
            (_, weight, rows), (_, bias, _) = patch.parameter_at(plain, site), patch.parameter_at(plain, site + ".bias")
            if site.split(".", 2)[2] in inputs:
                weight[rows] *= scale
            else:
                weight[rows] *= scale[:, None]
                bias[rows] *= scale
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_reference():
    generator = torch.Generator().manual_seed(0)
    x, w, b, i, o = (torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((3, 7), (5, 7), (5,), (7,), (5,)))
    assert_close(ia3_linear_ref(x, w, b, i, o), x @ (o[:, None] * w * i).T + o * b)
    assert_close(ia3_linear_ref(x, w, b), x @ w.T + b)
    assert torch.autograd.gradcheck(ia3_linear_ref, (x, w, b, i, o))


def test_names_and_shapes():
    method = create("ia3", drawn_model().config)
    widths = {"attention.key": HIDDEN, "attention.value": HIDDEN, "feed_forward.down": FEED_FORWARD}
    wanted = {f"layers.{i}.{kind}": (n,) for i in range(LAYERS) for kind, n in widths.items()}
    assert {name: tuple(p.shape) for name, p in method.parameters().items()} == wanted
    assert all((p == 1).all() for p in method.parameters().values())


def test_short_names_are_the_full_ones():
    assert IA3Config(("value", "attention.key"), ("down",)) == IA3Config() and IA3Config().outputs == ("attention.key", "attention.value")


def test_scaling_keeps_the_dtype_of_what_it_scales():
    """Products in bf16 under wider vectors stay bf16, as the queries beside them are."""
    model = drawn_model()
    attached(model, "gender", "ia3")
    hooks, x = model.encoder.hooks, torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    weight, bias = torch.randn(HIDDEN, HIDDEN, dtype=torch.bfloat16), torch.randn(HIDDEN, dtype=torch.bfloat16)
    assert hooks.linear("layers.0.attention.key", x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("options,words", [
    ({"outputs": ("keys",)}, "ia3 outputs: expected some of query, key, value, output, up, down, got 'keys'"),
    ({"inputs": ("wo",)}, "ia3 inputs: expected some of query, key, value, output, up, down, got 'wo'"),
    ({"outputs": (), "inputs": ()}, "ia3 outputs and inputs: expected at least one linear, got none"),
    ({"inputs": ("key", "down")}, "ia3 outputs and inputs: expected each linear in one of them, got attention.key in both"),
])
def test_errors(options, words):
    with pytest.raises(ConfigError, match=words):
        create("ia3", drawn_model().config, options=options)


@pytest.mark.parametrize("kind,head", [("bert", "mlm"), ("bert", "class"), ("roberta", "class")])
def test_equals_peft(kind, head):
    """Their default for BERT and RoBERTa: `output.dense` names attention.output.dense too."""
    model = drawn_model(kind)
    method = attached(model, "gender", "ia3", inputs=("output", "down"))
    wrapped = with_peft(model, head, "IA3Config", **({"task_type": "SEQ_CLS"} if head == "class" else {}))
    pairs = {name: (p, lambda own, shape=p.shape: own.view(shape), (method.values[our_site(model, name)],))
             for name, p in wrapped.named_parameters() if "ia3_l" in name}
    assert len(pairs) == 4 * LAYERS
    assert_equals_peft(model, wrapped, pairs, head, batch_for(model, head))
