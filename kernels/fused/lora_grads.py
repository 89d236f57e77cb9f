"""LoRA, part four of four: dA and dB from x and dY.

Contract. lora_grads(x, dy, a, b, scale, rate, seed, site) computes lora_grads_ref of peftdebias/methods/lora.py: the gradients of
    y = x W^T + bias + s (z A^T) B^T,    z = x dropped with `rate`, or x itself at rate 0,
with respect to A and B. x [T, in] and dy [T, out] of one dtype (fp32, bf16, fp16), rows of any stride, neighbours in a row next to each other; A [r, in] and B [out, r]
of one dtype, r >= 1 (above 64 torch's own products do it). seed int64 [1] and site: see dropout.py. Returns dA [r, in], dB [out, r] in A's dtype. fp32 accumulation;
u and v are rounded to x's dtype before the second product, as a library's would be. Deterministic: no atomics, every sum in one order on one kind of device. Overwrites nothing.
lora_grads_op takes several pieces of one product, query's and value's, say: their A and B stand in lists, their columns of dY equally far apart. Their ranks lie side by side
in one tile, so x, which they share, is read as often as for one of them. It takes A and B packed, u and v, where somebody has them (lora_thin.py).

Derivation. With u = z A^T [T, r] and v = dY B [T, r]:  dB = s dY^T u  and  dA = s v^T z.  dA needs all columns of dY for v and some of x, dB all of x for u and
some of dY: the same work with the roles exchanged. One calls the thin one of u and v `w`, and the tensor whose columns the result has `right`:  w^T right [T, N] -> [r, N].
Of the ranks of all pieces a piece's own begin at `lowest`; the others' are not stored.

Forms, picked by dispatch.py. `sum_kernel`, the last launch of both, adds the sums of chunks of rows in their order.
"twice": x and dY are read twice, in two streams of tiles with several on their way: for u and v (lora_thin.py), then `partial_kernel`: w^T right, a program a tile of
columns and a chunk of rows. Where u and v are there already, as behind the unwritten product, x and dY are read once. Where x and dY fit in the L2 cache, the second
time comes from there. What limits it: memory, and at a few thousand rows the launches.
"once": x and dY are read once. `once_kernel`: a program, one a multiprocessor, walks over its chunk of rows with all of dA and dB in its registers and the next tiles of
rows on their way to shared memory. It takes what they hold (`once_serves`): bf16 and fp16, I and O in whole tiles of 128 columns, 768 at most, up to 16 ranks of all
pieces, up to two of these, one with dropout. What limits it: a program's second products wait for the sum of its first; at a few thousand rows the sums of as many
chunks as there are multiprocessors.

Letters: T rows, G pieces, I = in, O = out of a piece, R ranks of all pieces (padded to a power of two), BT rows and BK columns of a tile, W tiles side by side.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch, lora_thin, register
from .dropout import dropout, keep
from .dropout_ref import threshold_of
from .lora_thin import MAX_RANK, pack, ranks_of, thin, tile_of
from .op import op
from .tiles import DTYPES, Spec, arch_of, ceil_div, dot, expect, on, power, processors, reduce, rows_together

CHUNKS = 32  # of "twice", at most that many partial sums; of "once" one a multiprocessor


@triton.jit
def _sum_rows(w, right, right_stride, N, first, partial, partial_stride, T, lowest, rank, row0, tiles, seed, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr,
              BK: tl.constexpr, R: tl.constexpr):
    """partial [rank, N], rows partial_stride apart, at the columns first .. first + BK = w^T right over `tiles` tiles of rows from row0 on, of the ranks from `lowest` on."""
    ranks, columns, total = tl.arange(0, R), first + tl.arange(0, BK), tl.zeros((R, BK), tl.float32)
    for t in range(0, tiles):
        rows = (row0 + t * BT + tl.arange(0, BT)).to(tl.int64)
        thin = tl.load(w + rows[:, None] * R + ranks[None, :], mask=(rows < T)[:, None], other=0.0)  # all ranks, in whole vectors; what nobody asked for is not stored
        total = dot(tl.trans(thin), tile_of(right, rows, right_stride, first, N, T, seed, site, threshold, DROPS, BK), total)
    ranks -= lowest
    tl.store(partial + ranks[:, None] * partial_stride + columns[None, :], total, mask=((ranks >= 0) & (ranks < rank))[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["T", "pieces", "groups_a", "groups_b", "tiles", "site", "threshold"])
def partial_kernel(x, dy, u, v, seed, partial_a, partial_b, T, I, O, x_stride, dy_stride, apart, pieces, rank, groups_a, groups_b, tiles, site, threshold,
                   DROPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """partial_a fp32 [chunks, G rank, I], partial_b fp32 [chunks, rank, G O], not scaled. u, v [T, R]; the others as in thin_kernel of lora_thin.py.

    Programs (group, chunk): the first groups_a groups own BK columns of dA each, groups_b each those of a piece's dB; a chunk is `tiles` tiles of BT rows.
    """
    group, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row0 = chunk * tiles * BT
    start = 0 if seed is None else tl.load(seed)
    if group < groups_a:
        ranks = pieces * rank
        _sum_rows(v, x, x_stride, I, group * BK, partial_a + chunk * ranks * I, I, T, 0, ranks, row0, tiles, start, site, threshold, DROPS, BT, BK, R)
    else:
        piece, group = (group - groups_a) // groups_b, (group - groups_a) % groups_b
        mine = partial_b + chunk * rank * pieces * O + piece * O
        _sum_rows(u, dy + piece * apart, dy_stride, O, group * BK, mine, pieces * O, T, piece * rank, rank, row0, tiles, start, site, threshold, False, BT, BK, R)


@triton.jit
def _zeros(N: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """N sums [W, R, BK] that begin."""
    found = ()
    for _ in tl.static_range(N):
        found = found + (tl.zeros((W, R, BK), tl.float32),)
    return found


@triton.jit
def _side(base, row0, stride, first, blocks, T, seed, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr, W: tl.constexpr, BK: tl.constexpr):
    """W tiles side by side, [W, BT, BK], from row row0 and column `first` on; rows beyond T are zeros. DROPS: dropped as dropout.py says, `blocks` blocks of 8 a row."""
    columns, rows = first + (tl.arange(0, W) * BK)[:, None] + tl.arange(0, BK)[None, :], tl.arange(0, BT).to(tl.int64)
    value = tl.load(base + row0 * stride + (rows[None, :, None] * stride + columns[:, None, :]), mask=(rows < T - row0)[None, :, None], other=0.0)
    if DROPS:
        kept = keep(row0 + rows, first // 8, blocks, seed, site, threshold, W * BK // 8)
        value = tl.where(tl.permute(tl.reshape(kept, (BT, W, BK)), (1, 0, 2)), value, 0.0)
    return value


@triton.jit
def _over_tiles(u, v):
    """[BT, R] fp32 each: u and v [W, BT, R] fp32 summed over W. Tiles lie in different warps: a thread gets both halves of W for its numbers, of u and v in one exchange. (A bare
    tl.sum over W has a warp write and read one number in eight, eight times in a row, and triton 3.6 puts them into the same bank of shared memory.)"""
    W: tl.constexpr = u.shape[0]
    BT: tl.constexpr = u.shape[1]
    R: tl.constexpr = u.shape[2]
    both = tl.permute(tl.join(u, v), (1, 2, 3, 0))
    even, odd = tl.split(tl.reshape(both, (BT, R, 2, W // 2, 2)))
    return tl.split(tl.sum(even + odd, 3))


@triton.jit
def _everywhere(low, W: tl.constexpr):
    """[W, R, BT]: low [BT, R], of any dtype, turned, for each of the W tiles side by side."""
    return tl.broadcast_to(tl.trans(low)[None, :, :], (W, low.shape[1], low.shape[0]))


@triton.jit(do_not_specialize=["T", "tiles", "site", "threshold"])
def once_kernel(x, dy, packed, seed, partial_a, partial_b, T, I, O, x_stride, dy_stride, apart, rank, tiles, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr,
                W: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, XS: tl.constexpr, DYS: tl.constexpr):
    """partial_a and partial_b as of partial_kernel, from x and dy themselves; the others as in thin_kernel. x is XS times W BK columns wide, a piece of dy DYS times. W
    tiles side by side are one product of W batches, which the warps share among them: as one wide product each warp would read all of it. The pieces share the sums of
    dB, as each has ranks of its own. Programs: a chunk of `tiles` tiles of BT rows each."""
    chunk, ranks, own_columns = tl.program_id(0).to(tl.int64), tl.arange(0, R), (tl.arange(0, W) * BK)[:, None] + tl.arange(0, BK)[None, :]
    start = 0 if seed is None else tl.load(seed)
    piece_of, low_b = ranks // rank, packed + R * I
    da, db = _zeros(XS, W, R, BK), _zeros(DYS, W, R, BK)
    for t in range(0, tiles):
        row0 = (chunk * tiles + t) * BT
        xs, dys, u, v = (), (), tl.zeros((W, BT, R), tl.float32), tl.zeros((W, BT, R), tl.float32)
        for i in tl.static_range(XS):
            value = _side(x, row0, x_stride, i * W * BK, I // 8, T, start, site, threshold, DROPS, BT, W, BK)
            u = dot(value, tl.load(packed + (i * W * BK + own_columns)[:, :, None] + ranks[None, None, :] * I), u)
            xs = xs + (value,)
        for piece in tl.static_range(PIECES):
            total = tl.zeros((W, BT, R), tl.float32)
            for j in tl.static_range(DYS):
                columns = (j * W * BK + own_columns)[:, :, None]
                b = tl.load(low_b + columns * R + ranks[None, None, :])
                for other in tl.static_range(1, PIECES):  # where the others' ranks are zeros: one tile for all pieces, in half the shared memory
                    b += tl.load(low_b + (other * O + columns) * R + ranks[None, None, :])
                value = _side(dy + piece * apart, row0, dy_stride, j * W * BK, 0, T, start, site, threshold, False, BT, W, BK)
                total = dot(value, b, total)
                dys = dys + (value,)
            v = total if PIECES == 1 else tl.where((piece_of == piece)[None, None, :], total, v)
        u, v = _over_tiles(u, v)
        u, v, grown = _everywhere(u.to(x.dtype.element_ty), W), _everywhere(v.to(x.dtype.element_ty), W), ()
        for j in tl.static_range(DYS):
            total = dot(u, dys[j], db[j])
            for piece in tl.static_range(1, PIECES):  # u with zeros for the others' ranks would go through shared memory once more
                total = tl.where((piece_of == piece)[None, :, None], dot(u, dys[piece * DYS + j], db[j]), total)
            grown = grown + (total,)
        db, grown = grown, ()
        for i in tl.static_range(XS):
            grown = grown + (dot(v, xs[i], da[i]),)
        da = grown
    held = (ranks < PIECES * rank)[None, :, None]
    for i in tl.static_range(XS):
        tl.store(partial_a + (chunk * PIECES * rank + ranks[None, :, None]) * I + (i * W * BK + own_columns)[:, None, :], da[i], mask=held)
    for j in tl.static_range(DYS):
        places = (chunk * rank + (ranks % rank)[None, :, None]) * (PIECES * O) + (piece_of * O)[None, :, None] + (j * W * BK + own_columns)[:, None, :]
        tl.store(partial_b + places, db[j], mask=held)


@triton.jit(do_not_specialize=["chunks", "ranks", "groups_a"])
def sum_kernel(partial_a, partial_b, da, db, chunks, ranks, rank, I, O, groups_a, scale_a, scale_b, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """da [ranks, I] and db [O, rank] = scale_a and scale_b times the sums over the chunks; here `ranks` are all pieces' and O is all pieces'. Programs (group of BN columns, k), the first
    groups_a groups of dA."""
    group, k = tl.program_id(0), tl.program_id(1)
    if group < groups_a:
        reduce(partial_a, da, chunks, ranks, I, scale_a, I, 1, group, k, CHUNKS, BN)
    elif k < rank:
        reduce(partial_b, db, chunks, rank, O, scale_b, 1, rank, group - groups_a, k, CHUNKS, BN)


# ---------------------------------------------------------------- sizes, specs

def tiles_for(dtype: torch.dtype, ranks: int) -> dict[str, int]:
    """BT, BK, R of partial_kernel and how the compiler schedules; ranks: R."""
    if dtype == torch.float32:
        return {"BT": 32 if ranks <= 32 else 16, "BK": 64 if ranks <= 32 else 32, "R": ranks, "num_warps": 8, "num_stages": 2}
    return {"BT": 32, "BK": 128 if ranks <= 32 else 64, "R": ranks, "num_warps": 4, "num_stages": 4}


SUMMED = {"CHUNKS": 32, "BN": 64}


ONCE = {"BT": 16, "W": 8, "BK": 16, "R": 16, "num_warps": 8}
ONCE_COLUMNS = ONCE["W"] * ONCE["BK"]


def once_tiles(arch: int) -> dict[str, int]:
    """As tiles_for, of once_kernel. Before 90 there is shared memory for one tile of rows on its way, from 90 on for two. With BK 16 the 8 warps share out W whole: of wider
    tiles triton 3.9 gives a thread some of several W, lays them out in shared memory so, and eight rows of a product's operand come from one bank."""
    return ONCE | {"num_stages": 2 if arch < 90 else 3}


