"""Bidirectional attention inside each sequence of a packed batch, with prefix and dropout inside; the backward that goes with it. Computes attention_ref of
peftdebias/ops/attention.py:

    s_ij = q_i . k_j / sqrt(W)      l_i = log sum_j exp s_ij      a_ij = exp(s_ij - l_i)      y_i = sum_j m_ij / c a_ij v_j

    q [Mq, H, W], k and v [T, H, W] -> y [Mq, H, W], every head for itself. i: the query rows of a sequence, which may be fewer than its keys or none; j: the P keys
    of the prefix, [P, H, W], which the sequences share, and the sequence's own. m in {0, 1}: dropout, drawn from counters (attention_keep of dropout_ref.py), c the
    share kept; without dropout m = c = 1. A sequence with neither keys nor prefix gives zeros.
    float32, bfloat16 or float16, q, k and v alike (under autocast: of autocast's dtype); the prefix may be of any of these, and what the products see of it is of q's.
    Scores, sums and the softmax are float32; a is rounded to v's dtype before it meets v, as in a library's flash attention. W at most 128, padded to a power of two
    inside. Rows of q, k and v may lie apart, as slices of one [T, 3 D] product do; any other layout is copied.
    The host's lists of lengths give the grid alone, by their number and their largest; which rows belong together is read on the device from cu_queries and cu_keys.

Saved for the backward: q, k, v and the prefix as they came, y, the seed, and l as two float32 of [H, Mq]: the largest q_i . k_j and the inverse of the sum
relative to it, 0 where there is no key (in one number a large score would take the sum's last bits; and the difference is scaled, not the product, so that the
largest shares have the least error). No saved tensor is overwritten, no mask and no matrix [Mq, T] is ever stored, and the prefix is never copied for a sequence.

How: one pass over blocks of keys with the softmax carried along (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), the prefix's
blocks first, then the own; so l is over both, and the backward is exact. With g the gradient of y:

    d_i = g_i . y_i      da_ij = m_ij / c g_i . v_j      ds_ij = a_ij (da_ij - d_i)        since d_i = sum_j a_ij da_ij
    dv_j = sum_i m_ij / c a_ij g_i      dk_j = sum_i ds_ij q_i / sqrt(W)      dq_i = sum_j ds_ij k_j / sqrt(W)

Where all keys of the longest sequence are one tile (64 keys, no prefix; 16-bit, W at most 64), one kernel does all that belongs to a sequence: q, k, v, y, g are read and
dq, dk, dv written once. Else dq and d come from one kernel, dk and dv from another, which computes a again. Longer sequences in one program, dq waiting in memory between
two tiles of keys, were no faster than the two kernels at 256 keys, and slower with a prefix or without dropout. The prefix's dk and dv are sums over all
of Mq: every program sums a stretch, a second kernel the stretches, in float32 and in one order; frozen, nothing is computed for it. No atomics: gradients repeat
bit for bit. What nobody asks for is left out. In float32 d is its sum over the keys, one pass more: where one key has nearly all of a, da - d is the difference of
two near equals, and g . y, summed in another order, would cost the last bits of ds; 16-bit gradients are rounded more than that.
What limits it: at lengths of BERT's texts memory; with dropout, the ten rounds of Philox for eight probabilities.

The room: peftdebias/ops/attention.py (specification, the other forms), dropout_ref.py (the bits), this file (kernels), tests/kernel_checks/check_attention.py (proof).
Letters: T keys, Mq query rows, B sequences, H heads, W head width, P prefix length; BM, BN, BP, BW rows, own keys, prefix keys and width of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .dropout import keep_at
from .dropout_ref import Drop, threshold_of
from .op import op
from .tiles import DTYPES, Spec, ceil_div, dot, expect, on, power, product_dtype, sum_spec, sum_stretches

WIDEST = 128  # W
STRETCH = 256  # query rows that one program sums for the gradients of the prefix, at least
MOST_STRETCHES = 16


# ---------------------------------------------------------------- arithmetic

@triton.jit
def _load(x, rows, inside, stride, W: tl.constexpr, BW: tl.constexpr):
    """[n, BW]: one head's W values of these rows; 0 beyond W and where not inside. x points at the head in row 0."""
    w = tl.arange(0, BW)
    mask = inside[:, None] if W == BW else inside[:, None] & (w < W)[None, :]
    return tl.load(x + rows[:, None] * stride + w[None, :], mask=mask, other=0.0)


