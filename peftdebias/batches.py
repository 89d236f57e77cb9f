"""Packed batches: token ids of many texts end to end, without padding, as torch reads them.

What it adds over buckets.py (which texts share a batch, in numpy): tensors, and where each text begins. It leaves out masking (tokens) and losses (tasks).

Letters: T tokens in the batch, B sequences, M rows asked for.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .buckets import WINDOW, Packed, plan
from .errors import ModelError

__all__ = ["IGNORED", "WINDOW", "Batch", "Sample", "Spans", "cumulative", "from_packed", "pack", "plan", "with_inserted"]

IGNORED = -100
"""A target that counts for nothing, as in torch's own losses."""


class lazy:
    """functools.cached_property without its lock, which torch.compile cannot follow."""

    def __init__(self, make):
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner, name: str):
        self.name = name

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        value = self.make(instance)
        object.__setattr__(instance, self.name, value)
        return value


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; to a GPU through pinned memory, so that the copy waits for nothing and nobody waits for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Where sequences begin in packed queries and keys; everything attention knows about a batch.

    cu_queries, cu_keys: int32 [B+1]; sequence b's queries are rows cu_queries[b] to cu_queries[b+1]. In the last layer a sequence has only as many queries as
    rows asked for. queries, keys: packed rows in all. most_queries, most_keys: the longest sequence's; with `exact` they are that, else bounds (see
    Batch.bounds), and the host knows no length.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    queries: int
    keys: int
    most_queries: int
    most_keys: int
    exact: bool = True

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device = torch.device("cpu")) -> "Spans":
        """Spans of sequences with that many queries and keys. Raises ModelError on a length below 0, or another number of lengths on either side."""
        both = tuple(query_lengths), tuple(key_lengths)
        if len(both[0]) != len(both[1]) or min((least for lengths in both for least in lengths), default=0) < 0:
            raise ModelError(f"Spans.of: expected lengths from 0, as many of queries as of keys, got {both[0]} and {both[1]}")
        return cls(*(send(cumulative(lengths), device) for lengths in both), *map(sum, both), *(max(lengths, default=0) for lengths in both))._knowing(*both)

    def _knowing(self, query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> "Spans":
        """With the lengths that the host has: they are never read back from a device."""
        object.__setattr__(self, "query_lengths", query_lengths)  # which torch.compile can follow, as `lazy` does it
        object.__setattr__(self, "key_lengths", key_lengths)
        return self

    @lazy
    def query_lengths(self) -> tuple[int, ...]:
        """On the host, B entries. For the specification; from a device it is read back."""
        return tuple(self.cu_queries.diff().tolist())

    @lazy
    def key_lengths(self) -> tuple[int, ...]:
        """The same for keys."""
        return tuple(self.cu_keys.diff().tolist())

    @lazy
    def host_lengths(self) -> Tensor:
        """int64 [2, B], on the host: query_lengths and key_lengths. Raises ModelError where one is below 0: whoever goes by it would leave the tensors' memory."""
        lengths = torch.tensor((self.query_lengths, self.key_lengths), dtype=torch.int64, device="cpu")
        if bool((lengths < 0).any()):
            raise ModelError(f"spans: expected ascending cu_queries and cu_keys, got lengths {self.query_lengths} and {self.key_lengths}")
        return lengths

    @lazy
    def query_places(self) -> Tensor:
        """int64 [queries]: where each packed query stands in a padded [B * most_queries]."""
        return padded_places(self.cu_queries, self.most_queries, self.queries)

    @lazy
    def key_places(self) -> Tensor:
        """int64 [keys], the same for keys."""
        return padded_places(self.cu_keys, self.most_keys, self.keys)

    @lazy
    def key_mask(self) -> Tensor | None:
        """bool [B, most_keys]: True where a padded key is a real one; None where all are."""
        if self.exact and min(self.key_lengths, default=0) == self.most_keys:
            return None
        return torch.arange(self.most_keys, device=self.cu_keys.device)[None, :] < self.cu_keys.diff()[:, None]


def sequence_of(bounds: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the sequence that each packed row belongs to. bounds: int32 [B+1] that end in `rows`."""
    return torch.searchsorted(bounds[1:], torch.arange(rows, device=bounds.device, dtype=bounds.dtype), right=True)


def padded_places(bounds: Tensor, most: int, rows: int) -> Tensor:
    """int64 [rows]: where each packed row stands in a padded [B * most]."""
    owner = sequence_of(bounds, rows)
    return torch.arange(rows, device=bounds.device) + owner * most - bounds[:-1].long().index_select(0, owner)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 [len(lengths) + 1], starting at 0."""
    return torch.from_numpy(numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64))).astype(numpy.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised sequence and the rows of it that are asked for.

    ids: int [n]; segments: int [n] or None (all 0); rows: int [m], ascending places in 0..n-1; targets: int [m] for masked tokens, [1] for a label,
    or None; family: index of the source text.
    """

    ids: numpy.ndarray
    rows: numpy.ndarray
    targets: numpy.ndarray | None = None
    segments: numpy.ndarray | None = None
    family: int = 0


class Bounds(NamedTuple):
    """tokens: T. longest, rows: no sequence has more tokens, or more rows asked for."""

    tokens: int
    longest: int
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What the encoder reads. The host builds all of it; nothing is derived from device data.

    ids, positions, segments: int64 [T]; positions count from 0 in every text. cu_seqlens: int32 [B+1]. rows: int64 [M], ascending indices into T,
    the rows asked for. targets: int64 [M] (masked tokens) or labels [B], IGNORED among them, or None. lengths, row_lengths: host tuples of B
    entries, tokens and rows asked for of each sequence. max_length: the longest. family: int64 [B], the source text each member came from.

    firsts: whether the first token of each sequence, which a classifier reads, is all that is asked for.
    cu_rows: int32 [B+1], the rows of each sequence; None: row_lengths says it. bounds: of a batch in a fixed shape (shapes.py), whose lengths the host does not know.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: Tensor | None
    lengths: tuple[int, ...]
    row_lengths: tuple[int, ...]
    max_length: int
    family: Tensor
    firsts: bool = False
    cu_rows: Tensor | None = None
    bounds: Bounds | None = None

    @lazy
    def spans(self) -> Spans:
        """Queries of every token: all layers but the last."""
        if self.bounds:
            return Spans(self.cu_seqlens, self.cu_seqlens, *[self.bounds.tokens] * 2, *[self.bounds.longest] * 2, False)
        return Spans(self.cu_seqlens, self.cu_seqlens, *[sum(self.lengths)] * 2, *[self.max_length] * 2)._knowing(self.lengths, self.lengths)

    @lazy
    def row_spans(self) -> Spans:
        """Queries of the rows asked for: the last layer."""
        every, rows = self.spans, self.rows.shape[0]
        if self.bounds:
            return Spans(self.cu_rows, every.cu_keys, rows, every.keys, self.bounds.rows, every.most_keys, False)
        bounds = send(cumulative(self.row_lengths), self.rows.device) if self.cu_rows is None else self.cu_rows
        return Spans(bounds, every.cu_keys, rows, every.keys, max(self.row_lengths, default=0), every.most_keys)._knowing(self.row_lengths, self.lengths)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`. To a GPU all of it, cu_rows too, travels as one asynchronous copy from pinned memory."""
        device = torch.device(device)
        if device == self.ids.device:
            return self
        staged = self.staged(pinned=device.type == "cuda")
        return staged.on(staged.flat.to(device, non_blocking=True))

    def staged(self, pinned: bool = False) -> "Staged":
        """All tensors of a host batch end to end, ready to travel. Each begins at a multiple of 16 bytes: Triton makes code of its own for pointers that do."""
        whole = dataclasses.replace(self, cu_rows=cumulative(self.row_lengths) if self.cu_rows is None else self.cu_rows)
        names = tuple(f.name for f in dataclasses.fields(whole) if isinstance(getattr(whole, f.name), Tensor))
        sizes = [2 * -(-getattr(whole, name).numel() * getattr(whole, name).element_size() // 16) for name in names]  # in 8 bytes
        flat = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=pinned)
        for name, place in zip(names, flat.split(sizes)):
            part = getattr(whole, name)
            place.view(part.dtype)[:part.numel()].copy_(part)
        return Staged(whole, names, sizes, flat)


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """A batch whose tensors lie in one: `flat`, int64."""

    batch: Batch
    names: tuple[str, ...]
    sizes: list[int]
    flat: Tensor

    def on(self, flat: Tensor) -> Batch:
        """The batch whose tensors are views of `flat`, a copy of this one's on any device."""
        like = [getattr(self.batch, name) for name in self.names]
        return dataclasses.replace(self.batch, **{name: place.view(part.dtype)[:part.numel()] for name, part, place in zip(self.names, like, flat.split(self.sizes))})


def _trouble(sample: Sample) -> str:
    """What a sample's arrays are not, in words; "" where all is well."""
    tokens, rows = numpy.asarray(sample.ids), numpy.asarray(sample.rows)
    wanted = (("ids", tokens, tokens.size), ("rows", rows, rows.size), ("segments", sample.segments, tokens.size), ("targets", sample.targets, rows.size))
    for name, given, size in wanted:
        array = numpy.asarray(given)
        if given is not None and (array.shape != (size,) or size and array.dtype.kind not in ("biu" if name == "segments" else "iu")):
            return f"{name}: expected {size} integers, got {array.dtype} of shape {list(array.shape)}"
    if rows.size and not (0 <= rows.min() and rows.max() < tokens.size and (rows[1:] >= rows[:-1]).all()):
        return f"expected rows from 0 to {tokens.size - 1}, ascending, got {', '.join(map(str, rows[:5].tolist()))}{', ...' if rows.size > 5 else ''}"
    return ""


def _size(array) -> int:
    return array.size if type(array) is numpy.ndarray else numpy.asarray(array).size


def _sound(samples: list[Sample], lengths: tuple[int, ...], row_lengths: tuple[int, ...], starts: numpy.ndarray) -> bool:
    """Whether all samples are as `_trouble` wants them, seen at once; where not, or where they are no arrays of integers, each is to be looked at."""
    for sample, tokens, rows in zip(samples, lengths, row_lengths):
        given = [(sample.ids, tokens), (sample.rows, rows)]
        given += [(array, size) for array, size in ((sample.segments, tokens), (sample.targets, rows)) if array is not None]
        if not all(type(array) is numpy.ndarray and array.dtype.kind == "i" and array.shape == (size,) for array, size in given):
            return False
    rows = numpy.concatenate([sample.rows for sample in samples] or [[]])
    placed = rows + numpy.repeat(starts[:-1], row_lengths)
    return bool((rows >= 0).all() and (rows < numpy.repeat(lengths, row_lengths)).all() and (placed[1:] >= placed[:-1]).all())


def pack(samples: Sequence[Sample]) -> Batch:
    """One Batch of the samples, in their order. Targets are packed where every sample has them. Raises ModelError on what is no Sample, and on arrays of another kind or
    size than it says, or rows it does not have."""
    samples = list(samples) if isinstance(samples, Iterable) else [samples]
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise ModelError(f"pack: expected a list of Sample, got {type(sample).__name__} at {number}")
    lengths, row_lengths = tuple(_size(s.ids) for s in samples), tuple(_size(s.rows) for s in samples)
    starts = numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64)))
    if not _sound(samples, lengths, row_lengths, starts):
        for number, sample in enumerate(samples):
            if trouble := _trouble(sample):
                raise ModelError(f"pack: sample {number}: {trouble}")

    def join(arrays: list, dtype=numpy.int64) -> Tensor:
        return torch.from_numpy(numpy.concatenate(arrays or [[]]).astype(dtype))

    with_targets = len(samples) > 0 and all(s.targets is not None for s in samples)
    return Batch(
        ids=join([s.ids for s in samples]),
        positions=join([numpy.arange(n) for n in lengths]),
        segments=join([numpy.zeros(len(s.ids)) if s.segments is None else s.segments for s in samples]),
        cu_seqlens=cumulative(lengths),
        rows=join([s.rows + start for s, start in zip(samples, starts)]),
        targets=join([s.targets for s in samples]) if with_targets else None,
        lengths=lengths,
        row_lengths=row_lengths,
        max_length=max(lengths, default=0),
        family=torch.tensor([s.family for s in samples], dtype=torch.int64, device="cpu"),
        firsts=bool(samples) and all(len(s.rows) == 1 and s.rows[0] == 0 for s in samples),
    )