def once_serves(arch: int, dtype: torch.dtype, width: int, out: int, pieces: int, ranks: int, drops: bool) -> bool:
    """Whether "once" takes x of `width` and pieces of dY of `out` columns with `ranks` ranks together. Its sums must fit in registers, and tiles of rows in shared memory: of
    that a data centre's GPUs have 160 KB and more, others 100. Columns come in whole tiles: the registers of a mask are not there."""
    return (arch in (80, 90, 100, 103) and dtype != torch.float32 and ranks <= 16 and pieces <= (1 if drops else 2) and max(width, out) <= 768
            and not width % ONCE_COLUMNS and not out % ONCE_COLUMNS)


def specs(arch: int) -> list[Spec]:
    found = []
    whole = {name: "i32" for name in ("T", "I", "O", "x_stride", "dy_stride", "apart", "pieces", "rank", "groups_a", "groups_b", "tiles", "site", "threshold")}

    def add(name: str, kernel, kind: str, drops: bool, sizes: dict[str, int]) -> None:
        pointers = dict.fromkeys(("x", "dy", "packed", "u", "v"), f"*{kind}") | dict.fromkeys(("partial_a", "partial_b"), "*fp32") | ({"seed": "*i64"} if drops else {})
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        signature = {key: value for key, value in (pointers | whole).items() if key in kernel.arg_names}
        found.append(Spec(name + (", dropout" if drops else ""), kernel, signature, {"DROPS": drops} | sizes | ({} if drops else {"seed": None}), warps, stages,
                          aligned=tuple(n for n in ("I", "O", "x_stride", "dy_stride", "apart") if n in kernel.arg_names)))

    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for drops in (False, True):
                add(f"partial, {kind}, r {rank}", partial_kernel, kind, drops, tiles_for(dtype, power(rank)))
    for kind in ("bf16", "fp16"):
        for pieces, drops in ((1, False), (2, False), (1, True)):
            if once_serves(arch, torch.bfloat16, 768, 768, pieces, 16, drops):
                add(f"once, {kind}, {pieces} of 768", once_kernel, kind, drops, once_tiles(arch) | {"PIECES": pieces, "XS": 768 // ONCE_COLUMNS, "DYS": 768 // ONCE_COLUMNS})
    signature = dict.fromkeys(("partial_a", "partial_b", "da", "db"), "*fp32") | dict.fromkeys(("chunks", "ranks", "rank", "I", "O", "groups_a"), "i32") | dict.fromkeys(("scale_a", "scale_b"), "fp32")
    return [*lora_thin.specs(arch), *found, Spec("sum", sum_kernel, signature, SUMMED, aligned=("I", "O"))]


# ---------------------------------------------------------------- launcher

def forms(x: Tensor, out: int, pieces: int, ranks: int, drops: bool) -> tuple[str, ...]:
    """Those that serve x [T, in] and pieces of dY of `out` columns with `ranks` ranks together, on x's device; the default first."""
    return dispatch.FORMS["lora_grads"] if once_serves(arch_of(x), x.dtype, x.shape[1], out, pieces, ranks, drops) else ("twice",)


def form_for(x: Tensor, out: int, pieces: int, ranks: int, rate: float, asked: str) -> str:
    """"twice" or "once". Looked up when the op runs, so a compiled graph holds no choice but the one `asked` for by name."""
    candidates = forms(x, out, pieces, ranks, rate > 0)
    return asked if asked in candidates else dispatch.pick("lora_grads", candidates, device=x.device, dtype=x.dtype, dropout=rate > 0, rows=x.shape[0], inside=x.shape[1],
                                                           outside=pieces * out, rank=ranks)


@op("lora_grads", fake=lambda x, dy, a, b, *others: tuple(x.new_empty((len(t) * t[0].shape[0], t[0].shape[1]), dtype=t[0].dtype) for t in (a, b)))
def lora_grads_op(x: Tensor, dy: Tensor, a: list[Tensor], b: list[Tensor], scale: float, apart: int, rate: float, seed: Tensor | None, site: int, form: str,
                  packed: Tensor | None = None, u: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dA [G r, in] and dB [G out, r] of G pieces, one below the other; G r at most MAX_RANK, or G is 1. dy [T, ..]: the first piece's columns come first, the next one's
    `apart` further on. form: the one that is asked for, or nothing. packed, u, v: of lora_thin.py, by who has them."""
    pieces, (rank, width), out = len(a), a[0].shape, b[0].shape[0]
    if rank > MAX_RANK:
        z, dy = dropout(x, rate, seed, site) if rate else x, dy[:, :out]
        u, v = F.linear(z, a[0].to(x.dtype)) if u is None else u, dy @ b[0].to(dy.dtype) if v is None else v
        return (v.t() @ z * scale).to(a[0].dtype), (dy.t() @ u * scale).to(b[0].dtype)
    x, dy = rows_together(x), rows_together(dy)
    ranks, da, db = pieces * rank, a[0].new_empty(pieces * rank, width), b[0].new_empty(pieces * out, rank)
    shape, lacks = (width, out, apart, pieces, rank, rate, seed if rate else None, site), u is None or v is None
    once = (lacks or form) and form_for(x, out, pieces, ranks, rate, form) == "once"
    packed = pack(a, b, x.dtype) if packed is None and (once or lacks) else packed
    with on(x):
        if once:
            partial_a, partial_b = _once(x, dy, packed, *shape)
        else:
            made = thin(x if u is None else None, dy if v is None else None, packed, *shape) if lacks else (u, v)
            partial_a, partial_b = _twice(x, dy, *(mine if given is None else given for given, mine in zip((u, v), made)), *shape)
        whole = scale * 65536 / threshold_of(rate)  # with what the mask's scale is; u of `thin` has it
        groups = ceil_div(width, SUMMED["BN"]), ceil_div(pieces * out, SUMMED["BN"])
        sum_kernel[sum(groups), ranks](partial_a, partial_b, da, db, len(partial_a), ranks, rank, width, pieces * out, groups[0], whole, whole if once else scale,
                                       enable_fp_fusion=True, **SUMMED)
    return da, db


def _partial(x: Tensor, width: int, out: int, pieces: int, rank: int, tile: int, most: int) -> tuple[int, Tensor, Tensor]:
    """(tiles of `tile` rows in a chunk, partial_a, partial_b) for at most `most` chunks."""
    tiles = max(1, ceil_div(ceil_div(x.shape[0], tile), most))
    chunks = ceil_div(x.shape[0], tiles * tile)
    return tiles, *(x.new_empty((chunks, *shape), dtype=torch.float32) for shape in ((pieces * rank, width), (rank, pieces * out)))


def _twice(x: Tensor, dy: Tensor, u: Tensor, v: Tensor, width: int, out: int, apart: int, pieces: int, rank: int, rate: float, seed: Tensor | None,
           site: int) -> tuple[Tensor, Tensor]:
    sizes = tiles_for(x.dtype, ranks_of(rank, pieces))
    tiles, *partial = _partial(x, width, out, pieces, rank, sizes["BT"], CHUNKS)
    if x.shape[0]:
        groups = ceil_div(width, sizes["BK"]), ceil_div(out, sizes["BK"])
        partial_kernel[groups[0] + pieces * groups[1], len(partial[0])](x, dy, u, v, seed, *partial, *x.shape, out, x.stride(0), dy.stride(0), apart, pieces, rank, *groups, tiles,
                                                                        site, threshold_of(rate), DROPS=rate > 0, enable_fp_fusion=True, **sizes)
    return tuple(partial)


def _once(x: Tensor, dy: Tensor, packed: Tensor, width: int, out: int, apart: int, pieces: int, rank: int, rate: float, seed: Tensor | None,
          site: int) -> tuple[Tensor, Tensor]:
    sizes = once_tiles(arch_of(x))
    tiles, *partial = _partial(x, width, out, pieces, rank, sizes["BT"], processors(x))
    if x.shape[0]:
        once_kernel[len(partial[0]),](x, dy, packed, seed, *partial, *x.shape, out, x.stride(0), dy.stride(0), apart, rank, tiles, site, threshold_of(rate), DROPS=rate > 0,
                                      PIECES=pieces, XS=width // ONCE_COLUMNS, DYS=out // ONCE_COLUMNS, enable_fp_fusion=True, **sizes)
    return tuple(partial)


@register("lora_grads", "triton")
def lora_grads(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(dA, dB) as the file's first lines say. Raises ValueError on what does not fit, naming the tensor."""
    check("lora_grads", x, a, b, rate, seed)
    expect("lora_grads", "dy", dy, (x.shape[0], b.shape[0]), (x.dtype,), x.device)
    return lora_grads_op(x, dy, [a], [b], scale, 0, rate, seed, site, dispatch.asked("lora_grads") or "")


def check(op: str, x: Tensor, a: Tensor, b: Tensor, rate: float, seed: Tensor | None) -> None:
    """What every LoRA launcher refuses by name."""
    expect(op, "x", x, (-1, -1))
    expect(op, "A", a, (-1, x.shape[1]), device=x.device)
    expect(op, "B", b, (-1, a.shape[0]), (a.dtype,), x.device)
    if not a.shape[0]:
        raise ValueError(f"{op}, A: expected a rank of at least 1, got 0")
    threshold_of(rate)
    if rate:
        if seed is None:
            raise ValueError(f"{op}, seed: expected a tensor beside a rate of {rate}, got None")
        expect(op, "seed", seed, (1,), (torch.int64,), x.device)
