"""The norm's kernels against norm_ref: forward and every named gradient, at ragged sizes and real ones, each dtype, with and without residual and dropout."""

import pytest
import torch

from peftdebias.kernels import norm as fused
from peftdebias.kernels.tiles import sum_stretches
from peftdebias.ops import Drop, norm_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, run, strided

NAMES = ("hidden", "residual", "gain", "bias")
DROP = Drop(0.3, torch.tensor([2 ** 40 + 2 ** 31 + 3], device=DEVICE), 2)  # more than 32 bits
DROPS = pytest.mark.parametrize("drop", [None, DROP], ids=["no dropout", "dropout"])


def tensors(t: int, d: int, names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    """float64 [T, D] twice, [D] twice; the gain is neither one nor of one sign."""
    shapes = {"hidden": (t, d), "residual": (t, d), "gain": (d,), "bias": (d,)}
    return {name: drawn(*shapes[name], seed=i) for i, name in enumerate(NAMES) if name in names}


def both(drop: Drop | None = None, epsilon: float = 1e-5):
    """(fused, twin), each a function of NAMES, the residual optional."""
    return tuple(lambda f=f, residual=None, **t: f(t["hidden"], residual, t["gain"], t["bias"], epsilon, drop) for f in (fused.norm, norm_ref))


@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d", [(13, 37), (37, 7), (7, 13), (1, 37), (1, 7), pytest.param(19, 2, marks=pytest.mark.slow), (5, 520)])
def test_ragged_sizes_in_each_dtype(t, d, dtype, drop):
    compare(*both(drop), tensors(t, d), dtype=dtype, gradients=NAMES)


@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_residual(dtype, drop):
    names = ("hidden", "gain", "bias")
    compare(*both(drop), tensors(13, 37, names), dtype=dtype, gradients=names)


@DROPS
@pytest.mark.parametrize("gradients", [("hidden",), ("residual",), ("gain",), ("bias",), ("hidden", "residual"), ("residual", "bias"), ("gain", "hidden")],
                         ids="+".join)
def test_any_set_of_gradients(gradients, drop):
    compare(*both(drop), tensors(13, 37), dtype=torch.float32, gradients=gradients)


@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_readers(dtype, drop):
    """Both get y; the gradients are those of one reader who asks for the sum, which the kernel rounds to no 16 bits before it uses it."""
    def forked(f):
        def both_of(residual=None, **t):
            first, second, normal = f(t["hidden"], residual, t["gain"], t["bias"], 1e-5, drop, fork=True)
            assert torch.equal(first, second)
            if f is fused.norm:  # what it says y is made of, is what y is made of
                n, gain, bias = normal
                assert not any(x.requires_grad for x in normal) and n.dtype == first.dtype
                torch.testing.assert_close((n.float() * gain + bias).to(first.dtype), first.detach(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
            return torch.cat([first, 2 * second])  # one pull for both, as the harness has it: its halves differ
        return both_of

    compare(forked(fused.norm), forked(norm_ref), tensors(13, 37), dtype=dtype, gradients=NAMES)


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1), ()], ids=str)
def test_a_reader_that_gives_no_gradient(read):
    def gradients(f):
        t = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
        found = f(t["hidden"], t["residual"], t["gain"], t["bias"], 1e-5, DROP, fork=True)
        pulls = [(1 + i) * drawn(13, 37, seed=50 + i).float() for i in range(2)]
        return torch.autograd.grad(sum([(found[i] * pulls[i]).sum() for i in read], 0.0 * t["gain"].sum()), list(t.values()), allow_unused=True)

    for mine, twin in zip(gradients(fused.norm), gradients(norm_ref)):
        if mine is None or twin is None:
            assert not any(g is not None and g.any() for g in (mine, twin))
        else:
            torch.testing.assert_close(mine, twin, rtol=1e-5, atol=1e-5)


def test_two_readers_and_a_gradient_of_the_gradient():
    """By itself autograd would pass the backward over, and leave its term out."""
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
    for fork in (False, True):
        y = fused.norm(*given.values(), 1e-5, None, fork)
        with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
            torch.autograd.grad(((y[0] if fork else y) ** 3).sum(), given["hidden"], create_graph=True)


