"""Linears with trained float32 weights beside 16-bit activations, against their twins: output and every named gradient, and what they keep."""

import contextlib

import pytest
import torch

from peftdebias import kernels, ops
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.kernels import linear_trained as fused
from peftdebias.ops import gelu_linear_ref
from peftdebias.ops.linear import linear_ref

from .harness import DEVICE, DTYPES, compare, drawn, strided

PARAMETERS = ("weight", "bias", "shift")
OPS = {"linear": (fused.linear_trained, linear_ref, ("x", "weight", "bias")), "gelu": (fused.gelu_linear, gelu_linear_ref, ("x", "shift", "weight", "bias"))}
BOTH = pytest.mark.parametrize("op", OPS)


def tensors(op: str, t: int, width: int, out: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """float64 values that `dtype` holds: x [T, in], W [out, in] of entries near 1 / sqrt(in), b [out], shift [in]."""
    shapes = {"x": (t, width), "shift": (width,), "weight": (out, width), "bias": (out,)}
    return {n: drawn(*shapes[n], seed=i, scale=width ** -0.5 if n == "weight" else 1.0).to(dtype).double() for i, n in enumerate(OPS[op][2])}


def plain(op: str, dtype: torch.dtype):
    """torch's own in that dtype, as autocast has it: casts, the product, and their backward."""
    return lambda **t: OPS[op][1](**{n: x.to(dtype) for n, x in t.items()})


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,width,out", [(13, 37, 7), (37, 7, 13), (1, 13, 37), pytest.param(117, 16, 1, marks=pytest.mark.slow)])
def test_ragged_sizes_in_each_dtype(op, t, width, out, dtype):
    kernel, twin, names = OPS[op]
    compare(kernel, twin, tensors(op, t, width, out, dtype), plain=plain(op, dtype), dtype=dtype, gradients=names, float32=[n for n in names if n in PARAMETERS])


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("t,width,out", [(197, 768, 768), (67, 3072, 768), (131, 768, 3072)])
def test_sizes_of_bert(op, t, width, out, dtype):
    kernel, twin, names = OPS[op]
    compare(kernel, twin, tensors(op, t, width, out, dtype), plain=plain(op, dtype), dtype=dtype, gradients=names, float32=[n for n in names if n in PARAMETERS])


@BOTH
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "bias")], ids="+".join)
def test_any_set_of_gradients(op, wanted):
    kernel, twin, names = OPS[op]
    compare(kernel, twin, tensors(op, 13, 37, 7, torch.bfloat16), plain=plain(op, torch.bfloat16), dtype=torch.bfloat16, gradients=wanted,
            float32=[n for n in names if n in PARAMETERS])


@BOTH
def test_without_biases(op):
    kernel, twin, _ = OPS[op]
    more = {"shift": None, "bias": None} if op == "gelu" else {"bias": None}
    given = {n: x for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items() if n not in more}
    compare(lambda **t: kernel(**t, **more), lambda **t: twin(**t, **more), given, plain=lambda **t: twin(**{n: x.bfloat16() for n, x in t.items()}, **more),
            dtype=torch.bfloat16, gradients=("x", "weight"), float32=("weight",))


@BOTH
def test_gradients_of_parameters_are_sums_in_float32(op):
    """Of 257 rows of ones, dW and db are 257, a number that neither bf16 nor a sum in bf16 holds; and dtypes are the tensors' own."""
    x = torch.full((257, 16), 8.0, dtype=torch.bfloat16, device=DEVICE)  # gelu(8) = 8
    weight, bias = torch.ones(16, 16, device=DEVICE, requires_grad=True), torch.zeros(16, device=DEVICE, requires_grad=True)
    y = OPS[op][0](x.requires_grad_(), weight, bias) if op == "linear" else OPS[op][0](x.requires_grad_(), None, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(dbias, torch.full_like(dbias, 257.0)) and torch.equal(dweight, torch.full_like(dweight, 8 * 257.0))


@BOTH
def test_autocast_says_the_dtype(op):
    given = {n: x.float().requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = OPS[op][0](**given)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), list(given.values())))


