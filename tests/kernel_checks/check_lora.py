"""LoRA's four kernel files against the plain twins of methods/lora.py: every output, every named gradient, every form."""

import gc
import weakref

import pytest
import torch

from peftdebias import kernels
from peftdebias.kernels import dispatch, lora, lora_grads, lora_thin, lora_write, product
from peftdebias.kernels.dropout_ref import dropout_ref
from peftdebias.methods.lora import lora_grads_ref, lora_linear_ref
from peftdebias.written import lora_write_ref, lora_written_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, strided

SEED = torch.tensor([2**33 + 5], device=DEVICE)
SCALE = 1.7
RAGGED = [(13, 7, 37, 1), (37, 13, 7, 8), (7, 37, 13, 13), (130, 70, 131, 5)]  # T, in, out, r
WIDTHS = [(768, 768), (768, 3072), (3072, 768)]
REAL = [(65, *widths, rank, dtype, 0.25 if (i + j + k) % 4 == 0 else 0.0)  # a quarter of them drops: each rank, each pair of widths and each dtype is among it
        for i, rank in enumerate((1, 8, 13, 64)) for j, widths in enumerate(WIDTHS) for k, dtype in enumerate(DTYPES)]
RATES = (0.0, 0.3)  # of 65536 values 0.3 is no whole number, so the share kept is not 1 - 0.3
HALVES = DTYPES[1:]  # what dA and dB come in one pass for


def tensors(rows: int, width: int, out: int, rank: int, bias: bool = True) -> dict[str, torch.Tensor]:
    found = {"x": drawn(rows, width, seed=1), "weight": drawn(out, width, seed=2, scale=width ** -0.5), "bias": drawn(out, seed=3),
             "a": drawn(rank, width, seed=4, scale=width ** -0.5), "b": drawn(out, rank, seed=5, scale=0.3)}
    return found if bias else {k: v for k, v in found.items() if k != "bias"}


def form(name: str, rate: float):
    def run(x, weight, a, b, bias=None):
        with dispatch.use("lora_linear", name):
            return lora.lora_linear(x, weight, bias, a, b, SCALE, rate, SEED, 6)
    return run


def twin(rate: float, convert=lambda t: t):
    return lambda x, weight, a, b, bias=None: lora_linear_ref(x, weight, bias, convert(a), convert(b), SCALE, rate, SEED, 6)


# ---------------------------------------------------------------- the product