def test_two_readers_cost_no_sum_of_their_own():
    """A layer's y is read by a product and by the residual: no add between the backward kernels."""
    h, r, gain, bias = (x.to(torch.bfloat16).requires_grad_() for x in tensors(13, 37).values())
    first, second, _ = fused.norm(h, r, gain, bias, 1e-5, None, fork=True)
    assert first.data_ptr() == second.data_ptr() and first.grad_fn is second.grad_fn
    assert [n[0] for n in (first * second).grad_fn.next_functions] == [first.grad_fn] * 2
    with torch.no_grad():
        one, other, normal = fused.norm(h, r, gain, bias, 1e-5, None, fork=True)
    assert one is other and normal is None


def test_one_column_is_the_bias():
    """s is its own mean. torch's rstd of 1e6 makes noise of what rounding leaves, so nothing is compared with it."""
    given = {n: x.float() for n, x in tensors(13, 1).items()}
    with poisoned():
        found = run(both(epsilon=1e-12)[0], given, NAMES, 0)
    assert torch.equal(found["output"], given["bias"].double().expand(13, 1))
    assert not any(found[f"gradient of {n}"].any() for n in ("hidden", "residual", "gain"))
    pull = drawn(13, 1, seed=100).float().double()
    torch.testing.assert_close(found["gradient of bias"], pull.sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_in_float32_beside_rounded_activations(dtype):
    """What a model has whose activations alone are of 16 bits; the parameters' gradients are float32."""
    def plain(**t):  # a GPU's LayerNorm wants one dtype: here the parameters are values that it holds
        return both(DROP)[1](**t | {n: t[n].to(dtype) for n in ("gain", "bias")})

    given = tensors(13, 37)
    given |= {n: given[n].to(dtype).double() for n in ("gain", "bias")}
    compare(*both(DROP), given, plain=plain, dtype=dtype, gradients=NAMES, float32=("gain", "bias"))
    t = {n: x.to(torch.float32 if n in ("gain", "bias") else dtype).requires_grad_() for n, x in given.items()}
    out = both(DROP)[0](**t)
    assert out.dtype == dtype and [g.dtype for g in torch.autograd.grad(out.sum(), list(t.values()))] == [dtype, dtype, torch.float32, torch.float32]


@DROPS
@pytest.mark.parametrize("wide", ["hidden", "residual"])
def test_hidden_and_residual_of_two_dtypes(wide, drop):
    """y is of hidden's dtype, each gradient of its own tensor's."""
    given = {n: x.to(torch.float32 if n == wide else torch.bfloat16).requires_grad_() for n, x in tensors(5, 13).items()}
    out, wanted = both(drop)[0](**given), both(drop)[1](**{n: x.double() for n, x in given.items()})
    assert out.dtype == given["hidden"].dtype
    pull = torch.ones_like(out) * torch.arange(13, device=DEVICE)
    found = torch.autograd.grad(out, list(given.values()), pull)
    expected = torch.autograd.grad(wanted, list(given.values()), pull.double())
    assert [g.dtype for g in found] == [x.dtype for x in given.values()]
    assert (out.double() - wanted).abs().max() <= 2.0 ** -8 * wanted.abs().max()
    assert all((f.double() - e.double()).abs().max() <= 2.0 ** -6 * e.abs().max() for f, e in zip(found, expected))


@DROPS
def test_autocast_decides_the_dtype(drop):
    """float32 in, bf16 out, float32 gradients. n is kept in bf16, so the measure is torch's norm of a hidden state and a residual that are bf16."""
    fused_op, twin = both(drop)

    def cast(**t):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return fused_op(**t)

    def plain(hidden, residual, **t):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return twin(hidden=hidden.bfloat16(), residual=residual.bfloat16(), **t).bfloat16()

    compare(cast, twin, tensors(13, 37), plain=plain, dtype=torch.float32, gradients=NAMES)
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
    out = cast(**given)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in torch.autograd.grad(out.sum(), list(given.values()))} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e3, -3e3])
