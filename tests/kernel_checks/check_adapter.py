"""The adapter's kernels against adapter_ref: forward and every named gradient, at ragged sizes and real ones, each dtype, each way to keep z."""

import pytest
import torch

from peftdebias.kernels import adapter as fused
from peftdebias.methods.adapter import adapter_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, run, strided

NAMES = ("inputs", "hidden", "down", "down_bias", "up", "up_bias")
PARAMETERS = NAMES[2:]


def tensors(t: int, d: int, k: int) -> dict[str, torch.Tensor]:
    """float64 [T, D] twice, [K, D], [K], [D, K], [D]; neither bias is zero, z is of order 1."""
    shapes = {"inputs": (t, d), "hidden": (t, d), "down": (k, d), "down_bias": (k,), "up": (d, k), "up_bias": (d,)}
    scale = {"down": d ** -0.5, "up": k ** -0.5, "down_bias": 0.3, "up_bias": 0.3}
    return {name: drawn(*shape, seed=i, scale=scale.get(name, 1.0)) for i, (name, shape) in enumerate(shapes.items())}


def both(activation: str, scale: float = 1.0, **more):
    """(fused, twin), each a function of NAMES."""
    return (lambda **t: fused.adapter(*(t[n] for n in NAMES), activation, scale, **more)), (lambda **t: adapter_ref(*(t[n] for n in NAMES), activation, scale))


@pytest.mark.parametrize("activation,recompute", [pytest.param(activation, recompute, id=f"{activation}, z {'recomputed' if recompute else 'kept'}",
                                                               marks=pytest.mark.slow if recompute == (activation == "relu") else ())
                                                  for activation in fused.ACTIVATIONS for recompute in (False, True)])
def test_each_activation_trained(activation, recompute):
    compare(*both(activation, 0.7, recompute=recompute), tensors(13, 37, 7), dtype=torch.float32, gradients=NAMES)


@pytest.mark.parametrize("t,d,k,dtype", [pytest.param(*sizes, dtype, marks=pytest.mark.slow if (i + j) % 2 else ())
                                         for i, sizes in enumerate(((13, 37, 7), (37, 13, 64), (1, 7, 1), (70, 28, 48))) for j, dtype in enumerate(DTYPES)])
def test_ragged_sizes_in_each_dtype(t, d, k, dtype):
    compare(*both("relu", 1.0), tensors(t, d, k), dtype=dtype, gradients=NAMES)
    compare(*both("silu", 4.0, recompute=True), tensors(t, d, k), dtype=dtype, gradients=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_frozen_parameters(activation, dtype):
    compare(*both(activation, 0.7), tensors(13, 37, 23), dtype=dtype, gradients=("inputs", "hidden"))


@pytest.mark.parametrize("gradients", [("inputs",), ("hidden",), ("down",), ("up_bias", "inputs"), ("hidden", "down_bias")], ids="+".join)
def test_any_set_of_gradients(gradients):
    compare(*both("silu"), tensors(13, 37, 7), dtype=torch.float32, gradients=gradients)


@pytest.mark.parametrize("trained", [True, False])
def test_one_tensor_as_input_and_residual_gets_one_gradient(trained):
    given = tensors(13, 37, 7)
    del given["hidden"]
    names = [n for n in NAMES if n != "hidden"]
    functions = [lambda f=f, **t: f(hidden=t["inputs"], **t) for f in both("silu", 0.7)]
    compare(*functions, given, dtype=torch.float32, gradients=names if trained else ("inputs",))


def test_a_bottleneck_wider_than_one_launch(monkeypatch):
    monkeypatch.setattr(fused, "WIDEST", 16)
    compare(*both("gelu", 0.7), tensors(13, 29, 37), dtype=torch.float32, gradients=NAMES)


def test_many_stretches_sum_to_the_same(monkeypatch):
    monkeypatch.setattr(fused, "STRETCH", 16)
    compare(*both("relu"), tensors(117, 13, 7), dtype=torch.float32, gradients=NAMES)
    monkeypatch.setattr(fused, "MOST_STRETCHES", 3)
    compare(*both("relu"), tensors(117, 13, 7), dtype=torch.float32, gradients=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype):
    compare(*both("relu"), tensors(13, 37, 7), dtype=dtype, gradients=NAMES, layout=strided)


def test_no_rows():
    fused_op, twin = both("relu")
    given = {n: t.float() for n, t in tensors(0, 37, 7).items()}
    with poisoned():
        found, wanted = (run(f, given, NAMES, 0) for f in (fused_op, twin))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_autocast_reads_float32_and_multiplies_in_bf16():
    """Against eager under the same autocast, the truth in float64; the parameters' gradients come in the parameters' dtype."""
    def in_autocast(f):
        def inner(**t):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return f(**t)
        return inner

    fused_op, twin = both("silu", 0.7)  # ReLU's slope jumps, and eager rounds the bias as well
    given = tensors(37, 28, 13)
    shares = compare(in_autocast(fused_op), twin, given, plain=in_autocast(twin), dtype=torch.float32, gradients=NAMES)
    assert len(shares) == 1 + len(NAMES)
    t = {n: x.float().requires_grad_() for n, x in given.items()}
    out = in_autocast(fused_op)(**t)
    assert out.dtype == in_autocast(twin)(**t).dtype
    assert {g.dtype for g in torch.autograd.grad(out.sum(), list(t.values()))} == {torch.float32}


def test_mixed_residual_gives_the_wider_dtype():
    given = {n: x.float() if n == "hidden" else x.bfloat16() for n, x in tensors(5, 13, 7).items()}
    out, wanted = (f(**given) for f in both("relu"))
    assert out.dtype == wanted.dtype == torch.float32
    compare(*both("relu"), tensors(5, 13, 7), dtype=torch.bfloat16, float32=("hidden",), gradients=NAMES)


def test_what_is_kept_for_the_backward(monkeypatch):
    """Frozen: a bit each for ReLU, z for the others, no hidden state. Trained: x and z; with recompute x alone, in every slice of a wide bottleneck. No gradients: nothing."""
    def kept(activation, trained, recompute=False):
        sizes = []
        given = {n: x.float().requires_grad_(n == "inputs" or (trained and n in PARAMETERS)) for n, x in tensors(64, 96, 32).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.element_size()) or x, lambda x: x):
            both(activation, recompute=recompute)[0](**given)
        weights = sum(given[n].numel() * 4 for n in ("down", "down_bias", "up"))
        return sum(sizes) - weights

    x, z = 64 * 96 * 4, 64 * 32 * 4
    assert kept("relu", False) == 64 * 32 // 8
    assert kept("silu", False) == z
    assert kept("silu", True) == kept("relu", True) == x + z
    assert kept("relu", True, recompute=True) == x
    monkeypatch.setattr(fused, "WIDEST", 16)
    assert kept("relu", True) == 2 * x + z and kept("relu", True, recompute=True) == 2 * x


