"""Attention's kernels against attention_ref: forward and every named gradient, in each dtype, over ragged batches, prefixes, dropout, fewer queries than keys."""

import math

import pytest
import torch

from peftdebias.batches import Spans
from peftdebias.kernels import attention as room
from peftdebias.kernels.attention import attention
from peftdebias.kernels.dropout_ref import Drop, philox_ref
from peftdebias.ops.attention import attention_ref

from .harness import DEVICE, DTYPES, compare, drawn, poisoned, run, strided

pytestmark = pytest.mark.usefixtures("products_in_order")  # ds is a small difference where one key has nearly all: d and da of two kernels

HEADS = 3
ALL = pytest.param(HEADS, marks=pytest.mark.slow)  # where fewer heads make a quicker check
OWN = ("query", "key", "value")
PREFIX = ("prefix_key", "prefix_value")
LENGTHS = {
    "ragged": ((13, 1, 37), (13, 1, 37)),
    "fewer queries": ((6, 1, 15), (13, 1, 37)),
    "no queries in one": ((9, 0, 7), (13, 5, 17)),
    "an empty text": ((13, 0, 17), (13, 0, 17)),
    "one token each": ((1,) * 5, (1,) * 5),
    "longer than a tile": ((70, 3), (141, 19)),
}
"""Enough rows that in float32 the largest of many roundings is compared with the largest of many, and not the luck of a few."""
LONG = ("one token each", "longer than a tile")  # the longest to check


def seeded(value: int = 5, rate: float = 0.3, site: int = 7) -> Drop:
    return Drop(rate, torch.tensor([value], device=DEVICE), site)


def spans_of(name: str) -> Spans:
    return Spans.of(*LENGTHS[name], DEVICE)


def tensors(spans: Spans, width: int, prefix: int | None = None, heads: int = HEADS) -> dict[str, torch.Tensor]:
    """float64 by name; scores are of order 1."""
    rows = {"query": sum(spans.query_lengths), "key": sum(spans.key_lengths), "value": sum(spans.key_lengths)} | ({} if prefix is None else dict.fromkeys(PREFIX, prefix))
    return {name: drawn(n, heads, width, seed=i) for i, (name, n) in enumerate(rows.items())}


def both(spans: Spans, drop: Drop | None = None):
    """(fused, twin), each a function of OWN and PREFIX."""
    def function(op):
        return lambda query, key, value, prefix_key=None, prefix_value=None: op(query, key, value, spans, None if prefix_key is None else (prefix_key, prefix_value), drop)

    return function(attention), function(attention_ref)


@pytest.mark.parametrize("name,prefix,rate", [pytest.param(name, *both, marks=() if both in ((None, 0.0), (30, 0.3)) and name not in LONG else pytest.mark.slow)
                                              for name in LENGTHS for both in ((None, 0.0), (30, 0.3), (30, 0.0), (None, 0.3), (0, 0.3), (1, 0.3))])
def test_every_batch_with_every_prefix(name, prefix, rate):
    spans = spans_of(name)
    few = {"one token each": 3000, "fewer queries": 400 if prefix == 1 else 32}  # five queries, one shared key: so few shares that one draw is luck
    draws = {"values": few[name]} if name in few else {}
    compare(*both(spans, seeded(rate=rate) if rate else None), tensors(spans, 37, prefix), dtype=torch.float32, gradients=OWN if prefix is None else OWN + PREFIX, **draws)


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_one_token_each_at_the_widths_of_real_heads(width):
    """One query a text hides no rounding of its products; theirs are summed alike on both sides."""
    spans = spans_of("one token each")
    compare(*both(spans, seeded()), tensors(spans, width, 30), dtype=torch.float32, gradients=OWN + PREFIX, in_order=True)


@pytest.mark.parametrize("width,dtype", [pytest.param(width, dtype, marks=() if (i + j) % 2 and (width, dtype) != (32, torch.float32) else pytest.mark.slow)
                                         for i, width in enumerate((1, 13, 16, 32, 64, 128)) for j, dtype in enumerate(DTYPES)])  # float32 of 32: below
