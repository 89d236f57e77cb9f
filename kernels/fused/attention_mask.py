"""Attention's dropout as bits, part two of two: a kernel draws them once, and those of attention.py read them as words.

Contract. bits uint8 [H, Mq, line]: for every head and query row one bit a probability, set where it is kept (attention_keep of dropout_ref.py: a counter of the row, the head
and the key alone). A line is as long as the prefix and the longest sequence, in 64s of keys; the prefix's bits come first, a sequence's own from `own` on. Bit j of byte n
belongs to key 8 n + j, so bit j of word n to key 32 n + j. What no key owns is never written, and never counts.

Why a kernel of its own. The threads that hold a tile's scores are not those that could draw its bits without doing so four times over, and what threads exchange inside a loop
all of them wait for; as words of 32 keys the bits come with the keys, ahead of their turn. What limits it: ten rounds of Philox for eight probabilities.

Letters: those of attention.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .dropout import kept_bits
from .dropout_ref import threshold_of
from .tiles import Spec, ceil_div

TILED = 64  # a multiple of the keys of every tile
MASK = {"BM": 64, "BLOCKS": 8}


@triton.jit
def place_of(H, tiles):
    """(sequence, head, tile) of this program. The tiles of one sequence and head come one after the other: they read the same rows, which are in L2 then."""
    pair = tl.program_id(0) // tiles
    return pair // H, pair % H, tl.program_id(0) % tiles


# ---------------------------------------------------------------- drawn

@triton.jit
def _draw(bits, rows, inside, line, first, keys, fourth, seed, site, threshold, BLOCKS: tl.constexpr):
    """The bits of these rows and of `keys` keys, from byte `first` of a line on: attention_keep. fourth: 1 + 2 head, one more for a prefix."""
    for block in range(0, (keys + 7) // 8, BLOCKS):
        place = block + tl.arange(0, BLOCKS)
        eight = kept_bits(place.to(tl.uint32)[None, :], rows.to(tl.uint32)[:, None], fourth.to(tl.uint32), seed, site, threshold)
        tl.store(bits + rows.to(tl.int64)[:, None] * line + (first + place)[None, :], eight.to(tl.uint8), mask=inside[:, None] & (place * 8 < keys)[None, :])


@triton.jit(do_not_specialize=["Mq", "tiles", "line", "site", "threshold"])
def mask_kernel(cu_queries, cu_keys, seed, bits, Mq, P, H, tiles, line, own, site, threshold, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """bits as the file's first lines say; cu_queries and cu_keys int32 [B + 1], seed int64 [1], line and own in bytes. Programs (sequence, head, tile of its queries)."""
    sequence, head, tile = place_of(H, tiles)
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    if q0 + tile * BM >= q1:
        return
    rows, start = q0 + tile * BM + tl.arange(0, BM), tl.load(seed)
    bits += head.to(tl.int64) * Mq * line
    _draw(bits, rows, rows < q1, line, 0, P, 2 + 2 * head, start, site, threshold, BLOCKS)
    _draw(bits, rows, rows < q1, line, own, k1 - k0, 1 + 2 * head, start, site, threshold, BLOCKS)


def line_of(keys: int, shared: int) -> tuple[int, int]:
    """Bytes of a line, and where in it a sequence's own keys begin: whole tiles of keys, on both sides. keys: of the longest sequence; shared: P."""
    own = ceil_div(shared, TILED) * TILED // 8
    return own + ceil_div(keys, TILED) * TILED // 8, own


def draw(bits: Tensor, cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int, shared: int, rate: float, seed: Tensor, site: int) -> None:
    """Fills bits [H, Mq, line]; for a launcher, inside `on`. queries, keys: of the longest sequence."""
    (heads, rows, _), tiles = bits.shape, ceil_div(queries, MASK["BM"])
    mask_kernel[(cu_queries.shape[0] - 1) * heads * tiles,](cu_queries, cu_keys, seed, bits, rows, shared, heads, tiles, *line_of(keys, shared), site, threshold_of(rate),
                                                           enable_fp_fusion=True, **MASK)


# ---------------------------------------------------------------- read

@triton.jit
def words_of(bits, line, begin, left, own, first, BY_KEYS: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """int32 [N, words], BY_KEYS [words, N]: the mask of N rows and of the keys from place `first` on, which begin at word `own` of a line. bits int32 [Mq, line], a word
    for 32 keys; tiles of fewer keys are a whole part of a word. bits points at the head."""
    r, place, bits = tl.arange(0, N), tl.arange(0, max(1, KEYS // 32)), bits + (tl.cast(begin, tl.int64) * line + (own + first // 32))
    if BY_KEYS:
        words = tl.load(bits + (r[None, :] * line + place[:, None]), mask=(r < left)[None, :], other=0)
    else:
        words = tl.load(bits + (r[:, None] * line + place[None, :]), mask=(r < left)[:, None], other=0)
    return words


@triton.jit
def kept_of(words, first, BY_KEYS: tl.constexpr, KEYS: tl.constexpr):
    """bool [n, KEYS], BY_KEYS [KEYS, n], out of words_of. To be called where the answer is used: a thread has few registers for truths."""
    bit = tl.full([1], 1, tl.int32) << (tl.arange(0, 32) if KEYS >= 32 else first % 32 + tl.arange(0, KEYS))
    if BY_KEYS:
        kept = tl.reshape(words[:, None, :] & bit[None, :, None], (KEYS, words.shape[1])) != 0
    else:
        kept = tl.reshape(words[:, :, None] & bit[None, None, :], (words.shape[0], KEYS)) != 0
    return kept


def spec() -> Spec:
    numbers = dict.fromkeys(("Mq", "P", "H", "tiles", "line", "own", "site", "threshold"), "i32")
    return Spec("mask", mask_kernel, dict.fromkeys(("cu_queries", "cu_keys"), "*i32") | {"seed": "*i64", "bits": "*u8"} | numbers, MASK)
