"""LoRA, part three of three: dA and dB from one pass over dY and x.

Contract. lora_grads(x, dy, a, b, scale, rate, seed, site) computes lora_grads_ref of peftdebias/methods/lora.py: the gradients of
    y = x W^T + bias + s (z A^T) B^T,    z = x dropped with `rate`, or x itself at rate 0,
with respect to A and B. x [T, in] and dy [T, out] of one dtype (fp32, bf16, fp16), rows of any stride, neighbours in a row next to each other; A [r, in] and B [out, r]
of one dtype, r >= 1 (above 64 torch's own products do it). seed int64 [1] and site: see dropout.py. Returns dA [r, in], dB [out, r] in A's dtype. fp32 accumulation;
u and v are rounded to x's dtype before the second product, as a library's would be. Deterministic: no atomics, every sum in one order on one kind of device. Overwrites nothing.

Derivation. With u = z A^T [T, r] and v = dY B [T, r]:  dB = s dY^T u  and  dA = s v^T z.  dA needs all columns of dY for v and some of x, dB all of x for u and
some of dY: the same work with the roles exchanged. One calls the tensor that is multiplied by the thin matrix `left`, and the one whose columns the result has `right`:
    left [T, L] F [L, r] -> w [T, r];    w^T right [T, N] -> [r, N].

How. Stage 1: a program owns up to 6 pieces of BK columns of the result (their sums stay in registers) and a chunk of rows; per BT rows it walks over left for w, then
adds w^T right to each piece. Programs of one chunk, those of dA and those of dB, are neighbours in the launch: x and dY come from memory once and from L2 the second time.
Stage 2 adds the chunks' sums in their order.
What limits it: at widths of 768 memory; at 3072, whose columns need four groups, L2, as each group computes its own w (768 -> 3072: 2.6 times the bytes of x and dY
go through L2).

Letters: T rows, R rank (padded to a power of two), BT rows and BK columns of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .dropout import dropout, keep
from .dropout_ref import threshold_of
from .tiles import DTYPES, Spec, ceil_div, dot, expect, on, power, reduce_kernel, rows_together

CHUNKS = 128  # at most that many partial sums
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
def _side(left, left_stride, L, factor, factor_column, factor_rank, right, right_stride, N, first, partial, T, rank, row0, tiles, seed, site, threshold,
          LEFT_DROPS: tl.constexpr, RIGHT_DROPS: tl.constexpr, PIECES: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """partial [rank, N] at columns first .. first + PIECES * BK = (left F)^T right over `tiles` tiles of rows from row0 on; see the derivation."""
    ranks = tl.arange(0, R)
    s0 = tl.zeros((R, BK), tl.float32)
    s1, s2, s3, s4, s5 = s0, s0, s0, s0, s0
    for t in range(0, tiles):
        rows = (row0 + t * BT + tl.arange(0, BT)).to(tl.int64)
        w = tl.zeros((BT, R), tl.float32)
        for k in range(0, L, BK):
            columns = k + tl.arange(0, BK)
            thin = tl.load(factor + columns[:, None] * factor_column + ranks[None, :] * factor_rank, mask=(columns < L)[:, None] & (ranks < rank)[None, :], other=0.0)
            value = _tile(left, rows, left_stride, k, L, T, seed, site, threshold, LEFT_DROPS, BK)
            w = dot(value, thin.to(value.dtype), w)
        turned = tl.trans(w).to(right.dtype.element_ty)
        s0 = dot(turned, _tile(right, rows, right_stride, first, N, T, seed, site, threshold, RIGHT_DROPS, BK), s0)
        if PIECES > 1:
            s1 = dot(turned, _tile(right, rows, right_stride, first + BK, N, T, seed, site, threshold, RIGHT_DROPS, BK), s1)
        if PIECES > 2:
            s2 = dot(turned, _tile(right, rows, right_stride, first + 2 * BK, N, T, seed, site, threshold, RIGHT_DROPS, BK), s2)
        if PIECES > 3:
            s3 = dot(turned, _tile(right, rows, right_stride, first + 3 * BK, N, T, seed, site, threshold, RIGHT_DROPS, BK), s3)
        if PIECES > 4:
            s4 = dot(turned, _tile(right, rows, right_stride, first + 4 * BK, N, T, seed, site, threshold, RIGHT_DROPS, BK), s4)
        if PIECES > 5:
            s5 = dot(turned, _tile(right, rows, right_stride, first + 5 * BK, N, T, seed, site, threshold, RIGHT_DROPS, BK), s5)
    _put(partial, s0, first, N, rank, BK, R)
    if PIECES > 1:
        _put(partial, s1, first + BK, N, rank, BK, R)
    if PIECES > 2:
        _put(partial, s2, first + 2 * BK, N, rank, BK, R)
    if PIECES > 3:
        _put(partial, s3, first + 3 * BK, N, rank, BK, R)
    if PIECES > 4:
        _put(partial, s4, first + 4 * BK, N, rank, BK, R)
    if PIECES > 5:
        _put(partial, s5, first + 5 * BK, N, rank, BK, R)


@triton.jit
def _put(partial, total, first, N, rank, BK: tl.constexpr, R: tl.constexpr):
    ranks, columns = tl.arange(0, R), first + tl.arange(0, BK)
    tl.store(partial + ranks[:, None] * N + columns[None, :], total, mask=(ranks < rank)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["site"])
def partial_kernel(x, dy, a, b, seed, partial_a, partial_b, T, I, O, x_stride, dy_stride, rank, groups_a, tiles, site, threshold,
                   DROPS: tl.constexpr, PIECES: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, R: tl.constexpr):
    """Stage 1: partial_a fp32 [chunks, rank, I], partial_b fp32 [chunks, rank, O], not scaled. x [T, I], dy [T, O], a [rank, I], b [O, rank], seed int64 [1].

    Programs (group, chunk): the first groups_a groups own columns of dA, the others of dB; a chunk is `tiles` tiles of BT rows.
    """
    group, chunk = tl.program_id(0), tl.program_id(1)
    row0 = chunk * tiles * BT
    start = 0 if seed is None else tl.load(seed)
    if group < groups_a:
        _side(dy, dy_stride, O, b, rank, 1, x, x_stride, I, group * (PIECES * BK), partial_a + chunk.to(tl.int64) * rank * I, T, rank, row0, tiles, start, site,
              threshold, False, DROPS, PIECES, BT, BK, R)
    else:
        _side(x, x_stride, I, a, 1, I, dy, dy_stride, O, (group - groups_a) * (PIECES * BK), partial_b + chunk.to(tl.int64) * rank * O, T, rank, row0, tiles, start,
              site, threshold, DROPS, False, PIECES, BT, BK, R)


# ---------------------------------------------------------------- sizes, specs

def tiles_for(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """BT, BK, R, PIECES and how many warps. Pieces times R stays the same, and with it the registers that the sums take."""
    r = power(rank)
    if dtype == torch.float32:
        return {"BT": 16, "BK": 64 if rank <= 32 else 32, "R": r, "PIECES": max(1, 24 // r), "num_warps": 8, "num_stages": 2}
    return {"BT": 32, "BK": 128, "R": r, "PIECES": max(1, 96 // r), "num_warps": 8, "num_stages": 2}


def specs(arch: int) -> list[Spec]:
    found = []
    whole = {name: "i32" for name in ("T", "I", "O", "x_stride", "dy_stride", "rank", "groups_a", "tiles", "site", "threshold")}
    for dtype, kind in DTYPES.items():
        for rank in (8, 64):
            for drops in (False, True):
                sizes = tiles_for(dtype, rank)
                warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                pointers = {"x": f"*{kind}", "dy": f"*{kind}", "a": "*fp32", "b": "*fp32", "partial_a": "*fp32", "partial_b": "*fp32"}
                constants = {"DROPS": drops} | sizes | ({} if drops else {"seed": None})
                found.append(Spec(f"partial, {kind}, r {rank}{', dropout' if drops else ''}", partial_kernel, pointers | whole | ({"seed": "*i64"} if drops else {}),
                                  constants, warps, stages, aligned=("I", "O", "x_stride", "dy_stride")))
    found.append(Spec("reduce", reduce_kernel, {"partial": "*fp32", "result": "*fp32", "chunks": "i32", "rank": "i32", "N": "i32", "scale": "fp32", "rank_stride": "i32",
                                                "column_stride": "i32"}, {"CHUNKS": 16, "BN": 128}, aligned=("N",)))
    return found


# ---------------------------------------------------------------- launcher

@op("lora_grads", fake=lambda x, dy, a, b, *others: tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b)))
def lora_grads_op(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, rate: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    if a.shape[0] > MAX_RANK:
        z, v = dropout(x, rate, seed, site) if rate else x, dy @ b.to(dy.dtype)
        return (v.t() @ z * scale).to(a.dtype), (dy.t() @ F.linear(z, a.to(z.dtype)) * scale).to(b.dtype)
    x, dy, a, b = rows_together(x), rows_together(dy), a.contiguous(), b.contiguous()
    (rows, width), out, rank = x.shape, dy.shape[1], a.shape[0]
    da, db = torch.empty_like(a), torch.empty_like(b)
    sizes = tiles_for(x.dtype, rank)
    owned = sizes["PIECES"] * sizes["BK"]
    tiles = max(1, ceil_div(ceil_div(rows, sizes["BT"]), CHUNKS))  # of BT rows, in a chunk
    chunks = ceil_div(rows, tiles * sizes["BT"])
    partial_a = torch.empty((chunks, rank, width), dtype=torch.float32, device=x.device)
    partial_b = torch.empty((chunks, rank, out), dtype=torch.float32, device=x.device)
    threshold = threshold_of(rate)
    with on(x):
        if chunks:
            groups = ceil_div(width, owned), ceil_div(out, owned)
            partial_kernel[(sum(groups), chunks)](x, dy, a, b, seed if rate else None, partial_a, partial_b, rows, width, out, x.stride(0), dy.stride(0), rank, groups[0],
                                                  tiles, site, threshold, DROPS=rate > 0, enable_fp_fusion=True, **sizes)
        for partial, result, strides in ((partial_a, da, (width, 1)), (partial_b, db, (1, rank))):
            columns = partial.shape[2]
            reduce_kernel[(ceil_div(columns, 128), rank)](partial, result, chunks, rank, columns, scale * 65536 / threshold, *strides, CHUNKS=16, BN=128,
                                                          enable_fp_fusion=True)
    return da, db


@register("lora_grads", "triton")
def lora_grads(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, rate: float = 0.0, seed: Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(dA, dB) as the file's first lines say. Raises ValueError on what does not fit, naming the tensor."""
    check("lora_grads", x, a, b, rate, seed)
    expect("lora_grads", "dy", dy, (x.shape[0], b.shape[0]), (x.dtype,), x.device)
    return lora_grads_op(x, dy, a, b, scale, rate, seed, site)


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
