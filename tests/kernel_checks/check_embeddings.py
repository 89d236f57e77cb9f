"""The embeddings' kernel against embed_ref: forward and every named gradient, at ragged sizes and real ones, each dtype, with and without dropout."""

import pytest
import torch

from peftdebias.kernels import embeddings as fused
from peftdebias.kernels import norm as room
from peftdebias.kernels.dropout import dropout
from peftdebias.ops import Drop, embed_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, run, strided

NAMES = ("word", "placed", "gain", "bias")
DROP = Drop(0.3, torch.tensor([2 ** 40 + 2 ** 31 + 3], device=DEVICE), 2)  # more than 32 bits
DROPS = pytest.mark.parametrize("drop", [None, DROP], ids=["no dropout", "dropout"])


def tensors(t: int, d: int, v: int = 11, n: int = 5) -> dict[str, torch.Tensor]:
    """int64 [T] twice, float64 [V, D], [N, D] and [D] twice; the gain is neither one nor of one sign."""
    generator = torch.Generator().manual_seed(t)
    numbers = {name: torch.randint(0, rows, (t,), generator=generator).to(DEVICE) for name, rows in (("ids", v), ("places", n))}
    return numbers | {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(zip(NAMES, ((v, d), (n, d), (d,), (d,))))}


def given(t: int = 13, d: int = 37, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, torch.Tensor]:
    return {name: x.to(dtype) if name in NAMES else x for name, x in tensors(t, d, **sizes).items()}


def both(drop: Drop | None = None, epsilon: float = 1e-5):
    """(fused, twin), each a function of tensors by name."""
    return tuple(lambda f=f, **t: f(t["ids"], t["places"], t["word"], t["placed"], t["gain"], t["bias"], epsilon, drop) for f in (fused.embed, embed_ref))


def one_by_one(drop: Drop | None):
    """torch's look-ups, the norm's kernel and dropout's, which rounds between two of them."""
    def composed(ids, places, word, placed, gain, bias):
        y = room.norm(torch.nn.functional.embedding(ids, word), torch.nn.functional.embedding(places, placed), gain, bias, 1e-5)
        return y if drop is None else dropout(y, *drop)

    return composed


@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d,v,n", [(13, 37, 11, 5), (37, 7, 61, 19), (7, 48, 3, 2), *(pytest.param(*s, marks=pytest.mark.slow) for s in ((1, 37, 1, 1), (5, 520, 61, 5)))])
def test_ragged_sizes_in_each_dtype(t, d, v, n, dtype, drop):
    compare(*both(drop), tensors(t, d, v, n), dtype=dtype, gradients=NAMES)


@DROPS
@pytest.mark.parametrize("gradients", [(), ("word",), ("placed",), ("gain",), ("bias",), ("word", "placed"), ("placed", "bias"), ("gain", "bias")], ids="+".join)
def test_any_set_of_gradients(gradients, drop):
    compare(*both(drop), tensors(13, 37), dtype=torch.float32, gradients=gradients)


@pytest.mark.parametrize("trained", [("word",), ("gain",), ("bias",), ("gain", "bias"), NAMES], ids="+".join)
def test_frozen_tensors_cost_nothing(monkeypatch, trained):
    """No ds without a trained table, no sums without a trained gain or bias; the others have no gradient."""
    made, backward = [], fused.norm_backward
    monkeypatch.setattr(fused, "norm_backward", lambda *a: made.append(backward(*a)) or made[-1])
    t = given()
    for name in trained:
        t[name].requires_grad_()
    both(DROP)[0](**t).sum().backward()
    (ds, again, parameters), = made
    assert ds.numel() == (13 * 37 if {"word", "placed"} & set(trained) else 0) and not again.numel()
    assert parameters.shape == (len({"gain", "bias"} & set(trained)), 37)
    assert [n for n in NAMES if t[n].grad is not None] == [n for n in NAMES if n in trained]


