"""Dropout, residual and LayerNorm in one kernel; the backward that goes with it. Computes norm_ref of peftdebias/ops/norm.py:

    s = m h / q + r        n = (s - mean s) i,    i = 1 / sqrt(var s + epsilon)        y = gain n + bias        mean and var over the D values of a row

    h hidden [T, D], r residual [T, D] or None, gain and bias [D] -> y [T, D]; m the mask of dropout.py, q the share it keeps; m / q = 1 without dropout.
    Each of float32, bfloat16 or float16, h and r with rows of any stride; D up to 4096. y is of autocast's dtype where that is on (torch's own LayerNorm would
    be float32 on CUDA), else of h's. All arithmetic is float32, and s is never rounded. The variance is the mean square around the mean, so a large mean costs
    no digits.

With dy the gradient of y and g = gain dy:

    ds = i (g - mean g - n mean(g n))        dr = ds        dh = m ds / q        dgain = sum_t dy n        dbias = sum_t dy

Saved for the backward: n [T, D] in y's dtype and i [T] in float32, the seed and the gain; no mask. Nothing where nobody wants a gradient; for that of the bias
alone neither n nor i. h and r could be saved instead: reading them again moves as many bytes as writing and reading n, but both would have to stay, where n is
one tensor. s in y's dtype would be as small, and worse: where a row's mean is large its digits go to the mean.
No saved tensor is overwritten. Every gradient is computed only where it is asked for. Without dropout dh and dr are one tensor, if h and r are of one dtype.

How. A program holds whole rows, 4096 elements at a time: 4 rows of 768 (padded to 1024) or 1 of 3072. In the backward with a trained gain or bias it walks over
a stretch of T and keeps their sums, float32 in registers; tiles.sum_stretches adds the stretches in their order: no atomics, the sums repeat bit for bit.
What limits it: memory, and with dropout ten rounds of Philox for eight elements.

The room: peftdebias/ops/norm.py (specification), this file, tests/kernel_checks/check_norm.py (proof). Letters: T rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .dropout import keep
from .dropout_ref import Drop, threshold_of
from .op import op
from .tiles import DTYPES, Spec, ceil_div, expect, on, power, product_dtype, rows_together, sum_spec, sum_stretches

WIDEST = 4096  # D of a row, and elements that a program holds at a time
STRETCHES = 256  # at most that many partial sums of a column: about two programs for each multiprocessor of a GPU


# ---------------------------------------------------------------- kernels, forward beside backward

@triton.jit(do_not_specialize=["site"])
def forward_kernel(hidden, residual, gain, bias, seed, y, normal, inverse, T, D, hidden_stride, residual_stride, epsilon, site, threshold, scale,
                   DROPS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """hidden, residual (or None) [T, D], gain, bias [D], seed int64 [1] or None -> y [T, D]; normal [T, D] and inverse fp32 [T] (n and i) unless None.
    scale = 1 / q. A program does ROWS rows."""
    rows, d = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, BD)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    total = tl.load(hidden + rows[:, None] * hidden_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        total = tl.where(keep(rows, 0, (D + 7) // 8, tl.load(seed), site, threshold, BD // 8), total * scale, 0.0)
    if residual is not None:
        total += tl.load(residual + rows[:, None] * residual_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    centred = tl.where((d < D)[None, :], total - (tl.sum(total, 1) / D)[:, None], 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + epsilon)
    found = centred * factor[:, None]
    if normal is not None:
        tl.store(normal + rows[:, None] * D + d[None, :], found, mask=inside)
        tl.store(inverse + rows, factor, mask=rows < T)
    weight, shift = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32), tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + rows[:, None] * D + d[None, :], found * weight[None, :] + shift[None, :], mask=inside)


@triton.jit(do_not_specialize=["site"])
def backward_kernel(dy, normal, inverse, gain, seed, dhidden, dresidual, partial_gain, partial_bias, T, D, dy_stride, tiles, site, threshold, scale,
                    DROPS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """dy, normal [T, D], inverse fp32 [T], gain [D], seed int64 [1] or None -> dhidden, dresidual [T, D], partial_gain, partial_bias fp32 [stretches, D]: each
    unless None. A program does `tiles` tiles of ROWS rows, a stretch."""
    d = tl.arange(0, BD)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    weight = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    start = 0 if seed is None else tl.load(seed)
    sums_gain, sums_bias = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS, BD), tl.float32)
    for tile in range(0, tiles):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (d < D)[None, :]
        pull = tl.load(dy + rows[:, None] * dy_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if partial_bias is not None:
            sums_bias += pull
        if normal is not None:
            n = tl.load(normal + rows[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if partial_gain is not None:
                sums_gain += pull * n
            if dhidden is not None or dresidual is not None:
                g = pull * weight[None, :]
                fall = (g - (tl.sum(g, 1) / D)[:, None] - n * (tl.sum(g * n, 1) / D)[:, None]) * tl.load(inverse + rows, mask=rows < T, other=0.0)[:, None]
                if dresidual is not None:
                    tl.store(dresidual + rows[:, None] * D + d[None, :], fall, mask=inside)
                if dhidden is not None:
                    if DROPS:
                        fall = tl.where(keep(rows, 0, (D + 7) // 8, start, site, threshold, BD // 8), fall * scale, 0.0)
                    tl.store(dhidden + rows[:, None] * D + d[None, :], fall, mask=inside)
    stretch = tl.program_id(0).to(tl.int64) * D
    if partial_gain is not None:
        tl.store(partial_gain + stretch + d, tl.sum(sums_gain, 0), mask=d < D)
    if partial_bias is not None:
        tl.store(partial_bias + stretch + d, tl.sum(sums_bias, 0), mask=d < D)


# ---------------------------------------------------------------- sizes, specs

def tiles_for(width: int, sums: bool = False) -> dict[str, int]:
    """ROWS, BD and how many warps: 32 elements a thread, half as many where sums of columns stay in registers beside them, and half of that in rows of more than 1024
    columns; at most 16 rows."""
    block = power(width)
    rows = max(1, min(16, WIDEST // block))
    return {"ROWS": rows, "BD": block, "num_warps": max(1, rows * block // (1024 >> (sums + (block > 1024))))}


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: widths of 513 to 1024 share their tiles, those above 2048 too."""
    strides = ("hidden_stride", "residual_stride", "dy_stride")
    whole = dict.fromkeys(("T", "D", *strides, "tiles", "site", "threshold"), "i32") | {"epsilon": "fp32", "scale": "fp32"}
    found = []

    def spec(name: str, kernel, width: int, words: str, given: dict[str, str], nothing: tuple[str, ...], drops: bool) -> None:
        sums = kernel is backward_kernel and not {"partial_gain", "partial_bias"} <= set(nothing)
        sizes = tiles_for(width, sums)
        warps = sizes.pop("num_warps")
        fixed = dict.fromkeys([*nothing, *(() if drops else ("seed",))]) | {"DROPS": drops} | sizes
        if kernel is backward_kernel and not sums:
            fixed["tiles"] = 1  # a launch with 1 is compiled for it
        signature = {n: kind for n, kind in (given | {"seed": "*i64"} | whole).items() if n in kernel.arg_names and n not in fixed}
        aligned = tuple(n for n in ("D", *strides) if n in signature)
        found.append(Spec(f"{name}, D {words}{', dropout' if drops else ''}", kernel, signature, fixed, warps, aligned=aligned))

    for kind in DTYPES.values():
        same = "*" + kind
        given = dict.fromkeys(("hidden", "residual", "y", "normal", "dy", "dhidden", "dresidual"), same)
        given |= dict.fromkeys(("gain", "bias", "inverse", "partial_gain", "partial_bias"), "*fp32")
        for width, words in ((768, "768, 1024"), (3072, "3072, 4096")):
            for drops in (False, True):
                one = () if drops else ("dresidual",)  # without dropout it is dhidden
                spec(f"forward, {kind}", forward_kernel, width, words, given, (), drops)
                spec(f"backward, {kind}", backward_kernel, width, words, given, ("partial_gain", "partial_bias", *one), drops)
                spec(f"backward, gain and bias trained, {kind}", backward_kernel, width, words, given, one, drops)
        spec(f"forward alone, {kind}", forward_kernel, 768, "768, 1024", given, ("normal", "inverse"), False)
        spec(f"backward, bias alone, {kind}", backward_kernel, 768, "768, 1024", given, ("normal", "inverse", "dhidden", "dresidual", "partial_gain"), False)
    return [*found, sum_spec()]


