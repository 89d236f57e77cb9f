"""LoRA, part two of four: the thin products u = z A^T and v = dY B, [T, r] each. The product's low-rank half is made of them (lora.py), and so are dA and dB (lora_grads.py).

Contract. A [r, in] and B [out, r] of G pieces of one product, alike in shape and dtype (query's and value's, say), whose ranks lie side by side: R is G r, padded to a
power of two of at least 16. pack(a, b, dtype) rounds them once to the dtype of the products and lays them out as the kernels read them, in whole vectors and with zeros
where a piece has no ranks: `packed`, one flat tensor of [R, in], A's rows, and [G, out, R], B's, of which a piece has its own ranks alone (pack_ref).
thin(x, dy, packed, ...): u [T, R] = z A^T, z = x dropped with `rate` (dropout.py) or x itself at rate 0, and v [T, R] = dY B; both, or the one whose tensor is given. x [T, in]
and dy [T, ..] of packed's dtype, rows of any stride, neighbours in a row next to each other; dy's pieces are `apart` columns from each other. fp32 sums, rounded to x's dtype, as
a library's would be. No gradients, nothing overwritten.

How. `thin_kernel`: a program a tile of rows and a side: u, or v of a piece. It walks over the columns with several tiles on their way to shared memory; what it multiplies
them by comes ready, as a tile of A that had to be rounded on its way would hold up every product until it is back in shared memory. What limits it: memory.

Letters: T rows, G pieces, I = in, O = out of a piece, R ranks of all pieces (padded), BT rows and BK columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep
from .dropout_ref import threshold_of
from .tiles import DTYPES, Spec, arch_of, ceil_div, dot, on, power

MAX_RANK = 64  # of all pieces together
PACKED = 3  # pieces that one launch packs: query, key and value
PACK = {"BK": 128, "num_warps": 4}


def ranks_of(rank: int, pieces: int = 1) -> int:
    """R; above MAX_RANK, where no kernel serves, all ranks as they are."""
    return power(pieces * rank) if pieces * rank <= MAX_RANK else pieces * rank


# ---------------------------------------------------------------- A and B, packed

def pack_ref(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What pack_kernel writes; the specification."""
    (rank, width), out, ranks = a[0].shape, b[0].shape[0], ranks_of(a[0].shape[0], len(a))
    rows, columns = a[0].new_zeros(ranks, width, dtype=dtype), b[0].new_zeros(len(b), out, ranks, dtype=dtype)
    for piece, (low, up) in enumerate(zip(a, b)):
        mine = slice(piece * rank, (piece + 1) * rank)
        rows[mine], columns[piece, :, mine] = low.to(dtype), up.to(dtype)
    return torch.cat((rows.flatten(), columns.flatten()))


@triton.jit
def pack_kernel(a0, a1, a2, b0, b1, b2, packed, I, O, pieces, rank, R: tl.constexpr, BK: tl.constexpr):
    """packed [R, I] and then [G, O, R] of a0 .. a2 [rank, I] and b0 .. b2 [O, rank], None from piece G on. Programs (tile of BK columns of A and rows of B, piece)."""
    piece, columns, ranks = tl.program_id(1), tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, R)
    a, b = a0, b0
    if a1 is not None:
        if piece == 1:
            a, b = a1, b1
    if a2 is not None:
        if piece == 2:
            a, b = a2, b2
    mine = ranks - piece * rank
    own = (mine >= 0) & (mine < rank)
    ours = own | (ranks >= pieces * rank)  # the rows of zeros below are the same whoever writes them
    low = tl.load(a + mine[:, None] * I + columns[None, :], mask=own[:, None] & (columns < I)[None, :], other=0.0)
    tl.store(packed + ranks[:, None] * I + columns[None, :], low.to(packed.dtype.element_ty), mask=ours[:, None] & (columns < I)[None, :])
    up = tl.load(b + columns[:, None] * rank + mine[None, :], mask=(columns < O)[:, None] & own[None, :], other=0.0)
    tl.store(packed + R * I + (piece * O + columns)[:, None] * R + ranks[None, :], up.to(packed.dtype.element_ty), mask=(columns < O)[:, None])