@pytest.mark.parametrize("rate", [0.1, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d", [(13, 37), (37, 96), (9, 520)])
def test_the_mask_is_dropouts_own(t, d, dtype, rate):
    """Of a norm whose result is ones."""
    x, drop = given(t, d, dtype), DROP._replace(rate=rate)
    x |= {"gain": torch.zeros_like(x["gain"]), "bias": torch.ones_like(x["bias"])}
    found = both(drop)[0](**x)
    assert torch.equal(found, dropout(torch.ones(t, d, dtype=dtype, device=DEVICE), *drop)) and 0 < (found == 0).sum() < found.numel()


@DROPS
def test_the_same_as_one_op_after_the_other(drop):
    """In float32, where nothing is rounded between them, in the forward and in the backward."""
    found, expected = (run(f, given(), NAMES, 0) for f in (both(drop)[0], one_by_one(drop)))
    assert torch.equal(found["output"] == 0, expected["output"] == 0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@DROPS
def test_autocast_decides_the_dtype(drop):
    """float32 tables, bf16 out, float32 gradients, and none of them further off than where norm and dropout follow each other."""
    def cast(f):
        def under(**t):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return f(**t)
        return under

    compare(cast(both(drop)[0]), both(drop)[1], tensors(13, 37), plain=cast(one_by_one(drop)), dtype=torch.float32, gradients=NAMES, factor=1.05)
    t = given()
    leaves = [t[n].requires_grad_() for n in NAMES]
    out = cast(both(drop)[0])(**t)
    assert out.dtype == cast(one_by_one(drop))(**t).dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(out.sum(), leaves)} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_parameters_in_float32_beside_rounded_tables(dtype):
    """What is trained beside tables that are frozen in 16 bits."""
    def plain(**t):  # a GPU's LayerNorm wants one dtype: here the parameters are values that it holds
        return both(DROP)[1](**t | {n: t[n].to(dtype) for n in ("gain", "bias")})

    x = tensors(13, 37)
    x |= {n: x[n].to(dtype).double() for n in ("gain", "bias")}
    compare(*both(DROP), x, plain=plain, dtype=dtype, gradients=NAMES, float32=("gain", "bias"))


@DROPS
@pytest.mark.parametrize("wide", ["word", "placed"])
def test_tables_of_two_dtypes(wide, drop, monkeypatch):
    """y is of word's dtype, each gradient of its own tensor's; float32 gets what bf16 beside it does not round."""
    x, made, backward = given(dtype=torch.bfloat16), [], fused.norm_backward
    monkeypatch.setattr(fused, "norm_backward", lambda *a: made.append(backward(*a)) or made[-1])
    x[wide] = x[wide].float()
    leaves = [x[n].requires_grad_() for n in NAMES]
    out, wanted = both(drop)[0](**x), both(drop)[1](**{n: t.double() if n in NAMES else t for n, t in x.items()})
    assert out.dtype == x["word"].dtype
    pull = torch.arange(37, device=DEVICE).expand(13, 37)
    found, expected = (torch.autograd.grad(y, leaves, pull.to(y.dtype)) for y in (out, wanted))
    assert [g.dtype for g in found] == [t.dtype for t in leaves] and made[0][0].dtype == torch.float32
    assert (out.double() - wanted).abs().max() <= 2.0 ** -8 * wanted.abs().max()
    assert all((f.double() - e.double()).abs().max() <= 2.0 ** -6 * e.abs().max() for f, e in zip(found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(dtype):
    x = tensors(13, 117)
    x["placed"] += 1e3
    compare(*both(), x, dtype=dtype, gradients=NAMES)


@pytest.mark.parametrize("stretches", [1, 3])
def test_stretches_sum_to_the_same(monkeypatch, stretches):
    """A program of the backward that walks over several tiles draws each one's mask."""
    monkeypatch.setattr(room, "STRETCHES", stretches)
    compare(*both(DROP), tensors(67, 37), dtype=torch.float32, gradients=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype):
    compare(*both(DROP), tensors(13, 37), dtype=dtype, gradients=NAMES, layout=strided)


def test_rows_of_any_stride_are_not_copied(monkeypatch):
    """Tables that are columns of a wider one, ids that are a column."""
    x, seen = given(), []
    wide, wider, numbers = drawn(11, 3 * 37, seed=7).float(), drawn(5, 4 * 37, seed=8).float(), torch.stack([x["ids"], x["places"]], 1)
    x |= {"word": wide[:, 37:74], "placed": wider[:, 74:111], "ids": numbers[:, 0], "places": numbers[:, 1]}
    monkeypatch.setattr(fused, "rows_together", lambda t, same=fused.rows_together: seen.append(same(t) is t) or same(t))
    assert torch.equal(both()[0](**x), both()[0](**{n: t.contiguous() for n, t in x.items()})) and seen == [True] * 4
    x["word"] = x["word"].detach().contiguous().requires_grad_()
    pulls = torch.ones(1, 37, device=DEVICE).expand(13, 37)  # a stride of 0
    one, other = (torch.autograd.grad(both(DROP)[0](**x), x["word"], p)[0] for p in (pulls, pulls.contiguous()))
    assert torch.equal(one, other)


@DROPS
def test_no_tokens(drop):
    with poisoned():
        found, wanted = (run(f, given(0), NAMES, 0) for f in both(drop))
    assert found["gradient of word"].shape == (11, 37) and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name,wrong,drop", [("ids", -1, DROP), ("ids", 11, None), ("ids", -2 ** 63, None), ("ids", 2 ** 40, None), ("places", 5, DROP), ("places", -1, None),
                                             ("places", 2 ** 63 - 1, DROP), ("places", 2 ** 40, None)])
def test_a_number_of_no_row_is_nan_and_reads_nothing(name, wrong, drop):
    """Row 3 alone, all of it; the tables' gradients are those of the other tokens. A read at row 2^40 would end the process, where one at 2^63 wraps around to the table."""
    x, others = given(), torch.arange(13, device=DEVICE) != 3
    expected = run(both(drop)[0], x, NAMES, 0)["output"]
    x[name][3] = wrong
    with poisoned():
        found = run(both(drop)[0], x, NAMES, 0)
    checked = fused._embed_forward(*x.values(), 1e-5, 0.0, None, 0, torch.float32, True, True)[3]
    assert checked[:, 3].tolist() == [-1, -1] and torch.equal(checked[:, others], torch.stack([x["ids"], x["places"]])[:, others])
    assert found["output"][3].isnan().all() and torch.equal(found["output"][others], expected[others])
    for table in ("word", "placed"):
        leaf, masked = x[table].detach().requires_grad_(), {n: t.clone() for n, t in x.items()}
        masked[name][3] = 0  # any row: the token's pull is 0
        pull = drawn(13, 37, seed=100).float() * others[:, None]
        (alone,) = torch.autograd.grad(both(drop)[0](**masked | {table: leaf}), leaf, pull)
        torch.testing.assert_close(found[f"gradient of {table}"], alone.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_hidden(bad):
    x = given()
    x["word"][x["ids"][3], 2] = bad
    out, hit = both()[0](**x), x["ids"] == x["ids"][3]
    assert out[hit].isnan().all() and not out[~hit].isnan().any()


def test_a_rate_of_zero_drops_nothing():
    assert torch.equal(both(DROP._replace(rate=0.0))[0](**given()), both()[0](**given()))


def test_another_seed_or_site_is_another_mask():
    one, again, seed, site = (both(d)[0](**given()) for d in (DROP, DROP, DROP._replace(seed=DROP.seed + 1), DROP._replace(site=3)))
    assert torch.equal(one, again) and not torch.equal(one, seed) and not torch.equal(one, site)


def test_gradients_repeat_bit_for_bit():
    x = given(67, 37, torch.bfloat16)
    first, again = (run(both(DROP)[0], x, NAMES, 0) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_what_is_kept_for_the_backward():
    """n [T, D], i [T] and with a trained table both numbers of each token; nothing for the bias alone, nor where nobody wants a gradient."""
    def kept(*wanted, dtype=torch.float32, drop=None):
        sizes, x = [], given(64, 96, dtype)
        for name in wanted:
            x[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
            both(drop)[0](**x)
        return sum(sizes) - (96 * x["gain"].element_size() if sizes else 0)

    assert kept() == kept("bias") == 0
    assert kept("gain") == kept("gain", "bias") == 64 * 96 * 4 + 64 * 4
    assert kept("word") == kept("placed") == kept(*NAMES) == 64 * 96 * 4 + 64 * 4 + 2 * 64 * 4
    assert kept("gain", dtype=torch.bfloat16) == 64 * 96 * 2 + 64 * 4
    assert kept("gain", drop=DROP) == 64 * 96 * 4 + 64 * 4 + 8  # the seed


def test_nothing_is_made_for_a_backward_that_nobody_can_ask_for(monkeypatch):
    made = []
    monkeypatch.setattr(fused, "_outputs", lambda *given, make=fused._outputs: made.append(given[-2:]) or make(*given))
    x = {n: t.requires_grad_() if n in NAMES else t for n, t in given().items()}
    with torch.no_grad():
        both()[0](**x)
    both()[0](**x)
    assert made == [(False, False), (True, True)]


@pytest.mark.parametrize("change,words", [
    ({"word": torch.zeros(11)}, r"embed, word: expected shape \[-1, -1\], got \[11\]"),
    ({"word": torch.zeros(11, 37, dtype=torch.float64)}, "embed, word: expected one of float32, bfloat16, float16, got float64"),
    ({"word": torch.zeros(11, 0)}, "embed, word: expected 1 to 4096 columns, got 0"),
    ({"word": torch.zeros(1, 4097)}, "embed, word: expected 1 to 4096 columns, got 4097"),
    ({"placed": torch.zeros(5, 36)}, r"embed, placed: expected shape \[-1, 37\], got \[5, 36\]"),
    ({"ids": torch.zeros(13, dtype=torch.int32)}, "embed, ids: expected one of int64, got int32"),
    ({"ids": torch.zeros(13, 1, dtype=torch.int64)}, r"embed, ids: expected shape \[-1\], got \[13, 1\]"),
    ({"places": torch.zeros(12, dtype=torch.int64)}, r"embed, places: expected shape \[13\], got \[12\]"),
    ({"gain": torch.zeros(12)}, r"embed, gain: expected shape \[37\], got \[12\]"),
    ({"bias": torch.zeros(37, dtype=torch.int64)}, "embed, bias: expected one of float32, bfloat16, float16, got int64"),
])
def test_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        both()[0](**given() | {n: t.to(DEVICE) for n, t in change.items()})


@pytest.mark.parametrize("change,words", [
    ({"rate": 1.0}, "dropout: expected a rate from 0 up to but not 1, got 1.0"),
    ({"seed": torch.zeros(1)}, "embed, seed: expected one of int64, got float32"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, r"embed, seed: expected shape \[1\], got \[2\]"),
])
def test_a_drop_that_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        both(DROP._replace(**change))[0](**given())


@pytest.mark.parametrize("drop", [pytest.param(None, marks=pytest.mark.slow), DROP], ids=["no dropout", "dropout"])
def test_torch_compile_does_not_break_on_it(drop):
    """The ops' registrations: fake tensors, autograd and what they do agree; a full graph, ahead of time, computes the same."""
    x = given()
    leaves = [x[n].requires_grad_() for n in NAMES]
    rate, seed, site = drop or (0.0, None, 0)
    torch.library.opcheck(torch.ops.peftdebias.embed_forward.default, (*x.values(), 1e-5, rate, seed, site, torch.float32, True, True))
    plain = [t.detach() for t in x.values()]
    _, normal, inverse, _ = torch.ops.peftdebias.embed_forward(*plain, 1e-5, rate, seed, site, torch.bfloat16, True, False)
    pull = drawn(13, 37, seed=3).bfloat16()
    torch.library.opcheck(torch.ops.peftdebias.norm_backward.default, (pull, None, normal, inverse, plain[4], rate, seed, site, True, torch.float32, None, True, True))
    compiled = torch.compile(lambda t: both(drop)[0](**t) * 2, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(x), both(drop)[0](**x) * 2
    assert torch.equal(out, wanted)
    pull = torch.ones_like(out) * torch.arange(37, device=DEVICE)
    found, expected = (torch.autograd.grad(y, leaves, pull) for y in (out, wanted))
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


@pytest.mark.slow
@DROPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t,d", [(67, 768), (37, 1024), (13, 3072), (5, 4096)])
def test_real_sizes(t, d, dtype, drop):
    compare(*both(drop, 1e-12), tensors(t, d, 301, 128), dtype=dtype, gradients=NAMES)
    compare(*both(drop, 1e-12), tensors(t, d, 301, 128), dtype=dtype, gradients=("word",))