@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_epilogue(sizes, dtype, rate):
    compare(form("epilogue", rate), twin(rate), tensors(*sizes), dtype=dtype, gradients=("x", "weight", "bias", "a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["written", "epilogue", "library"])
@pytest.mark.parametrize("rows,width,out,rank,dtype,rate", REAL, ids=str)
def test_real_sizes(name, rows, width, out, rank, dtype, rate, monkeypatch):
    """Also dA and dB, which the three forms take from lora_grads.py. float32 in the tiles of bf16: fewer steps of the interpreter, the same kernels."""
    for file in (product, lora_thin, lora_grads):
        monkeypatch.setattr(file, "tiles_for", lambda dtype, *rest, of=file.tiles_for: of(torch.bfloat16, *rest))
    given = tensors(rows, width, out, rank)
    if name == "written":  # knows no dropout
        compare(written(lora.lora_written, lora_write.lora_write), written(lora_written_ref, lora_write_ref), given, dtype=dtype, gradients=("x", "a", "b"))
    else:
        compare(form(name, rate), twin(rate), given, dtype=dtype, gradients=("x", "a", "b"))


@pytest.mark.slow
def test_the_tiles_of_float32_at_real_sizes():
    compare(form("epilogue", 0.0), twin(0.0), tensors(65, 768, 768, 8), dtype=torch.float32, gradients=("x", "a", "b"))


def written(function, write):
    """One piece that covers the weight, written and then multiplied."""
    def run(x, weight, bias, a, b):
        return function(x, write([weight], [(0, 0, a.detach(), b.detach(), SCALE)], x.dtype)[0], bias, [(0, a, b, SCALE)])
    return run


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("sizes", [RAGGED[0], (13, 70, 131, 65)], ids=str)
def test_library(sizes, rate):
    """Also where nobody asked for it: no kernel takes a rank above 64."""
    compare(form("library" if sizes[3] < 64 else "epilogue", rate), twin(rate), tensors(*sizes), dtype=torch.bfloat16, gradients=("x", "weight", "bias", "a", "b"))


def test_a_backward_keeps_the_form_of_its_forward(monkeypatch):
    """Autograd runs it later, in a thread that knows nothing of the `with` block."""
    launched, launch = [], lora._product
    monkeypatch.setattr(lora, "_product", lambda *given: launched.append(given[5]) or launch(*given))
    for name, directions in (("library", []), ("epilogue", [True, False])):
        launched.clear()
        inputs = tensors_float(x=True)
        form(name, 0.25)(**inputs).sum().backward()
        assert launched == directions


@pytest.mark.parametrize("rate", RATES)
def test_thin_matrices_in_float32_beside_bf16(rate):
    """As autocast has it: A, B and their gradients stay float32. The measure rounds A and B to bf16, as torch's own products under autocast do."""
    compare(form("epilogue", rate), twin(rate), tensors(37, 24, 13, 8), dtype=torch.bfloat16, gradients=("x", "a", "b"), float32=("a", "b"),
            plain=lambda x, **rest: twin(rate, lambda t: t.to(x.dtype))(x, **rest))


def slice_of_columns(t: torch.Tensor) -> torch.Tensor:
    """The same values as the middle third of wider rows, which lie apart."""
    return torch.cat([t * 0, t, t * 0], -1)[:, t.shape[1]:2 * t.shape[1]]


@pytest.mark.parametrize("layout", [strided, slice_of_columns])
def test_without_bias_and_not_contiguous(layout):
    compare(form("epilogue", 0.25), twin(0.25), tensors(13, 24, 7, 3, bias=False), dtype=torch.float32, gradients=("x", "a", "b"), layout=layout)


def test_more_tiles_of_rows_than_go_together():
    """The product walks over groups of them (product.py), the last of which may be smaller."""
    compare(form("epilogue", 0.0), twin(0.0), tensors(32 * product.tiles_for(torch.float32, False)["GROUP"] + 37, 7, 37, 1), dtype=torch.float32, gradients=("x",))


@pytest.mark.parametrize("name", ["epilogue", "library"])
def test_a_bias_that_is_not_contiguous(name):
    compare(form(name, 0.25), twin(0.25), tensors(13, 24, 37, 3), dtype=torch.float32, gradients=("x", "bias", "a", "b"), layout=strided)


def test_only_what_is_asked_for_has_a_gradient():
    for trained in ("a", "b"):
        inputs = tensors_float(**{trained: True})
        form("epilogue", 0.0)(**inputs).sum().backward()
        assert {k for k, v in inputs.items() if v.grad is not None} == {trained}
    frozen = form("epilogue", 0.0)(**tensors_float(x=True))
    # W, A, B, the seed, A and B packed; neither x nor u where W, A and B are frozen.
    assert {t.shape for t in saved(frozen)} == {(37, 7), (3, 7), (37, 3), (1,), (16 * (7 + 37),)}


def tensors_float(**grads: bool) -> dict[str, torch.Tensor]:
    return {k: v.float().requires_grad_(grads.get(k, False)) for k, v in tensors(13, 7, 37, 3).items()}


def saved(y: torch.Tensor) -> list[torch.Tensor]:
    return [t for t in y.grad_fn.saved_tensors if t is not None]


def test_the_mask_is_the_seeds():
    """Another seed, another mask; the same in the two forms and in the backward (which is held against the twin above)."""
    inputs = {k: v.float() for k, v in tensors(37, 24, 13, 8).items()}
    one = form("epilogue", 0.5)(**inputs)
    torch.testing.assert_close(one, form("library", 0.5)(**inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(one, form("epilogue", 0.5)(**inputs))
    with dispatch.use("lora_linear", "epilogue"):
        other = lora.lora_linear(inputs["x"], inputs["weight"], inputs["bias"], inputs["a"], inputs["b"], SCALE, 0.5, SEED + 1, 6)
    assert (one - other).abs().max() > 0.01


def test_no_rows():
    with poisoned():
        y = form("epilogue", 0.0)(**{k: v[:0].float() if k == "x" else v.float() for k, v in tensors(3, 7, 5, 2).items()})
        da, db = lora_grads.lora_grads(torch.zeros(0, 7), torch.zeros(0, 5), torch.ones(2, 7), torch.ones(5, 2), 1.0)
    assert y.shape == (0, 5) and not da.any() and not db.any()


# ---------------------------------------------------------------- A and B packed, u and v

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces,rank", [(1, 1), (1, 64), (2, 8), (3, 5), (3, 21), (4, 5), (1, 65)])
def test_packed(pieces, rank, dtype):
    """To the bit, zeros too; four pieces and more ranks than a kernel takes are packed by torch."""
    a, b = ([drawn(*shape, seed=i).float() for i in range(pieces)] for shape in ((rank, 131), (37, rank)))
    a[0] = strided(a[0])
    with poisoned():
        found = lora_thin.pack(a, b, dtype)
    ranks = lora_thin.ranks_of(rank, pieces)
    rows, columns = found[:ranks * 131].view(ranks, 131), found[ranks * 131:].view(pieces, 37, ranks)
    assert found.dtype == dtype and torch.equal(found, lora_thin.pack_ref(a, b, dtype))
    assert torch.equal(rows[:pieces * rank], torch.cat(a).to(dtype)) and not rows[pieces * rank:].any()
    for i in range(pieces):
        own = slice(i * rank, (i + 1) * rank)
        assert torch.equal(columns[i, :, own], b[i].to(dtype)) and torch.count_nonzero(columns[i]) == torch.count_nonzero(columns[i, :, own])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width,out,apart", [(131, 37, 50), (144, 48, 64)])
def test_thin_products(width, out, apart, dtype, rate):
    """u and v of two pieces, together and each alone, read one by one or in whole vectors; nothing but zeros where no piece has ranks. u has the scale of its mask."""
    rows, rank, pieces = 137, 5, 2
    inputs = {"x": drawn(rows, width, seed=1), "dy": drawn(rows, apart + out, seed=2)} | {name: drawn(*shape, seed=3 + i) for i, (name, shape) in enumerate(
        {"qa": (rank, width), "va": (rank, width), "qb": (out, rank), "vb": (out, rank)}.items())}

    def fused(x, dy, qa, va, qb, vb):
        packed, how = lora_thin.pack([qa, va], [qb, vb], x.dtype), (width, out, apart, pieces, rank, rate, SEED, 6)
        with poisoned():
            u, v = lora_thin.thin(x, dy, packed, *how)
            alone = lora_thin.thin(x, None, packed, *how)[0], lora_thin.thin(None, dy, packed, *how)[1]
        assert all(torch.equal(t[:, :10], other[:, :10]) and not t[:, 10:].any() for t, other in zip((u, v), alone))
        return {"u": u[:, :10], "v": v[:, :10]}

    def plain(x, dy, qa, va, qb, vb):
        z = dropout_ref(x, rate, SEED, 6) if rate else x
        return {"u": z @ torch.cat((qa, va)).t(), "v": torch.cat((dy[:, :out] @ qb, dy[:, apart:] @ vb), 1)}

    compare(fused, plain, inputs, dtype=dtype)


@pytest.mark.parametrize("form", ["twice", "once", ""])
def test_gradients_take_the_thin_products_that_are_there(form, monkeypatch):
    """As behind the unwritten product; by a form asked for by name as well. Then x and dY are read once."""
    width, out = (128, 256) if form == "once" else (13, 7)
    x, dy, a, b = (drawn(*s, seed=i).bfloat16() for i, s in enumerate(((37, width), (37, out), (5, width), (out, 5))))
    packed, how = lora_thin.pack([a], [b], x.dtype), (SCALE, 0, 0.25, SEED, 6, form)
    u, v = lora_thin.thin(x, dy, packed, width, out, 0, 1, 5, 0.25, SEED, 6)
    expected = lora_grads.lora_grads_op(x, dy, [a], [b], *how)
    for given in ((packed, u, v), (None, u, v), (packed, u, None), (None, None, v), (packed, None, None)):
        assert all(map(torch.equal, lora_grads.lora_grads_op(x, dy, [a], [b], *how, *given), expected))
    monkeypatch.setattr(lora_grads, "thin", None)
    monkeypatch.setattr(lora_grads, "pack", None)
    if not form:  # then no table is asked, which may say "once"
        monkeypatch.setattr(lora_grads, "form_for", None)
    assert all(map(torch.equal, lora_grads.lora_grads_op(x, dy, [a], [b], *how, packed, u, v), expected))


# ---------------------------------------------------------------- dA and dB

@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_grads(sizes, dtype, rate):
    check_grads(sizes, dtype, rate, "twice")


@pytest.mark.parametrize("rate", RATES)
def test_grads_of_more_ranks_than_a_kernel_takes(rate):
    check_grads((13, 7, 37, 65), torch.float32, rate, "twice")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", [(1, 128, 128, 1), (13, 128, 256, 3), (300, 256, 128, 16), (97, 128, 384, 8)], ids=str)
def test_grads_in_one_pass(sizes, dtype, rate, monkeypatch):
    """Also widths of several tiles, and more tiles of rows than programs."""
    monkeypatch.setattr(lora_grads, "processors", lambda tensor: 3)
    check_grads(sizes, dtype, rate, "once")


@pytest.mark.slow
@pytest.mark.parametrize("rank,rate", [(1, 0.0), (8, 0.0), (8, 0.25), (13, 0.0)])
@pytest.mark.parametrize("dtype", HALVES)
def test_grads_in_one_pass_at_real_sizes(rank, rate, dtype, monkeypatch):
    monkeypatch.setattr(lora_grads, "processors", lambda tensor: 3)
    check_grads((131, 768, 768, rank), dtype, rate, "once")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_query_and_value_in_one_pass_at_real_sizes(dtype):
    """As a layer has them: the first and the last third of dY."""
    def fused(x, dy, qa, qb, va, vb):
        return dict(zip(("dA", "dB"), lora_grads.lora_grads_op(x, dy, [qa, va], [qb, vb], SCALE, 2 * 768, 0.0, None, 0, "once")))

    def twin(x, dy, qa, qb, va, vb):
        pairs = [lora_grads_ref(x, dy[:, first:first + 768], a, b, SCALE) for first, a, b in ((0, qa, qb), (2 * 768, va, vb))]
        return {name: torch.cat(parts) for name, parts in zip(("dA", "dB"), zip(*pairs))}

    inputs = {"x": drawn(131, 768, seed=1), "dy": drawn(131, 3 * 768, seed=2), "qa": drawn(8, 768, seed=3), "qb": drawn(768, 8, seed=4), "va": drawn(8, 768, seed=5),
              "vb": drawn(768, 8, seed=6)}
    compare(fused, twin, inputs, dtype=dtype)


def test_what_one_pass_cannot_hold_takes_two(monkeypatch):
    """float32, many ranks, wide sides and parts of a tile, a GPU with less shared memory: asked for by name or not."""
    held = {"arch": 90, "dtype": torch.bfloat16, "width": 768, "out": 768, "pieces": 2, "ranks": 16, "drops": False}
    assert lora_grads.once_serves(**held) and lora_grads.once_serves(**held | {"dtype": torch.float16, "pieces": 1, "drops": True})
    assert not any(lora_grads.once_serves(**held | more) for more in ({"arch": 89}, {"dtype": torch.float32}, {"ranks": 17}, {"width": 896}, {"out": 896}, {"width": 760}, {"out": 760},
                                                                      {"pieces": 3}, {"drops": True}))
    monkeypatch.setattr(lora_grads, "once_kernel", None)
    check_grads((13, 128, 128, 3), torch.float32, 0.0, "once")
    check_grads((13, 120, 128, 3), torch.bfloat16, 0.0, "once")
    with pytest.raises(TypeError):
        check_grads((13, 128, 128, 3), torch.bfloat16, 0.0, "once")


def check_grads(sizes, dtype, rate, form, layout=lambda t: t):
    rows, width, out, rank = sizes
    inputs = {"x": drawn(rows, width, seed=1), "dy": drawn(rows, out, seed=2), "a": drawn(rank, width, seed=3), "b": drawn(out, rank, seed=4)}

    def both(function):
        def run(**given):
            with dispatch.use("lora_grads", form):
                return dict(zip(("dA", "dB"), function(**given, scale=SCALE, rate=rate, seed=SEED, site=6)))
        return run

    compare(both(lora_grads.lora_grads), both(lora_grads_ref), inputs, dtype=dtype, layout=layout)


def test_grads_of_a_slice_of_columns(monkeypatch):
    """dY of query is a third of that of query, key and value: rows far apart, nothing copied."""
    seen = set()
    monkeypatch.setattr(lora_grads, "rows_together", lambda t, same=lora_grads.rows_together: seen.add((t.shape[1], same(t) is t)) or same(t))
    for form, dtype, sizes in (("twice", torch.float32, (37, 13, 7, 5)), ("once", torch.bfloat16, (37, 128, 256, 5))):
        check_grads(sizes, dtype, 0.25, form, layout=slice_of_columns)
    assert seen == {(width, True) for width in (13, 7, 128, 256)}


@pytest.mark.parametrize("form", ["twice", "once"])
def test_rows_may_lie_further_apart_than_32_bits_count(form):
    """The elements of one tile of rows. What lies between them is never touched, so on a CPU it takes no memory."""
    x = torch.empty_strided((16, 128), (2 ** 31 // 15 + 16, 1), dtype=torch.bfloat16, device=DEVICE).fill_(1)
    with dispatch.use("lora_grads", form):
        da, db = lora_grads.lora_grads(x, *(torch.ones(shape, device=DEVICE, dtype=x.dtype) for shape in ((16, 128), (3, 128), (128, 3))), 1.0)
    assert (da == 2048).all() and (db == 2048).all()


@pytest.mark.parametrize("form", ["twice", "once"])
@pytest.mark.parametrize("rows", [1, 64, 129, 64 * 7 + 1])
def test_chunks_of_rows_are_added_once_each(rows, form, monkeypatch):
    """With ones everywhere dB counts rows. More tiles than chunks make a program walk over several."""
    monkeypatch.setattr(lora_grads, "CHUNKS", 3)
    monkeypatch.setattr(lora_grads, "processors", lambda tensor: 3)
    width, out = (128, 256) if form == "once" else (5, 7)
    ones = [torch.ones(s, dtype=torch.bfloat16, device=DEVICE) for s in ((rows, width), (rows, out), (2, width), (out, 2))]
    with poisoned(), dispatch.use("lora_grads", form):
        da, db = lora_grads.lora_grads(ones[0], ones[1], ones[2].float(), ones[3].float(), 1.0)
    assert torch.equal(da, torch.full((2, width), 1.0 * out * rows, device=DEVICE)) and torch.equal(db, torch.full((out, 2), 1.0 * width * rows, device=DEVICE))


@pytest.mark.parametrize("form", ["twice", "once"])
def test_grads_repeat_bit_for_bit(form):
    width, out = (128, 128) if form == "once" else (13, 7)
    x, dy, a, b = (drawn(*s, seed=7).bfloat16() for s in ((300, width), (300, out), (5, width), (out, 5)))
    with dispatch.use("lora_grads", form):
        first, second = (lora_grads.lora_grads(x, dy, a, b, 1.0) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second))


# ---------------------------------------------------------------- W'

def matrices(widths, seed=1):
    return [drawn(out, width, seed=seed + i) for i, (out, width) in enumerate(widths)]


def test_written_matrices():
    """Pieces anywhere in a matrix, ranks that differ, a matrix without a piece, rows before, between and after; three dtypes of result."""
    weights = [w.float() for w in matrices([(37, 13), (7, 37), (5, 3)])]
    low = {(m, first): (drawn(r, weights[m].shape[1], seed=m + first).float(), drawn(p, r, seed=9 + first).float())
           for (m, first), (p, r) in {(0, 4): (13, 1), (0, 17): (5, 8), (0, 30): (7, 13), (1, 0): (7, 64)}.items()}
    pieces = [(m, first, a, b, 0.5 + m) for (m, first), (a, b) in low.items()]
    before = [w.clone() for w in weights]
    for dtype in DTYPES:
        expected = lora_write_ref([w.double() for w in weights], [(m, f, a.double(), b.double(), s) for m, f, a, b, s in pieces], torch.float64)
        with poisoned():
            found = lora_write.lora_write(weights, pieces, dtype)
        plain = lora_write_ref(weights, pieces, dtype)
        for have, want, theirs in zip(found, expected, plain, strict=True):
            error, own = ((t.double() - want).abs().max() for t in (have, theirs))
            assert have.dtype == dtype and error <= 2 * own
    assert all(torch.equal(w, kept) for w, kept in zip(weights, before))
    assert torch.equal(found[2], weights[2].half()) and torch.equal(found[0][:4], weights[0][:4].half())  # copied rows to the bit


@pytest.mark.slow
@pytest.mark.parametrize("rank,dtype", [(1, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16), (8, torch.float16), (13, torch.bfloat16), (64, torch.bfloat16)], ids=str)
def test_written_matrices_at_real_sizes(rank, dtype):
    """Written in `dtype` from float32."""
    weights = [w.float() for w in matrices([(2304, 768), (3072, 768), (768, 3072)])]
    pieces = [(0, 0, 768), (0, 1536, 768), (1, 0, 3072), (2, 0, 768)]
    pieces = [(m, first, drawn(rank, weights[m].shape[1], seed=m).float(), drawn(rows, rank, seed=7).float(), 2.0) for m, first, rows in pieces]
    expected = lora_write_ref([w.double() for w in weights], [(m, f, a.double(), b.double(), s) for m, f, a, b, s in pieces], torch.float64)
    plain = lora_write_ref(weights, pieces, dtype)
    for have, want, theirs in zip(lora_write.lora_write(weights, pieces, dtype), expected, plain, strict=True):
        assert (have.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max()


def test_tables_are_made_once_for_the_same_addresses():
    weight, a, b = drawn(13, 7).float(), drawn(2, 7).float(), drawn(13, 2).float()
    lora_write.tables.cache_clear()
    first = lora_write.lora_write([weight], [(0, 0, a, b, 2.0)], torch.float32)[0].clone()
    a.mul_(2)
    second = lora_write.lora_write([weight], [(0, 0, a, b, 2.0)], torch.float32)[0]
    assert lora_write.tables.cache_info().misses == 1 and lora_write.tables.cache_info().hits == 1
    torch.testing.assert_close(second - weight, 2 * (first - weight), rtol=1e-4, atol=1e-5)


def test_tables_that_a_captured_graph_reads_outlive_the_others(monkeypatch):
    weight, a, b = drawn(13, 7).float(), drawn(2, 7).float(), drawn(13, 2).float()
    pieces = [(0, 0, a, b, 2.0)]

    def held():
        return weakref.ref(lora_write.tables(lora_write.segments_of([weight], [a], [b], [2.0], [0, 0]), DEVICE)[1])

    def forgotten():
        lora_write.lora_write([weight], pieces, torch.float32)
        table = held()
        lora_write.tables.cache_clear()
        gc.collect()
        return table() is None

    assert forgotten()
    monkeypatch.setattr(lora_write, "_CAPTURED", {})
    monkeypatch.setattr(lora_write, "capturing", lambda device: True)
    assert not forgotten()


@pytest.mark.parametrize("grads,dtype", [*(("twice", dtype) for dtype in DTYPES), *(("once", dtype) for dtype in HALVES)])
def test_the_product_with_written_weights(grads, dtype):
    """Query and value of a weight of three: outputs are those of W', gradients of A and B those of the unmerged product; the backward has the form that its forward had."""
    width, out = (128, 128) if grads == "once" else (13, 7)

    def prepared(function, write):
        def run(x, weight, bias, qa, qb, va, vb):
            pieces = [(0, qa, qb, SCALE), (2 * out, va, vb, SCALE)]
            low = [p.detach() for p in (qa, qb, va, vb)]
            written = write([weight], [(0, 0, *low[:2], SCALE), (0, 2 * out, *low[2:], SCALE)], x.dtype)[0]
            with dispatch.use("lora_grads", grads):
                return function(x, written, bias, pieces)
        return run

    inputs = {"x": drawn(37, width, seed=1), "weight": drawn(3 * out, width, seed=2), "bias": drawn(3 * out, seed=3), "qa": drawn(5, width, seed=4), "qb": drawn(out, 5, seed=5),
              "va": drawn(5, width, seed=6), "vb": drawn(out, 5, seed=7)}
    compare(prepared(lora.lora_written, lora_write.lora_write), prepared(lora_written_ref, lora_write_ref), inputs, dtype=dtype,
            gradients=("x", "bias", "qa", "qb", "va", "vb"))


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_the_product_with_written_weights_in_float32_under_autocast(inside):
    """Products and their result are of autocast's dtype, as a library's; every gradient is of its own tensor's."""
    given = {"x": drawn(37, 13, seed=1), "bias": drawn(21, seed=3), "a": drawn(5, 13, seed=4), "b": drawn(7, 5, seed=5)}
    weight, pull, found = drawn(21, 13, seed=2).float(), drawn(37, 21, seed=6), []
    for function, dtype in ((lora.lora_written, torch.float32), (lora_written_ref, torch.float64)):
        x, bias, a, b = tensors = [t.to(dtype).requires_grad_() for t in given.values()]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.float32):
            y = function(x, weight.to(dtype), bias, [(7, a, b, SCALE)])
            assert y.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
            if inside:
                y.backward(pull.to(y.dtype))
        if not inside:
            y.backward(pull.to(y.dtype))
        assert all(t.grad.dtype == dtype for t in tensors)
        found.append([y.detach(), *(t.grad for t in tensors)])
    for have, expected in zip(*found, strict=True):
        assert (have.double() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("trained", ["x", "va", "x va", "qa qb va vb"])
def test_pieces_that_are_frozen_cost_nothing(trained, monkeypatch):
    """Neither dA and dB of a piece that is, nor x where all are. The others, each of its own rank and scale, have the twin's gradients."""
    computed, kept, launch = [], [], lora.lora_grads_op
    monkeypatch.setattr(lora, "lora_grads_op", lambda *given: computed.append(len(given[2])) or launch(*given))
    given = {"x": drawn(37, 13, seed=1), "qa": drawn(5, 13, seed=4), "qb": drawn(7, 5, seed=5), "va": drawn(3, 13, seed=6), "vb": drawn(7, 3, seed=7)}
    weight, found = drawn(21, 13, seed=2).float(), []
    for function in (lora_written_ref, lora.lora_written):
        x, qa, qb, va, vb = tensors = [t.float().requires_grad_(name in trained) for name, t in given.items()]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = function(x, weight, None, [(0, qa, qb, SCALE), (14, va, vb, 0.6)])
        y.backward(drawn(37, 21, seed=3).float())
        found.append([y.detach(), *(t.grad for t in tensors if t.requires_grad)])
    assert sum(computed) == {"x": 0, "va": 1, "x va": 1, "qa qb va vb": 2}[trained] and (x.shape in kept) is (trained != "x")
    for expected, have in zip(*found, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("grads,pieces", [("twice", 3), ("once", 2)])
def test_pieces_of_one_product_go_together(grads, pieces):
    """Each piece's gradients are those it has alone, to the bit by "once" whatever the other's dY is."""
    width, out = (128, 128) if grads == "once" else (13, 7)
    x, dy = drawn(97, width, seed=1).bfloat16(), drawn(97, 1 + pieces * (out + 2), seed=2).bfloat16()
    a, b = ([drawn(*shape, seed=3 + i).float() for i in range(pieces)] for shape in ((5, width), (out, 5)))
    with dispatch.use("lora_grads", grads), poisoned():
        together = lora_grads.lora_grads_op(x, dy[:, 1:], a, b, SCALE, out + 2, 0.0, None, 0, "")
        alone = [lora_grads.lora_grads(x, dy[:, first:first + out], a[i], b[i], SCALE) for i, first in enumerate(range(1, pieces * (out + 2), out + 2))]
        if grads == "once":
            dy[:, 1:1 + out] = torch.nan
            da, db = lora_grads.lora_grads_op(x, dy[:, 1:], a, b, SCALE, out + 2, 0.0, None, 0, "")
            assert torch.equal(da[5:], alone[1][0]) and torch.equal(db[out:], alone[1][1])
    for have, want in zip(together, (torch.cat(parts) for parts in zip(*alone))):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_which_pieces_of_one_product_go_together():
    """Those alike: what differs in shape, scale or distance, or has too many ranks together, goes by itself."""
    def runs(firsts, ranks=(5, 5, 5), scales=(1.0, 1.0, 1.0), outs=(7, 7, 7)):
        return lora._alike([torch.zeros(r, 13) for r in ranks], [torch.zeros(out, r) for out, r in zip(outs, ranks)], list(scales), firsts)

    assert runs([0, 7, 14]) == [(0, 3)] and runs([0, 7, 20]) == [(0, 2), (2, 1)] and runs([14, 0, 7]) == [(0, 1), (1, 2)]
    assert runs([0, 7, 14], ranks=(5, 4, 4)) == [(0, 1), (1, 2)] and runs([0, 7, 14], scales=(1.0, 2.0, 2.0)) == [(0, 1), (1, 2)]
    assert runs([0, 7, 14], ranks=(30, 30, 30)) == [(0, 2), (2, 1)] and runs([0, 7, 14], outs=(7, 6, 6)) == [(0, 1), (1, 2)]


def test_which_products_are_read_in_whole_vectors():
    assert product.is_regular(128, 48, 144) and not any(product.is_regular(*sizes) for sizes in ((96, 48, 144), (128, 40, 144), (128, 48, 136)))


# ---------------------------------------------------------------- dispatch

def test_forms_are_picked_by_what_was_measured_nearest(monkeypatch):
    base = {"device": "cpu", "dtype": "float32", "dropout": False, "inside": 768, "outside": 768, "rank": 8}
    rows = [base | {"rows": 4096, "ms": {"written": 3.0, "epilogue": 1.0, "library": 2.0}}, base | {"rows": 65536, "ms": {"written": 1.0, "epilogue": 3.0, "library": 2.0}},
            base | {"rows": 4096, "dropout": True, "ms": {"epilogue": 3.0, "library": 2.0}}]
    monkeypatch.setattr(dispatch, "table", lambda: {"lora_linear": rows})
    dispatch._measured.cache_clear()
    how = {"device": torch.device("cpu"), "dtype": torch.float32, "dropout": False, "inside": 768, "outside": 768, "rank": 8}
    every = ("written", "epilogue", "library")
    assert [dispatch.pick("lora_linear", every, **how | {"rows": n}) for n in (1000, 8000, 30000, 10**6)] == ["epilogue", "epilogue", "written", "written"]
    assert dispatch.pick("lora_linear", ("epilogue", "library"), **how | {"rows": 10**6}) == "library"
    assert dispatch.pick("lora_linear", ("epilogue", "library"), **how | {"rows": 5, "dropout": True}) == "library"
    assert dispatch.decide("lora_linear", every, **how | {"rows": 5, "dtype": torch.float16}) == ("written", "the default: not measured on cpu")
    with dispatch.use("lora_linear", "library"):
        assert dispatch.decide("lora_linear", every, **how | {"rows": 5}) == ("library", "asked for by name")
    with pytest.raises(ValueError, match="dispatch.use: expected one of written, epilogue, library for lora_linear, got 'fast'"):
        with dispatch.use("lora_linear", "fast"):
            pass
    dispatch._measured.cache_clear()


def test_forced_kinds_reach_the_kernels():
    with kernels.use("triton"):
        assert kernels.choose("lora_linear", None, DEVICE) is lora.lora_linear and kernels.choose("lora_write", None, DEVICE) is lora_write.lora_write


# ---------------------------------------------------------------- registration and errors

def test_registration():
    """torch's own checks of every op, and torch.compile takes them without a break."""
    x, w, bias, a, b = (t.float().requires_grad_(k != "weight") for k, t in tensors(13, 7, 37, 3).items())
    flat = (1.5, 0.25, SEED, 2)
    torch.library.opcheck(torch.ops.peftdebias.lora_linear.default, (x, w, bias, a, b, *flat, "", ""))
    packed = lora_thin.pack([a.detach()], [b.detach()], torch.float32)
    torch.library.opcheck(torch.ops.peftdebias.lora_dx.default, (torch.randn(13, 37, device=DEVICE), w, packed, 3, *flat, ""))
    pieces = [a.detach(), a.detach() + 1], [b.detach(), b.detach() + 1]
    torch.library.opcheck(torch.ops.peftdebias.lora_grads.default, (x.detach(), torch.randn(13, 74, device=DEVICE), *pieces, flat[0], 37, *flat[1:], ""))
    torch.library.opcheck(torch.ops.peftdebias.lora_write.default, ([w], [a.detach()], [b.detach()], [1.5], [0, 0], torch.bfloat16))
    torch.library.opcheck(torch.ops.peftdebias.lora_written.default, (x, w, bias, [a], [b], [1.5], [0], ""))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    """Through `choose`, for more than one number of rows."""
    def run(x, w, bias, a, b):
        return kernels.choose("lora_linear", reference=lora_linear_ref, device=x.device)(x * 2, w, bias, a, b, 1.5, 0.25, SEED, 2).relu()

    whole = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (13, 17):
        given = [t.float().requires_grad_() for t in tensors(rows, 7, 37, 3).values()]
        with kernels.use("triton"):
            found, plain = whole(*given), run(*given)
        assert torch.equal(found, plain)
        assert all(torch.equal(p, q) for p, q in zip(*(torch.autograd.grad(y.sum(), given) for y in (found, plain)), strict=True))


@pytest.mark.parametrize("change,words", [
    ({"x": torch.zeros(13, 8)}, r"lora_linear, A: expected shape \[-1, 8\], got \[3, 7\]"),
    ({"x": torch.zeros(13, 7, dtype=torch.float64)}, "lora_linear, x: expected one of float32, bfloat16, float16, got float64"),
    ({"b": torch.zeros(36, 3)}, r"lora_linear, W: expected shape \[36, 7\], got \[37, 7\]"),
    ({"bias": torch.zeros(5)}, r"lora_linear, bias: expected shape \[37\], got \[5\]"),
    ({"rate": 0.5}, "lora_linear, seed: expected a tensor beside a rate of 0.5, got None"),
])
def test_errors(change, words):
    inputs = {k: v.float() for k, v in tensors(13, 7, 37, 3).items()} | {"scale": 1.0} | {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with dispatch.use("lora_linear", "epilogue"), pytest.raises(ValueError, match=words):
        lora.lora_linear(**inputs)


@pytest.mark.parametrize("change,words", [
    (lambda w, a, b: (w.t(), a, b, 0), r"W of matrix 0: expected a contiguous tensor, got strides \[1, 7\] for shape \[7, 13\]"),
    (lambda w, a, b: (w, a[:, ::2], b, 0), r"A of piece 0: expected shape \[-1, 7\], got \[2, 4\]"),
    (lambda w, a, b: (w, a, b, -1), r"piece 0: expected rows of matrix 0 \(13\) that no other piece has, got -1 to 12"),
    (lambda w, a, b: (w, a, b, 3), r"piece 0: expected rows of matrix 0 \(13\) that no other piece has, got 3 to 16"),
])
def test_errors_of_writing(change, words):
    w, a, b, first = change(torch.zeros(13, 7, device=DEVICE), torch.zeros(2, 7, device=DEVICE), torch.zeros(13, 2, device=DEVICE))
    with pytest.raises(ValueError, match=words):
        lora_write.lora_write([w], [(0, first, a, b, 1.0)], torch.float32)


@pytest.mark.parametrize("first, apart", [(0, False), (4, False), (5, True), (9, False), (10, True)])
def test_pieces_that_overlap_are_refused(first, apart):
    """Rows 0 .. 4, and 11 and 12 where rows 10 .. 12 are not asked for, have one of 13, whichever comes first."""
    w, a = torch.zeros(13, 7, device=DEVICE), torch.zeros(2, 7, device=DEVICE)
    there = [(0, 0, a, torch.zeros(5, 2, device=DEVICE), 1.0)] + [(0, 11, a, torch.zeros(2, 2, device=DEVICE), 1.0)] * (first != 10)
    one = (0, first, a, torch.zeros(3, 2, device=DEVICE), 1.0)
    for pieces in ([*there, one], [one, *there]):
        if apart:
            lora_write.lora_write([w], pieces, torch.float32)
        else:
            with pytest.raises(ValueError, match="that no other piece has"):
                lora_write.lora_write([w], pieces, torch.float32)


def test_a_write_counts_on_alignment_where_all_has_it(monkeypatch):
    """Weight, A, width: one that is off is enough."""
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **more: seen.append(more["ALIGNED"])

    monkeypatch.setattr(lora_write, "write_kernel", Recorder())
    for width, weight_off, a_off in ((16, 0, 0), (13, 0, 0), (16, 1, 0), (16, 0, 1)):
        flat, low = torch.zeros(weight_off + 5 * width, device=DEVICE), torch.zeros(a_off + 2 * width, device=DEVICE)
        piece = 0, 0, low[a_off:].view(2, width), torch.zeros(5, 2, device=DEVICE), 1.0
        lora_write.lora_write([flat[weight_off:].view(5, width)], [piece], torch.bfloat16)
    assert seen == [True, False, False, False]


def test_more_chunks_than_are_added_at_a_time(monkeypatch):
    """A GPU has more multiprocessors, and so many partial sums, than one round of the second stage takes."""
    monkeypatch.setattr(lora_grads, "processors", lambda tensor: 40)
    rows = 16 * 40
    ones = [torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((rows, 128), (rows, 128), (2, 128), (128, 2))]
    with poisoned(), dispatch.use("lora_grads", "once"):
        da, db = lora_grads.lora_grads(ones[0], ones[1], ones[2].float(), ones[3].float(), 1.0)
    assert torch.equal(da, torch.full((2, 128), 128.0 * rows, device=DEVICE)) and torch.equal(db, torch.full((128, 2), 128.0 * rows, device=DEVICE))


def test_written_with_more_ranks_than_a_kernel_takes():
    """A piece that is not the last of its matrix."""
    found, given = [], {"x": drawn(13, 7, seed=1), "a": drawn(65, 7, seed=2), "b": drawn(7, 65, seed=3)}
    weight = drawn(21, 7, seed=4).float()
    for function in (lora.lora_written, lora_written_ref):
        x, a, b = (t.float().requires_grad_() for t in given.values())
        function(x, weight, None, [(7, a, b, 0.5)]).backward(drawn(13, 21, seed=5).float())
        found.append((x.grad, a.grad, b.grad))
    for have, want in zip(*found):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sums_of_the_epilogue_are_not_rounded_between_tiles(dtype):
    """A large number, ones, and its negative in another tile: what is rounded in between loses the ones."""
    big, depth = (256.0 if dtype == torch.bfloat16 else 2048.0), 150
    column = torch.zeros(depth, device=DEVICE)
    column[0], column[1], column[140] = big, 1.0, -big
    along, across, ones = column.expand(16, depth).contiguous().to(dtype), column[:, None].expand(depth, 16).contiguous().to(dtype), torch.ones(16, depth, device=DEVICE, dtype=dtype)
    with dispatch.use("lora_linear", "epilogue"):
        y = lora.lora_linear(ones, along + along.eq(1), None, along[:1].float(), torch.ones(16, 1, device=DEVICE), 1.0)
        x = torch.zeros(16, 16, device=DEVICE, dtype=dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(lora.lora_linear(x, across + across.eq(1), None, torch.ones(1, 16, device=DEVICE), across[:, :1].float(), 1.0), x, ones)
    assert (y == 3).all() and (dx == 3).all()


def test_a_written_piece_beyond_the_matrix_is_refused():
    piece = 15, torch.zeros(3, 7, device=DEVICE), torch.zeros(7, 3, device=DEVICE), 1.0
    with pytest.raises(ValueError, match="lora_written, piece: expected rows within 21, got 15 to 22"):
        lora.lora_written(torch.zeros(13, 7, device=DEVICE), torch.zeros(21, 7, device=DEVICE), None, [piece])