def test_head_widths_in_each_dtype(width, dtype):
    spans = spans_of("ragged")
    compare(*both(spans, seeded()), tensors(spans, width, 5), dtype=dtype, gradients=OWN + PREFIX)


@pytest.mark.parametrize("heads", [2, ALL])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [None, pytest.param(1, marks=pytest.mark.slow), 37])
def test_texts_of_more_than_one_tile(prefix, dtype, heads):
    """Keys of 141 and 19 places: several tiles of queries, of keys and of the prefix. One of them without dropout."""
    spans, dropped = spans_of("longer than a tile"), (prefix, dtype, heads) != (None, torch.float32, 2)
    compare(*both(spans, seeded(rate=0.1) if dropped else None), tensors(spans, 32, prefix, heads), dtype=dtype, gradients=OWN if prefix is None else OWN + PREFIX)


@pytest.mark.parametrize("gradients", [("query",), ("key",), ("value",), ("key", "value"), ("query", "value"), OWN, PREFIX, ("prefix_value",), ("query", "prefix_key"),
                                       ("value", "prefix_key")], ids="+".join)
@pytest.mark.parametrize("heads", [1, ALL])
@pytest.mark.parametrize("name", ["ragged", pytest.param("longer than a tile", marks=pytest.mark.slow)])
def test_any_set_of_gradients(name, gradients, heads):
    """A frozen prefix, a query alone, keys alone, ..."""
    spans = spans_of(name)
    compare(*both(spans, seeded()), tensors(spans, 37, 5, heads), dtype=torch.float32, gradients=gradients)


def test_a_frozen_prefix_costs_no_gradient(monkeypatch):
    """Its kernel is not even launched."""
    spans = spans_of("ragged")
    given = {name: x.float() for name, x in tensors(spans, 13, 5).items()}
    monkeypatch.setattr(room, "backward_prefix_kernel", None)
    run(both(spans)[0], given, OWN, 0)
    with pytest.raises(TypeError):
        run(both(spans)[0], given, PREFIX, 0)


@pytest.mark.parametrize("heads", [1, ALL])
def test_many_stretches_sum_to_the_same(heads, monkeypatch):
    monkeypatch.setattr(room, "STRETCH", 1)
    spans = Spans.of((70, 1, 61), (70, 1, 61), DEVICE)
    compare(*both(spans, seeded()), tensors(spans, 13, 9, heads), dtype=torch.float32, gradients=PREFIX)
    monkeypatch.setattr(room, "MOST_STRETCHES", 2)
    compare(*both(spans, seeded()), tensors(spans, 13, 9, heads), dtype=torch.float32, gradients=PREFIX)


