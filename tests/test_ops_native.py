"""The compiled CPU ops against their twins in float64: outputs and every gradient, on every code path, with one thread and two; masks bit for bit."""

import concurrent.futures
import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftdebias import kernels, native, optimizer, tasks
from peftdebias.batches import IGNORED, Spans
from peftdebias.errors import ModelError
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.ops import Drop, attention_ref, compiled, dropout, gelu_ref, heads_of, norm_ref
from peftdebias.ops.attention_compiled import attention_compiled
from peftdebias.ops.dropout import dropout_compiled
from peftdebias.ops.gelu import gelu_compiled
from peftdebias.ops.norm import norm_compiled

from .outside import attached
from .plain import model_of, some
from .test_attention import SPANS

pytestmark = pytest.mark.skipif(not compiled.FUNCTIONS, reason=f"no compiled ops: {native.load()[1]}")

WIDTHS = (1, 7, 13, 37, 64, 65, 72, 768)


LEVELS = ("portable", "AVX2", "AVX-512")[:compiled.FUNCTIONS["ops_level"]() + 1 if compiled.FUNCTIONS else 0]


@contextlib.contextmanager
def running(level: int, threads: int):
    before = torch.get_num_threads()
    compiled.FUNCTIONS["ops_limit"](level)
    torch.set_num_threads(threads)
    try:
        assert compiled.FUNCTIONS["ops_level"]() == level
        yield
    finally:
        compiled.FUNCTIONS["ops_limit"](2)
        torch.set_num_threads(before)


def ways():
    """The portable code and what the processor has of the others; with one thread and with two."""
    for (level, name), threads in itertools.product(enumerate(LEVELS), (1, 2)):
        with running(level, threads):
            yield f"{name}, {threads} threads"


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def dropping(rate: float, seed: int = 2 ** 40 + 3) -> Drop | None:
    return Drop(rate, torch.tensor([seed]), 3) if rate else None


