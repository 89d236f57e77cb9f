"""Packing against batches made by hand; the plan is a partition, keeps its limits and its seed; where spans say that sequences begin."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from peftdebias.batches import WINDOW, Bounds, Sample, Spans, cumulative, from_packed, pack, plan, with_inserted
from peftdebias.buckets import Families, Packed
from peftdebias.errors import ModelError


def sample(*ids, rows=(), targets=None, segments=None, family=0):
    arrays = [None if x is None else np.array(x, dtype=np.int32) for x in (ids, rows, targets, segments)]
    return Sample(arrays[0], arrays[1], arrays[2], arrays[3], family)


def equal(tensor, values, dtype=torch.int64):
    assert tensor.dtype == dtype and tensor.tolist() == list(values)
    return True


# pack


def test_every_field_of_a_batch_made_by_hand():
    batch = pack([
        sample(11, 12, 13, rows=[1], targets=[7], family=5),
        sample(21, rows=[0], targets=[8], family=5),
        sample(31, 32, 33, 34, rows=[0, 3], targets=[9, 10], segments=[0, 0, 1, 1], family=2),
    ])
    assert equal(batch.ids, [11, 12, 13, 21, 31, 32, 33, 34])
    assert equal(batch.positions, [0, 1, 2, 0, 0, 1, 2, 3])
    assert equal(batch.segments, [0, 0, 0, 0, 0, 0, 1, 1])
    assert equal(batch.cu_seqlens, [0, 3, 4, 8], torch.int32)
    assert equal(batch.rows, [1, 3, 4, 7])
    assert equal(batch.targets, [7, 8, 9, 10])
    assert equal(batch.family, [5, 5, 2])
    assert (batch.lengths, batch.row_lengths, batch.max_length) == ((3, 1, 4), (1, 1, 2), 4)
    assert {f.name for f in dataclasses.fields(batch)} == {  # CONTRACTS.md, the host's row_lengths, what a classifier reads, and what a device or a bucket needs
        "ids", "positions", "segments", "cu_seqlens", "rows", "targets", "lengths", "row_lengths", "max_length", "family", "firsts", "cu_rows", "bounds"}


def test_a_batch_packed_in_numpy_is_the_same_batch():
    samples = [sample(11, 12, 13, rows=[1], targets=[7], family=5), sample(21, rows=[], targets=[], family=5), sample(31, 32, rows=[0, 1], targets=[9, 10], family=2)]
    arrays = ([11, 12, 13, 21, 31, 32], [1, 4, 5], [7, 9, 10], [3, 1, 2], [1, 0, 2], [5, 5, 2])
    found, expected = from_packed(Packed(*(np.array(values, np.int32) for values in arrays))), pack(samples)
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert equal(one, other.tolist(), other.dtype) if isinstance(other, torch.Tensor) else one == other, field.name


def test_families_end_to_end():
    made = Families.of([[[1, 2], [3]], [[4]], [[5, 6, 7], [8], [9]]])
    assert [a.tolist() for a in made.bounds()] == [[0, 2, 3, 6], [0, 3, 4, 9]]
    part = made[1:3]
    assert (part.ids.tolist(), part.lengths.tolist(), part.sizes.tolist(), part.sources.tolist()) == ([4, 5, 6, 7, 8, 9], [1, 3, 1, 1], [1, 3], [1, 2])
    again = Families.joined([made[0:1], made[1:1], part])
    assert all(np.array_equal(getattr(again, f.name), getattr(made, f.name)) for f in dataclasses.fields(made)) and len(again) == 3


def test_targets_are_packed_only_where_every_sample_has_them():
    assert pack([sample(1, rows=[0], targets=[3]), sample(2, rows=[0])]).targets is None
    assert equal(pack([sample(1, rows=[0], targets=[3]), sample(2, 3, targets=[])]).targets, [3])


def test_a_classifiers_batch_asks_for_the_first_token_of_each_text():
    asked = ([[0], [0]], True), ([[0], [1]], False), ([[0], [0, 1]], False), ([[0], []], False)
    assert all(pack([sample(1, 2, rows=rows) for rows in texts]).firsts == firsts for texts, firsts in asked) and not pack([]).firsts


def test_vectors_before_every_text_widen_what_a_batch_is_bound_by():
    batch = dataclasses.replace(pack([sample(1, 2, 3, rows=[0]), sample(4, rows=[0])]), cu_rows=cumulative((1, 1)), bounds=Bounds(4, 3, 1))
    order, found = with_inserted(batch, 2)
    assert with_inserted(pack([]), 2)[1].max_length == 0 and found.bounds == Bounds(8, 5, 1)
    assert equal(order, [0, 1, 4, 5, 6, 2, 3, 7]) and equal(found.cu_seqlens, [0, 5, 8], torch.int32) and equal(found.rows, [2, 7])


def test_no_sample_is_an_empty_batch():
    batch = pack([])
    assert equal(batch.ids, []) and equal(batch.rows, []) and equal(batch.cu_seqlens, [0], torch.int32)
    assert (batch.lengths, batch.max_length, batch.targets) == ((), 0, None)


def test_spans_of_a_batch():
    batch = pack([sample(1, 2, 3, rows=[2]), sample(4), sample(5, 6, rows=[0, 1])])
    assert (batch.spans.query_lengths, batch.spans.key_lengths) == ((3, 1, 2), (3, 1, 2))
    assert (batch.row_spans.query_lengths, batch.row_spans.key_lengths) == ((1, 0, 2), (3, 1, 2))


def test_moving_a_batch_moves_every_tensor_and_nothing_else():
    batch = pack([sample(1, 2, 3, rows=[2], targets=[1]), sample(4, rows=[0], targets=[2])])
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        elif field.name == "cu_rows":
            assert (after.device.type, after.shape, after.dtype) == ("meta", (3,), torch.int32)
        else:
            assert after == before
    assert moved.spans.cu_keys.device.type == "meta"
    assert batch.to("cpu") is batch


@pytest.mark.parametrize("texts", [1, 2, 3, 4])
def test_what_travels_begins_at_multiples_of_16_bytes_and_arrives_unchanged(texts):
    """Whatever the counts: a kernel is compiled anew for a pointer that begins elsewhere."""
    batch = pack([sample(*range(1, n + 4), rows=[*range(n + 1)], targets=[*range(n + 1)]) for n in range(texts)])
    staged = batch.staged()
    assert staged.flat.data_ptr() % 16 == 0
    copy, seen = staged.on(staged.flat.clone()), 0
    for field in dataclasses.fields(staged.batch):
        wanted, found = getattr(staged.batch, field.name), getattr(copy, field.name)
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(wanted, found) and found.data_ptr() % 16 == 0, field.name
            seen += 1
    assert seen == 8 and copy.cu_rows.tolist() == [0, *itertools.accumulate(batch.row_lengths)]


# Spans


def test_spans_made_by_hand():
    spans = Spans.of((1, 0, 2), (3, 1, 2))
    assert equal(spans.cu_queries, [0, 1, 1, 3], torch.int32)
    assert equal(spans.cu_keys, [0, 3, 4, 6], torch.int32)
    assert equal(spans.query_places, [0, 4, 5])  # three sequences of 2 places each
    assert equal(spans.key_places, [0, 1, 2, 3, 6, 7])  # three sequences of 3 places each
    assert spans.key_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


def test_equal_lengths_need_no_mask():
    assert Spans.of((1, 2), (3, 3)).key_mask is None
    assert Spans.of((), ()).key_mask is None
    assert Spans.of((0, 1), (0, 1)).key_mask.tolist() == [[False], [True]]


def test_cumulative_starts_at_zero():
    assert equal(cumulative([]), [0], torch.int32)
    assert equal(cumulative((2, 0, 5)), [0, 2, 2, 7], torch.int32)


# plan


LENGTHS = np.random.default_rng(0).integers(1, 61, 1009)
MEMBERS = np.random.default_rng(1).integers(2, 6, 1009)


@pytest.mark.parametrize("seed", [None, 0, (0, 3)])
@pytest.mark.parametrize("options", [
    dict(batch_size=13), dict(batch_tokens=211), dict(batch_size=13, members=MEMBERS), dict(batch_tokens=211, members=MEMBERS), dict(batch_size=1)])
def test_a_plan_is_a_partition_within_its_limit(options, seed):
    batches = plan(LENGTHS, seed=seed, **options)
    assert sorted(item for batch in batches for item in batch) == list(range(1009))
    tokens, members = options.get("batch_tokens"), options.get("members", np.ones(1009))
    for batch in batches:
        assert batch
        used = LENGTHS[batch].sum() if tokens else members[batch].sum()
        assert used <= (tokens or options["batch_size"])
    if seed is None:  # greedy over one order: no two neighbours would have fitted into one
        for one, two in zip(batches, batches[1:]):
            assert (LENGTHS if tokens else members)[[*one, two[0]]].sum() > (tokens or options["batch_size"])


def test_a_family_is_one_item_and_never_parted():
    """Members count towards batch_size, but a family larger than a batch still comes whole, alone."""
    batches = plan([10, 30, 50], members=[2, 6, 10], batch_size=5, seed=0)
    assert sorted(batches) == [[0], [1], [2]]
    assert sorted(plan([10, 30, 50], batch_tokens=45, seed=0)) == [[0, 1], [2]]


def test_a_seed_repeats_and_another_differs():
    order = plan(LENGTHS, batch_size=13, seed=(0, 1))
    assert order == plan(LENGTHS, batch_size=13, seed=(0, 1))
    assert order != plan(LENGTHS, batch_size=13, seed=(0, 2))
    assert [item for batch in plan(LENGTHS, batch_size=13) for item in batch] == np.argsort(LENGTHS, kind="stable").tolist()


def spread(batches, lengths):
    """Mean over batches of longest - shortest."""
    return np.mean([np.ptp(lengths[batch]) for batch in batches])


def test_lengths_in_a_batch_are_near_equal():
    assert spread(plan(LENGTHS, batch_size=13, seed=0), LENGTHS) < 3  # shuffled batches of 13 of 60 lengths would spread over 52
    assert spread(plan(LENGTHS, batch_size=13), LENGTHS) < 1
    per_member = LENGTHS * MEMBERS  # families of texts of LENGTHS tokens: near-equal are the texts, not the families
    assert spread(plan(per_member, members=MEMBERS, batch_size=37, seed=0), LENGTHS) < 3
    assert spread(plan(per_member, members=MEMBERS, batch_tokens=997, seed=0), LENGTHS) < 6


def test_lengths_are_sorted_within_windows_only():
    """Ten windows of 1920 different lengths: three neighbours of a window lie 2 x 10 apart on average (sorted over all: 2), and the seed says which."""
    lengths = np.arange(10 * WINDOW * 3)
    batches = plan(lengths, batch_size=3, seed=0)
    assert 15 < spread(batches, lengths) < 25
    assert 15 < spread(plan(2 * lengths, members=np.full(len(lengths), 2), batch_size=6, seed=0), lengths) < 25  # families of two
    assert {tuple(sorted(b)) for b in batches} != {tuple(sorted(b)) for b in plan(lengths, batch_size=3, seed=1)}


def test_the_order_of_batches_is_shuffled_too():
    """A window of 1009 texts holds all: sorted batches would begin with the shortest and end with the longest."""
    means = [LENGTHS[batch].mean() for batch in plan(LENGTHS, batch_size=16, seed=0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 4 / np.sqrt(len(means))


def test_nothing_to_plan():
    assert plan([], batch_size=3, seed=0) == plan([], batch_tokens=3) == []


@pytest.mark.parametrize("options", [{}, dict(batch_size=3, batch_tokens=5)])
def test_one_limit_is_needed(options):
    with pytest.raises(ValueError, match="expected one of batch_size and batch_tokens"):
        plan([1, 2], **options)


@pytest.mark.parametrize("changes,words", [
    (dict(rows=np.arange(4) == 2), "rows: expected 4 integers, got bool of shape [4]"),
    (dict(rows=np.array([0, 5, 2]), targets=None), "expected rows from 0 to 3, ascending, got 0, 5, 2"),
    (dict(rows=np.array([1, 4])), "expected rows from 0 to 3, ascending, got 1, 4"),
    (dict(rows=np.array([0, -1, 2]), targets=None), "expected rows from 0 to 3, ascending, got 0, -1, 2"),
    (dict(rows=np.array([-1, 2]), targets=None), "expected rows from 0 to 3, ascending, got -1, 2"),  # in a batch, the last row of the text before
    (dict(rows=np.array([3, 2, 1, 1, 0, 0]), targets=None), "expected rows from 0 to 3, ascending, got 3, 2, 1, 1, 0, ..."),
    (dict(rows=np.array([[0]])), "rows: expected 1 integers, got int64 of shape [1, 1]"),
    (dict(rows=None), "rows: expected 1 integers, got object of shape []"),
    (dict(ids=np.array([5.7, 1, 2, 3])), "ids: expected 4 integers, got float64 of shape [4]"),
    (dict(segments=np.array([0, 0, 1])), "segments: expected 4 integers, got int64 of shape [3]"),
    (dict(targets=np.array([7])), "targets: expected 2 integers, got int64 of shape [1]"),
])  # fmt: skip
def test_a_sample_whose_arrays_do_not_fit_is_named(changes, words):
    """Otherwise another text's rows, segments or targets would be read."""
    whole = sample(5, 6, 7, 8, rows=(1, 3), targets=(7, 8))
    with pytest.raises(ModelError) as caught:
        pack([whole, dataclasses.replace(whole, **changes)])
    assert str(caught.value) == f"pack: sample 1: {words}"


def test_what_is_as_good_as_an_array_of_integers_is_packed():
    whole = sample(5, 6, 7, 8, rows=(1, 3), targets=(7, 8))
    alike = Sample([5, 6, 7, 8], np.array([1, 3], np.uint8), [7, 8], np.zeros(4, bool))
    assert torch.equal(pack([Sample(torch.tensor([5, 6]), torch.tensor([1]))]).ids, torch.tensor([5, 6]))
    assert all(torch.equal(getattr(pack([alike, whole]), name), getattr(pack([whole, whole]), name)) for name in ("ids", "rows", "targets", "segments", "cu_seqlens"))