# ---------------------------------------------------------------- launchers

@op("norm_forward", fake=lambda hidden, residual, gain, bias, epsilon, rate, seed, site, dtype, keeps: _outputs(hidden, dtype, keeps))
def _norm_forward(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, rate: float, seed: Tensor | None, site: int,
                  dtype: torch.dtype, keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, D] of `dtype`; where keeps, n [T, D] and i [T], else empty."""
    hidden, residual = rows_together(hidden), None if residual is None else rows_together(residual)
    y, normal, inverse = _outputs(hidden, dtype, keeps)
    rows, width = hidden.shape
    if rows:
        sizes, threshold = tiles_for(width), threshold_of(rate)
        with on(hidden):
            forward_kernel[(ceil_div(rows, sizes["ROWS"]),)](
                hidden, residual, gain.contiguous(), bias.contiguous(), seed if rate else None, y, normal if keeps else None, inverse if keeps else None, rows,
                width, hidden.stride(0), 0 if residual is None else residual.stride(0), epsilon, site, threshold, 65536 / threshold, DROPS=rate > 0,
                enable_fp_fusion=True, **sizes)
    return y, normal, inverse


def _outputs(hidden: Tensor, dtype: torch.dtype, keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = hidden.shape
    return (hidden.new_empty(rows, width, dtype=dtype), hidden.new_empty((rows, width) if keeps else 0, dtype=dtype),
            hidden.new_empty(rows if keeps else 0, dtype=torch.float32))


@op("norm_backward", fake=lambda dy, normal, inverse, gain, rate, seed, site, *wanted: _gradients(dy, *wanted))
def _norm_backward(dy: Tensor, normal: Tensor, inverse: Tensor, gain: Tensor, rate: float, seed: Tensor | None, site: int, hidden_dtype: torch.dtype | None,
                   residual_dtype: torch.dtype | None, of_gain: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden and dresidual [T, D] of these dtypes (None: nobody wants it, empty), dgain and dbias fp32 [D] where wanted, else empty."""
    found = dhidden, dresidual, dgain, dbias = _gradients(dy, hidden_dtype, residual_dtype, of_gain, of_bias)
    rows, width = dy.shape
    if not rows:
        return dhidden, dresidual, dgain.zero_(), dbias.zero_()
    dy, sizes, threshold = rows_together(dy), tiles_for(width, of_gain or of_bias), threshold_of(rate)
    tiles = ceil_div(ceil_div(rows, sizes["ROWS"]), STRETCHES) if of_gain or of_bias else 1
    stretches = ceil_div(rows, tiles * sizes["ROWS"])
    partial = [torch.empty((stretches, width), dtype=torch.float32, device=dy.device) if wanted else None for wanted in (of_gain, of_bias)]
    reads = of_gain or hidden_dtype or residual_dtype
    with on(dy):
        backward_kernel[(stretches,)](
            dy, normal if reads else None, inverse if reads else None, gain.contiguous(), seed if rate else None, dhidden if hidden_dtype else None,
            dresidual if residual_dtype else None, *partial, rows, width, dy.stride(0), tiles, site, threshold, 65536 / threshold, DROPS=rate > 0,
            enable_fp_fusion=True, **sizes)
        for sums, result in zip(partial, found[2:]):
            if sums is not None:
                sum_stretches(sums, result)
    return found