def gradients(function, tensors: dict[str, Tensor | None], wanted: list[str], dtype=torch.float32) -> dict[str, Tensor]:
    """{"y": output, name: gradient} of function(**tensors) in `dtype`, for a drawn gradient of y."""
    given = {name: t if t is None else t.to(dtype).detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted) for name, t in tensors.items()}
    y = function(**given)
    assert y.dtype == dtype and y.requires_grad == bool(wanted)
    found = {"y": y.detach()}
    if wanted:
        pull = drawn(*y.shape, seed=99).to(dtype)
        found |= {name: g for name, g in zip(wanted, torch.autograd.grad(y, [given[name] for name in wanted], pull, materialize_grads=True), strict=True)}
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], way: str = "") -> None:
    """1e-6 for values of order 1; sums over rows are larger, and so is what is allowed."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and found[name].dtype == torch.float32
        if wanted.numel():
            apart, largest = float((found[name].double() - wanted).abs().max()), float(wanted.abs().max())
            assert apart <= 1e-6 * max(1.0, largest), f"{way}, {name}: max|difference| {apart:.3g}, of values up to {largest:.3g}"


def check(compiled_op, twin, tensors: dict[str, Tensor | None], wanted: list[str]) -> None:
    expected = gradients(twin, tensors, wanted, torch.float64)
    for way in ways():
        close(gradients(compiled_op, tensors, wanted), expected, way)


# ---------------------------------------------------------------- dropout

@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (13, 7), (37, 12), (37, 13), (65, 136), (5, 768), (300, 72), (2100, 8)])
@pytest.mark.parametrize("seed", [0, 2 ** 31 + 7, 2 ** 62 - 5])
def test_dropout_draws_the_mask_of_the_specification(shape, seed):
    for rate in (0.0, 0.1, 0.5, 0.999):
        drop = Drop(rate, torch.tensor([seed]), 2 ** 31 - 1)
        expected = dropout_ref(torch.ones(shape), *drop)
        for way in ways():
            assert torch.equal(dropout_compiled(torch.ones(shape), *drop), expected), way


def test_dropout_of_a_slice_of_rows():
    whole = drawn(50, 200)
    for x in (whole[:, 8:72], whole[:, 3:40], whole.t(), whole[::2]):
        expected = dropout_ref(x, *dropping(0.5))
        for way in ways():
            assert torch.equal(dropout_compiled(x, *dropping(0.5)), expected), way


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_gradients_of_dropout(rate):
    check(lambda x: dropout_compiled(x, *dropping(rate)), lambda x: dropout_ref(x, *dropping(rate)), {"x": drawn(37, 13)}, ["x"])


# ---------------------------------------------------------------- norm

def norm_tensors(rows: int, width: int, residual: bool) -> dict[str, Tensor | None]:
    return {"hidden": drawn(rows, width), "residual": drawn(rows, width, seed=1) if residual else None, "gain": drawn(width, seed=2), "bias": drawn(width, seed=3)}


def norm_of(op, rate):
    return lambda hidden, residual, gain, bias: op(hidden, residual, gain, bias, 1e-5, dropping(rate))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_norm(width, residual, rate):
    wanted = ["hidden", *(["residual"] if residual else []), "gain", "bias"]
    check(norm_of(norm_compiled, rate), norm_of(norm_ref, rate), norm_tensors(45, width, residual), wanted)


@pytest.mark.parametrize("wanted", [list(c) for n in range(5) for c in itertools.combinations(("hidden", "residual", "gain", "bias"), n)], ids=" ".join)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_norm_computes_what_is_asked_for(wanted, rate):
    check(norm_of(norm_compiled, rate), norm_of(norm_ref, rate), norm_tensors(13, 37, True), wanted)


@pytest.mark.parametrize("rows", [0, 1])
def test_norm_of_few_rows(rows):
    check(norm_of(norm_compiled, 0.1), norm_of(norm_ref, 0.1), norm_tensors(rows, 37, True), ["hidden", "residual", "gain", "bias"])


@pytest.mark.parametrize("width", [37, 768])
def test_norm_of_rows_far_from_zero(width):
    """The variance is taken about the mean, and the mean is no further off than its last rounding, over many rows."""
    tensors = norm_tensors(500, width, False)
    tensors["hidden"] = (tensors["hidden"] + 100).float()
    plain, expected = (gradients(norm_of(norm_ref, 0.0), tensors, [], dtype)["y"] for dtype in (torch.float32, torch.float64))
    for way in ways():
        assert (gradients(norm_of(norm_compiled, 0.0), tensors, [])["y"] - expected).abs().max() <= (plain - expected).abs().max(), way


@pytest.mark.parametrize("width", [37, 768])
def test_the_deviation_of_rows_very_far_from_zero(width):
    """Between a row's largest and smallest result the mean cancels out: what is left is the deviation, which a mean that is off must not raise."""
    hidden = drawn(50, width) + 1e5

    def range_of(op, x):
        one = torch.ones(width, dtype=x.dtype)
        y = op(x, None, one, one * 0, 1e-5).double()
        return y.max(1)[0] - y.min(1)[0]

    exact = range_of(norm_ref, hidden.double())
    for way in ways():
        assert ((range_of(norm_compiled, hidden) - exact).abs() <= 3e-6 * exact).all(), way


# ---------------------------------------------------------------- gelu

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu(width, bias):
    tensors = {"x": drawn(45, width, scale=2.0), "bias": drawn(width, seed=1) if bias else None}
    for wanted in (["x", "bias"], ["x"], ["bias"], []) if bias else (["x"], []):
        check(gelu_compiled, gelu_ref, tensors, wanted)
    check(gelu_compiled, gelu_ref, {name: None if t is None else t[:0] if name == "x" else t for name, t in tensors.items()}, ["x"])