def from_packed(packed: Packed) -> Batch:
    """The Batch of masked texts that buckets.masked_batches put together; what `pack` makes of the same texts one by one."""
    lengths = tuple(packed.lengths.tolist())
    bounds = numpy.zeros(len(lengths) + 1, numpy.int32)
    numpy.cumsum(packed.lengths, out=bounds[1:])

    def tensor(array: numpy.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(numpy.int64))

    return Batch(
        ids=tensor(packed.ids),
        positions=torch.from_numpy(numpy.arange(len(packed.ids)) - numpy.repeat(bounds[:-1], packed.lengths)),
        segments=torch.zeros(len(packed.ids), dtype=torch.int64, device="cpu"),
        cu_seqlens=torch.from_numpy(bounds),
        rows=tensor(packed.rows),
        targets=tensor(packed.targets),
        lengths=lengths,
        row_lengths=tuple(packed.row_lengths.tolist()),
        max_length=max(lengths, default=0),
        family=tensor(packed.family),
    )


def with_inserted(batch: Batch, count: int, first_row: bool = False) -> tuple[Tensor, Batch]:
    """(order int64 [T + B * count], the batch that fits) for `count` vectors put before every text.

    order: rows of [the vectors, once for every text; hidden] end to end, to gather with. It names no row twice, so the backward of the gather adds nothing up: on a GPU
    that would be a sum in another order every time. The rows asked for move with the text; with `first_row` the first vector before a text
    is asked for where the text's first token was, in a batch of `firsts`. ids, positions and segments keep describing the text.
    """
    owner, of_row = sequence_of(batch.cu_seqlens, total := batch.spans.keys), sequence_of(batch.row_spans.cu_queries, batch.rows.shape[0])
    device, sequences = batch.ids.device, batch.cu_seqlens.shape[0] - 1
    before, inserted = torch.arange(sequences, device=device), torch.arange(count, device=device)
    order = torch.empty(total + sequences * count, dtype=torch.int64, device=device)
    order.index_copy_(0, torch.arange(total, device=device) + (owner + 1) * count, torch.arange(total, device=device) + sequences * count)
    order.index_copy_(0, ((batch.cu_seqlens[:-1] + before * count)[:, None] + inserted).flatten(), torch.arange(sequences * count, device=device))
    rows = batch.rows + (of_row + 1) * count
    if first_row and batch.firsts:
        place = batch.rows - batch.cu_seqlens[:-1].long().index_select(0, of_row)
        already = (total - batch.ids.shape[0]) // max(1, sequences)  # vectors that stand there before
        rows = torch.where((place == 0) | (place == already), rows - place - count, rows)
    lengths = tuple(n + count for n in batch.lengths)
    bounds = batch.bounds and Bounds(batch.bounds.tokens + sequences * count, batch.bounds.longest + count, batch.bounds.rows)
    return order, dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens + count * torch.arange(sequences + 1, dtype=torch.int32, device=device), rows=rows,
                                      lengths=lengths, max_length=batch.max_length + count if sequences else 0, bounds=bounds)
