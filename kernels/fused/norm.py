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
In an encoder y has two readers, a product and the residual: with `fork` each has a y, and the backward two dy, which it adds as it reads them; and (n, gain, bias), of which
y is made, for whoever would keep y beside them.

How. A program holds whole rows, up to 4096 elements at a time: 2 rows of 768, as three parts of 256 each, or 1 of 3072; one part, padded to a power of two, where
three would not be shorter. In the backward with a trained gain or bias it walks over a stretch of T and keeps their sums, float32 in registers; tiles.sum_stretches
adds the stretches in their order: no atomics, the sums repeat bit for bit.
What limits it: memory, and with dropout ten rounds of Philox for eight elements.

The room: peftdebias/ops/norm.py (specification), this file, embeddings.py (rows out of tables, dropout behind the norm), tests/kernel_checks/check_norm.py (proof).
Letters: T rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import WIDEST, register, watched
from .dropout import keep
from .dropout_ref import Drop, threshold_of
from .op import first_order, op
from .tiles import DTYPES, Spec, arch_of, ceil_div, expect, on, power, product_dtype, rows_together, sum_spec, sum_stretches

HELD = 4096  # elements that a program holds at a time
STRETCHES = 768  # at most that many partial sums of a column: a few programs for each multiprocessor of a GPU


# ---------------------------------------------------------------- kernels, forward beside backward

@triton.jit
def columns_of(part, rows, T, D, BD: tl.constexpr, WHOLE: tl.constexpr):
    """(columns of a part, which of its elements are there). WHOLE: the parts are D columns, not one more."""
    d = part * BD + tl.arange(0, BD)
    return d, (rows < T)[:, None] if WHOLE else (rows < T)[:, None] & (d < D)[None, :]


@triton.jit
def vector_of(x, part, D, BD: tl.constexpr, WHOLE: tl.constexpr):
    """A part of x [D], fp32 [1, BD]."""
    d = part * BD + tl.arange(0, BD)
    return (tl.load(x + d) if WHOLE else tl.load(x + d, mask=d < D, other=0.0)).to(tl.float32)[None, :]


@triton.jit
def centre(parts, total, D, epsilon, ROWS: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """(rows less their mean, in parts fp32 [ROWS, BD] like `parts`, 0 beyond D; i fp32 [ROWS]). total fp32 [ROWS, BD]: the sum of the parts, which are 0 beyond D."""
    mean, centred, squares = (tl.sum(total, 1) / D)[:, None], (), tl.zeros([ROWS, BD], tl.float32)
    for part in tl.static_range(PARTS):
        away = parts[part] - mean
        if not WHOLE:
            away = tl.where((part * BD + tl.arange(0, BD) < D)[None, :], away, 0.0)
        squares += away * away
        centred = centred + (away,)
    return centred, 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / D + epsilon)


