"""Dropout whose mask is computed again wherever it is needed, never stored; the bits are the same in torch, in C and in Triton.

Contract. dropout(x, rate, seed, site) is x with every element kept with probability q and multiplied by 1 / q, or set to 0; dropout_ref.py is the
specification. x [T, D] fp32, bf16 or fp16, rows of any stride, neighbours in a row next to each other. seed int64 [1] on x's device: a captured CUDA graph
draws anew when somebody writes it. site: which of the places that drop in one model, 0 .. 2^31 - 1. Saves the seed alone; overwrites nothing.

The bits. Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key of two 32-bit words and a counter of four into four
words. Key: the seed's low half, the site. Counter: (low half of n, high half of n, the seed's high half, 0), where n = element index // 8: one call serves eight
elements. Element index i = t * 8 ceil(D / 8) + d for row t and column d, which is the flat index where D is a multiple of 8. Its 16 bits are the low
(i % 8 < 4) or high half of word i % 4. It is kept where they are less than the threshold round((1 - rate) * 65536), so q = threshold / 65536 is what is
realised, and 1 / q the scale: the mean is x exactly. Eight bits would miss the rate by up to 0.2 %.

Derivation. y = m x / q element by element, m in {0, 1}: dx = m dy / q, the same kernel on dy.

The room: dropout_ref.py (specification), this file (kernel), lora.py (who drops inside a product), tests/kernel_checks/check_dropout.py (proof).
Letters: T rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .dropout_ref import threshold_of
from .op import op
from .tiles import DTYPES, Spec, ceil_div, expect, on

# ---------------------------------------------------------------- the bits, in Triton

@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One round on uint32 tiles."""
    first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
    return (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32), (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """philox_ref on uint32 tiles; the key's words are uint32 scalars."""
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep(rows, first_block, blocks, seed, site, threshold, BLOCKS: tl.constexpr):
    """bool [rows, 8 * BLOCKS]: keep_mask of these rows and of the columns from 8 * first_block on.

    rows int64 [BT]; blocks: ceil(D / 8) of the whole tensor; seed int64, site and threshold int32 scalars (kernels take the latter two unspecialised: a 1 would arrive as a
    Python number, which has no type to change).
    The lanes come in the order (half, word // 2, word % 2), each `join` a new fastest axis.
    """
    n = rows[:, None] * blocks + (first_block + tl.arange(0, BLOCKS))[None, :]  # [BT, BLOCKS]
    w0, w1, w2, w3 = philox(n.to(tl.uint32), (n >> 32).to(tl.uint32), (seed >> 32).to(tl.uint32), n.to(tl.uint32) * 0, seed.to(tl.uint32), site.to(tl.uint32))
    even = tl.join(_halves(w0, threshold), _halves(w2, threshold))  # [BT, BLOCKS, 2, 2]
    odd = tl.join(_halves(w1, threshold), _halves(w3, threshold))
    return tl.reshape(tl.join(even, odd), (w0.shape[0], w0.shape[1] * 8)) != 0


@triton.jit
def kept_bits(first, second, fourth, seed, site, threshold):
    """int32 of the shape that the counters (first, second, the seed's high half, fourth), uint32, broadcast to: bit i is 1 where element i of their eight is kept."""
    w0, w1, w2, w3 = philox(first, second, (seed >> 32).to(tl.uint32), fourth, seed.to(tl.uint32), site.to(tl.uint32))
    most = threshold.to(tl.uint32) << 16  # a half of a word is less than the threshold where the half before 16 zeros is less than this
    low = _bit(w0 << 16, most, 1) | _bit(w1 << 16, most, 2) | _bit(w2 << 16, most, 4) | _bit(w3 << 16, most, 8)
    return low | _bit(w0, most, 16) | _bit(w1, most, 32) | _bit(w2, most, 64) | _bit(w3, most, 128)


@triton.jit
def _bit(word, most, BIT: tl.constexpr):
    return tl.where(word < most, BIT, 0)


@triton.jit
def _halves(word, threshold):
    """[..., 2]: whether the low and the high 16 bits of a word are below the threshold, as int8."""
    return tl.join(((word & 0xFFFF).to(tl.int32) < threshold).to(tl.int8), ((word >> 16).to(tl.int32) < threshold).to(tl.int8))


# ---------------------------------------------------------------- kernel, forward and backward

@triton.jit(do_not_specialize=["T", "site", "threshold"])
def dropout_kernel(x, y, seed, T, D, row_stride, site, threshold, scale, BT: tl.constexpr, BD: tl.constexpr):
    """y [T, D] = x [T, D] dropped; a program does BT rows and BD columns. seed int64 [1]. For the backward x is dy and y is dx."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (rows < T)[:, None] & (columns < D)[None, :]
    value = tl.load(x + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
    kept = keep(rows, tl.program_id(1) * (BD // 8), (D + 7) // 8, tl.load(seed), site, threshold, BD // 8)
    tl.store(y + rows[:, None] * D + columns[None, :], tl.where(kept, value.to(tl.float32) * scale, 0.0), mask=inside)


TILE = (16, 128)  # BT, BD


def specs(arch: int) -> list[Spec]:
    signature = {"x": "", "y": "", "seed": "*i64", "T": "i32", "D": "i32", "row_stride": "i32", "site": "i32", "threshold": "i32", "scale": "fp32"}
    return [Spec(f"dropout, {kind}", dropout_kernel, signature | {"x": f"*{kind}", "y": f"*{kind}"}, {"BT": TILE[0], "BD": TILE[1]}, aligned=("D", "row_stride"))
            for kind in DTYPES.values()]


# ---------------------------------------------------------------- launcher, autograd, the public function

@op("dropout", fake=lambda x, rate, seed, site: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _dropout(x: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if y.numel():
        threshold = threshold_of(rate)
        with on(x):
            dropout_kernel[(ceil_div(rows, TILE[0]), ceil_div(columns, TILE[1]))](
                x, y, seed, rows, columns, x.stride(0), site, threshold, 65536 / threshold, BT=TILE[0], BD=TILE[1], enable_fp_fusion=True)
    return y


def _keep_for_backward(ctx, inputs, output):
    _, ctx.rate, seed, ctx.site = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad: Tensor):
    return _dropout(grad, ctx.rate, ctx.saved_tensors[0], ctx.site), None, None, None


_dropout.differentiate(_keep_for_backward, _backward, again=True)


@register("dropout", "triton")
def dropout(x: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    """dropout_ref in one kernel. x [T, D] fp32, bf16 or fp16; rate in [0, 1); seed int64 [1] on x's device; site in [0, 2^31). Raises ValueError otherwise."""
    expect("dropout", "x", x, (-1, -1))
    expect("dropout", "seed", seed, (1,), (torch.int64,), x.device)
    threshold_of(rate)
    return _dropout(x, rate, seed, site)
