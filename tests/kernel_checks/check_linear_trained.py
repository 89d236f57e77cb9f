"""Linears with trained float32 weights beside 16-bit activations, against their twins: output and every named gradient, and what they keep."""

import contextlib

import pytest
import torch

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
@pytest.mark.parametrize("t,width,out", [(13, 37, 7), (37, 7, 13), (1, 13, 37), (117, 16, 1)])
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
    """Of 4097 rows of ones, dW and db are 4097, a number that neither bf16 nor a sum in bf16 holds; and dtypes are the tensors' own."""
    x = torch.full((4097, 16), 8.0, dtype=torch.bfloat16, device=DEVICE)  # gelu(8) = 8
    weight, bias = torch.ones(16, 16, device=DEVICE, requires_grad=True), torch.zeros(16, device=DEVICE, requires_grad=True)
    y = OPS[op][0](x.requires_grad_(), weight, bias) if op == "linear" else OPS[op][0](x.requires_grad_(), None, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(dbias, torch.full_like(dbias, 4097.0)) and torch.equal(dweight, torch.full_like(dweight, 8 * 4097.0))


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