@triton.jit(do_not_specialize=["T", "site", "threshold"])
def forward_kernel(hidden, residual, gain, bias, seed, y, normal, inverse, T, D, hidden_stride, residual_stride, epsilon, site, threshold, scale,
                   DROPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """hidden, residual (or None) [T, D], gain, bias [D], seed int64 [1] or None -> y [T, D]; normal [T, D] and inverse fp32 [T] (n and i) unless None.
    scale = 1 / q. A program does ROWS rows."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = 0 if seed is None else tl.load(seed)
    parts, total = (), tl.zeros([ROWS, BD], tl.float32)
    for part in tl.static_range(PARTS):
        d, inside = columns_of(part, rows, T, D, BD, WHOLE)
        found = tl.load(hidden + rows[:, None] * hidden_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            found = tl.where(keep(rows, part * (BD // 8), (D + 7) // 8, start, site, threshold, BD // 8), found * scale, 0.0)
        if residual is not None:
            found += tl.load(residual + rows[:, None] * residual_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += found
        parts = parts + (found,)
    centred, factor = centre(parts, total, D, epsilon, ROWS, PARTS, BD, WHOLE)
    if normal is not None:
        tl.store(inverse + rows, factor, mask=rows < T)
    for part in tl.static_range(PARTS):
        d, inside = columns_of(part, rows, T, D, BD, WHOLE)
        n = centred[part] * factor[:, None]
        if normal is not None:
            tl.store(normal + rows[:, None] * D + d[None, :], n, mask=inside)
        tl.store(y + rows[:, None] * D + d[None, :], n * vector_of(gain, part, D, BD, WHOLE) + vector_of(bias, part, D, BD, WHOLE), mask=inside)


@triton.jit
def _zeros(PARTS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """PARTS sums that begin."""
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + (tl.zeros([ROWS, BD], tl.float32),)
    return found


@triton.jit(do_not_specialize=["T", "tiles", "site", "threshold"])
def backward_kernel(dy, again, normal, inverse, gain, seed, dhidden, dresidual, partial_gain, partial_bias, T, D, dy_stride, again_stride, partial_stride, tiles, site,
                    threshold, scale, DROPS: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """dy, again (or None: y has one reader), normal [T, D], inverse fp32 [T], gain [D], seed int64 [1] or None -> dhidden, dresidual [T, D], partial_gain and partial_bias
    fp32 [stretches, D], rows partial_stride apart: each unless None. A program does `tiles` tiles of ROWS rows, a stretch; one where nothing is summed, and is compiled for
    it. DROPS: hidden was dropped, or where AFTER y was (embeddings.py), so that the mask acts on dy and not on dhidden."""
    count = 1 if partial_gain is None and partial_bias is None else tiles
    first = tl.program_id(0).to(tl.int64) * count * ROWS
    start = 0 if seed is None else tl.load(seed)
    sums_gain, sums_bias = _zeros(PARTS, ROWS, BD), _zeros(PARTS, ROWS, BD)
    for tile in range(0, count):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        pulls, normals, grown_gain, grown_bias = (), (), (), ()
        along, across = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
        for part in tl.static_range(PARTS):
            d, inside = columns_of(part, rows, T, D, BD, WHOLE)
            pull = tl.load(dy + rows[:, None] * dy_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if again is not None:
                pull += tl.load(again + rows[:, None] * again_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if DROPS and AFTER:
                pull = tl.where(keep(rows, part * (BD // 8), (D + 7) // 8, start, site, threshold, BD // 8), pull * scale, 0.0)
            grown_bias = grown_bias + (sums_bias[part] + pull,)
            if normal is not None:
                n = tl.load(normal + rows[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
                grown_gain = grown_gain + (sums_gain[part] + pull * n,)
                pull *= vector_of(gain, part, D, BD, WHOLE)
                along += pull
                across += pull * n
                normals = normals + (n,)
            pulls = pulls + (pull,)
        if partial_bias is not None:
            sums_bias = grown_bias
        if partial_gain is not None:
            sums_gain = grown_gain
        if dhidden is not None or dresidual is not None:
            factor = tl.load(inverse + rows, mask=rows < T, other=0.0)[:, None]
            along_mean, across_mean = (tl.sum(along, 1) / D)[:, None], (tl.sum(across, 1) / D)[:, None]
            for part in tl.static_range(PARTS):
                d, inside = columns_of(part, rows, T, D, BD, WHOLE)
                fall = (pulls[part] - along_mean - normals[part] * across_mean) * factor
                if dresidual is not None:
                    tl.store(dresidual + rows[:, None] * D + d[None, :], fall, mask=inside)
                if dhidden is not None:
                    if DROPS and not AFTER:
                        fall = tl.where(keep(rows, part * (BD // 8), (D + 7) // 8, start, site, threshold, BD // 8), fall * scale, 0.0)
                    tl.store(dhidden + rows[:, None] * D + d[None, :], fall, mask=inside)
    stretch = tl.program_id(0).to(tl.int64) * partial_stride
    for part in tl.static_range(PARTS):
        d = part * BD + tl.arange(0, BD)
        if partial_gain is not None:
            tl.store(partial_gain + stretch + d, tl.sum(sums_gain[part], 0), mask=d < D)
        if partial_bias is not None:
            tl.store(partial_bias + stretch + d, tl.sum(sums_bias[part], 0), mask=d < D)


# ---------------------------------------------------------------- sizes, specs

def tiles_for(width: int, sums: bool = False) -> dict[str, int]:
    """ROWS, PARTS, BD, WHOLE and how many warps. A row that three quarters of the next power of two hold is three parts, one vector of 8 elements a thread and part, up to
    2048 elements a program or one row; another is one part, 32 elements a thread, half as many where `sums` of columns stay in registers beside them, and half of that above 1024."""
    block = power(width)
    if block >= 64 and 3 * block // 4 >= width:
        rows, block = max(1, min(16, HELD // 2 // block)), block // 4
        return {"ROWS": rows, "PARTS": 3, "BD": block, "WHOLE": 3 * block == width, "num_warps": max(1, rows * block // 256)}
    rows = max(1, min(16, HELD // block))
    return {"ROWS": rows, "PARTS": 1, "BD": block, "WHOLE": block == width, "num_warps": max(1, rows * block // (1024 >> (sums + (block > 1024))))}


def registers(tight: bool, arch: int) -> dict[str, int]:
    """A bound for a thread's registers where the compilers without one take fewer, to have more threads, and spill: where it is `tight`, and on sm_86 and its like."""
    return {"maxnreg": 168} if tight or arch == 86 else {}


def is_tight(dtype: torch.dtype, whole: bool) -> bool:
    """Whether a forward's threads need the bound on every GPU: rows of float32 and ragged ones, some with a mask, some by one compiler alone."""
    return dtype == torch.float32 or not whole


def spec_of(name: str, kernel, width: int, given: dict[str, str], nothing: tuple[str, ...], drops: bool, maxnreg: int | None = None, **constants: bool) -> Spec:
    """One kernel that holds whole rows. given: name of an argument -> Triton's type, those of other kernels among them; nothing: the pointers that are None."""
    sums = "partial_gain" in kernel.arg_names and not {"partial_gain", "partial_bias"} <= set(nothing)
    sizes = tiles_for(width, sums)
    warps, fixed = sizes.pop("num_warps"), dict.fromkeys([*nothing, *(() if drops else ("seed",))]) | {"DROPS": drops} | constants
    numbers = dict.fromkeys(("T", "D", "tiles", "site", "threshold", *(n for n in kernel.arg_names if n.endswith("_stride"))), "i32") | {"epsilon": "fp32", "scale": "fp32"}
    signature = {n: kind for n, kind in ({"seed": "*i64"} | numbers | given).items() if n in kernel.arg_names and n not in fixed}
    aligned = () if width % 16 else tuple(n for n in signature if n == "D" or n.endswith("_stride"))
    return Spec(f"{name}, D {width}{', dropout' if drops else ''}", kernel, signature, fixed | sizes, warps, aligned=aligned, maxnreg=maxnreg)


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: rows of three whole parts, and with dropout those of three that are not, and of one."""
    found, nobody = [], ("partial_gain", "partial_bias")
    for dtype, kind in DTYPES.items():
        given = dict.fromkeys(("hidden", "residual", "y", "normal", "dy", "again", "dhidden", "dresidual"), "*" + kind)
        given |= dict.fromkeys(("gain", "bias", "inverse", *nobody), "*fp32")

        def forward(name: str, width: int, nothing: tuple[str, ...], drops: bool) -> Spec:
            return spec_of(f"{name}, {kind}", forward_kernel, width, given, nothing, drops, **registers(is_tight(dtype, tiles_for(width)["WHOLE"]), arch))

        def backward(name: str, width: int, nothing: tuple[str, ...], drops: bool) -> Spec:
            return spec_of(f"{name}, {kind}", backward_kernel, width, given, nothing, drops, AFTER=False, **({} if "normal" not in nothing else registers(False, arch)))

        for width in (768, 3072, 700, 1000, 4000):
            for drops in (False, True) if width in (768, 3072) else (True,):
                one = () if drops else ("dresidual", "again")  # without dropout it is dhidden
                found += [forward("forward", width, (), drops), backward("backward", width, (*nobody, *one), drops), backward("backward, gain and bias trained", width, one, drops)]
        found += [forward("forward alone", 768, ("normal", "inverse"), False),
                  backward("backward, bias alone", 768, ("again", "normal", "inverse", "dhidden", "dresidual", "partial_gain"), False)]
    return [*found, sum_spec(), sum_spec(STRETCHES)]


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
                enable_fp_fusion=True, **sizes, **registers(is_tight(hidden.dtype, sizes["WHOLE"]), arch_of(hidden)))
    return y, normal, inverse


def _outputs(hidden: Tensor, dtype: torch.dtype, keeps: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = hidden.shape
    return (hidden.new_empty(rows, width, dtype=dtype), hidden.new_empty((rows, width) if keeps else 0, dtype=dtype),
            hidden.new_empty(rows if keeps else 0, dtype=torch.float32))


@op("norm_backward", fake=lambda dy, again, normal, inverse, gain, rate, seed, site, after, *wanted: _gradients(dy, *wanted))
def norm_backward(dy: Tensor, again: Tensor | None, normal: Tensor, inverse: Tensor, gain: Tensor, rate: float, seed: Tensor | None, site: int, after: bool,
                  hidden_dtype: torch.dtype | None, residual_dtype: torch.dtype | None, of_gain: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden and dresidual [T, D] of these dtypes (None: nobody wants it, empty), and fp32 [n, D]: dgain, dbias, those that are wanted. again: y's second reader's dy.
    after: y was dropped (embeddings.py), not hidden."""
    found = dhidden, dresidual, parameters = _gradients(dy, hidden_dtype, residual_dtype, of_gain, of_bias)
    rows, width = dy.shape
    if not rows:
        return dhidden, dresidual, parameters.zero_()
    dy, again, count = rows_together(dy), None if again is None else rows_together(again), len(parameters)
    sizes, threshold = tiles_for(width, count > 0), threshold_of(rate)
    tiles = ceil_div(ceil_div(rows, sizes["ROWS"]), STRETCHES) if count else 1
    stretches = ceil_div(rows, tiles * sizes["ROWS"])
    partial = torch.empty((stretches, count, width), dtype=torch.float32, device=dy.device) if count else None
    reads = of_gain or hidden_dtype or residual_dtype
    with on(dy):
        backward_kernel[(stretches,)](
            dy, again, normal if reads else None, inverse if reads else None, gain.contiguous(), seed if rate else None, dhidden if hidden_dtype else None,
            dresidual if residual_dtype else None, partial[:, 0] if of_gain else None, partial[:, -1] if of_bias else None, rows, width, dy.stride(0),
            0 if again is None else again.stride(0), count * width, tiles, site, threshold, 65536 / threshold, DROPS=rate > 0, AFTER=after, enable_fp_fusion=True, **sizes,
            **({} if reads else registers(False, arch_of(dy))))
        if count:
            sum_stretches(partial.view(stretches, -1), parameters.view(-1))
    return found


def _gradients(dy: Tensor, hidden_dtype: torch.dtype | None, residual_dtype: torch.dtype | None, of_gain: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dresidual = (dy.new_empty(dy.shape if dtype else 0, dtype=dtype) for dtype in (hidden_dtype, residual_dtype))
    return dhidden, dresidual, dy.new_empty((of_gain + of_bias, dy.shape[1]), dtype=torch.float32)


def _keep(ctx, inputs: tuple, normal: Tensor, inverse: Tensor) -> None:
    hidden, residual, gain, bias, _, ctx.rate, seed, ctx.site, _, _ = inputs
    ctx.dtypes = hidden.dtype, None if residual is None else residual.dtype, gain.dtype, bias.dtype
    ctx.save_for_backward(normal, inverse, gain, seed)


def _setup(ctx, inputs, output):
    _keep(ctx, inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_formula(ctx, dy, *_, again=None):
    """Gradients of hidden, residual, gain and bias, each where asked for."""
    normal, inverse, gain, seed = ctx.saved_tensors
    of_hidden, of_residual, of_gain, of_bias = ctx.needs_input_grad[:4]
    one = of_residual and not ctx.rate and ctx.dtypes[0] == ctx.dtypes[1]  # both have the same gradient
    dhidden, dresidual, parameters = norm_backward(dy, again, normal, inverse, gain, ctx.rate, seed, ctx.site, False, ctx.dtypes[0] if of_hidden or one else None,
                                                   ctx.dtypes[1] if of_residual and not one else None, of_gain, of_bias)
    return (dhidden if of_hidden else None, (dhidden if one else dresidual) if of_residual else None, parameters[0].to(ctx.dtypes[2]) if of_gain else None,
            parameters[-1].to(ctx.dtypes[3]) if of_bias else None, *(None,) * 6)


_norm_forward.differentiate(_setup, _backward_formula)


class _Forked(torch.autograd.Function):
    """y twice, one for each of two readers: the kernel adds their gradients as it reads them, where autograd would by a pass of its own over three tensors."""

    @staticmethod
    def forward(ctx, *inputs):
        y, normal, inverse = _norm_forward.launch(*inputs)
        ctx.set_materialize_grads(False)
        _keep(ctx, inputs, normal, inverse)
        ctx.mark_non_differentiable(normal)
        return y, y.view_as(y), normal

    @staticmethod
    def backward(ctx, dy, again, _):
        first_order("norm")
        if dy is None:
            dy, again = again, None
        return _backward_formula(ctx, dy, again=again) if dy is not None else (None,) * 10


# ---------------------------------------------------------------- the op

@register("norm", "triton")
def norm(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None, fork: bool = False) -> Tensor | tuple:
    """hidden [T, D], residual [T, D] or None, gain and bias [D] -> [T, D], with `fork` twice, for two readers, and (n [T, D], gain, bias) or None where no n is kept; see the
    head of this file. Raises ValueError that names what it cannot take."""
    expect("norm", "hidden", hidden, (-1, -1))
    width = hidden.shape[1]
    if not 1 <= width <= WIDEST["norm"]:
        raise ValueError(f"norm, hidden: expected 1 to {WIDEST['norm']} columns, got {width}")
    if residual is not None:
        expect("norm", "residual", residual, tuple(hidden.shape), device=hidden.device)
    expect("norm", "gain", gain, (width,), device=hidden.device)
    expect("norm", "bias", bias, (width,), device=hidden.device)
    rate, seed, site = drop or (0.0, None, 0)
    threshold_of(rate)
    if rate:
        expect("norm", "seed", seed, (1,), (torch.int64,), hidden.device)
    keeps = torch.is_grad_enabled() and (hidden.requires_grad or gain.requires_grad or (residual is not None and residual.requires_grad))
    given = hidden, residual, gain, bias, epsilon, rate, seed if rate else None, site, product_dtype(hidden), keeps
    if fork and keeps and not watched():
        *both, normal = _Forked.apply(*given)
        return *both, (normal, gain.detach(), bias.detach())
    y = _norm_forward(*given)[0]
    return (y, y, None) if fork else y