@pytest.mark.parametrize("rows, width, mean", [(2048, 3072, 0.0), (8192, 768, 0.0), (8192, 768, 1.0)])
def test_the_gradient_of_gelu_s_bias_over_many_rows(rows, width, mean):
    """Twice plain torch's own error at most, of single columns and of all."""
    x, bias, dy = drawn(rows, width), drawn(width, seed=1), mean + drawn(rows, width, seed=2)
    def of(function, dtype):
        given = bias.to(dtype).requires_grad_()
        return torch.autograd.grad(function(x.to(dtype), given), given, dy.to(dtype))[0].double()
    exact = of(gelu_ref, torch.float64)
    plain = of(gelu_ref, torch.float32) - exact
    for level in range(len(LEVELS)):
        with running(level, 2):
            found = of(gelu_compiled, torch.float32) - exact
        assert found.abs().max() <= 2 * plain.abs().max() and found.norm() <= 2 * plain.norm(), LEVELS[level]


def test_gelu_over_the_whole_range():
    """Between the twin and z Phi(z): no worse than 3e-7 of z anywhere, the tails and what is no number included."""
    z = torch.cat([torch.linspace(-15, 15, 300_001), torch.tensor([-1e30, -100.0, -0.0, 0.0, 1e-30, 100.0, 1e30])])[None]
    exact = {name: t.float().double() for name, t in gradients(gelu_ref, {"x": z}, ["x"], torch.float64).items()}
    pull, strange = drawn(*z.shape, seed=99), torch.tensor([[float("nan"), float("inf"), 1.0]])
    for way in ways():
        found = gradients(gelu_compiled, {"x": z}, ["x"])
        assert ((found["y"].double() - exact["y"]).abs() <= 3e-7 * z.abs().clamp(1e-30)).all(), way
        assert ((found["x"].double() - exact["x"]).abs() <= 4e-7 * pull.abs()).all(), way
        assert gelu_compiled(strange).isnan().tolist() == [[True, False, False]], way


# ---------------------------------------------------------------- attention

HEADS = 3
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


# ---------------------------------------------------------------- adamw, mlm_loss

@pytest.mark.parametrize("count", [0, 1, 7, 40_001])
@pytest.mark.parametrize("step", [1, 2, 5000])
def test_adamw(count, step):
    settings, rates = {"betas": (0.9, 0.999), "epsilon": 1e-8}, torch.tensor(optimizer.rates_at(step, 1e-2, (0.9, 0.999), 0.1))
    state = [drawn(count, seed=i) for i in range(3)] + [drawn(count, seed=3).abs()]
    expected = [t.double() for t in state]
    optimizer.adamw_ref(*expected, rates.double(), **settings)
    for way in ways():
        found = [t.clone() for t in state]
        optimizer.adamw_compiled(*found, rates, **settings)
        close(dict(zip("vgmq", found)), dict(zip("vgmq", expected)), way)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-8])
def test_adamw_of_gradients_as_small_as_epsilon(scale):
    """The root of the second moment is then no larger than epsilon, or 0: nothing moves."""
    settings, rates = {"betas": (0.9, 0.999), "epsilon": 1e-8}, torch.tensor(optimizer.rates_at(3, 1e-2, (0.9, 0.999), 0.1))
    state = [drawn(37), drawn(37, seed=1) * scale, drawn(37, seed=2) * scale, drawn(37, seed=3) ** 2 * scale ** 2]
    expected = [t.double() for t in state]
    optimizer.adamw_ref(*expected, rates.double(), **settings)
    for way in ways():
        found = [t.clone() for t in state]
        optimizer.adamw_compiled(*found, rates, **settings)
        close({"values": found[0]}, {"values": expected[0]}, way)


