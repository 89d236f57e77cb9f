"""Linears with trained float32 weights beside 16-bit activations, one and the two of a feed-forward block, against their twins: output and every named gradient, from x
or from what a norm keeps of it, and what they keep."""

import contextlib
import weakref

import pytest
import torch

from peftdebias import kernels, ops
from peftdebias.batches import Sample, pack
from peftdebias.encoder import EncoderConfig, Model
from peftdebias.kernels import dispatch
from peftdebias.kernels import feed_forward as block_file
from peftdebias.kernels import linear_trained as fused
from peftdebias.ops import feed_forward_ref
from peftdebias.ops.linear import linear_ref

from .harness import DEVICE, DTYPES, Watcher, compare, drawn, strided

PARAMETERS = {"linear": ("weight", "bias"), "block": ("up", "up_bias", "down", "down_bias")}
OPS = {"linear": (fused.linear_trained, linear_ref, ("x", *PARAMETERS["linear"])), "block": (block_file.feed_forward, feed_forward_ref, ("x", *PARAMETERS["block"]))}
BOTH = pytest.mark.parametrize("op", OPS)


def tensors(op: str, t: int, width: int, out: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """float64 values that `dtype` holds: x [T, width], of the linear W [out, width] and b [out], of the block such and back to the width; entries of W near 1 / sqrt(in)."""
    shapes = {"x": (t, width), "weight": (out, width), "bias": (out,), "up": (out, width), "up_bias": (out,), "down": (width, out), "down_bias": (width,)}
    return {n: drawn(*shapes[n], seed=i, scale=shapes[n][-1] ** -0.5 if len(shapes[n]) == 2 and i else 1.0).to(dtype).double() for i, n in enumerate(OPS[op][2])}


def plain(op: str, dtype: torch.dtype):
    """torch's own in that dtype, as autocast has it: casts, the product, and their backward."""
    return lambda **t: OPS[op][1](**{n: x.to(dtype) for n, x in t.items()})


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,width,out", [(13, 37, 7), (37, 7, 13), (1, 13, 37), pytest.param(117, 16, 1, marks=pytest.mark.slow)])
def test_ragged_sizes_in_each_dtype(op, t, width, out, dtype):
    compare_x(op, t, width, out, dtype, OPS[op][2])


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("t,width,out", [(197, 768, 768), (67, 3072, 768), (131, 768, 3072)])
def test_sizes_of_bert(op, t, width, out, dtype):
    compare_x(op, t, width, out, dtype, OPS[op][2])


@BOTH
@pytest.mark.parametrize("normal", [False, True], ids=["x", "n"])
def test_any_set_of_gradients(op, normal):
    for wanted in [("x",), *((n,) for n in PARAMETERS[op]), ("x", PARAMETERS[op][-1]), PARAMETERS[op][:2], PARAMETERS[op][::2], PARAMETERS[op][1::2]]:
        (compare_normal if normal else compare_x)(op, 13, 37, 7, torch.bfloat16, wanted)


@pytest.mark.parametrize("normal", [False, True], ids=["x", "n"])
def test_the_block_with_gelu_behind_its_products(normal):
    """All of its gradients, and dW1 alone, which from n asks for sums that no bias does."""
    for wanted in (OPS["block"][2], ("up",)):
        with dispatch.use("feed_forward", "fused"):
            (compare_normal if normal else compare_x)("block", 37, 40, 48, torch.bfloat16, wanted)


def compare_x(op: str, t: int, width: int, out: int, dtype: torch.dtype, gradients) -> None:
    compare(*OPS[op][:2], tensors(op, t, width, out, dtype), plain=plain(op, dtype), dtype=dtype, gradients=gradients, float32=PARAMETERS[op])


def compare_normal(op: str, t: int, width: int, out: int, dtype: torch.dtype, gradients) -> None:
    """The same where x = n gain + shift, rounded once, and the op is handed n, gain and shift as well; x's gradient is seen in n's."""
    kernel, twin, _ = OPS[op]
    given = tensors(op, t, width, out, dtype)
    given["n"] = given.pop("x")
    given |= {"gain": 1 + 0.3 * drawn(width, seed=22), "shift": 0.5 * drawn(width, seed=23)}

    def behind_norm(function, **more):
        def call(n, gain, shift, **parameters):
            x = n.to(gain.dtype) * gain + shift
            return function(x.to(n.dtype), *(p.to(n.dtype) if not more else p for p in parameters.values()), **({"normal": (n.detach(), gain, shift)} if more else {}))
        return call

    compare(behind_norm(kernel, normal=True), behind_norm(twin), given, plain=behind_norm(twin), dtype=dtype, gradients=["n" if n == "x" else n for n in gradients],
            float32=(*PARAMETERS[op], "gain", "shift"))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,width,out", [(13, 37, 7), (1, 300, 13), pytest.param(197, 768, 776, marks=pytest.mark.slow)])
def test_from_what_a_norm_keeps(op, t, width, out, dtype):
    compare_normal(op, t, width, out, dtype, OPS[op][2])


@BOTH
def test_without_biases(op):
    kernel, twin, names = OPS[op]
    more = {n: None for n in names if n.endswith("bias")}
    given, weights = {n: x for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items() if n not in more}, [n for n in PARAMETERS[op] if n not in more]
    compare(lambda **t: kernel(**t, **more), lambda **t: twin(**t, **more), given, plain=lambda **t: twin(**{n: x.bfloat16() for n, x in t.items()}, **more),
            dtype=torch.bfloat16, gradients=("x", *weights), float32=weights)


@BOTH
@pytest.mark.parametrize("normal", [False, True], ids=["x", "n"])
def test_gradients_of_parameters_are_sums_in_float32(op, normal):
    """Of 257 rows of ones, dW and db are 257, a number that neither bf16 nor a sum in bf16 holds; and dtypes are the tensors' own."""
    x = torch.full((257, 16), 8.0, dtype=torch.bfloat16, device=DEVICE)  # gelu(8) = 8
    weights = [torch.eye(16, device=DEVICE, requires_grad=True) for _ in range(1 if op == "linear" else 2)]
    biases = [torch.zeros(16, device=DEVICE, requires_grad=True) for _ in weights]
    parameters = [p for both in zip(weights, biases) for p in both]
    more = {"normal": (x / 2, torch.full((16,), 1.5, device=DEVICE), torch.full((16,), 2.0, device=DEVICE))} if normal else {}
    y = OPS[op][0](x.requires_grad_(), *parameters, **more)
    dx, *found = torch.autograd.grad(y, (x, *parameters), torch.ones_like(y))
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16) and {g.dtype for g in found} == {torch.float32}
    for dweight, dbias in zip(found[::2], found[1::2]):
        assert torch.equal(dbias, torch.full_like(dbias, 257.0)) and torch.equal(dweight, torch.full_like(dweight, 8 * 257.0))