@triton.jit
def _store(x, tile, rows, inside, stride, W: tl.constexpr, BW: tl.constexpr):
    w = tl.arange(0, BW)
    mask = inside[:, None] if W == BW else inside[:, None] & (w < W)[None, :]
    tl.store(x + rows[:, None] * stride + w[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _sums(sums, rows, inside, head, Mq, H):
    """l of these rows as it is saved: the largest q . k and the inverse of the sum. Rows that are not inside have the share 0: nothing comes of them."""
    sums += head.to(tl.int64) * Mq
    return tl.load(sums + rows, mask=inside, other=0.0), tl.load(sums + tl.cast(H, tl.int64) * Mq + rows, mask=inside, other=0.0)


@triton.jit
def _kept(rows, first, fourth, seed, site, threshold, KEYS: tl.constexpr):
    """bool [n, KEYS]: attention_keep of these query rows and of the keys from place `first` on, a multiple of 8. fourth: 1 + 2 head, one more for a prefix."""
    place = first // 8 + tl.arange(0, KEYS // 8)
    return keep_at(place.to(tl.uint32)[None, :], rows.to(tl.uint32)[:, None], fourth.to(tl.uint32), seed, site, threshold)


@triton.jit
def _fold(q, k, v, inside, kept, top, total, y, scale, DROPS: tl.constexpr):
    """One block of keys into the softmax carried along: top and total [BM], the largest q . k and the sum relative to it; y [BM, BW], not yet divided by it."""
    s = tl.where(inside[None, :], dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)), float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2((top - higher) * scale)
    a = tl.exp2((s - higher[:, None]) * scale)
    total = total * shrink + tl.sum(a, 1)
    if DROPS:
        a = tl.where(kept, a, 0.0)
    return higher, total, dot(a.to(v.dtype), v, y * shrink[:, None])


@triton.jit
def _pull(left, right, pull_left, pull_right, inside, top, share, d, kept, scale, inverse, DROPS: tl.constexpr):
    """(m a, ds sqrt(W)) of one tile, [left, right]: with left = q, right = k, pull_left = g and pull_right = v rows by keys; with each pair swapped keys by rows.
    top, share: l, as it is saved; with inside, d and kept they broadcast to that."""
    nothing = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    a = tl.exp2((tl.where(inside, dot(left, tl.trans(right), nothing), float("-inf")) - top) * scale) * share
    da = dot(pull_left, tl.trans(pull_right), nothing)
    if DROPS:
        return tl.where(kept, a, 0.0), a * (tl.where(kept, da * inverse, 0.0) - d)
    return a, a * (da - d)


# ---------------------------------------------------------------- forward

@triton.jit(do_not_specialize=["site"])
def forward_kernel(q, k, v, prefix_k, prefix_v, cu_queries, cu_keys, seed, y, sums, Mq, P, H, q_row, k_row, v_row, site, threshold, scale, inverse,
                   DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """y [Mq, H, W] and sums fp32 [2, H, Mq] = l of q [Mq, H, W], k and v [T, H, W], prefix_k and prefix_v [P, H, W] or None, cu_queries and cu_keys int32 [B + 1], seed int64 [1]
    or None. scale: 1 / sqrt(W) in units of log 2; inverse: 1 / c. Program (sequence and head, tile of its queries)."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    if q0 + tl.program_id(1) * BM >= q1:
        return
    rows = q0.to(tl.int64) + tl.program_id(1) * BM + tl.arange(0, BM)
    start = 0 if seed is None else tl.load(seed)
    query = _load(q + head * W, rows, rows < q1, q_row, W, BW)
    top, total, found = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BW], tl.float32)
    if prefix_k is not None:
        for first in range(0, P, BP):
            place = first + tl.arange(0, BP)
            key = _load(prefix_k + head * W, place, place < P, H * W, W, BW).to(query.dtype)
            value = _load(prefix_v + head * W, place, place < P, H * W, W, BW).to(query.dtype)
            kept = _kept(rows, first, 2 + 2 * head, start, site, threshold, BP) if DROPS else place < P
            top, total, found = _fold(query, key, value, place < P, kept, top, total, found, scale, DROPS)
    for first in range(0, k1 - k0, BN):
        place = k0.to(tl.int64) + first + tl.arange(0, BN)
        key, value = _load(k + head * W, place, place < k1, k_row, W, BW), _load(v + head * W, place, place < k1, v_row, W, BW)
        kept = _kept(rows, first, 1 + 2 * head, start, site, threshold, BN) if DROPS else place < k1
        top, total, found = _fold(query, key, value, place < k1, kept, top, total, found, scale, DROPS)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    _store(y + head * W, found * (inverse * share)[:, None], rows, rows < q1, H * W, W, BW)
    sums += head.to(tl.int64) * Mq
    tl.store(sums + rows, tl.where(total == 0.0, 0.0, top), mask=rows < q1)
    tl.store(sums + tl.cast(H, tl.int64) * Mq + rows, share, mask=rows < q1)


# ---------------------------------------------------------------- backward

@triton.jit
def _over_keys(query, pull, top, share, d, found, rows, k, v, k0, k1, k_row, v_row, fourth, start, site, threshold, scale, inverse, SUMS: tl.constexpr,
               DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr):
    """found [BM, BW] and what the keys k0 .. k1 add to dq, times sqrt(W); with SUMS found [BM] and what they add to d, where d itself is 0."""
    for first in range(0, k1 - k0, BN):
        place = k0 + first + tl.arange(0, BN)
        kept = _kept(rows, first, fourth, start, site, threshold, BN) if DROPS else place < k1
        key, value = _load(k, place, place < k1, k_row, W, BW).to(query.dtype), _load(v, place, place < k1, v_row, W, BW).to(query.dtype)
        _, ds = _pull(query, key, pull, value, (place < k1)[None, :], top[:, None], share[:, None], d[:, None], kept, scale, inverse, DROPS)
        if SUMS:
            found += tl.sum(ds, 1)
        else:
            found = dot(ds.to(query.dtype), key, found)
    return found


@triton.jit(do_not_specialize=["site"])
def backward_queries_kernel(q, k, v, prefix_k, prefix_v, g, y, sums, cu_queries, cu_keys, seed, delta, dq, Mq, P, H, q_row, k_row, v_row, dq_row, site, threshold,
                            scale, inverse, WANTED: tl.constexpr, EXACT: tl.constexpr, DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr,
                            BN: tl.constexpr, BP: tl.constexpr):
    """delta [H, Mq] fp32 = d, and where WANTED dq [Mq, H, W], of g and y [Mq, H, W], sums [2, H, Mq]; the others as in forward_kernel. EXACT: d by its sum over the
    keys. Program (sequence and head, tile of its queries)."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence).to(tl.int64), tl.load(cu_keys + sequence + 1).to(tl.int64)
    if q0 + tl.program_id(1) * BM >= q1:
        return
    rows = q0.to(tl.int64) + tl.program_id(1) * BM + tl.arange(0, BM)
    pull = _load(g + head * W, rows, rows < q1, H * W, W, BW)
    k, v, own, shared = k + head * W, v + head * W, 1 + 2 * head, 2 + 2 * head
    if WANTED or EXACT:
        start = 0 if seed is None else tl.load(seed)
        query = _load(q + head * W, rows, rows < q1, q_row, W, BW)
        top, share = _sums(sums, rows, rows < q1, head, Mq, H)
    if EXACT:
        nothing = tl.zeros([BM], tl.float32)
        d = nothing
        if prefix_k is not None:
            d = _over_keys(query, pull, top, share, nothing, d, rows, prefix_k + head * W, prefix_v + head * W, 0, P, H * W, H * W, shared, start, site, threshold, scale,
                           inverse, True, DROPS, W, BW, BP)
        d = _over_keys(query, pull, top, share, nothing, d, rows, k, v, k0, k1, k_row, v_row, own, start, site, threshold, scale, inverse, True, DROPS, W, BW, BN)
    else:
        d = tl.sum(pull.to(tl.float32) * _load(y + head * W, rows, rows < q1, H * W, W, BW).to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * Mq + rows, d, mask=rows < q1)
    if WANTED:
        found = tl.zeros([BM, BW], tl.float32)
        if prefix_k is not None:
            found = _over_keys(query, pull, top, share, d, found, rows, prefix_k + head * W, prefix_v + head * W, 0, P, H * W, H * W, shared, start, site, threshold, scale,
                               inverse, False, DROPS, W, BW, BP)
        found = _over_keys(query, pull, top, share, d, found, rows, k, v, k0, k1, k_row, v_row, own, start, site, threshold, scale, inverse, False, DROPS, W, BW, BN)
        _store(dq + head * W, found * W ** -0.5, rows, rows < q1, dq_row, W, BW)


@triton.jit(do_not_specialize=["site"])
def backward_keys_kernel(q, k, v, g, y, sums, cu_queries, cu_keys, seed, delta, dq, dk, dv, Mq, H, q_row, k_row, v_row, dq_row, d_row, site, threshold, scale,
                         inverse, WHOLE: tl.constexpr, DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dk, dv [T, H, W]. Program (sequence and head, tile of its keys). WHOLE: no sequence has more keys than a tile, and delta and dq are written too; else delta is
    read, and y is not there."""
    sequence, head = tl.program_id(0) // H, tl.program_id(0) % H
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    first = tl.program_id(1) * BN
    if not WHOLE:
        if k0 + first >= k1:
            return
    start = 0 if seed is None else tl.load(seed)
    place = k0.to(tl.int64) + first + tl.arange(0, BN)
    key, value = _load(k + head * W, place, place < k1, k_row, W, BW), _load(v + head * W, place, place < k1, v_row, W, BW)
    sum_k, sum_v = tl.zeros([BN, BW], tl.float32), tl.zeros([BN, BW], tl.float32)
    for more in range(0, q1 - q0, BM):
        rows = q0.to(tl.int64) + more + tl.arange(0, BM)
        kept = tl.trans(_kept(rows, first, 1 + 2 * head, start, site, threshold, BN)) if DROPS else place < k1
        query, pull = _load(q + head * W, rows, rows < q1, q_row, W, BW), _load(g + head * W, rows, rows < q1, H * W, W, BW)
        top, share = _sums(sums, rows, rows < q1, head, Mq, H)
        if WHOLE:
            d = tl.sum(pull.to(tl.float32) * _load(y + head * W, rows, rows < q1, H * W, W, BW).to(tl.float32), 1)
            tl.store(delta + head.to(tl.int64) * Mq + rows, d, mask=rows < q1)
        else:
            d = tl.load(delta + head.to(tl.int64) * Mq + rows, mask=rows < q1, other=0.0)
        a, ds = _pull(key, query, value, pull, (place < k1)[:, None], top[None, :], share[None, :], d[None, :], kept, scale, inverse, DROPS)
        ds = ds.to(key.dtype)
        sum_v = dot(a.to(key.dtype), pull, sum_v)
        sum_k = dot(ds, query, sum_k)
        if WHOLE:
            found = dot(tl.trans(ds), key, tl.zeros([BM, BW], tl.float32))
            _store(dq + head * W, found * W ** -0.5, rows, rows < q1, dq_row, W, BW)
    _store(dk + head * W, sum_k * W ** -0.5, place, place < k1, d_row, W, BW)
    _store(dv + head * W, sum_v * inverse, place, place < k1, d_row, W, BW)


@triton.jit(do_not_specialize=["site"])
def backward_prefix_kernel(q, prefix_k, prefix_v, g, sums, delta, seed, partial, Mq, P, H, q_row, stretch, site, threshold, scale, inverse, DROPS: tl.constexpr,
                           W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr):
    """partial [stretches, 2, P, H, W] fp32: dk and dv of the prefix, from the query rows [i stretch, (i + 1) stretch) whatever sequence they are of. Program (tile of
    the prefix and head, stretch i)."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    begin = tl.program_id(1).to(tl.int64) * stretch
    start = 0 if seed is None else tl.load(seed)
    place = tile * BP + tl.arange(0, BP)
    key = _load(prefix_k + head * W, place, place < P, H * W, W, BW).to(q.dtype.element_ty)
    value = _load(prefix_v + head * W, place, place < P, H * W, W, BW).to(q.dtype.element_ty)
    sum_k, sum_v = tl.zeros([BP, BW], tl.float32), tl.zeros([BP, BW], tl.float32)
    for more in range(0, stretch, BM):
        rows = begin + more + tl.arange(0, BM)
        kept = tl.trans(_kept(rows, tile * BP, 2 + 2 * head, start, site, threshold, BP)) if DROPS else place < P
        query, pull = _load(q + head * W, rows, rows < Mq, q_row, W, BW), _load(g + head * W, rows, rows < Mq, H * W, W, BW)
        top, share = _sums(sums, rows, rows < Mq, head, Mq, H)
        d = tl.load(delta + head.to(tl.int64) * Mq + rows, mask=rows < Mq, other=0.0)
        a, ds = _pull(key, query, value, pull, (place < P)[:, None], top[None, :], share[None, :], d[None, :], kept, scale, inverse, DROPS)
        sum_v = dot(a.to(key.dtype), pull, sum_v)
        sum_k = dot(ds.to(key.dtype), query, sum_k)
    partial += tl.program_id(1).to(tl.int64) * 2 * P * H * W + head * W
    _store(partial, sum_k * W ** -0.5, place, place < P, H * W, W, BW)
    _store(partial + P * H * W, sum_v * inverse, place, place < P, H * W, W, BW)


# ---------------------------------------------------------------- sizes, specs

CAPS = {  # (16-bit, BW <= 64) -> kernel -> most rows, most keys, warps, stages
    (True, True): {"forward": (64, 32, 4, 3), "queries": (64, 32, 4, 3), "keys": (32, 64, 4, 2), "whole": (32, 64, 4, 3), "prefix": (64, 32, 4, 2)},
    (True, False): {"forward": (64, 64, 8, 2), "queries": (64, 32, 8, 2), "keys": (16, 64, 8, 2), "prefix": (32, 32, 8, 2)},
    (False, True): {"forward": (32, 16, 8, 1), "queries": (16, 32, 8, 1), "keys": (16, 32, 4, 1), "prefix": (32, 32, 8, 1)},
    (False, False): {"forward": (16, 16, 4, 1), "queries": (16, 16, 8, 1), "keys": (16, 16, 8, 1), "prefix": (16, 16, 8, 1)},
}
"""Measured on an H200, and without a spill on sm_80, sm_90 and sm_100 by triton 3.6 and 3.9 (bench/compile_report.py). Keys of "prefix" are the prefix's. float32 loads
no tile ahead of its turn: it is the plain units that it waits for."""


def tiles_for(kernel: str, dtype: torch.dtype, width: int, queries: int, keys: int, shared: int) -> dict[str, int]:
    """Sizes of a tile and launch options. queries, keys: of the longest sequence; shared: P. A tile is no larger than what there is for it."""
    caps = CAPS[dtype != torch.float32, power(width) <= 64]
    most_rows, most_keys, warps, stages = caps[kernel]
    sizes = {"W": width, "BW": power(width), "BM": min(most_rows, power(queries))} | ({} if kernel == "prefix" else {"BN": min(most_keys, power(keys))})
    if kernel not in ("keys", "whole"):
        sizes["BP"] = min(caps["prefix"][1], power(shared))
    if kernel == "queries" and shared and dtype != torch.float32:
        sizes["BP"], stages = 16, 1  # more would spill somewhere
    return sizes | {"num_warps": warps, "num_stages": stages}


def in_one(dtype: torch.dtype, width: int, keys: int, shared: int) -> bool:
    """Whether one kernel does all that belongs to a sequence: its keys are one tile, and dq beside dk and dv leaves registers for the rest."""
    return dtype != torch.float32 and power(width) <= 64 and keys <= 64 and not shared


def specs(arch: int) -> list[Spec]:
    """Every kernel at its largest tiles with prefix and dropout, which is the most that a program has to hold, and with neither; at W 64 in bf16, what BERT has,
    with one of them as well, and at the tiles of short texts."""
    both, each = ((True, 30), (False, 0)), ((True, 30), (True, 0), (False, 30), (False, 0))
    found = []
    for dtype, widths in ((torch.bfloat16, (64, 32, 128)), (torch.float16, (64,)), (torch.float32, (32, 64, 128))):
        for width in widths:
            usual = (dtype, width) == (torch.bfloat16, 64)
            for drops, shared in each if usual else both[:1] if dtype == torch.float16 else both:
                for queries, keys in ((512, 512), (19, 28)) if usual and (drops, shared) in both else ((512, 512),):
                    found += _specs_of(dtype, DTYPES[dtype], width, drops, shared, queries, keys)
                if in_one(dtype, width, 64, 0) and not shared:
                    found += _specs_of(dtype, DTYPES[dtype], width, drops, 0, 64, 64, ("whole",))
    return found + [sum_spec()]


def _specs_of(dtype: torch.dtype, kind: str, width: int, drops: bool, shared: int, queries: int, keys: int, names: tuple[str, ...] = ("forward", "queries", "keys", "prefix")) -> list[Spec]:
    pointers = {name: f"*{kind}" for name in ("q", "k", "v", "g", "y", "dq", "dk", "dv")} | {"prefix_k": "*fp32", "prefix_v": "*fp32", "sums": "*fp32", "delta": "*fp32",
                                                                                           "partial": "*fp32", "cu_queries": "*i32", "cu_keys": "*i32", "seed": "*i64"}
    numbers = {name: "i32" for name in ("Mq", "P", "H", "q_row", "k_row", "v_row", "dq_row", "d_row", "stretch", "site", "threshold")} | {"scale": "fp32", "inverse": "fp32"}
    words = f"{kind}, W {width}{', dropout' if drops else ''}{', prefix' if shared else ''}, {queries} by {keys}"
    kernels = {"forward": (forward_kernel, {}), "queries": (backward_queries_kernel, {"WANTED": True, "EXACT": dtype == torch.float32}),
               "keys": (backward_keys_kernel, {"WHOLE": False}), "whole": (backward_keys_kernel, {"WHOLE": True}), "prefix": (backward_prefix_kernel, {})}
    found = []
    for name in names:
        kernel, chosen = kernels[name]
        if name == "prefix" and not shared:
            continue
        sizes = tiles_for(name, dtype, width, queries, keys, shared)
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
        absent = ([] if drops else ["seed"]) + ([] if shared else ["prefix_k", "prefix_v"])
        constants = chosen | {"DROPS": drops} | sizes | {key: None for key in absent if key in kernel.arg_names}
        signature = {key: value for key, value in (pointers | numbers).items() if key in kernel.arg_names and key not in constants}
        title = f"{'' if name == 'forward' else 'backward, '}{name}{' and all else' if name == 'whole' else ''}, {words}"
        found.append(Spec(title, kernel, signature, constants, aligned=tuple(n for n in ("q_row", "k_row", "v_row", "dq_row", "d_row") if n in kernel.arg_names), **options))
    return found


# ---------------------------------------------------------------- launchers

def _rows_apart(tensor: Tensor) -> Tensor:
    """The tensor [n, H, W], copied unless the H W values of a row lie end to end."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


def _numbers(width: int, rate: float) -> tuple[int, float, float]:
    """threshold, scale, inverse."""
    threshold = threshold_of(rate)
    return threshold, 1 / (math.sqrt(width) * math.log(2)), 65536 / threshold


@op("attention_forward", fake=lambda q, *others: _outputs(q))
def _attention_forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int,
                       rate: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """y [Mq, H, W] and sums fp32 [2, H, Mq]; see the head of this file. queries, keys: of the longest sequence."""
    y, sums = _outputs(q)
    (rows, heads, width), shared = q.shape, 0 if prefix_k is None else prefix_k.shape[0]
    if rows:
        q, k, v = _rows_apart(q), _rows_apart(k), _rows_apart(v)
        sizes = tiles_for("forward", q.dtype, width, queries, keys, shared)
        with on(q):
            forward_kernel[(cu_queries.shape[0] - 1) * heads, ceil_div(queries, sizes["BM"])](
                q, k, v, prefix_k if shared else None, prefix_v if shared else None, cu_queries, cu_keys, seed, y, sums, rows, shared, heads, q.stride(0), k.stride(0),
                v.stride(0), site, *_numbers(width, rate), DROPS=rate > 0, enable_fp_fusion=True, **sizes)
    return y, sums


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)


@op("attention_backward", fake=lambda g, q, k, v, prefix_k, *others: _room(q, k, prefix_k, *others[-3:]))
def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, y: Tensor, sums: Tensor, cu_queries: Tensor,
                        cu_keys: Tensor, queries: int, keys: int, rate: float, seed: Tensor | None, site: int, of_query: bool, of_keys: bool,
                        of_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `gradients` takes apart: dq, dk and dv, and [2, P, H, W] of the prefix's dtype, its dk and dv; those that are not asked for are empty."""
    found = _room(q, k, prefix_k, of_query, of_keys, of_prefix)
    (dq, dk, dv), total = gradients(*found[:2]), found[2]
    (rows, heads, width), shared = q.shape, 0 if prefix_k is None else prefix_k.shape[0]
    if not rows:
        return found[0], found[1].zero_(), total.zero_()
    q, k, v, g = _rows_apart(q), _rows_apart(k), _rows_apart(v), g.contiguous()
    delta, pairs = torch.empty_like(sums[0]), (cu_queries.shape[0] - 1) * heads
    prefix, strides, more = (prefix_k, prefix_v) if shared else (None, None), (q.stride(0), k.stride(0), v.stride(0), dq.stride(0)), (site, *_numbers(width, rate))
    options = {"DROPS": rate > 0, "enable_fp_fusion": True}
    whole = of_query and of_keys and in_one(q.dtype, width, keys, shared)
    with on(q):
        if not whole:
            tile = tiles_for("queries", q.dtype, width, queries, keys, shared)
            backward_queries_kernel[pairs, ceil_div(queries, tile["BM"])](q, k, v, *prefix, g, y, sums, cu_queries, cu_keys, seed, delta, dq, rows, shared, heads, *strides,
                                                                          *more, WANTED=of_query, EXACT=q.dtype == torch.float32, **options, **tile)
        if of_keys and k.shape[0] or whole:
            tile = tiles_for("whole" if whole else "keys", q.dtype, width, queries, keys, shared)
            backward_keys_kernel[pairs, ceil_div(max(keys, 1), tile["BN"])](q, k, v, g, y, sums, cu_queries, cu_keys, seed, delta, dq, dk, dv, rows, heads, *strides,
                                                                           dk.stride(0), *more, WHOLE=whole, **options, **tile)
        if of_prefix and shared:
            tile = tiles_for("prefix", q.dtype, width, rows, keys, shared)
            stretch = ceil_div(max(STRETCH, ceil_div(rows, MOST_STRETCHES)), tile["BM"]) * tile["BM"]
            stretches = ceil_div(rows, stretch)
            partial = q.new_empty(stretches, *total.shape, dtype=torch.float32)
            backward_prefix_kernel[ceil_div(shared, tile["BP"]) * heads, stretches](q, *prefix, g, sums, delta, seed, partial, rows, shared, heads, strides[0], stretch, *more,
                                                                                   **options, **tile)
            sum_stretches(partial.view(stretches, -1), total.view(-1))
    return found


def _room(q: Tensor, k: Tensor, prefix_k: Tensor | None, of_query: bool, of_keys: bool, of_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [Mq, H, W], [T, n, H, W], [2, P, H, W]): n is 2, dk and dv, or 3 with dq before them where there are as many queries as keys, or 0. Query, key and value come
    out of one product, which takes their gradients back as they lie."""
    together = of_query and of_keys and q.shape == k.shape
    own = k.new_empty(k.shape[0], 3 if together else 2 if of_keys else 0, *k.shape[1:])
    total = q.new_empty(0) if prefix_k is None or not of_prefix else prefix_k.new_empty(2, *prefix_k.shape)
    return q.new_empty((0 if together or not of_query else q.shape[0], *q.shape[1:])), own, total


def gradients(dq: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv out of the first two of `_room`; empty ones are not there."""
    if own.shape[1] == 3:
        return own.unbind(1)
    return dq, *(own.unbind(1) if own.shape[1] else (own[:, 0:0], own[:, 0:0]))


def _setup(ctx, inputs, output):
    *tensors, ctx.queries, ctx.keys, ctx.rate, seed, ctx.site = inputs
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.mark_non_differentiable(output[1])


def _backward_formula(ctx, g, _):
    *tensors, cu_queries, cu_keys, seed, y, sums = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    of_query, of_keys, of_prefix = wanted[0], wanted[1] or wanted[2], wanted[3] or wanted[4]
    dq, own, total = _attention_backward(g, *tensors, y, sums, cu_queries, cu_keys, ctx.queries, ctx.keys, ctx.rate, seed, ctx.site, of_query, of_keys, of_prefix)
    found = (*gradients(dq, own), *(total if of_prefix else (None, None)))
    return *(x if want else None for x, want in zip(found, wanted)), *(None,) * 7


_attention_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("attention", "triton")
def attention(query: Tensor, key: Tensor, value: Tensor, spans, prefix: tuple[Tensor, Tensor] | None = None, drop: Drop | None = None) -> Tensor:
    """query [Mq, H, W], key and value [T, H, W] -> [Mq, H, W]; see the head of this file.

    spans: cu_queries and cu_keys, int32 [B + 1] on the tensors' device; on the host queries and keys, how many rows there are, most_queries and most_keys, which no
    sequence has more of. prefix: keys and
    values [P, H, W]. drop: dropout of the probabilities. Raises ValueError that names what it cannot take.
    """
    query, key, value = (x.to(product_dtype(x)) for x in (query, key, value))
    expect("attention", "query", query, (spans.queries, -1, -1))
    heads, width = query.shape[1:]
    if not 1 <= width <= WIDEST:
        raise ValueError(f"attention, query: expected a head width of 1 to {WIDEST}, got {width}")
    for name, tensor in (("key", key), ("value", value)):
        expect("attention", name, tensor, (spans.keys, heads, width), (query.dtype,), query.device)
    for name, sums in (("cu_queries", spans.cu_queries), ("cu_keys", spans.cu_keys)):
        expect("attention", name, sums, (spans.cu_queries.shape[0],), (torch.int32,), query.device)
    if prefix is not None:
        expect("attention", "prefix key", prefix[0], (-1, heads, width), device=query.device)
        expect("attention", "prefix value", prefix[1], tuple(prefix[0].shape), (prefix[0].dtype,), query.device)
        prefix = tuple(x.contiguous() for x in prefix)
    drop = drop if drop is not None and drop.rate else None
    if drop is not None:
        threshold_of(drop.rate)
        expect("attention", "seed", drop.seed, (1,), (torch.int64,), query.device)
    return _attention_forward(query, key, value, *(prefix or (None, None)), spans.cu_queries, spans.cu_keys, spans.most_queries, spans.most_keys,
                              drop.rate if drop else 0.0, drop.seed if drop else None, drop.site if drop else 0)[0]
