"""LoRA, part three of three: dA and dB from x and dY.

Contract. lora_grads(x, dy, a, b, scale, rate, seed, site) computes lora_grads_ref of peftdebias/methods/lora.py: the gradients of
    y = x W^T + bias + s (z A^T) B^T,    z = x dropped with `rate`, or x itself at rate 0,
with respect to A and B. x [T, in] and dy [T, out] of one dtype (fp32, bf16, fp16), rows of any stride, neighbours in a row next to each other; A [r, in] and B [out, r]
of one dtype, r >= 1 (above 64 torch's own products do it). seed int64 [1] and site: see dropout.py. Returns dA [r, in], dB [out, r] in A's dtype. fp32 accumulation;
u and v are rounded to x's dtype before the second product, as a library's would be. Deterministic: no atomics, every sum in one order on one kind of device. Overwrites nothing.
lora_grads_op takes several pieces of one product, query's and value's, say: their A and B stand in lists, their columns of dY equally far apart. Their ranks lie side by side
in one tile, so x, which they share, is read as often as for one of them.

Derivation. With u = z A^T [T, r] and v = dY B [T, r]:  dB = s dY^T u  and  dA = s v^T z.  dA needs all columns of dY for v and some of x, dB all of x for u and
some of dY: the same work with the roles exchanged. One calls the tensor that is multiplied by the thin matrix `left`, and the one whose columns the result has `right`:
    left [T, L] F [L, r] -> w [T, r];    w^T right [T, N] -> [r, N].
Of the ranks of all pieces a piece's own begin at `lowest`; the others' are 0 in F and are not stored.

How. Three launches, each a stream of tiles with several on their way. `thin_kernel`: w = left F for both sides, a program a tile of rows. `partial_kernel`: w^T right,
a program a tile of columns and a chunk of rows. `sum_kernel` adds the chunks' sums in their order. x and dY are read twice; where the two fit in the L2 cache, once from
memory. One kernel that keeps a row tile for both products would read them once, and wait for its first product before every second.
What limits it: memory, and at a few thousand rows the launches.

Letters: T rows, G pieces, I = in, O = out of a piece, R ranks of all pieces (padded to a power of two), BT rows and BK columns of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .dropout import dropout, keep
from .dropout_ref import threshold_of
from .op import op
from .tiles import DTYPES, Spec, ceil_div, dot, expect, on, power, reduce, rows_together

CHUNKS = 32  # at most that many partial sums
MAX_RANK = 64


@triton.jit
def _tile(base, rows, stride, first, width, T, seed, site, threshold, DROPS: tl.constexpr, BK: tl.constexpr):
    """[BT, BK] of a tensor [T, width] from column `first` on, 0 outside; with DROPS what the mask drops is 0 too (the scale comes at the end)."""
    columns = first + tl.arange(0, BK)
    value = tl.load(base + rows[:, None] * stride + columns[None, :], mask=(rows < T)[:, None] & (columns < width)[None, :], other=0.0)
    if DROPS:
        value = tl.where(keep(rows, first // 8, (width + 7) // 8, seed, site, threshold, BK // 8), value, 0.0)
    return value


@triton.jit
def _thin(left, left_stride, L, factor, factor_column, factor_rank, w, rows, T, lowest, rank, seed, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
          R: tl.constexpr):
    """w [T, R] at these rows = left [T, L] times the thin matrix, whose `rank` ranks are those from `lowest` on."""
    ranks, total = tl.arange(0, R) - lowest, tl.zeros((BT, R), tl.float32)
    own = (ranks >= 0) & (ranks < rank)
    for k in range(0, L, BK):
        columns = k + tl.arange(0, BK)
        thin = tl.load(factor + columns[:, None] * factor_column + ranks[None, :] * factor_rank, mask=(columns < L)[:, None] & own[None, :], other=0.0)
        value = _tile(left, rows, left_stride, k, L, T, seed, site, threshold, DROPS, BK)
        total = dot(value, thin.to(value.dtype), total)
    tl.store(w + rows[:, None] * R + (lowest + ranks)[None, :], total.to(w.dtype.element_ty), mask=(rows < T)[:, None] & own[None, :])


@triton.jit(do_not_specialize=["site"])
def thin_kernel(x, dy, a, b, seed, u, v, T, I, O, x_stride, dy_stride, apart, pieces, rank, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """u = z A^T without z's scale and v = dY B, [T, R] of x's dtype. x [T, I], dy [T, O] of the first piece, the next one's `apart` columns further, a [G rank, I],
    b [G O, rank], seed int64 [1]. Programs: u and then v of every piece of a row tile, row tile after row tile; one axis, as the others end at 65 535."""
    side, tile = tl.program_id(0) % (1 + pieces), tl.program_id(0) // (1 + pieces)
    rows = (tile * BT + tl.arange(0, BT)).to(tl.int64)
    start = 0 if seed is None else tl.load(seed)
    if side == 0:
        _thin(x, x_stride, I, a, 1, I, u, rows, T, 0, pieces * rank, start, site, threshold, DROPS, BT, BK, R)
    else:
        piece = side - 1
        _thin(dy + piece * apart, dy_stride, O, b + piece * O * rank, rank, 1, v, rows, T, piece * rank, rank, start, site, threshold, False, BT, BK, R)


@triton.jit
def _sum_rows(w, right, right_stride, N, first, partial, partial_stride, T, lowest, rank, row0, tiles, seed, site, threshold, DROPS: tl.constexpr, BT: tl.constexpr,
              BK: tl.constexpr, R: tl.constexpr):
    """partial [rank, N], rows partial_stride apart, at the columns first .. first + BK = w^T right over `tiles` tiles of rows from row0 on, of the ranks from `lowest` on."""
    ranks, columns, total = tl.arange(0, R), first + tl.arange(0, BK), tl.zeros((R, BK), tl.float32)
    for t in range(0, tiles):
        rows = (row0 + t * BT + tl.arange(0, BT)).to(tl.int64)
        thin = tl.load(w + rows[:, None] * R + ranks[None, :], mask=(rows < T)[:, None], other=0.0)  # all ranks, in whole vectors; what nobody asked for is not stored
        total = dot(tl.trans(thin), _tile(right, rows, right_stride, first, N, T, seed, site, threshold, DROPS, BK), total)
    ranks -= lowest
    tl.store(partial + ranks[:, None] * partial_stride + columns[None, :], total, mask=((ranks >= 0) & (ranks < rank))[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["site"])
def partial_kernel(x, dy, u, v, seed, partial_a, partial_b, T, I, O, x_stride, dy_stride, apart, pieces, rank, groups_a, groups_b, tiles, site, threshold,
                   DROPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """partial_a fp32 [chunks, G rank, I], partial_b fp32 [chunks, rank, G O], not scaled. u, v [T, R]; the others as in thin_kernel.

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
def sum_kernel(partial_a, partial_b, da, db, chunks, ranks, rank, I, O, groups_a, scale, CHUNKS: tl.constexpr, BN: tl.constexpr):
    """da [ranks, I] and db [O, rank] = scale times the sums over the chunks; here `ranks` are all pieces' and O is all pieces'. Programs (group of BN columns, k), the first
    groups_a groups of dA."""
    group, k = tl.program_id(0), tl.program_id(1)
    if group < groups_a:
        reduce(partial_a, da, chunks, ranks, I, scale, I, 1, group, k, CHUNKS, BN)
    elif k < rank:
        reduce(partial_b, db, chunks, rank, O, scale, 1, rank, group - groups_a, k, CHUNKS, BN)


