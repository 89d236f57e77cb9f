"""The feed-forward block whose products have GELU and its gradient behind them, against the plain twins: the two kernels, and the block in both forms, frozen and trained."""

import pytest
import torch

from peftdebias import kernels
from peftdebias.kernels import dispatch, feed_forward, gelu, product
from peftdebias.ops.gelu import feed_forward_ref, gelu_ref
from peftdebias.ops.gelu import feed_forward as chosen

from .harness import DEVICE, DTYPES, Watcher, compare, drawn, poisoned, strided

NAMES = ("x", "up", "up_bias", "down", "down_bias")
RAGGED = [(13, 37, 7), (37, 7, 13), (1, 64, 131), (131, 66, 48), (37, 16, 29), (29, 48, 37)]  # T, D, inner; sums of 16 more than a multiple of 32 too


def tensors(rows: int, width: int, inner: int) -> dict[str, torch.Tensor]:
    return {"x": drawn(rows, width, seed=1), "up": drawn(inner, width, seed=2, scale=2 * width ** -0.5), "up_bias": drawn(inner, seed=3),
            "down": drawn(width, inner, seed=4, scale=inner ** -0.5), "down_bias": drawn(width, seed=5)}


def fused(x, up, down, up_bias=None, down_bias=None):
    with dispatch.use("feed_forward", "fused"):
        return feed_forward.feed_forward(x, up, up_bias, down, down_bias)


def plain(x, up, down, up_bias=None, down_bias=None):
    return feed_forward_ref(x, up, up_bias, down, down_bias)


# ---------------------------------------------------------------- the block

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_block(sizes, dtype):
    compare(fused, plain, tensors(*sizes), dtype=dtype, gradients=NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(131, 768, 3072), (300, 128, 512)], ids=str)
def test_block_of_bert(sizes, dtype, monkeypatch):
    """float32 in the tiles of bf16: fewer steps of the interpreter, the same kernels."""
    monkeypatch.setattr(product, "tiles_for", lambda dtype, *rest, of=product.tiles_for: of(torch.bfloat16, *rest))
    compare(fused, plain, tensors(*sizes), dtype=dtype, gradients=NAMES)


@pytest.mark.parametrize("gradients", [("x",), ("up",), ("up_bias",), ("down",), ("down_bias",), ("x", "down"), ("up", "down_bias")], ids=str)
def test_any_set_of_gradients(gradients):
    """Frozen weights too: what nobody asks for is None, and neither made nor kept."""
    compare(fused, plain, tensors(37, 24, 40), dtype=torch.bfloat16, gradients=gradients)
    given = {name: t.bfloat16().requires_grad_(name in gradients) for name, t in tensors(37, 24, 40).items()}
    y = fused(**given)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert (37, 40) in {tuple(t.shape) for t in kept} or gradients == ("down_bias",)
    y.sum().backward()
    assert {name for name, t in given.items() if t.grad is not None} == set(gradients)


def test_without_biases_and_not_contiguous():
    given = {name: t for name, t in tensors(37, 24, 40).items() if "bias" not in name}
    compare(fused, plain, given, dtype=torch.float32, gradients=tuple(given), layout=strided)


def test_rows_of_any_stride(monkeypatch):
    """x and dy are columns of a wider tensor, beside NaN: the kernels read them where they lie."""
    def beside(t):
        return torch.cat([torch.full_like(t, torch.nan), t], -1)[..., t.shape[-1]:]

    compare(fused, plain, tensors(37, 64, 48), dtype=torch.bfloat16, gradients=NAMES, layout=beside)
    seen, given = [], {name: beside(t.bfloat16()).requires_grad_() for name, t in tensors(37, 64, 48).items()}
    monkeypatch.setattr(feed_forward, "rows_together", lambda t, same=feed_forward.rows_together: seen.append(same(t) is t) or same(t))
    y = fused(**given)
    y.backward(beside(torch.ones_like(y)))
    assert seen == [True, True]