def test_the_first_moments_of_adamw_are_exact():
    """1 - beta is taken in float64: in float32 it would be off by 1e-5 of it."""
    state, rates = [drawn(37), drawn(37, seed=1), torch.zeros(37), torch.zeros(37)], torch.tensor(optimizer.rates_at(1, 1e-2, (0.9, 0.999), 0.1))
    expected = 0.1 * state[1].double(), 0.001 * state[1].double() ** 2
    for way in ways():
        found = [t.clone() for t in state]
        optimizer.adamw_compiled(*found, rates, betas=(0.9, 0.999), epsilon=1e-8)
        assert ((found[2] - expected[0]).abs() <= 1.5e-7 * expected[0].abs()).all() and ((found[3] - expected[1]).abs() <= 3e-7 * expected[1]).all(), way


def test_adamw_is_seen_by_autograd():
    x, state = torch.ones(3, requires_grad=True), [torch.ones(3) for _ in range(4)]
    y = x * state[0]
    optimizer.adamw_compiled(*state, torch.tensor(optimizer.rates_at(1, 0.1, (0.9, 0.999), 0.0)), betas=(0.9, 0.999), epsilon=1e-8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("weighted", [False, True])
def test_mlm_loss_of_ignored_rows(weighted):
    logits, targets = drawn(13, 7, seed=1), torch.arange(13) % 7
    targets[[0, 5, 12]] = IGNORED
    weights = drawn(7, seed=2).abs() if weighted else None
    found, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = tasks.mlm_loss_compiled(found * 1, targets, weights), tasks.mlm_loss_ref(expected * 1, targets, weights if weights is None else weights.double())
    for value in values:
        value.backward()
    torch.testing.assert_close(values[0].double(), values[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=0, atol=1e-6)
    assert not found.grad[[0, 5, 12]].any()


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("weighted", [False, True])
def test_mlm_loss_of_an_ignored_row_that_is_no_number(weighted, value):
    """A token that may never be said has -inf everywhere; what else an ignored row holds does not reach the loss either."""
    targets, weights = torch.tensor([3, IGNORED, 4]), drawn(7, seed=2).abs() if weighted else None
    logits = drawn(3, 7, seed=1)
    logits[slice(None) if value < 0 else 1, 0] = value
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = tasks.mlm_loss_compiled(found * 1, targets, weights), tasks.mlm_loss_ref(expected * 1, targets, weights)
    for loss in values:
        loss.backward()
    assert values[1].isfinite()
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-6, equal_nan=True)


def test_mlm_loss_where_all_rows_are_ignored():
    logits, targets = drawn(3, 7), torch.full((3,), IGNORED)
    for loss in (tasks.mlm_loss_ref, tasks.mlm_loss_compiled):
        assert loss(logits, targets).item() == 0 and loss(logits, targets, torch.ones(7)).isnan()
        for weights in (None, torch.ones(7)):
            given = logits.clone().requires_grad_()
            assert not torch.autograd.grad(loss(given * 1, targets, weights), given)[0].any()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (13, 7), (7, 37), (5, 30522)])
@pytest.mark.parametrize("weighted", [False, True])
def test_mlm_loss(shape, weighted):
    targets = torch.randint(0, shape[1], shape[:1], generator=torch.Generator().manual_seed(0))
    weights = drawn(shape[1], seed=1).abs() if weighted and shape[0] else None
    tensors = {"logits": drawn(*shape, scale=3.0) + 20}
    check(lambda logits: tasks.mlm_loss_compiled(logits * 1, targets, weights),
          lambda logits: tasks.mlm_loss_ref(logits, targets, None if weights is None else weights.double()), tensors, ["logits"])