@BOTH
def test_autocast_says_the_dtype(op):
    given = {n: x.float().requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = OPS[op][0](**given)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), list(given.values())))


@BOTH
@pytest.mark.parametrize("normal", [False, True], ids=["x", "n"])
def test_a_backward_inside_autocast_gives_the_bits_of_one_outside(op, normal):
    given, found = tensors(op, 37, 13, 7, torch.bfloat16), []
    scales = [1 + 0.3 * drawn(13, seed=22).float(), 0.5 * drawn(13, seed=23).float()]
    for inside in (False, True):
        leaves = {n: x.float().requires_grad_() for n, x in given.items()}
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = OPS[op][0](**leaves, **({"normal": (given["x"].bfloat16(), *scales)} if normal else {}))
            if inside:
                found.append(torch.autograd.grad(y.float().pow(2).sum(), list(leaves.values())))
        if not inside:
            found.append(torch.autograd.grad(y.float().pow(2).sum(), list(leaves.values())))
    assert any(not torch.equal(g, g.bfloat16().float()) for g in found[0])
    for name, outside, within in zip(given, *found):
        assert torch.equal(outside, within), name


def test_what_is_kept_for_the_backward():
    """x where W is trained, or n in its place; of the block what GELU is made of, and nothing of GELU; and of W nothing that is not there anyway."""
    t, width, out = 64, 96, 32

    def kept(op: str, *wanted: str, normal: bool = False) -> set[str]:
        held = set()
        given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_(n in wanted) for n, x in tensors(op, t, width, out, torch.bfloat16).items()}
        parts = (given["x"].detach().clone(), torch.ones(width, device=DEVICE), torch.ones(width, device=DEVICE)) if normal else None
        named = {x.untyped_storage().data_ptr(): n for n, x in (given | dict(zip(("n", "gain", "shift"), parts or ()))).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.add(named.get(x.untyped_storage().data_ptr(), tuple(x.shape))) or x, lambda x: x):
            OPS[op][0](**given, normal=parts)
        return held

    assert kept("linear") == kept("linear", "bias") == set() and kept("linear", "weight") == {"x"} and kept("linear", "x") == {"weight"}
    assert kept("linear", "x", "weight", "bias", normal=True) == {"n", "gain", "shift", "weight"} and kept("linear", "x", normal=True) == {"weight"}
    inner = {(t, out), "up_bias"}
    assert kept("block", "down_bias") == set() and kept("block", "down") == inner and kept("block", "up") == inner | {"x", "down"} and kept("block", "x") == inner | {"up", "down"}
    assert kept("block", "x", "up", "up_bias", "down", "down_bias", normal=True) == inner | {"n", "gain", "shift", "up", "down"}