def _gradients(dy: Tensor, hidden_dtype: torch.dtype | None, residual_dtype: torch.dtype | None, of_gain: bool,
               of_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = dy.shape[1]
    dhidden, dresidual = (dy.new_empty(dy.shape if dtype else 0, dtype=dtype) for dtype in (hidden_dtype, residual_dtype))
    dgain, dbias = (dy.new_empty(width if wanted else 0, dtype=torch.float32) for wanted in (of_gain, of_bias))
    return dhidden, dresidual, dgain, dbias


def _setup(ctx, inputs, output):
    hidden, residual, gain, bias, _, ctx.rate, seed, ctx.site, _, _ = inputs
    ctx.dtypes = hidden.dtype, None if residual is None else residual.dtype, gain.dtype, bias.dtype
    ctx.save_for_backward(*output[1:], gain, seed)
    ctx.mark_non_differentiable(*output[1:])


def _backward_formula(ctx, dy, *_):
    """Gradients of hidden, residual, gain and bias, each where asked for."""
    normal, inverse, gain, seed = ctx.saved_tensors
    of_hidden, of_residual, of_gain, of_bias = ctx.needs_input_grad[:4]
    one = of_residual and not ctx.rate and ctx.dtypes[0] == ctx.dtypes[1]  # both have the same gradient
    dhidden, dresidual, dgain, dbias = _norm_backward(dy, normal, inverse, gain, ctx.rate, seed, ctx.site, ctx.dtypes[0] if of_hidden or one else None,
                                                      ctx.dtypes[1] if of_residual and not one else None, of_gain, of_bias)
    return (dhidden if of_hidden else None, (dhidden if one else dresidual) if of_residual else None, dgain.to(ctx.dtypes[2]) if of_gain else None,
            dbias.to(ctx.dtypes[3]) if of_bias else None, *(None,) * 6)


_norm_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("norm", "triton")
def norm(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None) -> Tensor:
    """hidden [T, D], residual [T, D] or None, gain and bias [D] -> [T, D]; see the head of this file. Raises ValueError that names what it cannot take."""
    expect("norm", "hidden", hidden, (-1, -1))
    width = hidden.shape[1]
    if not 1 <= width <= WIDEST:
        raise ValueError(f"norm, hidden: expected 1 to {WIDEST} columns, got {width}")
    if residual is not None:
        expect("norm", "residual", residual, tuple(hidden.shape), device=hidden.device)
    expect("norm", "gain", gain, (width,), device=hidden.device)
    expect("norm", "bias", bias, (width,), device=hidden.device)
    rate, seed, site = drop or (0.0, None, 0)
    threshold_of(rate)
    if rate:
        expect("norm", "seed", seed, (1,), (torch.int64,), hidden.device)
    keeps = torch.is_grad_enabled() and (hidden.requires_grad or gain.requires_grad or (residual is not None and residual.requires_grad))
    return _norm_forward(hidden, residual, gain, bias, epsilon, rate, seed if rate else None, site, product_dtype(hidden), keeps)[0]