def test_mlm_loss_writes_over_the_logits_and_says_so():
    logits, targets = drawn(3, 7).requires_grad_(), torch.tensor([1, 6, 0])
    scores = logits * 1
    loss = tasks.mlm_loss_compiled(scores, targets)
    loss.backward(retain_graph=True)
    assert torch.equal(scores.detach(), logits.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for outside in (7, -1, -2 ** 40):
        with pytest.raises(IndexError, match="expected targets inside the vocabulary"):
            tasks.mlm_loss_compiled(logits, torch.tensor([1, outside, 0]))


def test_the_shares_of_a_loss_over_the_whole_range_of_the_exponential():
    """Each to a few units of its last place, down to e^-87, below which nothing is left; in whole vectors and in the rest of a row."""
    logits = -(torch.linspace(0, 90, 2 ** 12)[:, None] + 0.01 * torch.arange(37))
    logits[:, 0] = 0
    exact = logits.double().softmax(-1)
    counts = logits > -86.99
    for way in ways():
        given = logits.clone().requires_grad_()
        (tasks.mlm_loss_compiled(given * 1, torch.zeros(2 ** 12, dtype=torch.int64)) * 2 ** 12).backward()  # a power of two: no rounding
        found = given.grad.double()
        assert ((found - exact).abs()[:, 1:] <= 6e-7 * exact[:, 1:])[counts[:, 1:]].all(), way
        assert found[logits < -87.01].abs().max() == 0, way


def test_the_sum_over_a_whole_vocabulary_keeps_its_digits():
    """Equal terms round the same way each time: a float32 sum in one go would be off by 4e-5 of it."""
    logits = torch.log(torch.tensor([[0.7], [0.55], [0.123]])).repeat(1, 30522)
    logits[:, 0] = 0
    targets = torch.zeros(3, dtype=torch.int64)
    expected = tasks.mlm_loss_ref(logits.double(), targets)
    for way in ways():
        assert abs(float(tasks.mlm_loss_compiled(logits * 1, targets).double() - expected)) < 6e-6, way


@pytest.mark.parametrize("width", [5, 16, 37])
def test_one_far_above_the_rest_wherever_it_stands(width):
    """A logit or a score 200 above all others and 100 below 0, in each place in turn: it takes everything, nothing overflows and nothing vanishes."""
    logits = 200 * torch.eye(width) - 300
    spans, value = Spans.of((width,), (width,)), drawn(width, 1, width, seed=1)
    for way in ways():
        given = logits.clone().requires_grad_()
        loss = tasks.mlm_loss_compiled(given * 1, torch.arange(width))
        loss.backward()
        assert abs(float(loss.detach())) < 1e-6 and float(given.grad.abs().max()) < 1e-6, way
        found = attention_compiled((200 * torch.eye(width)[:, None] - 300) * width ** 0.5, torch.eye(width)[:, None], value, spans)
        assert torch.equal(found, value), way


def test_what_does_not_fit_is_not_handed_to_c():
    """Heads and widths that differ, targets of another type, weights of another length, a seed or rates of another size: C would read other memory."""
    spans, x, seed = Spans.of((5,), (5,)), torch.zeros(5, 2, 4), torch.tensor([5])
    for key, value, prefix in ((x[:, :1], x[:, :1], None), (x[..., :3], x[..., :3], None), (x, torch.zeros(5, 2, 6), None), (x, x, (x[:, :1], x[:, :1])), (x, x, (x[:3], x[:2]))):
        with pytest.raises(ValueError, match=r"attention: expected keys, values and a prefix with heads \(2, 4\) like the queries, got \(5, "):
            attention_compiled(x, key, value, spans, prefix)
    logits, targets = drawn(4, 7), torch.tensor([1, 2, 3, 6])
    with pytest.raises(RuntimeError, match="Long"):
        tasks.mlm_loss_compiled(logits, targets.int())
    torch.testing.assert_close(tasks.mlm_loss_compiled(logits, targets.byte()), tasks.mlm_loss_compiled(logits, targets))
    for many in (6, 8):
        with pytest.raises(RuntimeError, match="weight tensor should be defined either for all 7 classes or no classes"):
            tasks.mlm_loss_compiled(logits, targets, torch.ones(many))
    for wrong, words in ((seed.int(), r"torch.int32 \[1\]"), (seed.float(), r"torch.float32 \[1\]"), (seed[:0], r"torch.int64 \[0\]")):
        with pytest.raises(ValueError, match=rf"dropout: expected a seed of int64 \[1\] on the cpu, got {words} on cpu"):
            dropout_compiled(logits, 0.5, wrong, 1)
    with pytest.raises(ValueError, match="unpack"):
        optimizer.adamw_compiled(*(torch.ones(3) for _ in range(4)), torch.ones(1), betas=(0.9, 0.999), epsilon=1e-8)
    rates = torch.tensor([[1.0, 9.0], [0.01, 9.0], [0.5, 9.0]])[:, 0]  # which lie apart
    found, expected = ([torch.ones(9) * (i + 1) for i in range(4)] for _ in range(2))
    for update, tensors in ((optimizer.adamw_compiled, found), (optimizer.adamw_ref, expected)):
        update(*tensors, rates, None, betas=(0.9, 0.999), epsilon=1e-8)
    for have, want in zip(found, expected):
        torch.testing.assert_close(have, want)


# ---------------------------------------------------------------- who runs, and where

def everything(dtype=torch.float32, rows: int = 300) -> list[Tensor]:
    """One pass through every op, forward and backward; with 300 rows torch's own threads, which do not survive a fork, have none of it."""
    spans = Spans.of((60, 33, 7), (60, 33, 7))
    qkv, tall = drawn(100, 3 * 96).to(dtype).requires_grad_(), drawn(rows, 100).to(dtype).requires_grad_()
    gain, bias = drawn(100).to(dtype).requires_grad_(), drawn(100, seed=1).to(dtype).requires_grad_()
    prefix = tuple(drawn(5, HEADS, 32, seed=i).to(dtype).requires_grad_() for i in (7, 8))
    made = [attention_compiled(*heads_of(qkv, 3, HEADS), spans, prefix, dropping(0.1)), norm_compiled(tall, tall * 2, gain, bias, 1e-5, dropping(0.1)),
            gelu_compiled(tall, bias), dropout_compiled(tall, *dropping(0.1))]
    found = torch.autograd.grad(sum((y * drawn(*y.shape, seed=9).to(dtype)).sum() for y in made), [qkv, tall, gain, bias, *prefix])
    return [y.detach() for y in made] + list(found)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_any_number_of_threads_gives_the_same_bits(level):
    found = []
    for count in (1, 2, 3, 7, 2, 1):
        with running(level, count):
            found.append(everything(rows=3000))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_threads_flush_what_their_caller_flushes():
    """In a process of its own: nothing of it is left to other tests. The pool's thread is there before the setting changes, either way."""
    code = """
import torch
from peftdebias.ops.dropout import dropout_compiled
small, seed = torch.full((4096, 768), 1e-39), torch.tensor([3])
def kept(threads):
    torch.set_num_threads(threads)
    y = dropout_compiled(small, 0.1, seed, 1).view(torch.int32)  # as whole numbers: a comparison would flush too
    return int((y != 0).sum())
before = kept(2)
assert before == kept(1) > 0.8 * small.numel()
if torch.set_flush_denormal(True):
    assert [kept(2) for _ in range(4)] == [0] * 4 and kept(1) == 0
    torch.set_flush_denormal(False)
    assert [kept(2) for _ in range(4)] == [before] * 4
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_other_tensors_are_left_to_the_twins(monkeypatch):
    """float64, and anything that no plain pointer says: no call into the library."""
    monkeypatch.setattr(compiled, "call", lambda name, *rest: pytest.fail(f"{name} was called"))
    everything(torch.float64)
    with torch.device("meta"):
        assert dropout_compiled(torch.ones(3, 4), 0.0, torch.tensor([1]), 0).is_meta
    half = drawn(5, 8).bfloat16()
    assert torch.equal(gelu_compiled(half), gelu_ref(half))
    assert torch.equal(norm_compiled(half, drawn(5, 8), torch.ones(8), torch.zeros(8), 1e-5), norm_ref(half, drawn(5, 8), torch.ones(8), torch.zeros(8), 1e-5))


def test_a_negated_view_is_what_it_says_and_not_what_its_memory_holds():
    """As x.conj().imag is one; given to an op, and as the gradient of what it gave."""
    x, spans = drawn(5, 8, seed=1), Spans.of((3, 2), (3, 2))

    def attend(x):
        return attention_compiled(*heads_of(x, 1, 2) * 3, spans).flatten(1)

    def loss(x):
        return tasks.mlm_loss_compiled(x * 1 if x.requires_grad else x, torch.tensor([1, 2, 3, 4, IGNORED]))

    for op in (gelu_compiled, attend, loss, lambda x: dropout_compiled(x, *dropping(0.5)), lambda x: norm_compiled(x, x, torch.ones(8), torch.zeros(8), 1e-5)):
        assert torch._neg_view(x).is_neg()
        torch.testing.assert_close(op(torch._neg_view(x)), op(-x))
        found = []
        for turned in (torch._neg_view, torch.neg):
            given = x.clone().requires_grad_()
            y = op(given)
            y.register_hook(turned)
            y.backward(torch.ones_like(y))
            found.append(given.grad)
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_what_c_writes_to_is_float32_on_the_cpu_whatever_the_defaults_are(default):
    """In a process of its own: it would be memory of others."""
    code = f"""
import numpy, torch
from peftdebias.batches import Spans
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.batches import Sample, pack
from peftdebias import methods, patch, tasks
torch.manual_seed(0)
model = Model(EncoderConfig(kind="bert", layers=2, hidden=32, heads=2, feed_forward=48, vocab=97, max_positions=64), mlm=True)
batch = pack([Sample(numpy.arange(5, 5 + n), numpy.arange(n), numpy.arange(n)) for n in (37, 11, 24)])
def everything():
    patch.attach(model, "a", methods.create("lora", model.config, options=dict(rank=3), seed=1))
    patch.attach(model, "b", methods.create("prefix", model.config, options=dict(length=3), seed=1))
    found = [model.eval().mlm_logits(batch)]
    model.train()
    model.encoder.seed = None
    torch.default_generator.manual_seed(7)
    loss = tasks.mlm_loss(model.mlm_logits(batch), batch.targets)
    loss.backward()
    found += [loss, *(p.grad.clone() for p in patch.all_parameters(model).values())]
    for p in patch.all_parameters(model).values(): p.grad = None
    patch.detach(model, "a"), patch.detach(model, "b")
    return found
expected = everything()
default = {str(default) if default != "meta" else repr(default)}
torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
for _ in range(5):
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(everything(), expected, strict=True))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_step_compiles_whole_with_the_twins_inside():
    spans = Spans.of((9, 4), (9, 4))
    assert len(spans.query_places) == len(spans.key_places) == 13 and spans.key_mask is not None  # made before

    def run(x, seed):
        drop = Drop(0.1, seed, 3)
        y = attention_compiled(*heads_of(x, 3, 2), spans, None, drop).flatten(1)
        return dropout(gelu_compiled(norm_compiled(y, y * 2, torch.ones(8), torch.zeros(8), 1e-5, drop), torch.ones(8)), drop)

    x, seed, results = drawn(13, 24).requires_grad_(), torch.tensor([5]), []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y = function(x, seed)
        results.append({"y": y.detach(), "x": torch.autograd.grad(y.sum(), x)[0]})
    close(results[1], {name: t.double() for name, t in results[0].items()})