@BOTH
def test_a_weight_that_was_computed_is_kept_in_16_bits(op):
    """W + delta has no other home: its rounding stays, and it goes. A slice of a parameter stays, for it costs nothing."""
    x, held = drawn(5, 12).bfloat16().requires_grad_(), []
    parameters = {n: drawn(*(12, 12)[:1 if n.endswith("bias") else 2], seed=i).float().requires_grad_() for i, n in enumerate(PARAMETERS[op])}
    for weights in ({n: p + 1 for n, p in parameters.items()}, {n: p.repeat(2, 1)[:12] if p.dim() == 2 else p for n, p in parameters.items()}, {n: p[:12] for n, p in parameters.items()}):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            OPS[op][0](x, **weights)
        matrices = [t for t in held if t.shape == (12, 12)]
        own = {p.untyped_storage().data_ptr() for p in parameters.values()}
        assert len(matrices) == len(weights) // 2 and all((t.dtype == torch.float32) == (t.untyped_storage().data_ptr() in own) for t in matrices)
        held.clear()


@BOTH
def test_a_column_whose_bias_is_nearly_what_it_is_added_to(op):
    """x = n gain + bias with bias near -n gain: dW of that column errs by the rounding of n gain, and no more."""
    t, width, out = 200, 6, 4
    n = drawn(t, width, seed=1)
    n[:, 2] = 6 + 0.02 * n[:, 2]
    gain, shift = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    shift[2] = -6
    given = {name: p.float().requires_grad_() for name, p in tensors(op, t, width, out, torch.bfloat16).items() if name != "x"}
    x, pull, first = (n + shift).bfloat16(), drawn(t, out if op == "linear" else width, seed=2).bfloat16(), PARAMETERS[op][0]
    mine, = torch.autograd.grad(OPS[op][0](x, **given, normal=(n.bfloat16(), gain, shift)), given[first], pull)
    y = {name: p.detach().double().requires_grad_(name == first) for name, p in given.items()}
    exact, = torch.autograd.grad(OPS[op][1](n + shift.double(), **y), y[first], pull.double())
    error = (mine.double() - exact).square().mean(0).sqrt() / exact[:, [0, 1, 3, 4, 5]].square().mean().sqrt()
    assert error[2] < 2 ** -9 * 6 * 2 and error[[0, 1, 3, 4, 5]].max() < 2 ** -7