def in_one(spans: Spans, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, 3 D] of query, key and value."""
    given = tensors(spans, width)
    return torch.cat([given[name].flatten(1) for name in OWN], 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_one_product_are_read_where_they_lie(dtype, monkeypatch):
    """Rows 3 D apart: no copy is made, and the result is that of copies, bit for bit."""
    spans = spans_of("ragged")
    whole = in_one(spans, 16, dtype)
    copied = []
    monkeypatch.setattr(room, "_rows_apart", lambda x, f=room._rows_apart: copied.append(f(x) is not x) or f(x))

    def slices(tensor):
        return [x.view(-1, HEADS, 16) for x in tensor.split(HEADS * 16, 1)]

    leaf = whole.clone().requires_grad_()
    with poisoned():
        found = attention(*slices(leaf), spans, drop=seeded())
        pull = drawn(*found.shape, seed=9).to(dtype)
        (gradient,) = torch.autograd.grad(found, leaf, pull)
    assert copied and not any(copied)
    apart = [x.clone().requires_grad_() for x in slices(whole)]
    expected = attention(*apart, spans, drop=seeded())
    assert torch.equal(found, expected)
    assert torch.equal(gradient, torch.cat([g.flatten(1) for g in torch.autograd.grad(expected, apart, pull)], 1))


@pytest.mark.parametrize("layout", [strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)], ids=["every second element", "heads before rows"])
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES if dtype != torch.float32)])
def test_other_layouts_are_copied(dtype, layout):
    """To the same bits, of the outputs and of every gradient, as contiguous tensors have."""
    spans = spans_of("fewer queries")
    fused, _ = both(spans, seeded())
    given = {name: x.to(dtype) for name, x in tensors(spans, 13, 5).items()}
    with poisoned():
        found, expected = (run(fused, given, OWN + PREFIX, 0, *other) for other in ((layout,), ()))
    assert set(found) == {"output", *(f"gradient of {name}" for name in OWN + PREFIX)} and all(torch.equal(t, expected[name]) for name, t in found.items())


def test_an_expanded_gradient():
    """What a sum hands back has no strides."""
    spans = spans_of("ragged")
    given = {name: x.float().requires_grad_() for name, x in tensors(spans, 7).items()}
    found, wanted = (torch.autograd.grad(f(**given).sum(), list(given.values())) for f in both(spans))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_prefix_in_float32_beside_bf16():
    """What autocast leaves: the products see it rounded, its gradient comes in float32."""
    spans = spans_of("ragged")
    fused, twin = both(spans, seeded())
    compare(fused, lambda prefix_key, prefix_value, **own: twin(**own, prefix_key=prefix_key.to(own["query"].dtype), prefix_value=prefix_value.to(own["query"].dtype)),
            tensors(spans, 16, 5), dtype=torch.bfloat16, float32=PREFIX, gradients=OWN)
    given = {name: x.to(torch.float32 if name in PREFIX else torch.bfloat16).requires_grad_() for name, x in tensors(spans, 16, 5).items()}
    for gradient, wanted in zip(*(torch.autograd.grad(f(**given).float().sum(), [given[n] for n in PREFIX]) for f in (fused, lambda **t: twin(**{n: x.float() for n, x in t.items()})))):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, rtol=0.03, atol=0.03 * float(wanted.abs().max()))


def test_autocast_multiplies_in_bf16():
    spans = spans_of("ragged")
    given = {name: x.float().requires_grad_() for name, x in tensors(spans, 16, 5).items()}
    fused, _ = both(spans)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = fused(**given)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fused(**{name: x if name in PREFIX else x.bfloat16() for name, x in given.items()}))
    assert {g.dtype for g in torch.autograd.grad(found.sum(), list(given.values()))} == {torch.float32}


# ---------------------------------------------------------------- dropout

@pytest.mark.parametrize("name,seed", [pytest.param(name, seed, marks=pytest.mark.slow if name == "longer than a tile" and seed < 2**40 else ())
                                       for name in ("fewer queries", "longer than a tile") for seed in (0, 2**31 + 7, 2**40 + 3)])
def test_the_mask_is_that_of_the_specification(name, seed):
    """Equal scores over one-hot values: the output shows what was kept, of the prefix and of each sequence's own keys, element by element."""
    spans, prefix = spans_of(name), 11
    width, drop = 128, seeded(seed, 0.5)
    longest = max(spans.key_lengths)
    query = torch.zeros(sum(spans.query_lengths), 2, width, device=DEVICE)
    key = torch.zeros(sum(spans.key_lengths), 2, width, device=DEVICE)
    shared = torch.zeros(prefix, 2, width, device=DEVICE)
    for first in range(0, prefix + longest, width):  # which keys the values mark in turn
        marks = torch.eye(prefix + longest, device=DEVICE)[:, first:first + width]
        marks = torch.nn.functional.pad(marks, (0, width - marks.shape[1]))[:, None, :].expand(-1, 2, -1)
        value = torch.cat([marks[prefix:prefix + n] for n in spans.key_lengths])
        with poisoned():
            found, wanted = (f(query, key, value, spans, (shared, marks[:prefix]), drop) for f in (attention, attention_ref))
        assert torch.equal(found > 0, wanted > 0) and (wanted > 0).any() and not (wanted[:, :, :prefix] > 0).all()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [64, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_share(rate, n):
    spans, zeros, value = Spans.of((n, n), (n, n), DEVICE), torch.zeros(2 * n, 2, n, device=DEVICE), torch.eye(n, device=DEVICE).repeat(2, 1)[:, None, :].expand(-1, 2, -1)
    drop = seeded(rate=rate)
    kept = attention(zeros, zeros, value, spans, drop=drop) > 0
    assert abs(kept.double().mean().item() - 1 / drop.scale) <= 4 * math.sqrt(rate * (1 - rate) / kept.numel())
    for other in (drop._replace(seed=drop.seed + 1), drop._replace(seed=drop.seed + 2**32), drop._replace(site=1)):
        same = (kept == (attention(zeros, zeros, value, spans, drop=other) > 0)).double().mean().item()
        assert abs(same - (1 - 2 * rate * (1 - rate))) < 0.02


def test_rows_of_which_everything_is_dropped():
    """At 0.97 of three keys most rows keep nothing: their output is 0, and so is every gradient through them."""
    spans, drop = Spans.of((40,), (3,), DEVICE), seeded(rate=0.97)
    given = tensors(spans, 7)
    empty = (attention_ref(*(given[name] for name in OWN), spans, drop=drop) == 0).all(2)  # [Mq, H]
    assert 0 < empty.sum() < empty.numel()
    compare(*both(spans, drop), given, dtype=torch.float32, gradients=OWN)
    found = run(both(spans, drop)[0], {name: x.float() for name, x in given.items()}, OWN, 0)
    assert (found["output"][empty] == 0).all() and (found["gradient of query"][empty] == 0).all()


@pytest.mark.parametrize("rate", [0.0, 7e-6, 1e-9])
def test_dropout_at_a_rate_that_16_bits_take_for_0_is_none(rate):
    spans = spans_of("ragged")
    given = [x.float() for x in tensors(spans, 7).values()]
    assert torch.equal(attention(*given, spans, drop=seeded(rate=rate)), attention(*given, spans))


# ---------------------------------------------------------------- edges

@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (13, 7)), ((0,), (0,))], ids=["no sequences", "no queries", "nothing"])
@pytest.mark.parametrize("prefix", [None, 5])
@pytest.mark.parametrize("drop", [None, seeded()], ids=["no dropout", "dropout"])
def test_nothing_to_compute(lengths, prefix, drop):
    spans = Spans.of(*lengths, DEVICE)
    given = {name: x.float() for name, x in tensors(spans, 7, prefix).items()}
    with poisoned():
        found = run(both(spans, drop)[0], given, given, 0)
    assert all(x.shape == given[name.removeprefix("gradient of ")].shape and (x == 0).all() for name, x in found.items() if name != "output") and not found["output"].numel()