def test_a_large_mean_costs_no_digits(offset, dtype):
    """Rows of mean 1000 and spread 1: the mean square less the square of the mean would be off by some per cent in float32."""
    given = tensors(13, 117)
    given["residual"] += offset
    compare(*both(), given, dtype=dtype, gradients=NAMES)


def test_a_large_mean_in_numbers():
    given = {n: x.float() for n, x in tensors(13, 768).items()}
    given["hidden"] += 1e3
    out, truth = both()[0](**given), both()[1](**{n: x.double() for n, x in given.items()})
    assert (out.double() - truth).abs().max() < 5e-4  # one ulp of 1000 is 6e-5, gain and spread a few


def test_small_spread_beside_epsilon():
    given = tensors(13, 37)
    given["hidden"], given["residual"] = 1e-4 * given["hidden"], 1e-4 * given["residual"]
    compare(*both(epsilon=1e-5), given, dtype=torch.float32, gradients=NAMES)


@pytest.mark.parametrize("stretches,columns", [(256, 37), (257, 37), (601, 5), (601, 48)])
def test_few_stretches_and_many(stretches, columns):
    """The sums' own kernel, at both its tiles."""
    partial, result = drawn(stretches, columns).float(), torch.full((columns,), float("nan"), device=DEVICE)
    sum_stretches(partial, result)
    torch.testing.assert_close(result.double(), partial.double().sum(0), rtol=1e-5, atol=1e-4)


@DROPS
@pytest.mark.parametrize("stretches", [1, 3])
def test_stretches_sum_to_the_same(monkeypatch, stretches, drop):
    monkeypatch.setattr(fused, "STRETCHES", stretches)
    compare(*both(drop), tensors(117, 37), dtype=torch.float32, gradients=NAMES)


@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype, drop):
    compare(*both(drop), tensors(13, 37), dtype=dtype, gradients=NAMES, layout=strided)


def test_rows_of_any_stride_are_not_copied(monkeypatch):
    wide, seen = drawn(13, 3 * 37, seed=7).float(), []
    monkeypatch.setattr(fused, "rows_together", lambda t, same=fused.rows_together: seen.append(same(t) is t) or same(t))
    given = {n: x.float() for n, x in tensors(13, 37).items()} | {"hidden": wide[:, 37:74], "residual": wide[:, 74:]}
    assert torch.equal(both()[0](**given), both()[0](**{n: x.contiguous() for n, x in given.items()}))
    leaf = given["hidden"].contiguous().requires_grad_()
    pulls = torch.ones(1, 37, device=DEVICE).expand(13, 37)  # a stride of 0
    one, other = (torch.autograd.grad(both()[0](**given | {"hidden": leaf}), leaf, p)[0] for p in (pulls, pulls.contiguous()))
    assert torch.equal(one, other) and seen == [True] * (2 + 2 + 2 * 3)  # hidden and residual forward, dy backward


@DROPS
def test_no_rows(drop):
    given = {n: x.float() for n, x in tensors(0, 37).items()}
    with poisoned():
        found, wanted = (run(f, given, NAMES, 0) for f in both(drop))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_rate_of_zero_drops_nothing():
    given = {n: x.float() for n, x in tensors(13, 37).items()}
    assert torch.equal(both(DROP._replace(rate=0.0))[0](**given), both()[0](**given))


def test_another_seed_or_site_is_another_mask():
    given = {n: x.float() for n, x in tensors(13, 37).items()}
    one, again, seed, site = (both(d)[0](**given) for d in (DROP, DROP, DROP._replace(seed=DROP.seed + 1), DROP._replace(site=3)))
    assert torch.equal(one, again) and not torch.equal(one, seed) and not torch.equal(one, site)


def test_without_dropout_both_have_one_gradient():
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
    one, other = torch.autograd.grad(both()[0](**given), [given["hidden"], given["residual"]], torch.ones(13, 37, device=DEVICE))
    assert one.data_ptr() == other.data_ptr()
    one, other = torch.autograd.grad(both(DROP)[0](**given), [given["hidden"], given["residual"]], torch.ones(13, 37, device=DEVICE))
    assert one.data_ptr() != other.data_ptr() and not torch.equal(one, other)


