"""The compiled dropout, norm, GELU, AdamW and loss against their twins in float64: outputs and every gradient, on every code path, with one thread and two; masks bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor

from peftdebias import native, optimizer, tasks
from peftdebias.batches import IGNORED, Spans
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.ops import Drop, compiled, gelu_ref, norm_ref
from peftdebias.ops.attention_compiled import attention_compiled
from peftdebias.ops.dropout import dropout_compiled
from peftdebias.ops.gelu import gelu_compiled
from peftdebias.ops.norm import norm_compiled

from .natively import LEVELS, check, close, drawn, dropping, gradients, running, ways

pytestmark = pytest.mark.skipif(not compiled.FUNCTIONS, reason=f"no compiled ops: {native.load()[1]}")

WIDTHS = (1, 7, 13, 37, 64, 65, 72, 768)


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
