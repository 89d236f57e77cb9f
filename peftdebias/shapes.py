"""Batches brought to a few fixed shapes, as CUDA graphs and torch.compile want them: the same loss and the same gradients, computed on a few dummy tokens more.

What it adds over batches.py: a tail. Behind the texts stand dummy sequences that fill the tokens up, of which the first is asked for the rows that fill the rows up;
their targets are IGNORED. Behind them stand empty sequences. Dropout's masks go by row, so those of the texts stay what they were.

Letters: T tokens, B sequences, M rows asked for.
"""

from typing import NamedTuple

import torch

from .batches import IGNORED, Batch, Bounds
from .errors import ModelError

TOKENS, ROWS, SEQUENCES, LENGTHS = 64, 16, 8, 32  # the least that sizes are multiples of
FINE, COARSE = 16, 8
"""What is added beyond the least is at most one part in so many: FINE for tokens, which every layer pays for, COARSE for rows and sequences. A prompt's vectors go before
every sequence, those that fill up among them, so beside a long prompt these cost tokens too (32 texts become 40 sequences)."""


class Shape(NamedTuple):
    """tokens, rows, sequences: of the filled batch. longest, most_rows: no sequence has more of them."""

    tokens: int
    rows: int
    sequences: int
    longest: int
    most_rows: int


def grain(size: int, least: int, share: int = COARSE) -> int:
    """What `size` is rounded up to a multiple of: a power of two, at least `least`, else at most a `share`-th of the size. Both numbers are powers of two."""
    return max(least, 1 << max(0, size.bit_length() - share.bit_length()))


def rounded(size: int, least: int, share: int = COARSE) -> int:
    """The least multiple of its grain that is not below `size`."""
    return -(-size // grain(size, least, share)) * grain(size, least, share)


def shape_of(batch: Batch, limit: int) -> Shape:
    """The shape that a host batch is brought to. limit: the longest sequence that the model takes. Lengths cost a launch few idle programs, so they come in powers of
    two: fewer shapes. Raises ModelError on a longer text."""
    if batch.max_length > limit:
        raise ModelError(f"text of {batch.max_length} tokens: expected at most {limit}")
    tokens, rows = rounded(len(batch.ids), TOKENS, FINE), rounded(len(batch.rows), ROWS)
    longest = min(max(LENGTHS, 1 << (batch.max_length - 1).bit_length()), limit)
    dummies = -(-grain(len(batch.ids), TOKENS, FINE) // longest)
    most_rows = longest + grain(len(batch.rows), ROWS)
    return Shape(tokens, rows, rounded(len(batch.lengths) + dummies, SEQUENCES), longest, most_rows)


def fill(batch: Batch, shape: Shape) -> Batch:
    """A host batch with targets, in that shape. The result knows no lengths (Batch.bounds). Where the tokens fill the shape there is no dummy, and
    the last text is asked for the rows that fill up: its last token, once more."""
    tail, more = shape.tokens - len(batch.ids), shape.rows - len(batch.rows)
    dummies = [min(shape.longest, tail - start) for start in range(0, tail, shape.longest)]

    def filled(tensor: torch.Tensor, size: int, value: int = 0) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((size - len(tensor),), value)])

    bounds = torch.tensor(dummies, device="cpu").cumsum(0).int() + len(batch.ids)
    asked = [*batch.row_lengths, more] if tail else [*batch.row_lengths[:-1], batch.row_lengths[-1] + more]
    row_bounds = torch.tensor([0, *asked], device="cpu").cumsum(0).int()
    return Batch(ids=filled(batch.ids, shape.tokens), positions=torch.cat([batch.positions, *(torch.arange(n, device="cpu") for n in dummies)]),
                 segments=filled(batch.segments, shape.tokens), cu_seqlens=filled(torch.cat([batch.cu_seqlens, bounds]), shape.sequences + 1, shape.tokens),
                 rows=filled(batch.rows, shape.rows, min(len(batch.ids), shape.tokens - 1)), targets=filled(batch.targets, shape.rows, IGNORED), lengths=(), row_lengths=(),
                 max_length=shape.longest, family=filled(batch.family, shape.sequences, -1), firsts=batch.firsts, cu_rows=filled(row_bounds, shape.sequences + 1, shape.rows),
                 bounds=Bounds(shape.tokens, shape.longest, shape.most_rows))