def test_gradients_repeat_bit_for_bit():
    given = {n: x.bfloat16() for n, x in tensors(70, 37, 7).items()}
    first, again = (run(both("relu")[0], given, NAMES, 0) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_nan_is_not_hidden():
    given = {n: x.float() for n, x in tensors(5, 13, 7).items()}
    given["inputs"][3, 2] = float("nan")
    out = both("relu")[0](**given)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("change,words", [
    ({"hidden": torch.zeros(5, 12)}, r"adapter, hidden: expected shape \[5, 13\], got \[5, 12\]"),
    ({"up": torch.zeros(7, 13)}, r"adapter, up: expected shape \[13, 7\], got \[7, 13\]"),
    ({"inputs": torch.zeros(5, 13, dtype=torch.float64)}, "adapter, inputs: expected one of float32, bfloat16, float16, got float64"),
    ({"down_bias": torch.zeros(7, dtype=torch.bfloat16)}, "adapter, down_bias: expected one of float32, got bfloat16"),
])
def test_refused_by_name(change, words):
    given = {n: x.float() for n, x in tensors(5, 13, 7).items()} | {n: x.to(DEVICE) for n, x in change.items()}
    with pytest.raises(ValueError, match=words):
        both("relu")[0](**given)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="adapter, activation: expected one of relu, silu, gelu, gelu_new, got 'tanh'"):
        both("tanh")[0](**{n: x.float() for n, x in tensors(5, 13, 7).items()})


def test_torch_compile_does_not_break_on_it():
    """The op's registration: fake tensors, mutation and gradients agree with what it does; a full graph, eager or ahead of time."""
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37, 7).items()}
    fused_op = both("relu")[0]
    args = (*given.values(), "relu", 1.0, torch.float32, "z", True, False)
    torch.library.opcheck(torch.ops.peftdebias.adapter_forward.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    compiled = torch.compile(lambda t: fused_op(**t), backend="aot_eager", fullgraph=True)
    for f in (compiled, lambda t: fused_op(**t)):
        out = f(given)
        grads = torch.autograd.grad(out, list(given.values()), torch.ones_like(out))
        wanted = run(lambda **t: fused_op(**t), {n: x.detach() for n, x in given.items()}, (), 0)
        assert torch.equal(out.double(), wanted["output"]) and all(g.isfinite().all() for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d,k", [(193, 768, 48), (67, 768, 64), (65, 3072, 13), (33, 768, 200)])
def test_real_sizes(t, d, k, dtype):
    compare(*both("relu", 1.0), tensors(t, d, k), dtype=dtype, gradients=NAMES)
    compare(*both("relu", 1.0), tensors(t, d, k), dtype=dtype, gradients=("inputs", "hidden"))


@pytest.mark.parametrize("trained", [True, False])
def test_relu_at_0_has_no_slope(trained):
    given = {name: t.float() for name, t in tensors(13, 37, 7).items()}
    given["down_bias"].zero_(), given["inputs"][4:9].zero_()
    found, wanted = (run(function, given, NAMES if trained else ("inputs", "hidden"), 0) for function in both("relu"))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_under_autocast_nothing_is_written_beyond_what_is_made():
    """15 rows: what is rounded first ends inside of a block."""
    def rounded(**given):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return both("relu")[0](**given)

    with poisoned():
        run(rounded, {name: t.float() for name, t in tensors(15, 37, 7).items()}, NAMES, 0)