@pytest.mark.parametrize("trained", [(), ("gain",), ("bias",), ("gain", "bias")], ids="+".join)
def test_frozen_parameters_have_no_sums(monkeypatch, trained):
    made, launched, backward = [], [], fused.norm_backward
    monkeypatch.setattr(fused, "norm_backward", lambda *a: made.append(backward(*a)) or made[-1])
    monkeypatch.setattr(fused, "sum_stretches", lambda partial, result, add=fused.sum_stretches: launched.append(1) or add(partial, result))
    given = {n: x.float().requires_grad_(n in (*trained, "hidden")) for n, x in tensors(13, 37).items()}
    both()[0](**given).sum().backward()
    (_, dresidual, parameters), = made
    assert parameters.shape == (len(trained), 37) and len(launched) == bool(trained) and not dresidual.numel()
    assert [n for n, x in given.items() if x.grad is not None] == [n for n in NAMES if n in (*trained, "hidden")]


def test_what_is_kept_for_the_backward():
    """n [T, D] and i [T]; nothing for the bias alone, nor where nobody wants a gradient."""
    def kept(*wanted, dtype=torch.float32, drop=None):
        sizes = []
        given = {n: x.to(dtype).requires_grad_(n in wanted) for n, x in tensors(64, 96).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * x.element_size()) or x, lambda x: x):
            both(drop)[0](**given)
        return sum(sizes) - (96 * given["gain"].element_size() if sizes else 0)

    assert kept() == kept("bias") == 0
    assert kept("hidden") == kept("residual") == kept(*NAMES) == 64 * 96 * 4 + 64 * 4
    assert kept("hidden", dtype=torch.bfloat16) == 64 * 96 * 2 + 64 * 4
    assert kept("hidden", drop=DROP) == 64 * 96 * 4 + 64 * 4 + 8  # the seed


def test_nothing_is_made_for_a_backward_that_nobody_can_ask_for(monkeypatch):
    made = []
    monkeypatch.setattr(fused, "_outputs", lambda *given, make=fused._outputs: made.append(given[-1]) or make(*given))
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
    with torch.no_grad():
        both()[0](**given)
    both()[0](**given)
    assert made == [False, True]


def test_a_float32_residual_beside_bf16_has_a_gradient_that_nothing_rounds():
    given = {n: (x.bfloat16() if n == "hidden" else x.float()).requires_grad_() for n, x in tensors(13, 37).items()}
    y = both()[0](**given)
    (found,) = torch.autograd.grad(y, given["residual"], drawn(13, 37, seed=3).to(y.dtype))
    assert not torch.equal(found, found.bfloat16().float())