@BOTH
def test_inputs_that_are_not_contiguous(op):
    kernel, twin, names = OPS[op]
    compare(kernel, twin, tensors(op, 13, 37, 7, torch.bfloat16), plain=plain(op, torch.bfloat16), dtype=torch.bfloat16, gradients=names, float32=PARAMETERS[op], layout=strided)


@BOTH
def test_scales_of_a_norm_that_are_not_contiguous(op):
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    n, scales = drawn(13, 37, seed=8).bfloat16(), [drawn(37, seed=i).float() for i in (6, 7)]
    found = [torch.autograd.grad(OPS[op][0](**given, normal=(n, *map(layout, scales))).float().sum(), given[PARAMETERS[op][0]])[0] for layout in (torch.clone, strided)]
    assert torch.equal(*found)


@BOTH
@pytest.mark.parametrize("normal", [False, True], ids=["x", "n"])
def test_no_rows(op, normal):
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 0, 37, 7, torch.bfloat16).items()}
    y = OPS[op][0](**given, normal=(given["x"].detach(), torch.ones(37, device=DEVICE), torch.ones(37, device=DEVICE)) if normal else None)
    assert y.shape == (0, 7 if op == "linear" else 37) and all(not g.any() for g in torch.autograd.grad(y.sum(), list(given.values())))


@pytest.mark.parametrize("op,form", [("linear", "library"), ("block", "fused"), ("block", "library")])
def test_saved_tensors_are_not_overwritten(op, form):
    """Two backwards of one forward give the same bits; of the block that writes GELU's output over what it kept, a second is refused. What was handed in stays."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    parts = (drawn(13, 37, seed=8).bfloat16(), drawn(37, seed=6).float(), drawn(37, seed=7).float())
    before = [p.clone() for p in parts]
    with dispatch.use("feed_forward", form):
        y = OPS[op][0](**given, normal=parts)
    pull = drawn(*y.shape, seed=9).bfloat16()
    once = torch.autograd.grad(y, list(given.values()), pull, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") if (op, form) == ("block", "library") else contextlib.nullcontext():
        again = torch.autograd.grad(y, list(given.values()), pull, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert all(torch.equal(a, b) for a, b in zip(parts, before))


@BOTH
def test_what_cannot_be_taken_is_refused_by_name(op):
    kernel, x, weight = OPS[op][0], torch.zeros(3, 5, device=DEVICE), torch.zeros(7, 5, device=DEVICE)
    name, behind = ("linear_trained", ()) if op == "linear" else ("feed_forward", (torch.zeros(5, 7, device=DEVICE), None))
    which, bias = ("W", "bias") if op == "linear" else ("up", "up's bias")
    with pytest.raises(ValueError, match=rf"{name}, x: expected shape \[-1, 5\], got \[3, 4\]"):
        kernel(x[:, :4], weight, None, *behind)
    with pytest.raises(ValueError, match=rf"{name}, {which}: expected one of float32, bfloat16, float16, got float64"):
        kernel(x, weight.double(), None, *behind)
    with pytest.raises(ValueError, match=rf"{name}, {bias}: expected shape \[7\], got \[5\]"):
        kernel(x, weight, weight[0], *behind)
    with pytest.raises(ValueError, match=rf"{name}, n: expected one of float32, got bfloat16"):
        kernel(x, weight, None, *behind, normal=(x.bfloat16(), x[0], x[0]))
    with pytest.raises(ValueError, match=rf"{name}, n: expected shape \[3, 5\], got \[2, 5\]"):
        kernel(x, weight, None, *behind, normal=(x[:2], x[0], x[0]))
    with pytest.raises(ValueError, match=rf"{name}, gain: expected shape \[5\], got \[7\]"):
        kernel(x, weight, None, *behind, normal=(x, weight[:, 0], x[0]))
    if op == "block":
        with pytest.raises(ValueError, match=r"feed_forward, down: expected shape \[-1, 7\], got \[7, 5\]"):
            kernel(x, weight, None, weight, None)
        with pytest.raises(ValueError, match=r"feed_forward, down's bias: expected shape \[5\], got \[7\]"):
            kernel(x, weight, None, behind[0], weight[:, 0])


@BOTH
def test_rounded_once_changes_no_bit(op, monkeypatch):
    """The copies are what the op would make, of its own dtype alone, and the forward makes none; the backward makes W's again, whose copies are gone by then."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.float32).items()}
    parameters = [given[n] for n in PARAMETERS[op] if not (op == "block" and n == "up_bias")]
    found, made = [], []
    for context in (contextlib.nullcontext(), fused.rounded_once(parameters, torch.bfloat16), fused.rounded_once(parameters[:1], torch.float16)):
        with context:
            y = OPS[op][0](**given)
        found.append((y, *torch.autograd.grad(y, list(given.values()), drawn(*y.shape, seed=9).bfloat16())))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *how, **more: (made.append(t) if any(t is p for p in parameters) else None, original(t, *how, **more))[1])
    with fused.rounded_once(parameters, torch.bfloat16):
        y = OPS[op][0](**given)
    assert not made
    y.sum().backward()
    assert len(made) == sum(p.dim() == 2 for p in parameters)
    OPS[op][0](**given)
    assert len(made) == len(parameters) + sum(p.dim() == 2 for p in parameters)