def test_more_row_tiles_than_go_through_the_columns_together(monkeypatch):
    """Two and the one that is left."""
    monkeypatch.setattr(product, "tiles_for", lambda *_: {"BM": 16, "BN": 64, "BK": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2})
    compare(fused, plain, tensors(37, 32, 70), dtype=torch.bfloat16, gradients=("x",))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_of_trained_weights(context, monkeypatch):
    kept, up = [], feed_forward._up

    def watched(*given):
        y, inner = up(*given)
        kept.append(inner.numel())
        return y, inner

    monkeypatch.setattr(feed_forward, "_up", watched)
    given = {name: t.bfloat16().requires_grad_() for name, t in tensors(13, 24, 40).items()}
    with context():
        fused(**given)
    fused(**given)
    assert kept == [0, 13 * 40]


def test_the_forms_agree():
    """A form is what was asked for when the forward ran: its backward, later, keeps it."""
    found = {}
    for form in dispatch.FORMS["feed_forward"]:
        given = {name: t.bfloat16().requires_grad_() for name, t in tensors(37, 64, 48).items()}
        with dispatch.use("feed_forward", form):
            y = feed_forward.feed_forward(*(given[name] for name in NAMES))
        y.backward(torch.ones_like(y))
        found[form] = [y, *(given[name].grad for name in NAMES)]
    for have, want in zip(*found.values()):
        torch.testing.assert_close(have.float(), want.float(), rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_which_kernels_run(monkeypatch):
    called = []
    for name in ("_up", "_down"):
        monkeypatch.setattr(feed_forward, name, lambda *given, of=getattr(feed_forward, name), name=name: called.append(name) or of(*given))
    for form, expected in (("fused", ["_up", "_down"]), ("library", [])):
        called.clear()
        given = {name: t.bfloat16().requires_grad_(name == "x") for name, t in tensors(13, 24, 40).items()}
        with dispatch.use("feed_forward", form):
            y = feed_forward.feed_forward(*(given[name] for name in NAMES))
        y.sum().backward()
        assert called == expected
    assert feed_forward.form_for(torch.zeros(3, 4, dtype=torch.bfloat16), 5) == "library"  # nothing was measured on a CPU


def test_repeats_bit_for_bit():
    runs = []
    for _ in range(2):
        given = {name: t.bfloat16().requires_grad_() for name, t in tensors(131, 64, 48).items()}
        with poisoned():
            fused(**given).sum().backward()
        runs.append([t.grad for t in given.values()])
    assert all(map(torch.equal, *runs))


def test_no_rows():
    given = {name: (t[:0] if name == "x" else t).bfloat16().requires_grad_() for name, t in tensors(3, 24, 40).items()}
    with poisoned():
        y = fused(**given)
        y.sum().backward()
    assert y.shape == (0, 24) and not any(t.grad.any() for t in given.values())


# ---------------------------------------------------------------- the kernels

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,depth,columns", [(13, 7, 37), (131, 64, 48), pytest.param(65, 130, 133, marks=pytest.mark.slow)])
def test_what_the_kernels_write(rows, depth, columns, dtype):
    """GELU of the unrounded product, the product itself; the gradient before GELU, GELU once more, and sums that are not rounded."""
    inputs = {"x": drawn(rows, depth, seed=1), "weight": drawn(columns, depth, seed=2, scale=depth ** -0.5), "bias": drawn(columns, seed=3), "dy": drawn(rows, depth, seed=4),
              "down": drawn(depth, columns, seed=5, scale=depth ** -0.5), "inner": drawn(rows, columns, seed=6)}

    def run(x, weight, bias, dy, down, inner):
        with poisoned():
            y, product = feed_forward._up(x, weight, bias, True)
            alone, none = feed_forward._up(x, weight, bias, False)
            dinner, again, sums = feed_forward._down(dy, down, inner, bias, True, True)
            bare, *nothing = feed_forward._down(dy, down, inner, bias, False, False)
        assert torch.equal(alone, y) and torch.equal(bare, dinner) and not none.numel() and not any(t.numel() for t in nothing)
        assert torch.equal(again, gelu.gelu(inner, bias)) and sums.dtype == torch.float32
        return {"y": y, "product": product, "dinner": dinner, "sums": sums.to(dinner.dtype)}

    def truth(x, weight, bias, dy, down, inner):
        product, z = x @ weight.t(), (inner + bias).detach().requires_grad_()
        dinner, = torch.autograd.grad(gelu_ref(z), z, dy @ down)
        return {"y": gelu_ref(product, bias), "product": product, "dinner": dinner, "sums": dinner.sum(0)}

    compare(run, truth, inputs, dtype=dtype)


def test_what_lies_between_is_not_rounded():
    """GELU sees float32 sums, and what is summed for db1 is float32: in bf16 there is no rounding but the last."""
    x, weight, bias, down, inner = (drawn(*shape, seed=i).bfloat16() for i, shape in enumerate([(37, 32), (48, 32), (48,), (32, 48), (37, 48)]))
    y, _ = feed_forward._up(x, weight, bias, False)
    exact = gelu_ref(x.double() @ weight.double().t(), bias.double())
    assert ((y.double() - exact).abs() <= 2.0 ** -8 * exact.abs() + 1e-6).all()
    *_, sums = feed_forward._down(x, down, inner, bias, False, True)
    z = (inner.double() + bias.double()).requires_grad_()
    slope, = torch.autograd.grad(gelu_ref(z), z, x.double() @ down.double())
    torch.testing.assert_close(sums.double(), slope.sum(0), rtol=1e-5, atol=1e-4)


def test_a_row_that_is_not_finite_stays_alone():
    x, weight = torch.ones(20, 64), torch.ones(16, 64)
    x[3] = float("inf")
    y, _ = feed_forward._up(x.bfloat16().to(DEVICE), weight.bfloat16().to(DEVICE), None, False)
    assert torch.isinf(y[3]).all() and torch.isfinite(y[[i for i in range(20) if i != 3]]).all()


def test_registration():
    x, weight, bias, down = (t.float() for t in (drawn(13, 7), drawn(37, 7), drawn(37), drawn(7, 37)))
    torch.library.opcheck(torch.ops.peftdebias.feed_forward_up.default, (x, weight, bias, True))
    torch.library.opcheck(torch.ops.peftdebias.feed_forward_up.default, (x, weight, None, False))
    torch.library.opcheck(torch.ops.peftdebias.feed_forward_down.default, (x, down, drawn(13, 37).float(), bias, True, True))
    torch.library.opcheck(torch.ops.peftdebias.feed_forward_down.default, (x, down, drawn(13, 37).float(), None, False, False))


# ---------------------------------------------------------------- who takes it

@pytest.mark.parametrize("trained", [(), ("up", "down")], ids=["frozen", "trained"])
@pytest.mark.parametrize("form", ["library", "fused"])
def test_who_takes_it(form, trained, monkeypatch):
    """Trained weights of 16-bit products always, frozen ones where the fused form is picked; and nobody under float64, torch.compile or a watcher."""
    called, op = [], feed_forward.feed_forward
    monkeypatch.setitem(kernels._registry, ("feed_forward", "triton"), lambda *given: called.append(len(given[0])) or op(*given))
    given = {name: t.bfloat16().requires_grad_(name in trained or name == "x") for name, t in tensors(13, 24, 40).items()}

    def run(given):
        with dispatch.use("feed_forward", form), kernels.use("triton"):
            return chosen(*(given[name] for name in NAMES))

    taken = [13] if trained or form == "fused" else []
    y = run(given)
    assert called == taken
    y.sum().backward()
    called.clear()
    run({name: t.double() for name, t in given.items()})
    with dispatch.use("feed_forward", form), kernels.use("triton"):
        torch.compile(lambda *given: chosen(*given), backend="eager", fullgraph=True)(*(given[name].detach() for name in NAMES))
    with Watcher():
        run(given)
    assert not called