@DROPS
def test_gradients_repeat_bit_for_bit(drop):
    given = {n: x.bfloat16() for n, x in tensors(117, 37).items()}
    first, again = (run(both(drop)[0], given, NAMES, 0) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_hidden(bad):
    given = {n: x.float() for n, x in tensors(5, 13).items()}
    given["residual"][3, 2] = bad
    out = both(DROP)[0](**given)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("change,words", [
    ({"hidden": torch.zeros(5)}, r"norm, hidden: expected shape \[-1, -1\], got \[5\]"),
    ({"hidden": torch.zeros(5, 13, dtype=torch.float64)}, "norm, hidden: expected one of float32, bfloat16, float16, got float64"),
    ({"hidden": torch.zeros(5, 0)}, "norm, hidden: expected 1 to 4096 columns, got 0"),
    ({"hidden": torch.zeros(1, 4097)}, "norm, hidden: expected 1 to 4096 columns, got 4097"),
    ({"residual": torch.zeros(13)}, r"norm, residual: expected shape \[5, 13\], got \[13\]"),
    ({"gain": torch.zeros(12)}, r"norm, gain: expected shape \[13\], got \[12\]"),
    ({"bias": torch.zeros(13, dtype=torch.int64)}, "norm, bias: expected one of float32, bfloat16, float16, got int64"),
])
def test_refused_by_name(change, words):
    given = {n: x.float() for n, x in tensors(5, 13).items()} | {n: x.to(DEVICE) for n, x in change.items()}
    with pytest.raises(ValueError, match=words):
        both()[0](**given)


@pytest.mark.parametrize("change,words", [
    ({"rate": 1.0}, "dropout: expected a rate from 0 up to but not 1, got 1.0"),
    ({"seed": torch.zeros(1)}, "norm, seed: expected one of int64, got float32"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, r"norm, seed: expected shape \[1\], got \[2\]"),
])
def test_a_drop_that_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        both(DROP._replace(**change))[0](**{n: x.float() for n, x in tensors(5, 13).items()})


@DROPS
def test_torch_compile_does_not_break_on_it(drop):
    """The ops' registrations: fake tensors, autograd and what they do agree; a full graph, ahead of time, computes the same."""
    given = {n: x.float().requires_grad_() for n, x in tensors(13, 37).items()}
    rate, seed, site = drop or (0.0, None, 0)
    torch.library.opcheck(torch.ops.peftdebias.norm_forward.default, (*given.values(), 1e-5, rate, seed, site, torch.float32, True))
    plain = {n: x.detach() for n, x in given.items()}
    _, normal, inverse = torch.ops.peftdebias.norm_forward(*plain.values(), 1e-5, rate, seed, site, torch.bfloat16, True)
    for dtypes, sums in (((torch.float32, torch.bfloat16), (True, True)), ((None, torch.float32), (False, True)), ((torch.float32, None), (True, False))):
        again = plain["residual"].bfloat16() if all(sums) else None
        arguments = (plain["hidden"].bfloat16(), again, normal, inverse, plain["gain"], rate, seed, site, False, *dtypes, *sums)
        torch.library.opcheck(torch.ops.peftdebias.norm_backward.default, arguments)
    compiled = torch.compile(lambda t: both(drop)[0](**t) * 2, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(given), both(drop)[0](**given) * 2
    assert torch.equal(out, wanted)
    pull = torch.ones_like(out) * torch.arange(37, device=DEVICE)
    found, expected = (torch.autograd.grad(y, list(given.values()), pull) for y in (out, wanted))
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


@pytest.mark.slow
@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d", [(67, 768), (37, 1024), (13, 3072), (5, 4096)])
def test_real_sizes(t, d, dtype, drop):
    compare(*both(drop, 1e-12), tensors(t, d), dtype=dtype, gradients=NAMES)
    compare(*both(drop, 1e-12), tensors(t, d), dtype=dtype, gradients=("hidden", "residual"))


def apart(t: torch.Tensor) -> torch.Tensor:
    """The same values, rows twice as far from each other."""
    return torch.cat([t, t * 0], 1)[:, :t.shape[1]]


@pytest.mark.parametrize("which", [0, 1])
def test_rows_of_hidden_and_residual_lie_apart_unlike(which):
    given, (gain, bias) = [drawn(13, 37, seed=seed).float() for seed in (1, 2)], [drawn(37, seed=seed).float() for seed in (3, 4)]
    unlike = [apart(t) if i == which else t for i, t in enumerate(given)]
    with poisoned():
        assert torch.equal(fused.norm(*unlike, gain, bias, 1e-5), fused.norm(*given, gain, bias, 1e-5))


@pytest.mark.parametrize("which", [0, 1])
def test_rows_of_the_two_readers_gradients_lie_apart_unlike(which):
    pulls = [drawn(13, 37, seed=seed).float() for seed in (5, 6)]

    def gradient(pulls):
        hidden = drawn(13, 37, seed=1).float().requires_grad_()
        first, second, _ = fused.norm(hidden, None, drawn(37, seed=3).float(), drawn(37, seed=4).float(), 1e-5, fork=True)
        return torch.autograd.grad([first, second], hidden, pulls)[0]

    with poisoned():
        assert torch.equal(gradient([apart(t) if i == which else t for i, t in enumerate(pulls)]), gradient(pulls))
