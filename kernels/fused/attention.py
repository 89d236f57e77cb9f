"""Bidirectional attention inside each sequence of a packed batch, with prefix and dropout inside; the backward that goes with it. Computes attention_ref of
peftdebias/ops/attention.py:

    s_ij = q_i . k_j / sqrt(W)      l_i = log sum_j exp s_ij      a_ij = exp(s_ij - l_i)      y_i = sum_j m_ij / c a_ij v_j

    q [Mq, H, W], k and v [T, H, W] -> y [Mq, H, W], every head for itself. i: the query rows of a sequence, which may be fewer than its keys or none; j: the P keys
    of the prefix, [P, H, W], which the sequences share, and the sequence's own. m in {0, 1}: dropout, drawn from counters, once, as bits (attention_mask.py), c the
    share kept; without dropout m = c = 1. A sequence with neither keys nor prefix gives zeros.
    float32, bfloat16 or float16, q, k and v alike (under autocast: of autocast's dtype); the prefix may be of any of these, and what the products see of it is of q's.
    Scores, sums and the softmax are float32; a is rounded to v's dtype before it meets v, as in a library's flash attention. W at most 128, padded to a power of two
    inside. Rows of q, k and v may lie apart, as slices of one [T, 3 D] product do; any other layout is copied.
    The host's lists of lengths give the grid alone, by their number and their largest; which rows belong together is read on the device from cu_queries and cu_keys.

Saved for the backward: q, k, v and the prefix as they came, y, l, and with dropout m as one bit a probability, uint8 [H, Mq, line]: keys / (64 W) of q, k, v
and y in 16 bits, 3 % at 128 keys and W 64, 12 % at 512. l is one float32 of [H, Mq] in units of log 2, infinite where there is no key. In float32 it is two, the largest q_i . k_j and the inverse of the sum relative to it, 0 where there is no
key: in one number a large score would take the sum's last bits; and there the difference is scaled, not the product, so that the largest shares have the least error. No saved
tensor is overwritten, no matrix [Mq, T] of numbers is ever stored, and the prefix is never copied for a sequence.

How: one pass over blocks of keys with the softmax carried along (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), the prefix's
blocks first, then the own; so l is over both, and the backward is exact. With g the gradient of y:

    d_i = g_i . y_i      da_ij = m_ij / c g_i . v_j      ds_ij = a_ij (da_ij - d_i)        since d_i = sum_j a_ij da_ij
    dv_j = sum_i m_ij / c a_ij g_i      dk_j = sum_i ds_ij q_i / sqrt(W)      dq_i = sum_j ds_ij k_j / sqrt(W)

Where all keys of the longest sequence are one tile (64 keys, no prefix; 16-bit, W at most 64), one kernel does all that belongs to a sequence: q, k, v, y, g are read and
dq, dk, dv written once. Else dq and d come from one kernel, dk and dv from another, which computes a again. Longer sequences in one program, dq waiting in memory between
two tiles of keys, were no faster than the two kernels at 256 keys, and slower with a prefix or without dropout. The prefix's dk and dv are sums over all
of Mq: every program sums a stretch, a second kernel the stretches, in float32 and in one order; frozen, nothing is computed for it. No atomics: gradients repeat
bit for bit. What nobody asks for is left out. In float32 d is its sum over the keys, one pass more: where one key has nearly all of a, da - d is the difference of
two near equals, and g . y, summed in another order, would cost the last bits of ds; 16-bit gradients are rounded more than that. There ds is computed as m a da - a c d,
which is c ds, and c leaves with the last scale: fewer operations a probability, and those are what it waits for.
What limits it: the plain units, which do ten operations a probability and kernel while the tensor cores wait.

The room: peftdebias/ops/attention.py (specification, the other forms), attention_mask.py (the bits), this file (kernels), tests/kernel_checks/check_attention.py (proof).
Letters: T keys, Mq query rows, B sequences, H heads, W head width, P prefix length; BM, BN, BP, BW rows, own keys, prefix keys and width of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import WIDEST, register
from .attention_mask import draw, kept_of, line_of, place_of, words_of
from .attention_mask import spec as mask_spec
from .dropout_ref import Drop, threshold_of
from .op import op
from .tiles import DTYPES, Spec, arch_of, ceil_div, dot, expect, on, power, product_dtype, sum_spec, sum_stretches

STRETCH = 256  # query rows that one program sums for the gradients of the prefix, at least
MOST_STRETCHES = 16


# ---------------------------------------------------------------- arithmetic

@triton.jit
def _load(x, begin, left, stride, N: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """[N, BW]: one head's W values of the rows from `begin` on, of which there are `left`; 0 beyond them and beyond W. x points at the head in row 0."""
    r, w = tl.arange(0, N), tl.arange(0, BW)
    mask = (r < left)[:, None] if W == BW else (r < left)[:, None] & (w < W)[None, :]
    return tl.load(x + tl.cast(begin, tl.int64) * stride + (r[:, None] * stride + w[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(x, tile, begin, left, stride, W: tl.constexpr, BW: tl.constexpr):
    r, w = tl.arange(0, tile.shape[0]), tl.arange(0, BW)
    mask = (r < left)[:, None] if W == BW else (r < left)[:, None] & (w < W)[None, :]
    tl.store(x + tl.cast(begin, tl.int64) * stride + (r[:, None] * stride + w[None, :]), tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _sums(sums, begin, left, Mq, H, N: tl.constexpr, EXACT: tl.constexpr):
    """l of N rows as it is saved: the largest q . k and the inverse of the sum, or one number twice. What is given for rows that are not
    there matters to nobody: their q and g are 0. sums points at the head."""
    r = tl.arange(0, N)
    if EXACT:
        top = tl.load(sums + begin + r, mask=r < left, other=0.0)
        share = tl.load(sums + tl.cast(H, tl.int64) * Mq + begin + r, mask=r < left, other=0.0)
    else:
        top = tl.load(sums + begin + r, mask=r < left, other=0.0)
        share = top
    return top, share


@triton.jit
def _sums_and_d(sums, delta, begin, left, Mq, H, N: tl.constexpr, EXACT: tl.constexpr):
    """l as in _sums, and d. Not EXACT: delta holds both in one number of 64 bits, so that a thread fetches them at once."""
    r = tl.arange(0, N)
    if EXACT:
        top, share = _sums(sums, begin, left, Mq, H, N, True)
        d = tl.load(delta + begin + r, mask=r < left, other=0.0)
    else:
        both = tl.load(delta + begin + r, mask=r < left, other=0)
        top, d = both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        share = top
    return top, share, d


@triton.jit
def _fold(q, k, v, inside, words, first, top, total, y, scale, DROPS: tl.constexpr, EXACT: tl.constexpr):
    """One block of keys into the softmax carried along: top and total [BM], the largest q . k and the sum relative to it; y [BM, BW], not yet divided by it."""
    s = tl.where(inside[None, :], dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)), float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    shrink = tl.exp2((top - higher) * scale)
    if EXACT:
        a = tl.exp2((s - higher[:, None]) * scale)
    else:
        a = tl.exp2(s * scale - (higher * scale)[:, None])
    total = total * shrink + tl.sum(a, 1)
    if DROPS:
        a *= tl.where(kept_of(words, first, False, k.shape[0]), 1.0, 0.0)  # a select would be moved behind the rounding to 16 bits, where it takes more instructions
    return higher, total, dot(a.to(v.dtype), v, y * shrink[:, None])


@triton.jit
def _pull(left, right, pull_left, pull_right, inside, top, share, d, words, first, scale, inverse, BY_KEYS: tl.constexpr, DROPS: tl.constexpr, EXACT: tl.constexpr):
    """(m a, ds sqrt(W)) of one tile, [left, right]: with left = q, right = k, pull_left = g and pull_right = v rows by keys; with each pair swapped, BY_KEYS, keys by rows.
    top, share: l, as it is saved; with inside and d they broadcast to that. inside: None where the rows of keys that are not there are not used. Not EXACT: ds and d are c
    times themselves."""
    nothing = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    s, da = dot(left, tl.trans(right), nothing), dot(pull_left, tl.trans(pull_right), nothing)
    if inside is not None:
        s = tl.where(inside, s, float("-inf"))
    a = tl.exp2((s - top) * scale) * share if EXACT else tl.exp2(s * scale - top)
    m = a
    if DROPS:
        kept = kept_of(words, first, BY_KEYS, left.shape[0] if BY_KEYS else right.shape[0])
        m = tl.where(kept, a, 0.0)
        ds = a * (tl.where(kept, da * inverse, 0.0) - d) if EXACT else m * da - a * d
    else:
        ds = a * (da - d)
    return m, ds


# ---------------------------------------------------------------- forward

@triton.jit(do_not_specialize=["Mq", "tiles", "line"])
def forward_kernel(q, k, v, prefix_k, prefix_v, cu_queries, cu_keys, bits, y, sums, Mq, P, H, tiles, q_row, k_row, v_row, line, own, scale, inverse, EXACT: tl.constexpr,
                   DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """y [Mq, H, W] and sums fp32 [1 or 2, H, Mq] = l of q [Mq, H, W], k and v [T, H, W], prefix_k and prefix_v [P, H, W] or None, cu_queries and cu_keys int32 [B + 1], bits
    int32 [H, Mq, line], attention_mask.py's, or None. scale: 1 / sqrt(W) in units of log 2; inverse: 1 / c. Programs (sequence, head, tile of its queries)."""
    sequence, head, tile = place_of(H, tiles)
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    if q0 + tile * BM >= q1:
        return
    begin = q0 + tile * BM
    left, r = q1 - begin, tl.arange(0, BM)
    if DROPS:
        bits += head.to(tl.int64) * Mq * line
    query = _load(q + head * W, begin, left, q_row, BM, W, BW)
    top, total, found = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BW], tl.float32)
    if prefix_k is not None:
        for first in range(0, P, BP):
            inside = tl.arange(0, BP) < P - first
            words = words_of(bits, line, begin, left, 0, first, False, BM, BP) if DROPS else inside
            key = _load(prefix_k + head * W, first, P - first, H * W, BP, W, BW).to(query.dtype)
            value = _load(prefix_v + head * W, first, P - first, H * W, BP, W, BW).to(query.dtype)
            top, total, found = _fold(query, key, value, inside, words, first, top, total, found, scale, DROPS, EXACT)
    for first in range(0, k1 - k0, BN):
        there = k1 - k0 - first
        inside = tl.arange(0, BN) < there
        words = words_of(bits, line, begin, left, own, first, False, BM, BN) if DROPS else inside
        key, value = _load(k + head * W, k0 + first, there, k_row, BN, W, BW), _load(v + head * W, k0 + first, there, v_row, BN, W, BW)
        top, total, found = _fold(query, key, value, inside, words, first, top, total, found, scale, DROPS, EXACT)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    _store(y + head * W, found * (inverse * share)[:, None], begin, left, H * W, W, BW)
    sums += head.to(tl.int64) * Mq + begin
    if EXACT:
        tl.store(sums + r, tl.where(total == 0.0, 0.0, top), mask=r < left)
        tl.store(sums + tl.cast(H, tl.int64) * Mq + r, share, mask=r < left)
    else:
        tl.store(sums + r, tl.where(total == 0.0, float("inf"), top * scale + tl.log2(total)), mask=r < left)


# ---------------------------------------------------------------- backward

@triton.jit
def _over_keys(query, pull, top, share, d, found, begin, left, k, v, k0, k1, k_row, v_row, bits, line, own, scale, inverse, SUMS: tl.constexpr, EXACT: tl.constexpr,
               DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr):
    """found [BM, BW] and what the keys k0 .. k1 add to dq, times sqrt(W), not EXACT also c; with SUMS found [BM] and what they add to d, where d itself is 0."""
    for first in range(0, k1 - k0, BN):
        there = k1 - k0 - first
        inside = tl.arange(0, BN) < there
        words = words_of(bits, line, begin, left, own, first, False, query.shape[0], BN) if DROPS else inside
        key, value = _load(k, k0 + first, there, k_row, BN, W, BW).to(query.dtype), _load(v, k0 + first, there, v_row, BN, W, BW).to(query.dtype)
        _, ds = _pull(query, key, pull, value, inside[None, :], top[:, None], share[:, None], d[:, None], words, first, scale, inverse, False, DROPS, EXACT)
        if SUMS:
            found += tl.sum(ds, 1)
        else:
            found = dot(ds.to(query.dtype), key, found)
    return found


@triton.jit(do_not_specialize=["Mq", "tiles", "line"])
def backward_queries_kernel(q, k, v, prefix_k, prefix_v, g, y, sums, cu_queries, cu_keys, bits, delta, dq, Mq, P, H, tiles, q_row, k_row, v_row, dq_row, line, own,
                            scale, inverse, WANTED: tl.constexpr, EXACT: tl.constexpr, DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr,
                            BN: tl.constexpr, BP: tl.constexpr):
    """delta [H, Mq] = d in fp32, not EXACT int64: c d above l; and where WANTED dq [Mq, H, W], of g and y [Mq, H, W] and sums; the others as in forward_kernel. EXACT: d by
    its sum over the keys. Programs (sequence, head, tile of its queries)."""
    sequence, head, tile = place_of(H, tiles)
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    if q0 + tile * BM >= q1:
        return
    begin = q0 + tile * BM
    left, r = q1 - begin, tl.arange(0, BM)
    pull = _load(g + head * W, begin, left, H * W, BM, W, BW)
    k, v, sums, delta = k + head * W, v + head * W, sums + head.to(tl.int64) * Mq, delta + head.to(tl.int64) * Mq + begin
    if DROPS:
        bits += head.to(tl.int64) * Mq * line
    if WANTED or EXACT:
        query = _load(q + head * W, begin, left, q_row, BM, W, BW)
    top, share = _sums(sums, begin, left, Mq, H, BM, EXACT)
    if EXACT:
        nothing = tl.zeros([BM], tl.float32)
        d = nothing
        if prefix_k is not None:
            d = _over_keys(query, pull, top, share, nothing, d, begin, left, prefix_k + head * W, prefix_v + head * W, 0, P, H * W, H * W, bits, line, 0, scale, inverse,
                           True, True, DROPS, W, BW, BP)
        d = _over_keys(query, pull, top, share, nothing, d, begin, left, k, v, k0, k1, k_row, v_row, bits, line, own, scale, inverse, True, True, DROPS, W, BW, BN)
        tl.store(delta + r, d, mask=r < left)
    else:
        d = tl.sum(pull.to(tl.float32) * _load(y + head * W, begin, left, H * W, BM, W, BW).to(tl.float32), 1) / inverse
        tl.store(delta + r, (d.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (top.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF), mask=r < left)
    if WANTED:
        found = tl.zeros([BM, BW], tl.float32)
        if prefix_k is not None:
            found = _over_keys(query, pull, top, share, d, found, begin, left, prefix_k + head * W, prefix_v + head * W, 0, P, H * W, H * W, bits, line, 0, scale, inverse,
                               False, EXACT, DROPS, W, BW, BP)
        found = _over_keys(query, pull, top, share, d, found, begin, left, k, v, k0, k1, k_row, v_row, bits, line, own, scale, inverse, False, EXACT, DROPS, W, BW, BN)
        _store(dq + head * W, found * (W ** -0.5 if EXACT else W ** -0.5 * inverse), begin, left, dq_row, W, BW)


@triton.jit(do_not_specialize=["Mq", "tiles", "line"])
def backward_keys_kernel(q, k, v, g, y, sums, cu_queries, cu_keys, bits, delta, dq, dk, dv, Mq, H, tiles, q_row, k_row, v_row, dq_row, d_row, line, own, scale,
                         inverse, WHOLE: tl.constexpr, EXACT: tl.constexpr, DROPS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dk, dv [T, H, W]. Programs (sequence, head, tile of its keys). WHOLE, not EXACT: no sequence has more keys than a tile, and dq is written too; else delta is read,
    and y is not there."""
    sequence, head, tile = place_of(H, tiles)
    q0, q1 = tl.load(cu_queries + sequence), tl.load(cu_queries + sequence + 1)
    k0, k1 = tl.load(cu_keys + sequence), tl.load(cu_keys + sequence + 1)
    first = tile * BN
    if not WHOLE:
        if k0 + first >= k1:
            return
    if DROPS:
        bits += head.to(tl.int64) * Mq * line
    sums, delta = sums + head.to(tl.int64) * Mq, delta + head.to(tl.int64) * Mq
    there = k1 - k0 - first
    inside = tl.arange(0, BN) < there
    key, value = _load(k + head * W, k0 + first, there, k_row, BN, W, BW), _load(v + head * W, k0 + first, there, v_row, BN, W, BW)
    sum_k, sum_v = tl.zeros([BN, BW], tl.float32), tl.zeros([BN, BW], tl.float32)
    for more in range(0, q1 - q0, BM):
        begin, left = q0 + more, q1 - q0 - more
        words = words_of(bits, line, begin, left, own, first, True, BM, BN) if DROPS else inside
        query, pull = _load(q + head * W, begin, left, q_row, BM, W, BW), _load(g + head * W, begin, left, H * W, BM, W, BW)
        if WHOLE:
            top, share = _sums(sums, begin, left, Mq, H, BM, EXACT)
            d = tl.sum(pull.to(tl.float32) * _load(y + head * W, begin, left, H * W, BM, W, BW).to(tl.float32), 1) / inverse
        else:
            top, share, d = _sums_and_d(sums, delta, begin, left, Mq, H, BM, EXACT)
        a, ds = _pull(key, query, value, pull, inside[:, None] if WHOLE else None, top[None, :], share[None, :], d[None, :], words, first, scale, inverse, True, DROPS, EXACT)
        ds = ds.to(key.dtype)
        sum_v = dot(a.to(key.dtype), pull, sum_v)
        sum_k = dot(ds, query, sum_k)
        if WHOLE:
            found = dot(tl.trans(ds), key, tl.zeros([BM, BW], tl.float32))
            _store(dq + head * W, found * (W ** -0.5 * inverse), begin, left, dq_row, W, BW)
    _store(dk + head * W, sum_k * (W ** -0.5 if EXACT else W ** -0.5 * inverse), k0 + first, there, d_row, W, BW)
    _store(dv + head * W, sum_v * inverse, k0 + first, there, d_row, W, BW)


@triton.jit(do_not_specialize=["Mq", "stretch", "line"])
def backward_prefix_kernel(q, prefix_k, prefix_v, g, sums, delta, bits, partial, Mq, P, H, q_row, stretch, line, scale, inverse, EXACT: tl.constexpr, DROPS: tl.constexpr,
                           W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr):
    """partial [stretches, 2, P, H, W] fp32: dk and dv of the prefix, from the query rows [i stretch, (i + 1) stretch) whatever sequence they are of. Program (tile of
    the prefix and head, stretch i)."""
    tile, head = tl.program_id(0) // H, tl.program_id(0) % H
    start = tl.program_id(1) * stretch
    if DROPS:
        bits += head.to(tl.int64) * Mq * line
    sums, delta = sums + head.to(tl.int64) * Mq, delta + head.to(tl.int64) * Mq
    first = tile * BP
    there = P - first
    inside = tl.arange(0, BP) < there
    key = _load(prefix_k + head * W, first, there, H * W, BP, W, BW).to(q.dtype.element_ty)
    value = _load(prefix_v + head * W, first, there, H * W, BP, W, BW).to(q.dtype.element_ty)
    sum_k, sum_v = tl.zeros([BP, BW], tl.float32), tl.zeros([BP, BW], tl.float32)
    for more in range(0, stretch, BM):
        begin, left = start + more, Mq - start - more
        words = words_of(bits, line, begin, left, 0, first, True, BM, BP) if DROPS else inside
        query, pull = _load(q + head * W, begin, left, q_row, BM, W, BW), _load(g + head * W, begin, left, H * W, BM, W, BW)
        top, share, d = _sums_and_d(sums, delta, begin, left, Mq, H, BM, EXACT)
        a, ds = _pull(key, query, value, pull, None, top[None, :], share[None, :], d[None, :], words, first, scale, inverse, True, DROPS, EXACT)
        sum_v = dot(a.to(key.dtype), pull, sum_v)
        sum_k = dot(ds.to(key.dtype), query, sum_k)
    partial += tl.program_id(1).to(tl.int64) * 2 * P * H * W + head * W
    _store(partial, sum_k * (W ** -0.5 if EXACT else W ** -0.5 * inverse), first, there, H * W, W, BW)
    _store(partial + P * H * W, sum_v * inverse, first, there, H * W, W, BW)


# ---------------------------------------------------------------- sizes, specs

CAPS = {  # (16-bit, BW <= 64) -> kernel -> most rows, most keys, warps, stages
    (True, True): {"forward": (64, 32, 4, 3), "queries": (64, 32, 4, 3), "keys": (32, 64, 4, 3), "whole": (32, 64, 4, 3), "prefix": (64, 32, 4, 2)},
    (True, False): {"forward": (64, 64, 8, 2), "queries": (64, 32, 8, 2), "keys": (16, 64, 8, 2), "prefix": (32, 32, 8, 2)},
    (False, True): {"forward": (32, 16, 8, 1), "queries": (16, 32, 8, 1), "keys": (16, 32, 4, 1), "prefix": (32, 32, 8, 1)},
    (False, False): {"forward": (16, 16, 4, 1), "queries": (16, 16, 8, 1), "keys": (16, 16, 8, 1), "prefix": (16, 16, 8, 1)},
}
"""Measured on an H200, and without a spill by triton 3.6 and 3.9 (bench/compile_report.py). Keys of "prefix" are the prefix's. float32 loads
no tile ahead of its turn: it is the plain units that it waits for."""
REGISTERS = {"queries": 128, "keys": 168}
"""kernel -> registers of a thread at most, from sm_90 on and up to W 64: with a few more, which dropout takes, one program fewer fits on a multiprocessor."""


def tiles_for(kernel: str, dtype: torch.dtype, width: int, queries: int, keys: int, shared: int, arch: int = 90, alone: bool = False) -> dict[str, int]:
    """Sizes of a tile and launch options. queries, keys: of the longest sequence; shared: P. A tile is no larger than what there is for it. alone: of "queries", d without dq."""
    caps = CAPS[dtype != torch.float32, power(width) <= 64]
    most_rows, most_keys, warps, stages = caps[kernel]
    sizes = {"W": width, "BW": power(width), "BM": min(most_rows, power(queries))} | ({} if kernel == "prefix" else {"BN": min(most_keys, power(keys))})
    if kernel not in ("keys", "whole"):
        sizes["BP"] = min(caps["prefix"][1], power(shared))
    short, narrow, hopper = dtype != torch.float32, power(width) <= 64, 90 <= arch < 100
    if kernel == "queries" and shared and short:
        sizes["BP"], stages = 16, stages if hopper and narrow else 1  # more would spill
    if kernel in REGISTERS and narrow and arch >= 90 and (kernel == "keys" or short and (hopper or not shared)):
        sizes["maxnreg"] = REGISTERS[kernel]
    # Without a bound the compilers take fewer there, and spill.
    elif alone and not short and power(width) == 64:
        sizes["maxnreg"] = 128
    elif kernel in ("queries", "whole") and short and arch >= 100:
        sizes["maxnreg"] = 168
    elif kernel == "keys" and arch < 90 and not (short and narrow) or kernel == "forward" and arch == 86 and shared and short:
        sizes["maxnreg"] = 255
    return sizes | {"num_warps": warps, "num_stages": stages}


def exact(dtype: torch.dtype) -> bool:
    """Whether the softmax is computed as the file's first lines say for float32, or by fewer operations."""
    return dtype == torch.float32


def in_one(dtype: torch.dtype, width: int, keys: int, shared: int) -> bool:
    """Whether one kernel does all that belongs to a sequence: its keys are one tile, and dq beside dk and dv leaves registers for the rest."""
    return dtype != torch.float32 and power(width) <= 64 and keys <= 64 and not shared


def specs(arch: int) -> list[Spec]:
    """Every kernel at its largest tiles with prefix and dropout, which is the most that a program has to hold, and with neither; at W 64 in bf16, what BERT has,
    with one of them as well, and at the tiles of short texts. Beside dq d alone, as the lowest layer asks for it that has a prefix or trained keys."""
    both, each = ((True, 30), (False, 0)), ((True, 30), (True, 0), (False, 30), (False, 0))
    found = []
    for dtype, widths in ((torch.bfloat16, (64, 32, 128)), (torch.float16, (64,)), (torch.float32, (32, 64, 128))):
        for width in widths:
            usual = (dtype, width) == (torch.bfloat16, 64)
            for drops, shared in each if usual else both[:1] if dtype == torch.float16 else both:
                for queries, keys in ((512, 512), (19, 28)) if usual and (drops, shared) in both else ((512, 512),):
                    found += _specs_of(arch, dtype, DTYPES[dtype], width, drops, shared, queries, keys)
                if in_one(dtype, width, 64, 0) and not shared:
                    found += _specs_of(arch, dtype, DTYPES[dtype], width, drops, 0, 64, 64, ("whole",))
            for drops, shared in () if dtype == torch.float16 else each if width == 64 else both:
                found += _specs_of(arch, dtype, DTYPES[dtype], width, drops, shared, 512, 512, ("d",))
    return found + [mask_spec(), sum_spec()]


def _specs_of(arch: int, dtype: torch.dtype, kind: str, width: int, drops: bool, shared: int, queries: int, keys: int,
              names: tuple[str, ...] = ("forward", "queries", "keys", "prefix")) -> list[Spec]:
    pointers = dict.fromkeys(("q", "k", "v", "g", "y", "dq", "dk", "dv"), f"*{kind}") | dict.fromkeys(("prefix_k", "prefix_v", "sums", "partial"), "*fp32")
    pointers |= {"delta": "*fp32" if exact(dtype) else "*i64"} | dict.fromkeys(("bits", "cu_queries", "cu_keys"), "*i32")
    numbers = dict.fromkeys(("Mq", "P", "H", "tiles", "q_row", "k_row", "v_row", "dq_row", "d_row", "stretch", "line", "own"), "i32") | {"scale": "fp32", "inverse": "fp32"}
    aligned = ["q_row", "k_row", "v_row", "dq_row", "d_row", *(n for n, value in (("own", _words(keys, shared)[1]), ("P", shared)) if value % 16 == 0)]
    words = f"{kind}, W {width}{', dropout' if drops else ''}{', prefix' if shared else ''}, {queries} by {keys}"
    kernels = {"forward": (forward_kernel, {}), "queries": (backward_queries_kernel, {"WANTED": True}), "d": (backward_queries_kernel, {"WANTED": False}),
               "keys": (backward_keys_kernel, {"WHOLE": False}), "whole": (backward_keys_kernel, {"WHOLE": True}), "prefix": (backward_prefix_kernel, {})}
    found = []
    for name in names:
        kernel, chosen = kernels[name]
        if name == "prefix" and not shared:
            continue
        sizes = tiles_for("queries" if name == "d" else name, dtype, width, queries, keys, shared, arch, alone=name == "d")
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in sizes}
        absent = ([] if drops else ["bits"]) + ([] if shared else ["prefix_k", "prefix_v"])
        constants = chosen | {"EXACT": exact(dtype), "DROPS": drops} | sizes | {key: None for key in absent if key in kernel.arg_names}
        signature = {key: value for key, value in (pointers | numbers).items() if key in kernel.arg_names and key not in constants}
        title = f"{'' if name == 'forward' else 'backward, '}{name}{' and all else' if name == 'whole' else ' alone' if name == 'd' else ''}, {words}"
        found.append(Spec(title, kernel, signature, constants, aligned=tuple(n for n in aligned if n in kernel.arg_names), **options))
    return found


# ---------------------------------------------------------------- launchers

def _rows_apart(tensor: Tensor) -> Tensor:
    """The tensor [n, H, W], copied unless the H W values of a row lie end to end."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


def _words(keys: int, shared: int) -> tuple[int, int]:
    """line_of in words, as the kernels of this file read the bits."""
    return tuple(n // 4 for n in line_of(keys, shared))


def _numbers(width: int, rate: float) -> tuple[int, float, float]:
    """scale, inverse."""
    return 1 / (math.sqrt(width) * math.log(2)), 65536 / threshold_of(rate)


@op("attention_forward", fake=lambda q, k, v, prefix_k, prefix_v, cu_queries, cu_keys, queries, keys, rate, *drop: _outputs(q, prefix_k, keys, rate))
def _attention_forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int,
                       rate: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [Mq, H, W], sums fp32 [1 or 2, H, Mq] and bits uint8 [H, Mq, line], empty without dropout; see the head of this file. queries, keys: of the longest sequence."""
    y, sums, bits = _outputs(q, prefix_k, keys, rate)
    (rows, heads, width), shared = q.shape, 0 if prefix_k is None else prefix_k.shape[0]
    if rows:
        q, k, v = _rows_apart(q), _rows_apart(k), _rows_apart(v)
        sizes = tiles_for("forward", q.dtype, width, queries, keys, shared, arch_of(q))
        with on(q):
            if rate:
                draw(bits, cu_queries, cu_keys, queries, keys, shared, rate, seed, site)
            tiles = ceil_div(queries, sizes["BM"])
            forward_kernel[(cu_queries.shape[0] - 1) * heads * tiles,](
                q, k, v, prefix_k if shared else None, prefix_v if shared else None, cu_queries, cu_keys, bits.view(torch.int32) if rate else None, y, sums, rows, shared, heads,
                tiles, q.stride(0), k.stride(0), v.stride(0), *_words(keys, shared), *_numbers(width, rate), EXACT=exact(q.dtype), DROPS=rate > 0,
                enable_fp_fusion=True, **sizes)
    return y, sums, bits


def _outputs(q: Tensor, prefix_k: Tensor | None, keys: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    (rows, heads, _), line = q.shape, line_of(keys, 0 if prefix_k is None else prefix_k.shape[0])[0]
    return q.new_empty(q.shape), q.new_empty(1 + exact(q.dtype), heads, rows, dtype=torch.float32), q.new_empty((heads, rows, line) if rate else 0, dtype=torch.uint8)


@op("attention_backward", fake=lambda g, q, k, v, prefix_k, *others: _room(q, k, prefix_k, *others[-3:]))
def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, y: Tensor, sums: Tensor, bits: Tensor,
                        cu_queries: Tensor, cu_keys: Tensor, queries: int, keys: int, rate: float, of_query: bool, of_keys: bool, of_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `gradients` takes apart: dq, dk and dv, and [2, P, H, W] of the prefix's dtype, its dk and dv; those that are not asked for are empty."""
    found = _room(q, k, prefix_k, of_query, of_keys, of_prefix)
    (dq, dk, dv), total = gradients(*found[:2]), found[2]
    (rows, heads, width), shared = q.shape, 0 if prefix_k is None else prefix_k.shape[0]
    if not rows:
        return found[0], found[1].zero_(), total.zero_()
    bits = bits.view(torch.int32) if rate else None
    q, k, v, g = _rows_apart(q), _rows_apart(k), _rows_apart(v), g.contiguous()
    delta, pairs = torch.empty_like(sums[0], dtype=torch.float32 if exact(q.dtype) else torch.int64), (cu_queries.shape[0] - 1) * heads
    prefix, strides = (prefix_k, prefix_v) if shared else (None, None), (q.stride(0), k.stride(0), v.stride(0), dq.stride(0))
    (line, own), scales = _words(keys, shared), _numbers(width, rate)
    options = {"EXACT": exact(q.dtype), "DROPS": rate > 0, "enable_fp_fusion": True}
    whole, arch = of_query and of_keys and in_one(q.dtype, width, keys, shared), arch_of(q)
    with on(q):
        if not whole:
            tile = tiles_for("queries", q.dtype, width, queries, keys, shared, arch, alone=not of_query)
            tiles = ceil_div(queries, tile["BM"])
            backward_queries_kernel[pairs * tiles,](q, k, v, *prefix, g, y, sums, cu_queries, cu_keys, bits, delta, dq, rows, shared, heads, tiles, *strides, line, own,
                                                    *scales, WANTED=of_query, **options, **tile)
        if of_keys and k.shape[0] or whole:
            tile = tiles_for("whole" if whole else "keys", q.dtype, width, queries, keys, shared, arch)
            tiles = ceil_div(max(keys, 1), tile["BN"])
            backward_keys_kernel[pairs * tiles,](q, k, v, g, y, sums, cu_queries, cu_keys, bits, delta, dq, dk, dv, rows, heads, tiles, *strides, dk.stride(0), line, own,
                                                 *scales, WHOLE=whole, **options, **tile)
        if of_prefix and shared:
            tile = tiles_for("prefix", q.dtype, width, rows, keys, shared, arch)
            stretch = ceil_div(max(STRETCH, ceil_div(rows, MOST_STRETCHES)), tile["BM"]) * tile["BM"]
            stretches = ceil_div(rows, stretch)
            partial = q.new_empty(stretches, *total.shape, dtype=torch.float32)
            backward_prefix_kernel[ceil_div(shared, tile["BP"]) * heads, stretches](q, *prefix, g, sums, delta, bits, partial, rows, shared, heads, strides[0], stretch, line,
                                                                                   *scales, **options, **tile)
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
    *tensors, ctx.queries, ctx.keys, ctx.rate, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward_formula(ctx, g, *_):
    *tensors, cu_queries, cu_keys, y, sums, bits = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    of_query, of_keys, of_prefix = wanted[0], wanted[1] or wanted[2], wanted[3] or wanted[4]
    dq, own, total = _attention_backward(g, *tensors, y, sums, bits, cu_queries, cu_keys, ctx.queries, ctx.keys, ctx.rate, of_query, of_keys, of_prefix)
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
    if not 1 <= width <= WIDEST["attention"]:
        raise ValueError(f"attention, query: expected a head width of 1 to {WIDEST['attention']}, got {width}")
    for name, tensor in (("key", key), ("value", value)):
        expect("attention", name, tensor, (spans.keys, heads, width), (query.dtype,), query.device)
    for name, sums in (("cu_queries", spans.cu_queries), ("cu_keys", spans.cu_keys)):
        expect("attention", name, sums, (spans.cu_queries.shape[0],), (torch.int32,), query.device)
    if prefix is not None:
        expect("attention", "prefix key", prefix[0], (-1, heads, width), device=query.device)
        expect("attention", "prefix value", prefix[1], tuple(prefix[0].shape), (prefix[0].dtype,), query.device)
        prefix = tuple(x.contiguous() for x in prefix)
    drop = drop if drop is not None and threshold_of(drop.rate) < 65536 else None  # a rate that 16 bits cannot tell from 0 drops nothing
    if drop is not None:
        expect("attention", "seed", drop.seed, (1,), (torch.int64,), query.device)
    return _attention_forward(query, key, value, *(prefix or (None, None)), spans.cu_queries, spans.cu_keys, spans.most_queries, spans.most_keys,
                              drop.rate if drop else 0.0, drop.seed if drop else None, drop.site if drop else 0)[0]