# ---------------------------------------------------------------- sizes, specs

def tiles_for(dtype: torch.dtype, rank: int, kernel: str) -> dict[str, int]:
    """BT, BK, R and how the compiler schedules. kernel: "thin", which has a tile of rows for itself and walks over columns, or "partial", the other way round."""
    r = power(rank)
    if dtype == torch.float32:
        return {"BT": 32 if r <= 32 else 16, "BK": 64 if r <= 32 else 32, "R": r, "num_warps": 8, "num_stages": 2 if r <= 32 or kernel == "partial" else 1}
    if kernel == "thin":
        return {"BT": 128, "BK": 128 if r <= 32 else 64, "R": r, "num_warps": 8, "num_stages": 3}
    return {"BT": 32, "BK": 128 if r <= 32 else 64, "R": r, "num_warps": 4, "num_stages": 4}


SUMMED = {"CHUNKS": 32, "BN": 64}


def specs(arch: int) -> list[Spec]:
    found = []
    whole = {name: "i32" for name in ("T", "I", "O", "x_stride", "dy_stride", "apart", "pieces", "rank", "groups_a", "groups_b", "tiles", "site", "threshold")}
    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for drops in (False, True):
                pointers = dict.fromkeys(("x", "dy", "u", "v"), f"*{kind}") | dict.fromkeys(("a", "b", "partial_a", "partial_b"), "*fp32") | ({"seed": "*i64"} if drops else {})
                for name, kernel in (("thin", thin_kernel), ("partial", partial_kernel)):
                    sizes = tiles_for(dtype, rank, name)
                    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                    signature = {key: value for key, value in (pointers | whole).items() if key in kernel.arg_names}
                    found.append(Spec(f"{name}, {kind}, r {rank}{', dropout' if drops else ''}", kernel, signature, {"DROPS": drops} | sizes | ({} if drops else {"seed": None}),
                                      warps, stages, aligned=("I", "O", "x_stride", "dy_stride", "apart")))
    signature = dict.fromkeys(("partial_a", "partial_b", "da", "db"), "*fp32") | dict.fromkeys(("chunks", "ranks", "rank", "I", "O", "groups_a"), "i32") | {"scale": "fp32"}
    return [*found, Spec("sum", sum_kernel, signature, SUMMED, aligned=("I", "O"))]


