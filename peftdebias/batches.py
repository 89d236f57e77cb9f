"""Packed batches: token ids of many texts end to end, without padding, as torch reads them.

What it adds over buckets.py (which texts share a batch, in numpy): tensors, and where each text begins. It leaves out masking (tokens) and losses (tasks).

Letters: T tokens in the batch, B sequences, M rows asked for.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from .buckets import WINDOW, Packed, plan

__all__ = ["WINDOW", "Batch", "Sample", "Spans", "cumulative", "from_packed", "pack", "plan", "with_inserted"]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where sequences begin in packed queries and keys; everything attention knows about a batch.

    query_lengths, key_lengths: host lists, B entries each. In the last layer a sequence has only as many queries as rows asked for.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    @functools.cached_property
    def cu_queries(self) -> Tensor:
        """int32 [B+1]: sequence b's queries are rows cu_queries[b] to cu_queries[b+1]."""
        return cumulative(self.query_lengths).to(self.device, non_blocking=True)

    @functools.cached_property
    def cu_keys(self) -> Tensor:
        """int32 [B+1], the same for keys."""
        return cumulative(self.key_lengths).to(self.device, non_blocking=True)

    @functools.cached_property
    def queries(self) -> int:
        """Of all sequences."""
        return sum(self.query_lengths)

    @functools.cached_property
    def keys(self) -> int:
        """Of all sequences."""
        return sum(self.key_lengths)

    @functools.cached_property
    def host_lengths(self) -> Tensor:
        """int64 [2, B], on the host: query_lengths and key_lengths."""
        return torch.tensor((self.query_lengths, self.key_lengths), dtype=torch.int64)

    @functools.cached_property
    def padded_queries(self) -> Tensor:
        """int64 [sum(query_lengths)]: where each packed query stands in a padded [B * longest]."""
        return _padded_places(self.query_lengths).to(self.device, non_blocking=True)

    @functools.cached_property
    def padded_keys(self) -> Tensor:
        """int64 [sum(key_lengths)], the same for keys."""
        return _padded_places(self.key_lengths).to(self.device, non_blocking=True)

    @functools.cached_property
    def key_mask(self) -> Tensor | None:
        """bool [B, longest]: True where a padded key is a real one; None where all are."""
        longest = max(self.key_lengths, default=0)
        if min(self.key_lengths, default=0) == longest:
            return None
        return (torch.arange(longest)[None, :] < torch.tensor(self.key_lengths)[:, None]).to(self.device, non_blocking=True)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 [len(lengths) + 1], starting at 0."""
    return torch.from_numpy(numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64))).astype(numpy.int32))


def _padded_places(lengths: Sequence[int]) -> Tensor:
    longest = max(lengths, default=0)
    return torch.from_numpy(numpy.concatenate([numpy.arange(n) + b * longest for b, n in enumerate(lengths)] or [numpy.zeros(0, dtype=numpy.int64)]))


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


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What the encoder reads. The host builds all of it; nothing is derived from device data.

    ids, positions, segments: int64 [T]; positions count from 0 in every text. cu_seqlens: int32 [B+1]. rows: int64 [M], ascending indices into T,
    the rows asked for. targets: int64 [M] (masked tokens) or labels [B], or None. lengths, row_lengths: host tuples of B entries, tokens and rows asked
    for of each sequence. max_length: the longest. family: int64 [B], the source text each member came from.
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

    @functools.cached_property
    def spans(self) -> Spans:
        """Queries of every token: all layers but the last."""
        return Spans(self.lengths, self.lengths, self.ids.device)

    @functools.cached_property
    def row_spans(self) -> Spans:
        """Queries of the rows asked for: the last layer."""
        return Spans(self.row_lengths, self.lengths, self.ids.device)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies run asynchronously from pinned memory."""
        device = torch.device(device)
        if device == self.ids.device:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return dataclasses.replace(self, **{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)
                                            if isinstance(getattr(self, f.name), Tensor)})


def pack(samples: Sequence[Sample]) -> Batch:
    """One Batch of the samples, in their order. Targets are packed where every sample has them."""
    lengths = tuple(len(s.ids) for s in samples)
    row_lengths = tuple(len(s.rows) for s in samples)
    starts = numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64)))

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
        family=torch.tensor([s.family for s in samples], dtype=torch.int64),
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
        segments=torch.zeros(len(packed.ids), dtype=torch.int64),
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

    order: rows of [vectors; hidden] end to end, to gather with. The rows asked for move with the text; with `first_row` the first vector before a text
    is asked for where the text's first token was. ids, positions and segments keep describing the text.
    """
    lengths = tuple(n + count for n in batch.lengths)
    starts = numpy.cumsum([0, *batch.lengths])
    order = numpy.concatenate([part for start, n in zip(starts, batch.lengths) for part in (numpy.arange(count), numpy.arange(start, start + n) + count)]
                              or [numpy.zeros(0, dtype=numpy.int64)])
    places = numpy.repeat(numpy.arange(1, len(lengths) + 1) * count, batch.row_lengths)
    device = batch.ids.device
    rows = batch.rows + torch.from_numpy(places).to(device, non_blocking=True)
    if first_row:
        firsts = torch.from_numpy(numpy.repeat(starts[:-1], batch.row_lengths)).to(device, non_blocking=True)  # of each row's text
        before = (sum(batch.lengths) - len(batch.ids)) // max(1, len(lengths))  # vectors that stand there already
        place = batch.rows - firsts
        rows = torch.where((place == 0) | (place == before), rows - place - count, rows)
    return torch.from_numpy(order).to(device, non_blocking=True), dataclasses.replace(
        batch, cu_seqlens=cumulative(lengths).to(device, non_blocking=True), rows=rows, lengths=lengths, max_length=max(lengths, default=0))