def test_queries_without_any_key_give_zeros():
    """A sequence of no keys, beside one that has some; with a prefix it has that."""
    spans = Spans.of((2, 3), (0, 5), DEVICE)
    given = {name: x.float() for name, x in tensors(spans, 7, 4).items()}
    with poisoned():
        found = run(both(spans)[0], {name: given[name] for name in OWN}, OWN, 0)
    assert (found["output"][:2] == 0).all() and (found["gradient of query"][:2] == 0).all() and all(x.isfinite().all() for x in found.values())
    assert (found["output"][2:] != 0).all()
    compare(*both(spans), tensors(spans, 7, 4), dtype=torch.float32, gradients=OWN + PREFIX)


def test_large_scores_neither_overflow_nor_vanish():
    spans = spans_of("ragged")
    given = tensors(spans, 16, 5)
    given["query"] *= 200
    compare(*both(spans), given, dtype=torch.float32)
    found = run(both(spans)[0], {name: x.float() for name, x in given.items()}, OWN + PREFIX, 0)
    assert all(x.isfinite().all() for x in found.values())


def test_nan_stays_in_its_sequence_and_is_not_hidden():
    spans = spans_of("ragged")
    given = {name: x.float() for name, x in tensors(spans, 7).items()}
    given["key"][3, 1, 2] = math.nan
    found = both(spans)[0](**given)
    assert found[:13, 1].isnan().all() and not found[13:].isnan().any() and not found[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("heads", [1, ALL])
@pytest.mark.parametrize("name", ["ragged", "longer than a tile"])
def test_gradients_repeat_bit_for_bit(name, heads):
    spans = spans_of(name)
    given = {n: x.bfloat16() for n, x in tensors(spans, 16, 9, heads).items()}
    first, again = (run(both(spans, seeded())[0], given, OWN + PREFIX, 0) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_a_sequence_does_not_depend_on_its_batch_beside_the_mask():
    spans = spans_of("ragged")
    given = [x.float() for x in tensors(spans, 16).values()]
    alone = attention(*(x[14:] for x in given), Spans.of((37,), (37,), DEVICE))
    assert torch.equal(attention(*given, spans)[14:], alone)


def test_what_is_kept_for_the_backward():
    """q, k, v, y, two float32 a row and head; of [Mq, T] one bit each, no number."""
    spans, sizes = Spans.of((64, 64), (64, 64), DEVICE), {}
    given = {name: x.float().requires_grad_() for name, x in tensors(spans, 16).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.setdefault(x.data_ptr(), x.numel() * x.element_size()) and x, lambda x: x):
        both(spans, seeded())[0](**given)
    assert sum(sizes.values()) == 4 * (4 * 128 * HEADS * 16 + 2 * 128 * HEADS) + 2 * 3 * 4 + 128 * HEADS * 64 // 8


@pytest.mark.parametrize("change,words", [
    ({"query": torch.zeros(4, 2, 8)}, r"attention, query: expected shape \[5, -1, -1\], got \[4, 2, 8\]"),
    ({"query": torch.zeros(5, 2, 136)}, "attention, query: expected a head width of 1 to 128, got 136"),
    ({"query": torch.zeros(5, 2, 8, dtype=torch.float64)}, "attention, query: expected one of float32, bfloat16, float16, got float64"),
    ({"key": torch.zeros(5, 3, 8)}, r"attention, key: expected shape \[5, 2, 8\], got \[5, 3, 8\]"),
    ({"value": torch.zeros(5, 2, 8, dtype=torch.bfloat16)}, "attention, value: expected one of float32, got bfloat16"),
    ({"prefix": (torch.zeros(3, 2, 7), torch.zeros(3, 2, 8))}, r"attention, prefix key: expected shape \[-1, 2, 8\], got \[3, 2, 7\]"),
    ({"prefix": (torch.zeros(3, 2, 8), torch.zeros(4, 2, 8))}, r"attention, prefix value: expected shape \[3, 2, 8\], got \[4, 2, 8\]"),
    ({"drop": Drop(1.0, torch.tensor([1]), 0)}, "dropout: expected a rate from 0 up to but not 1, got 1.0"),
    ({"drop": Drop(0.5, torch.zeros(1), 0)}, "attention, seed: expected one of int64, got float32"),
])
def test_refused_by_name(change, words):
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    given = {name: torch.zeros(5, 2, 8, device=DEVICE) for name in OWN} | {"spans": Spans.of((2, 3), (2, 3), DEVICE)} | moved
    with pytest.raises(ValueError, match=words):
        attention(**given)


@pytest.mark.parametrize("heads", [1, ALL])
@pytest.mark.parametrize("prefix,drop", [(None, None), (5, seeded())], ids=["", "prefix and dropout"])
def test_torch_compile_does_not_break_on_it(prefix, drop, heads):
    """The op's registration: fake tensors, mutation and gradients agree with what it does; a full graph, eager or ahead of time."""
    spans = spans_of("fewer queries")
    given = {name: x.float().requires_grad_() for name, x in tensors(spans, 16, prefix, heads).items()}
    pre = [given.get(name) for name in PREFIX]
    args = (*(given[name] for name in OWN), *pre, spans.cu_queries, spans.cu_keys, 15, 37, drop.rate if drop else 0.0, drop.seed if drop else None, 7)
    torch.library.opcheck(torch.ops.peftdebias.attention_forward.default, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    kept = [x.detach() for x in torch.ops.peftdebias.attention_forward(*args)]
    for asked in ((True, True, prefix is not None), (True, False, False), (False, True, False)):
        torch.library.opcheck(torch.ops.peftdebias.attention_backward.default, (torch.ones_like(kept[0]), *args[:5], *kept, *args[5:-2], *asked), test_utils=("test_schema", "test_faketensor"))
    fused = both(spans, drop)[0]
    compiled = torch.compile(lambda t: fused(**t), backend="aot_eager", fullgraph=True)
    outputs = [f(given) for f in (compiled, lambda t: fused(**t))]
    assert torch.equal(*outputs)
    for one, other in zip(*(torch.autograd.grad(x, list(given.values()), torch.ones_like(x)) for x in outputs)):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- real sizes

@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [None, 30])
def test_the_size_of_bert_base(prefix, dtype):
    lengths = (128, 5, 64, 54)
    spans = Spans.of(lengths, lengths, DEVICE)
    compare(*both(spans, seeded(rate=0.1)), tensors(spans, 64, prefix, heads=12), dtype=dtype, gradients=OWN if prefix is None else OWN + PREFIX)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_longest_text_and_few_queries(dtype):
    spans = Spans.of((77, 1), (512, 9), DEVICE)
    compare(*both(spans, seeded(rate=0.1)), tensors(spans, 64, 30, heads=12), dtype=dtype, gradients=OWN + PREFIX)


# ---------------------------------------------------------------- texts of one tile, in 16 bits: a kernel of its own

@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_texts_of_one_tile(dtype, rate):
    spans = spans_of("ragged")
    assert room.in_one(dtype, 16, 37, 0)
    compare(*both(spans, seeded(rate=rate) if rate else None), tensors(spans, 16), dtype=dtype, gradients=OWN)


def test_of_one_tile_a_text_without_keys():
    spans = Spans.of((2, 3), (0, 5), DEVICE)
    with poisoned():
        found = run(both(spans)[0], {name: x.bfloat16() for name, x in tensors(spans, 7).items()}, OWN, 0)
    assert all(x.isfinite().all() for x in found.values()) and (found["gradient of query"][:2] == 0).all()


def test_of_one_tile_scores_far_below_0():
    """exp2 of minus the top would be infinite at the places that hold no key."""
    spans = spans_of("ragged")
    given = tensors(spans, 16)
    given["key"], given["query"] = given["key"].abs() + 1, -30 * (given["query"].abs() + 1)
    with poisoned():
        found = run(both(spans)[0], {name: x.bfloat16() for name, x in given.items()}, OWN, 0)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("place", [0, 5])
def test_a_probability_whose_bits_are_the_threshold_is_dropped(place):
    """Sixteen bits are at it once in 65 536 times: the rate is made for those of one key."""
    words = philox_ref([torch.tensor(c) for c in (0, 0, 0, 1)], [torch.tensor(5), torch.tensor(7)])
    bits = int(words[place % 4]) >> (16 * (place >= 4)) & 0xFFFF
    spans, zeros, value = Spans.of((1,), (8,), DEVICE), torch.zeros(8, 1, 8, device=DEVICE), torch.eye(8, device=DEVICE)[:, None]
    found, wanted = (op(zeros[:1], zeros, value, spans, drop=seeded(rate=1 - bits / 65536)) for op in (attention, attention_ref))
    assert torch.equal(found > 0, wanted > 0) and found[0, 0, place] == 0


@pytest.mark.parametrize("gradients", [("query",), ("key",), OWN], ids="+".join)
@pytest.mark.parametrize("name", ["ragged", "fewer queries"])
def test_of_one_tile_any_set_of_gradients(name, gradients):
    spans = spans_of(name)
    compare(*both(spans, seeded()), tensors(spans, 16), dtype=torch.bfloat16, gradients=gradients)


def test_of_one_tile_no_text_has_keys():
    spans = Spans.of((2, 3), (0, 0), DEVICE)
    with poisoned():
        found = run(both(spans)[0], {name: x.bfloat16() for name, x in tensors(spans, 7).items()}, OWN, 0)
    assert not found["output"].any() and not found["gradient of query"].any()


def test_where_all_scores_are_negative_in_16_bits():
    """The two numbers of a row that travel as one word: the second is negative here."""
    spans = spans_of("ragged")
    given = tensors(spans, 16, 5)
    given |= {name: given[name].abs() + 1 for name in ("key", "prefix_key")} | {"query": -(given["query"].abs() + 1)}
    compare(*both(spans, seeded()), given, dtype=torch.bfloat16, gradients=tuple(given))