def test_what_is_kept_for_the_backward():
    """x and W in 16 bits, each where it is needed; of GELU's output nothing."""
    def kept(op: str, *wanted: str) -> int:
        sizes = []
        given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_(n in wanted) for n, x in tensors(op, 64, 96, 32, torch.bfloat16).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.element_size()) or x, lambda x: x):
            OPS[op][0](**given)
        return sum(sizes)

    x, weight, shift = 64 * 96 * 2, 32 * 96 * 2, 96 * 4
    assert kept("linear") == 0 and kept("linear", "bias") == 0 and kept("linear", "weight") == x and kept("linear", "x") == weight
    assert kept("linear", "x", "weight", "bias") == x + weight and kept("gelu", "x", "weight", "bias", "shift") == x + weight + shift


@BOTH
def test_inputs_that_are_not_contiguous(op):
    kernel, twin, names = OPS[op]
    compare(kernel, twin, tensors(op, 13, 37, 7, torch.bfloat16), plain=plain(op, torch.bfloat16), dtype=torch.bfloat16, gradients=names,
            float32=[n for n in names if n in PARAMETERS], layout=strided)


@BOTH
def test_no_rows(op):
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 0, 37, 7, torch.bfloat16).items()}
    y = OPS[op][0](**given)
    assert y.shape == (0, 7) and all(not g.any() for g in torch.autograd.grad(y.sum(), list(given.values())))


