"""The compiled attention against its twin in float64: outputs and every gradient, on every code path, with one thread and two; masks bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor

from peftdebias import native
from peftdebias.batches import Spans
from peftdebias.ops import attention_ref, compiled, heads_of
from peftdebias.ops.attention_compiled import attention_compiled

from .natively import HEADS, check, close, drawn, dropping, gradients, ways
from .test_attention import SPANS

pytestmark = pytest.mark.skipif(not compiled.FUNCTIONS, reason=f"no compiled ops: {native.load()[1]}")

MORE_SPANS = SPANS | {"long": Spans.of((200, 3), (200, 130)), "short ones": Spans.of((1,) * 9 + (2, 5), (1,) * 9 + (2, 5)), "nothing": Spans.of((), ()),
                      "many": Spans.of(tuple(range(1, 41)), tuple(range(1, 41)))}
NAMES = ["query", "key", "value", "prefix_key", "prefix_value"]


def attention_tensors(spans: Spans, prefix: int | None, width: int, draw: int = 0) -> dict[str, Tensor | None]:
    rows = [spans.queries, spans.keys, spans.keys, *([None, None] if prefix is None else [prefix, prefix])]
    return {name: None if n is None else drawn(n, HEADS, width, seed=1000 * draw + i) for i, (name, n) in enumerate(zip(NAMES, rows))}


def attention_of(op, spans: Spans, rate: float):
    def run(query, key, value, prefix_key=None, prefix_value=None):
        return op(query, key, value, spans, None if prefix_key is None else (prefix_key, prefix_value), dropping(rate))
    return run


def wanted_of(tensors: dict) -> list[str]:
    return [name for name, t in tensors.items() if t is not None]


@pytest.mark.parametrize("prefix", [None, 0, 1, 5, 30])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", list(MORE_SPANS))
def test_attention(name, rate, prefix):
    tensors = attention_tensors(MORE_SPANS[name], prefix, 24)
    check(attention_of(attention_compiled, MORE_SPANS[name], rate), attention_of(attention_ref, MORE_SPANS[name], rate), tensors, wanted_of(tensors))


@pytest.mark.parametrize("width", [1, 4, 7, 13, 20, 32, 37, 64, 80])
def test_attention_of_any_head_width(width):
    spans = MORE_SPANS["ragged"]
    tensors = attention_tensors(spans, 3, width)
    check(attention_of(attention_compiled, spans, 0.1), attention_of(attention_ref, spans, 0.1), tensors, NAMES)


@pytest.mark.parametrize("draw", range(8))
def test_attention_of_the_longest_texts(draw):
    """Sums over 512 places, which in one go would err by more."""
    spans = Spans.of((512, 20), (512, 77))
    tensors = attention_tensors(spans, 30, 64, draw)
    check(attention_of(attention_compiled, spans, 0.1), attention_of(attention_ref, spans, 0.1), tensors, NAMES)


@pytest.mark.parametrize("wanted", [list(c) for n in range(1, 5) for c in itertools.combinations(NAMES, n)], ids=" ".join)
def test_attention_computes_what_is_asked_for(wanted):
    spans = MORE_SPANS["ragged"]
    check(attention_of(attention_compiled, spans, 0.5), attention_of(attention_ref, spans, 0.5), attention_tensors(spans, 5, 16), wanted)


def test_attention_without_keys_gives_zeros():
    spans = Spans.of((2, 3), (0, 4))
    tensors = attention_tensors(spans, None, 8)
    for way in ways():
        found = gradients(attention_of(attention_compiled, spans, 0.0), tensors, NAMES[:3])
        assert not found["y"][:2].any() and found["y"][2:].all() and not found["query"][:2].any(), way


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_attention_of_a_text_that_has_the_prefix_alone(rate):
    spans = Spans.of((2, 3, 0), (0, 4, 0))
    check(attention_of(attention_compiled, spans, rate), attention_of(attention_ref, spans, rate), attention_tensors(spans, 5, 24), NAMES)


def test_attention_drops_the_probabilities_of_the_specification():
    """Uniform probabilities over one-hot values show the mask: that of the text and that of the prefix."""
    spans, p, rate = Spans.of((130, 20), (130, 61)), 11, 0.5
    width = p + 130
    value = torch.zeros(191, 2, width)
    for place, row in zip([*range(130), *range(61)], range(191)):
        value[row, :, p + place] = 1
    prefix = torch.zeros(p, 2, width), torch.eye(p, width)[:, None].repeat(1, 2, 1)
    zeros = torch.zeros(150, 2, width), torch.zeros(191, 2, width)
    expected = attention_ref(*zeros, value, spans, prefix, dropping(rate)) == 0
    assert 0.4 < expected[:130].double().mean() < 0.6
    for way in ways():
        assert torch.equal(attention_compiled(*zeros, value, spans, prefix, dropping(rate)) == 0, expected), way


def test_attention_of_slices_of_one_product():
    """Their gradients come back as slices of one tensor too, and `heads_of` hands that on without a copy; part by part they are the twin's."""
    spans, width = MORE_SPANS["ragged"], 16
    rows = spans.keys
    product = drawn(rows, 3 * HEADS * width)

    def run(op):
        return lambda x: op(*heads_of(x, 3, HEADS), spans, None, dropping(0.1))

    check(run(attention_compiled), run(attention_ref), {"x": product}, ["x"])
    x = product.clone().requires_grad_()
    kept = []
    query, key, value = heads_of(x * 1, 3, HEADS)
    for part in (query, key, value):
        part.register_hook(lambda g: kept.append(g.untyped_storage().data_ptr()))
    (gradient,) = torch.autograd.grad(attention_compiled(query, key, value, spans).sum(), x)
    assert len(set(kept)) == 1 and gradient.is_contiguous()
    two = drawn(rows, 2 * HEADS * width, seed=4)
    fewer = MORE_SPANS["fewer queries"]
    asked = drawn(fewer.queries, HEADS, width, seed=5)
    for op, dtype in ((attention_compiled, torch.float32), (attention_ref, torch.float64)):
        kept.append(gradients(lambda query, x: op(query, *heads_of(x, 2, HEADS), fewer), {"query": asked, "x": two}, ["query", "x"], dtype))
    close(kept[-2], kept[-1])


def test_parts_whose_gradients_come_apart_are_put_together():
    x = drawn(5, 24)
    check(lambda x: sum((i + 1) * part for i, part in enumerate(heads_of(x, 3, 2))), lambda x: sum((i + 1) * part for i, part in enumerate(x.view(5, 3, 2, 4).unbind(1))),
          {"x": x}, ["x"])
    check(lambda x: heads_of(x, 3, 2)[1], lambda x: x.view(5, 3, 2, 4)[:, 1], {"x": x}, ["x"])


def test_attention_that_does_not_add_up():
    x = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match="attention: expected 7 queries, 7 keys and values, got 5, 5 and 5"):
        attention_compiled(x, x, x, Spans.of((7,), (7,)))
    wrong = Spans.of((5,), (5,))
    wrong.__dict__.update(query_lengths=(500,), key_lengths=(5,))  # of which C reads
    with pytest.raises(ValueError, match="attention: expected 500 queries, 5 keys and values, got 5, 5 and 5"):
        attention_compiled(x, x, x, wrong)