# ---------------------------------------------------------------- launcher

@op("lora_grads", fake=lambda x, dy, a, b, *others: tuple(x.new_empty((len(t) * t[0].shape[0], t[0].shape[1]), dtype=t[0].dtype) for t in (a, b)))
def lora_grads_op(x: Tensor, dy: Tensor, a: list[Tensor], b: list[Tensor], scale: float, apart: int, rate: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """dA [G r, in] and dB [G out, r] of G pieces, one below the other; G r at most MAX_RANK, or G is 1. dy [T, ..]: the first piece's columns come first, the next one's
    `apart` further on."""
    pieces, (rank, width), out = len(a), a[0].shape, b[0].shape[0]
    a, b = (t[0].contiguous() if pieces == 1 else torch.cat(t) for t in (a, b))
    if rank > MAX_RANK:
        z, v = dropout(x, rate, seed, site) if rate else x, dy[:, :out] @ b.to(dy.dtype)
        return (v.t() @ z * scale).to(a.dtype), (dy[:, :out].t() @ F.linear(z, a.to(z.dtype)) * scale).to(b.dtype)
    x, dy = rows_together(x), rows_together(dy)
    rows, ranks = x.shape[0], pieces * rank
    da, db = torch.empty_like(a), torch.empty_like(b)
    u, v = (torch.empty((rows, power(ranks)), dtype=x.dtype, device=x.device) for _ in range(2))
    thin, sizes, threshold = tiles_for(x.dtype, ranks, "thin"), tiles_for(x.dtype, ranks, "partial"), threshold_of(rate)
    tiles = max(1, ceil_div(ceil_div(rows, sizes["BT"]), CHUNKS))  # of BT rows, in a chunk
    chunks = ceil_div(rows, tiles * sizes["BT"])
    partial_a = torch.empty((chunks, ranks, width), dtype=torch.float32, device=x.device)
    partial_b = torch.empty((chunks, rank, pieces * out), dtype=torch.float32, device=x.device)
    shape = rows, width, out, x.stride(0), dy.stride(0), apart, pieces, rank
    options = {"DROPS": rate > 0, "enable_fp_fusion": True}
    with on(x):
        if chunks:
            thin_kernel[(1 + pieces) * ceil_div(rows, thin["BT"]),](x, dy, a, b, seed if rate else None, u, v, *shape, site, threshold, **options, **thin)
            groups = ceil_div(width, sizes["BK"]), ceil_div(out, sizes["BK"])
            partial_kernel[groups[0] + pieces * groups[1], chunks](x, dy, u, v, seed if rate else None, partial_a, partial_b, *shape, *groups, tiles, site, threshold, **options,
                                                                   **sizes)
        groups = ceil_div(width, SUMMED["BN"]), ceil_div(pieces * out, SUMMED["BN"])
        sum_kernel[sum(groups), ranks](partial_a, partial_b, da, db, chunks, ranks, rank, width, pieces * out, groups[0], scale * 65536 / threshold, enable_fp_fusion=True,
                                       **SUMMED)
    return da, db


@register("lora_grads", "triton")
def lora_grads(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(dA, dB) as the file's first lines say. Raises ValueError on what does not fit, naming the tensor."""
    check("lora_grads", x, a, b, rate, seed)
    expect("lora_grads", "dy", dy, (x.shape[0], b.shape[0]), (x.dtype,), x.device)
    return lora_grads_op(x, dy, [a], [b], scale, 0, rate, seed, site)


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