def test_choose_takes_them_by_itself():
    for op in ("dropout", "norm", "embed", "gelu", "attention", "adamw", "mlm_loss"):
        assert kernels.decide(op, torch.device("cpu")) == ("native", "the fastest on cpu")
        assert kernels.decide(op, torch.device("cuda"))[0] != "native"
        with kernels.use("torch"):
            assert kernels.choose(op, reference=print) is print


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_makes_threads_of_its_own():
    code = """
import multiprocessing, torch
from tests.test_ops_native import everything
torch.set_num_threads(2)
sums = lambda: [t.double().sum().item() for t in everything()]
def child(pipe):
    pipe.send(sums())
if __name__ == "__main__":
    before = sums()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        mine, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,))
        process.start()
        assert mine.poll(60), "the child hangs"
        assert mine.recv() == before == sums()
        process.join(60)
        assert process.exitcode == 0
    print("same")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert ran.returncode == 0 and ran.stdout == "same\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_a_second_derivative_is_that_of_float64_or_an_error(method):
    """Of the inputs asked for alone: there autograd leaves out, without a word, what a backward that cannot be differentiated reads of the forward."""
    def pulled(kind: str, dtype: torch.dtype) -> list[Tensor]:
        model, batch = model_of(), some("bert")
        trained = list(attached(model, "x", method).parameters().values())
        model.to(dtype)
        with kernels.use(kind), sdpa_kernel(SDPBackend.MATH):  # the only one of torch's with a second derivative
            first = torch.autograd.grad(torch.nn.functional.cross_entropy(model.mlm_logits(batch), batch.targets), trained, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    for found, expected in zip(pulled("torch", torch.float32), pulled("auto", torch.float64), strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(RuntimeError, match=r": expected a backward without create_graph, .*\(PEFTDEBIAS_KERNELS=torch, in float32\)$"):
        pulled("auto", torch.float32)


def test_lengths_below_0_never_reach_memory():
    query, keys = drawn(5, 2, 4), drawn(5, 2, 4)
    for lengths in (((6, -1), (6, -1)), ((-1, 6), (3, 2)), ((3, 2), (5,))):
        with pytest.raises(ModelError, match=r"^Spans.of: expected lengths from 0, as many of queries as of keys, got \("):
            Spans.of(*lengths)
    by_hand = Spans(torch.tensor([0, 6, 5], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32), 5, 5, 6, 3)
    with pytest.raises(ModelError, match=r"^spans: expected ascending cu_queries and cu_keys, got lengths \(6, -1\) and \(3, 2\)$"):
        attention_compiled(query, keys, keys, by_hand)


def test_every_backward_that_has_no_derivative_says_so():
    from peftdebias import methods, written  # noqa: F401

    found = [cls for cls in torch.autograd.Function.__subclasses__() if cls.__module__.startswith("peftdebias.") and "backward" in vars(cls) and ".kernels." not in cls.__module__]
    assert {cls.__name__ for cls in found} == {"_Norm", "_Gelu", "_Linear", "_Scores", "_Turned", "_Attention", "_Parts", "_Dropout", "_Adapter", "_Apart", "_Loss"}
    for cls in found:
        if cls.__name__ != "_Parts":  # which puts gradients side by side, differentiably
            with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
                cls.backward(None, None)


def test_callers_on_two_threads_do_not_disturb_each_other():
    expected = everything()
    with running(len(LEVELS) - 1, 2), concurrent.futures.ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: everything(), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_the_library_the_twins_do_the_work_and_it_is_said_once():
    code = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peftdebias._native" else find(name, *rest)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from peftdebias import kernels, ops, tasks, training, cda_engine
    from peftdebias.axes import load_axis
    assert kernels.decide("dropout", torch.device("cpu")) == ("torch", "no native kernel for this op; plain torch does its work")
    drop = ops.Drop(0.5, torch.tensor([5]), 1)
    assert torch.equal(ops.dropout(torch.ones(3, 7), drop), ops.dropout.__globals__["dropout_ref"](torch.ones(3, 7), *drop))
    cda_engine.engine(load_axis("gender"))
print([str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count("peftdebias._native is not built") == 1, ran.stdout + ran.stderr