@BOTH
def test_a_gradient_of_the_gradient_is_refused(op):
    """By itself autograd would pass the backward over, and leave its term out."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.bfloat16).items()}
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        torch.autograd.grad((OPS[op][0](**given) ** 3).sum(), given["x"], create_graph=True)


@BOTH
@pytest.mark.parametrize("autocast", [True, False])
def test_who_takes_it(op, autocast, monkeypatch):
    """Trained parameters beside products of 16 bits: under autocast any, else of x's own dtype. Not what is frozen, not float32, not what torch.func
    transforms or a watcher sees."""
    taken = []
    for file, name in ((fused, "_Linear"), (block_file, "_FeedForward")):
        kind = getattr(file, name)
        monkeypatch.setattr(kind, "apply", staticmethod(lambda *a, apply=kind.apply, name=name: (taken.append(name), apply(*a))[1]))
    call = (lambda x, weight, bias: ops.linear(x, weight, bias)) if op == "linear" else (lambda x, weight, bias: ops.feed_forward(x, up.to(x.dtype), None, weight, bias))
    wide, up = torch.float32 if autocast else torch.bfloat16, drawn(13, 13)
    x, weight, bias = drawn(5, 13).bfloat16(), drawn(7, 13).to(wide).requires_grad_(), drawn(7).to(wide).requires_grad_()
    with kernels.use("triton"), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        y = call(x, weight, bias)
        assert taken == [{"linear": "_Linear", "block": "_FeedForward"}[op]] and y.dtype == torch.bfloat16
        call(x, weight.detach(), bias.detach())
        torch.func.grad(lambda w: call(x, w, bias.detach()).float().sum())(weight.detach())
        for context in (torch.no_grad(), Watcher()):
            with context:
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
    """Every linear of its layers goes through it, the feed-forward's two with GELU in one; the weights are rounded in one launch, what is sliced and the head's by itself, and
    with --save-memory each."""
    config = EncoderConfig(kind="bert", layers=2, hidden=16, heads=2, feed_forward=37, vocab=61, max_positions=19)
    model, made = Model(config, mlm=True).to(DEVICE), []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    own = fused.rounding_of
    for file in (fused, block_file):
        monkeypatch.setattr(file, "rounding_of", lambda p, dtype: (made.append(p is None or id(p) not in fused._once.get()), own(p, dtype))[1])
    batch = pack([Sample(torch.arange(5, 5 + n).numpy(), torch.arange(2).numpy(), torch.arange(5, 7).numpy()) for n in (13, 2, 7)]).to(DEVICE)
    with kernels.use("triton"), torch.autocast(DEVICE.type, torch.bfloat16), model.recomputing(save):
        model.encoder(batch, all_rows=all_rows).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for n, p in model.encoder.named_parameters())
    alone = sum(made)
    # qkv, output and the two of the feed-forward, weight and bias each, of which the up's has no bias; the last layer's query and key with value are two slices of both
    whole, slices = 2 * 4 * 2 - 2, 0 if all_rows else 2
    if save:
        assert alone == len(made) == 2 * (whole + slices)
    else:
        assert len(made) == whole + slices and alone == (0 if all_rows else 4)  # the slices


def test_what_a_layer_keeps_when_it_is_trained_in_16_bits():
    """Query, key and value, attention's output, the inner rows and n of both norms, in bf16; in float32 a number a row and norm, and one a row and head. No weight."""
    hidden, inner, heads, lengths = 16, 37, 2, (13, 2, 7)
    batch = pack([Sample(torch.arange(5, 5 + n).numpy(), torch.arange(2).numpy(), torch.arange(5, 7).numpy()) for n in lengths]).to(DEVICE)

    def kept(layers: int) -> int:
        model = Model(EncoderConfig(kind="bert", layers=layers, hidden=hidden, heads=heads, feed_forward=inner, vocab=61, max_positions=19)).to(DEVICE).eval()
        own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                held[x.untyped_storage().data_ptr()] = x  # the tensor with it, or its memory would be had again
            return x

        with kernels.use("triton"), torch.autocast(DEVICE.type, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.encoder(batch, all_rows=True)
        return sum(x.untyped_storage().nbytes() for x in held.values())

    assert kept(4) - kept(3) == sum(lengths) * (2 * (6 * hidden + inner) + 4 * (2 + heads))


@BOTH
def test_a_rounding_goes_with_its_first_reader(op):
    """A pass reads each once, and at its peak, in the last layers, those of all layers before would still be there."""
    given = {n: x.to(torch.bfloat16 if n == "x" else torch.float32).requires_grad_() for n, x in tensors(op, 13, 37, 7, torch.float32).items()}
    parameters = [given[n] for n in PARAMETERS[op] if not (op == "block" and n == "up_bias")]
    with fused.rounded_once([*parameters, torch.ones(3, device=DEVICE)], torch.bfloat16):
        held = [weakref.ref(copy.untyped_storage()) for copy in fused._once.get().values()]
        assert all(storage() is not None for storage in held)
        y = OPS[op][0](**given)
        assert [storage() is not None for storage in held] == [False] * len(parameters) + [True]
    assert y.grad_fn is not None and all(storage() is None for storage in held)


def test_two_copies_of_a_linear_are_told_apart():
    """Copies belong to tensors, not to values or places."""
    first, second = torch.ones(3, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with fused.rounded_once([first, second], torch.bfloat16):
        assert fused.rounding_of(first, torch.bfloat16).sum() == 12 and not fused.rounding_of(second, torch.bfloat16).any()
        assert fused.rounding_of(first[:2], torch.bfloat16).shape == (2, 4) and fused.rounding_of(None, torch.bfloat16) is None
    assert not fused._once.get()


def test_a_gradient_of_16_bits_is_rounded_once():
    """257 rows of n gain + bias that are 0: rounded before, 257 would be 256."""
    n, gain, bias = torch.ones(257, 16, device=DEVICE).bfloat16(), torch.ones(16, device=DEVICE), -torch.ones(16, device=DEVICE)
    weight = torch.eye(16, device=DEVICE).bfloat16().requires_grad_()
    y = fused.linear_trained(n * 0, weight, None, (n, gain, bias))
    assert not torch.autograd.grad(y, weight, torch.ones_like(y))[0].any()
