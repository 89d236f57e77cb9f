"""Which texts share a batch, and the batch in numpy: what the background process makes without torch.

What it adds over tokens.py: length buckets, a seeded order, families gathered end to end. It leaves out torch (batches.py turns a Packed into a Batch).

Letters: T tokens, B texts, M masked tokens, F families.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy

from .tokens import Tokenizer, mask_flat

GATHER = 64  # batches gathered together: a few hundred KiB, and numpy's own work outweighs Python's
WINDOW = 64  # batches that are sorted by length together: enough for near-equal lengths, small against an epoch


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A masked batch: ids int32 [T] as they are read; rows int64 [M], ascending places in T, and targets int32 [M]; lengths and row_lengths int32 [B],
    tokens and rows of each text; family int64 [B], the number of the source text in its corpus."""

    ids: numpy.ndarray
    rows: numpy.ndarray
    targets: numpy.ndarray
    lengths: numpy.ndarray
    row_lengths: numpy.ndarray
    family: numpy.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Families:
    """Tokenised families end to end: ids int32 [T], lengths int32 [B] of the texts, sizes int32 [F] texts of each family, sources int64 [F] the source text's number."""

    ids: numpy.ndarray
    lengths: numpy.ndarray
    sizes: numpy.ndarray
    sources: numpy.ndarray

    @classmethod
    def of(cls, families: Sequence[Sequence[numpy.ndarray]]) -> "Families":
        """Lists of ids, numbered as they stand."""
        members = [ids for family in families for ids in family]
        ids = numpy.concatenate([numpy.zeros(0, numpy.int32), *members]).astype(numpy.int32)
        sizes = numpy.array([len(family) for family in families], numpy.int32)
        return cls(ids, numpy.array([len(m) for m in members], numpy.int32), sizes, numpy.arange(len(families)))

    @classmethod
    def joined(cls, parts: Sequence["Families"]) -> "Families":
        return cls(*(numpy.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))

    def __len__(self) -> int:
        return len(self.sizes)

    def bounds(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(int64 [F+1], int64 [F+1]): where each family's texts begin, and where its tokens do."""
        texts = _starts(self.sizes)
        return texts, _starts(self.lengths)[texts]

    def __getitem__(self, part: slice) -> "Families":
        """Neighbouring families; step 1. The arrays are views."""
        texts, tokens = self.bounds()
        begin, end, _ = part.indices(len(self))
        end = max(begin, end)
        return Families(self.ids[tokens[begin]:tokens[end]], self.lengths[texts[begin]:texts[end]], self.sizes[part], self.sources[part])


def _starts(counts: numpy.ndarray) -> numpy.ndarray:
    return numpy.concatenate(([0], numpy.cumsum(counts, dtype=numpy.int64)))


def masked_batches(families: Families, tokenizer: Tokenizer, *, seed: int, epoch: int, window: int = 0, batch: dict, start: int = 0,
                   weights: numpy.ndarray | None = None) -> Iterator[Packed]:
    """Every family once, in the order and with the masks that (seed, epoch, window) give, from batch `start` on. batch: batch_size or batch_tokens of `plan`.
    weights: of tokens.mask_flat."""
    extra = (window,) if window else ()  # the first window has the seeds of a corpus that is held in memory
    texts, tokens = families.bounds()
    order = plan(numpy.diff(tokens), members=families.sizes, seed=(seed, 0, epoch, *extra), **batch)
    for number, (ids, lengths, family) in enumerate(_gathered(families, texts, tokens, order[start:]), start):
        masked, rows, targets, row_lengths = mask_flat(ids, lengths, tokenizer, numpy.random.default_rng([seed, 2, epoch, *extra, number]), weights=weights)
        yield Packed(masked, rows, targets, lengths, row_lengths, family)


def _gathered(families: Families, texts: numpy.ndarray, tokens: numpy.ndarray, order: list[list[int]]) -> Iterator[tuple[numpy.ndarray, ...]]:
    """(ids, lengths, family) of every batch, gathered for GATHER batches at once. texts, tokens: families.bounds()."""
    for begin in range(0, len(order), GATHER):
        group = order[begin:begin + GATHER]
        items = numpy.fromiter(itertools.chain.from_iterable(group), numpy.int64)
        ends = numpy.cumsum([len(batch) for batch in group])  # families up to the end of each batch
        ids, id_ends = _pieces(families.ids, tokens, items, ends)
        lengths, length_ends = _pieces(families.lengths, texts, items, ends)
        family = numpy.repeat(families.sources[items], families.sizes[items])
        t = b = 0
        for t_end, b_end in zip(id_ends, length_ends):
            yield ids[t:t_end], lengths[b:b_end], family[b:b_end]
            t, b = t_end, b_end


def _pieces(values: numpy.ndarray, bounds: numpy.ndarray, items: numpy.ndarray, ends: numpy.ndarray) -> tuple[numpy.ndarray, list[int]]:
    """(values[bounds[i]:bounds[i + 1]] for every i of `items`, end to end; how many values the first ends[0], ends[1], ... items have)."""
    counts = bounds[items + 1] - bounds[items]
    return stretches(values, bounds[items], counts), numpy.cumsum(counts)[ends - 1].tolist()


def stretches(values: numpy.ndarray, begins: numpy.ndarray, counts: numpy.ndarray) -> numpy.ndarray:
    """values[b:b + n] for every b, n of begins and counts (int64), end to end."""
    before = numpy.cumsum(counts) - counts
    return values[numpy.arange(int(counts.sum())) + numpy.repeat(begins - before, counts)]


def in_memory(families: Sequence[Sequence[numpy.ndarray]], tokenizer: Tokenizer, *, seed: int, batch: dict) -> Callable[[int], Iterator[Packed]]:
    """The batches of an epoch as a function of its number, of families as lists of ids (a text and its counterfactuals)."""
    ready = Families.of(families)
    return lambda number: masked_batches(ready, tokenizer, seed=seed, epoch=number, batch=batch)


def plan(lengths: Sequence[int], *, batch_size: int | None = None, batch_tokens: int | None = None, members: Sequence[int] | None = None,
         seed: int | Sequence[int] | None = None) -> list[list[int]]:
    """Which items share a batch: lists of item indices, each item in exactly one.

    An item is a text or a family that may not be parted; `lengths` are its tokens, `members` its texts (default 1 each). A batch holds at most
    `batch_size` members or `batch_tokens` tokens, and at least one item. With a seed, items are shuffled, sorted by length within windows of WINDOW
    batches, and the batches shuffled: lengths in a batch are near-equal, the order is the seed's. Without one, all are sorted by length.
    """
    if (batch_size is None) == (batch_tokens is None):
        raise ValueError("plan: expected one of batch_size and batch_tokens")
    lengths = numpy.asarray(lengths)
    cost = lengths if batch_tokens is not None else numpy.ones(len(lengths), dtype=int) if members is None else numpy.asarray(members)
    limit = batch_tokens if batch_tokens is not None else batch_size
    if seed is None:
        return list(_cut(numpy.argsort(lengths, kind="stable"), cost, limit))
    generator = numpy.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    share = max(1, int(WINDOW * limit / max(1.0, cost.mean() if len(cost) else 1.0)))
    batches = []
    for begin in range(0, len(order), share):
        window = order[begin:begin + share]
        batches.extend(_cut(window[numpy.argsort(lengths[window] / (1 if members is None else numpy.asarray(members)[window]), kind="stable")], cost, limit))
    return [batches[i] for i in generator.permutation(len(batches))]


def _cut(order: numpy.ndarray, cost: numpy.ndarray, limit: int) -> Iterator[list[int]]:
    batch: list[int] = []
    used = 0
    for item in order.tolist():
        if batch and used + cost[item] > limit:
            yield batch
            batch, used = [], 0
        batch.append(item)
        used += int(cost[item])
    if batch:
        yield batch