def test_saved_tensors_are_not_overwritten():
    """Two backwards of one forward give the same bits."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors("gelu", 13, 37, 7, torch.bfloat16).items()}
    y = fused.gelu_linear(**given)
    pull = drawn(13, 7, seed=9).bfloat16()
    once, again = (torch.autograd.grad(y, list(given.values()), pull, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@BOTH
def test_what_cannot_be_taken_is_refused_by_name(op):
    kernel, x, weight = OPS[op][0], torch.zeros(3, 5, device=DEVICE), torch.zeros(7, 5, device=DEVICE)
    more = (None,) if op == "gelu" else ()
    name = {"linear": "linear_trained", "gelu": "gelu_linear"}[op]
    with pytest.raises(ValueError, match=rf"{name}, x: expected shape \[-1, 5\], got \[3, 4\]"):
        kernel(x[:, :4], *more, weight, None)
    with pytest.raises(ValueError, match=rf"{name}, W: expected one of float32, bfloat16, float16, got float64"):
        kernel(x, *more, weight.double(), None)
    with pytest.raises(ValueError, match=rf"{name}, bias: expected shape \[7\], got \[5\]"):
        kernel(x, *more, weight, weight[0])
    if op == "gelu":
        with pytest.raises(ValueError, match=r"gelu_linear, shift: expected shape \[5\], got \[7\]"):
            kernel(x, weight[:, 0], weight, None)


@BOTH
def test_rounded_once_changes_no_bit(op, monkeypatch):
    """The copies are what the op would make, of its own dtype alone, and it makes none."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.float32).items()}
    pull, found, made = drawn(13, 7, seed=9).bfloat16(), [], []
    for context in (contextlib.nullcontext(), fused.rounded_once([given["weight"], given["bias"]], torch.bfloat16), fused.rounded_once([given["weight"]], torch.float16)):
        with context:
            y = OPS[op][0](**given)
        found.append((y, *torch.autograd.grad(y, list(given.values()), pull)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *how, **more: (made.append(t) if t is given["weight"] or t is given["bias"] else None, original(t, *how, **more))[1])
    with fused.rounded_once([given["weight"], given["bias"]], torch.bfloat16):
        OPS[op][0](**given)
    assert not made
    OPS[op][0](**given)
    assert len(made) == 2


@BOTH
def test_a_gradient_of_the_gradient_is_refused(op):
    """By itself autograd would pass the backward over, and leave its term out."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        torch.autograd.grad((OPS[op][0](**given) ** 3).sum(), given["x"], create_graph=True)


@BOTH
@pytest.mark.parametrize("autocast", [True, False])
def test_who_takes_it(op, autocast, monkeypatch):
    """Trained parameters beside products of 16 bits: under autocast any, else of x's own dtype. Not what is frozen, not float32, not functions that torch.func transforms."""
    taken = []
    for name in ("_Linear", "_GeluLinear"):
        kind = getattr(fused, name)
        monkeypatch.setattr(kind, "apply", staticmethod(lambda *a, apply=kind.apply, name=name: (taken.append(name), apply(*a))[1]))
    call = (lambda x, weight, bias: ops.linear(x, weight, bias)) if op == "linear" else (lambda x, weight, bias: ops.gelu_linear(x, None, weight, bias))
    wide = torch.float32 if autocast else torch.bfloat16
    x, weight, bias = drawn(5, 13).bfloat16(), drawn(7, 13).to(wide).requires_grad_(), drawn(7).to(wide).requires_grad_()
    with kernels.use("triton"), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        y = call(x, weight, bias)
        assert taken == [{"linear": "_Linear", "gelu": "_GeluLinear"}[op]] and y.dtype == torch.bfloat16
        call(x, weight.detach(), bias.detach())
        torch.func.grad(lambda w: call(x, w, bias.detach()).float().sum())(weight.detach())
        with torch.no_grad():
            call(x, weight, bias)
        assert len(taken) == 1
    with kernels.use("triton"):
        call(x.float(), weight.float(), bias.float())
        assert len(taken) == 1
        if autocast:
            with pytest.raises(RuntimeError, match="dtype"):
                ops.linear(x, weight, bias)


@pytest.mark.parametrize("save,all_rows", [(False, False), (False, True), (True, False)])
def test_an_encoder_that_is_trained_in_16_bits(save, all_rows, monkeypatch):
    """Every linear of its layers goes through it, the feed-forward's second with GELU; the weights are rounded in one launch, what is sliced and the head's by itself, and
    with --save-memory each."""
    config = EncoderConfig(kind="bert", layers=2, hidden=16, heads=2, feed_forward=37, vocab=61, max_positions=19)
    model, made = Model(config, mlm=True).to(DEVICE), []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    monkeypatch.setattr(fused, "_rounded", lambda p, dtype, own=fused._rounded: (made.append(p is None or id(p) not in fused._once.get()), own(p, dtype))[1])
    batch = pack([Sample(torch.arange(5, 5 + n).numpy(), torch.arange(2).numpy(), torch.arange(5, 7).numpy()) for n in (13, 2, 7)]).to(DEVICE)
    with kernels.use("triton"), torch.autocast(DEVICE.type, torch.bfloat16), model.recomputing(save):
        model.encoder(batch, all_rows=all_rows).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for n, p in model.encoder.named_parameters())
    alone = sum(made)
    # qkv, output and the two of the feed-forward, weight and bias each, of which the up's has no bias; the last layer's query and key with value are two slices of both
    whole, slices = 2 * 4 * 2, 0 if all_rows else 2
    if save:
        assert alone == len(made) == 2 * (whole + slices)
    else:
        assert len(made) == whole + slices and alone == 2 + (0 if all_rows else 4)  # the ups' biases that are not there, and the slices


def test_two_copies_of_a_linear_are_told_apart():
    """Copies belong to tensors, not to values or places."""
    first, second = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with fused.rounded_once([first, second], torch.bfloat16):
        assert fused._rounded(first, torch.bfloat16).sum() == 12 and not fused._rounded(second, torch.bfloat16).any()
        assert fused._rounded(first[:2], torch.bfloat16).shape == (2, 4) and fused._rounded(None, torch.bfloat16) is None
    assert not fused._once.get()