def pack(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> Tensor:
    """pack_ref in one launch, where one serves."""
    pieces, (rank, width), out = len(a), a[0].shape, b[0].shape[0]
    if pieces > PACKED or pieces * rank > MAX_RANK:
        return pack_ref(a, b, dtype)
    ranks, absent = ranks_of(rank, pieces), [None] * (PACKED - pieces)
    packed = torch.empty(ranks * (width + pieces * out), dtype=dtype, device=a[0].device)
    with on(packed):
        pack_kernel[ceil_div(max(width, out), PACK["BK"]), pieces](*(t.contiguous() for t in a), *absent, *(t.contiguous() for t in b), *absent, packed, width, out, pieces, rank,
                                                                   R=ranks, enable_fp_fusion=True, **PACK)
    return packed


# ---------------------------------------------------------------- u and v

@triton.jit
def tile_of(base, rows, stride, first, width, T, seed, site, threshold, DROPS: tl.constexpr, BK: tl.constexpr):
    """[BT, BK] of a tensor [T, width] from column `first` on, 0 outside; with DROPS what the mask drops is 0 too (the scale comes at the end)."""
    columns = first + tl.arange(0, BK)
    value = tl.load(base + rows[:, None] * stride + columns[None, :], mask=(rows < T)[:, None] & (columns < width)[None, :], other=0.0)
    if DROPS:
        value = tl.where(keep(rows, first // 8, (width + 7) // 8, seed, site, threshold, BK // 8), value, 0.0)
    return value


@triton.jit
def _thin(left, left_stride, L, factor, factor_column, factor_rank, w, ours, rows, T, seed, site, threshold, scale, DROPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
          R: tl.constexpr):
    """w [T, R] at these rows = left [T, L] times factor [L, R], and with DROPS times scale; of the ranks `ours` are stored."""
    ranks, total = tl.arange(0, R), tl.zeros((BT, R), tl.float32)
    for k in range(0, L, BK):
        columns = k + tl.arange(0, BK)
        thin = tl.load(factor + columns[:, None] * factor_column + ranks[None, :] * factor_rank, mask=(columns < L)[:, None], other=0.0)
        total = dot(tile_of(left, rows, left_stride, k, L, T, seed, site, threshold, DROPS, BK), thin, total)
    if DROPS:
        total *= scale
    tl.store(w + rows[:, None] * R + ranks[None, :], total.to(w.dtype.element_ty), mask=(rows < T)[:, None] & ours[None, :])


@triton.jit(do_not_specialize=["T", "pieces", "first_side", "sides", "site", "threshold"])
def thin_kernel(x, dy, packed, seed, u, v, T, I, O, x_stride, dy_stride, apart, pieces, rank, first_side, sides, site, threshold, scale, DROPS: tl.constexpr, BT: tl.constexpr,
                BK: tl.constexpr, R: tl.constexpr):
    """u and v [T, R] of x's dtype from x [T, I], dy [T, O] of the first piece, the next one's `apart` columns further, packed and seed int64 [1]; scale = 1 / q. Sides: u is 0, v of a
    piece one more than it. Programs: `sides` of them from first_side on of every row tile, row tile after row tile; one axis, as the others end at 65 535."""
    side, tile, ranks = first_side + tl.program_id(0) % sides, tl.program_id(0) // sides, tl.arange(0, R)
    rows = (tile * BT + tl.arange(0, BT)).to(tl.int64)
    start = 0 if seed is None else tl.load(seed)
    if side == 0:
        _thin(x, x_stride, I, packed, 1, I, u, ranks >= 0, rows, T, start, site, threshold, scale, DROPS, BT, BK, R)
    else:
        piece = side - 1
        ours = (ranks >= piece * rank) & (ranks < (piece + 1) * rank) | (ranks >= pieces * rank)  # with the zeros behind all pieces' ranks
        _thin(dy + piece * apart, dy_stride, O, packed + R * I + piece * O * R, R, 1, v, ours, rows, T, start, site, threshold, scale, False, BT, BK, R)


def is_regular(*columns: int) -> bool:
    """Whether widths and strides, in elements, let a tile be read in whole vectors."""
    return all(n % 16 == 0 for n in columns)


def tiles_for(dtype: torch.dtype, ranks: int, regular: bool, drops: bool, arch: int = 90) -> dict[str, int]:
    """BT, BK, R and how the compiler schedules; ranks: R. regular: see `is_regular`; what is not is read one by one, by addresses that take registers. A mask takes them too: in
    tiles half as wide three programs and more fit a multiprocessor, where one did. Without a bound for them triton 3.9 takes fewer on sm_100, and spills."""
    if dtype == torch.float32:
        return {"BT": 32 if ranks <= 32 else 16, "BK": 64 if ranks <= 32 else 32, "R": ranks, "num_warps": 8, "num_stages": 2 if ranks <= 32 else 1}
    if not regular:
        return {"BT": 64, "BK": 64, "R": ranks, "num_warps": 8, "num_stages": 2}
    return {"BT": 128, "BK": 128 if ranks <= 32 and not drops else 64, "R": ranks, "num_warps": 8, "num_stages": 3} | ({"maxnreg": 128} if arch >= 100 else {})


def thin(x: Tensor | None, dy: Tensor | None, packed: Tensor, width: int, out: int, apart: int, pieces: int, rank: int, rate: float, seed: Tensor | None,
         site: int) -> tuple[Tensor | None, Tensor | None]:
    """(u, v), None where x or dy is None; for a launcher. width, out: I, O."""
    some = x if dy is None else dy
    rows, ranks, given = some.shape[0], ranks_of(rank, pieces), [some if t is None else t for t in (x, dy)]
    found, first, sides = [None if t is None else some.new_empty(rows, ranks) for t in (x, dy)], int(x is None), (x is not None) + (0 if dy is None else pieces)
    if rows:
        regular, made = is_regular(width, out, apart, *(t.stride(0) for t in given)), [some if t is None else t for t in found]
        sizes = tiles_for(some.dtype, ranks, regular, rate > 0, arch_of(some))
        with on(some):
            thin_kernel[sides * ceil_div(rows, sizes["BT"]),](*given, packed, seed if rate else None, *made, rows, width, out, given[0].stride(0), given[1].stride(0), apart,
                                                              pieces, rank, first, sides, site, threshold_of(rate), 65536 / threshold_of(rate), DROPS=rate > 0, enable_fp_fusion=True, **sizes)
    return tuple(found)


def specs(arch: int) -> list[Spec]:
    found = []
    whole = dict.fromkeys(("T", "I", "O", "x_stride", "dy_stride", "apart", "pieces", "rank", "first_side", "sides", "site", "threshold"), "i32") | {"scale": "fp32"}
    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for drops, regular in ((False, True), (True, True), (True, False)):
                sizes = tiles_for(dtype, power(rank), regular, drops, arch)
                options = {key: sizes.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in sizes}
                signature = dict.fromkeys(("x", "dy", "packed", "u", "v"), f"*{kind}") | whole | ({"seed": "*i64"} if drops else {})
                found.append(Spec(f"thin, {kind}, r {rank}{', dropout' if drops else ''}{'' if regular else ', ragged'}", thin_kernel,
                                  {n: signature[n] for n in thin_kernel.arg_names if n in signature}, {"DROPS": drops} | sizes | ({} if drops else {"seed": None}),
                                  aligned=("I", "O", "x_stride", "dy_stride", "apart") if regular else (), **options))
        pointers = dict.fromkeys(("a0", "a1", "b0", "b1"), "*fp32") | {"packed": f"*{kind}"} | dict.fromkeys(("I", "O", "pieces", "rank"), "i32")
        found.append(Spec(f"pack, {kind}", pack_kernel, pointers, {"a2": None, "b2": None, "R": 16, "BK": PACK["BK"]}, PACK["num_warps"], aligned=("I", "O")))
    return found
