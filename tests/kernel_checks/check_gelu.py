"""The GELU's kernels against gelu_ref: forward and every named gradient, at ragged sizes and real ones, each dtype, with and without a bias."""

import pytest
import torch

from peftdebias.kernels import gelu as fused
from peftdebias.ops import gelu_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, run, strided

NAMES = ("x", "bias")


def tensors(t: int, f: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """float64 [T, F] and [F]."""
    return {"x": drawn(t, f, seed=0, scale=scale), "bias": drawn(f, seed=1)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,f", [(13, 37), (37, 7), (7, 13), (1, 37), (1, 1), (5, 520)])
def test_ragged_sizes_in_each_dtype(t, f, dtype):
    compare(fused.gelu, gelu_ref, tensors(t, f), dtype=dtype, gradients=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias(dtype):
    compare(fused.gelu, gelu_ref, {"x": drawn(13, 37)}, dtype=dtype, gradients=("x",))


@pytest.mark.parametrize("gradients", [("x",), ("bias",)], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_gradient_alone(gradients, dtype):
    compare(fused.gelu, gelu_ref, tensors(13, 37), dtype=dtype, gradients=gradients)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_bias_in_float32_beside_rounded_activations(dtype):
    compare(fused.gelu, gelu_ref, tensors(13, 37), dtype=dtype, gradients=NAMES, float32=("bias",))
    given = {"x": drawn(13, 37).to(dtype).requires_grad_(), "bias": drawn(37).float().requires_grad_()}
    out = fused.gelu(**given)
    assert out.dtype == dtype and [g.dtype for g in torch.autograd.grad(out.sum(), list(given.values()))] == [dtype, torch.float32]


def test_autocast_changes_nothing():
    given = {n: x.float() for n, x in tensors(13, 37).items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(fused.gelu(**given), fused.gelu(**{n: x.float() for n, x in tensors(13, 37).items()})) and fused.gelu(**given).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_flat_and_steep(scale):
    """Far from 0 the slope is 0 or 1; z^2 of 1e9 meets an exponential that must be 0."""
    compare(fused.gelu, gelu_ref, tensors(13, 37, scale), dtype=torch.float32, gradients=NAMES)


def test_against_the_formula_at_known_points():
    """z Phi(z) and Phi(z) + z phi(z) at 0, 1 and -1, from a table of the normal distribution."""
    above, below, density = 0.8413447460685429, 0.15865525393145707, 0.24197072451914337  # Phi(1), Phi(-1), phi(1)
    x = torch.tensor([[0.0, 1.0, -1.0]], device=DEVICE, requires_grad=True)
    out = fused.gelu(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out.detach(), torch.tensor([[0.0, above, -below]], device=DEVICE), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope, torch.tensor([[0.5, above + density, below - density]], device=DEVICE), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stretches", [1, 3])
def test_stretches_sum_to_the_same(monkeypatch, stretches):
    monkeypatch.setattr(fused, "STRETCHES", stretches)
    compare(fused.gelu, gelu_ref, tensors(117, 37), dtype=torch.float32, gradients=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype):
    compare(fused.gelu, gelu_ref, tensors(13, 37), dtype=dtype, gradients=NAMES, layout=strided)


def test_rows_of_any_stride():
    wide, bias = drawn(13, 3 * 37, seed=7).float(), drawn(37, seed=1).float()
    assert torch.equal(fused.gelu(wide[:, 37:74], bias), fused.gelu(wide[:, 37:74].contiguous(), bias))


@pytest.mark.parametrize("shape", [(0, 37), (13, 0)])
def test_nothing_to_do(shape):
    given = {n: x.float() for n, x in tensors(*shape).items()}
    with poisoned():
        found, wanted = (run(f, given, NAMES, 0) for f in (fused.gelu, gelu_ref))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_frozen_bias_has_no_sums(monkeypatch):
    monkeypatch.setattr(fused, "sum_stretches", lambda *a: pytest.fail("summed"))
    given = {n: x.float().requires_grad_(n == "x") for n, x in tensors(13, 37).items()}
    fused.gelu(**given).sum().backward()
    assert given["bias"].grad is None and given["x"].grad is not None


def test_what_is_kept_for_the_backward():
    def kept(*wanted):
        sizes = []
        given = {n: x.float().requires_grad_(n in wanted) for n, x in tensors(64, 96).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.element_size()) or x, lambda x: x):
            fused.gelu(**given)
        return sum(sizes)

    assert kept() == 0 and kept("x") == kept("bias") == kept(*NAMES) == 64 * 96 * 4 + 96 * 4


def test_gradients_repeat_bit_for_bit():
    given = {n: x.bfloat16() for n, x in tensors(117, 37).items()}
    first, again = (run(fused.gelu, given, NAMES, 0) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_nan_is_not_hidden():
    given = {n: x.float() for n, x in tensors(5, 13).items()}
    given["x"][3, 2] = float("nan")
    out = fused.gelu(**given)
    assert out[3, 2].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("change,words", [
    ({"x": torch.zeros(5)}, r"gelu, x: expected shape \[-1, -1\], got \[5\]"),
    ({"x": torch.zeros(5, 13, dtype=torch.float64)}, "gelu, x: expected one of float32, bfloat16, float16, got float64"),
    ({"bias": torch.zeros(12)}, r"gelu, bias: expected shape \[13\], got \[12\]"),
    ({"bias": torch.zeros(13, dtype=torch.int64)}, "gelu, bias: expected one of float32, bfloat16, float16, got int64"),
])
def test_refused_by_name(change, words):
    given = {n: x.float() for n, x in tensors(5, 13).items()} | {n: x.to(DEVICE) for n, x in change.items()}
    with pytest.raises(ValueError, match=words):
        fused.gelu(**given)


@pytest.mark.parametrize("biased", [False, True])
def test_torch_compile_does_not_break_on_it(biased):
    """The ops' registrations: fake tensors, autograd and what they do agree; a full graph, ahead of time, computes the same."""
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items() if biased or n == "x"}
    torch.library.opcheck(torch.ops.peftdebias.gelu_forward.default, (given["x"], given.get("bias")))
    plain = {n: x.detach() for n, x in given.items()}
    for wanted in ((True, biased), (False, biased)):
        torch.library.opcheck(torch.ops.peftdebias.gelu_backward.default, (torch.ones(13, 37, device=DEVICE), plain["x"], plain.get("bias"), *wanted))
    compiled = torch.compile(lambda t: fused.gelu(**t) * 2, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(given), fused.gelu(**given) * 2
    assert torch.equal(out, wanted)
    found, expected = (torch.autograd.grad(y, list(given.values()), torch.ones_like(y)) for y in (out, wanted))
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,f", [(67, 3072), (37, 768), (13, 4096)])
def test_real_sizes(t, f, dtype):
    compare(fused.gelu, gelu_ref, tensors(t, f), dtype=dtype, gradients=NAMES)


def test_the_biass_gradient_sums_what_is_not_rounded_yet():
    """Over 300 rows of bf16 the rounding of each would be 1e-2."""
    x, bias, dy = drawn(300, 13, seed=1).bfloat16(), drawn(13, seed=2).float(), drawn(300, 13, seed=3).bfloat16()
    found, exact = ((torch.autograd.grad(op(x.to(kind), b), b, dy.to(kind))[0]) for op, kind, b in (
        (fused.gelu, torch.bfloat16, bias.clone().requires_grad_()), (gelu_ref, torch.float64, bias.double().requires_grad_())))
    assert (found.double() - exact).abs().max() < 1e-3


def test_backward_of_rows_of_any_stride():
    wide, pull, bias = drawn(13, 3 * 37, seed=7).float(), drawn(13, 5 * 37, seed=8).float(), drawn(37, seed=1).float().requires_grad_()
    results = []
    for x, dy in ((wide[:, 37:74], pull[:, 74:111]), (wide[:, 37:74].contiguous(), pull[:, 74:111].contiguous())):
        x = x.detach().requires_grad_()
        results.append(torch.autograd.grad(fused.gelu(x, bias), (x, bias), dy))
    assert all(map(torch.equal, *results))
