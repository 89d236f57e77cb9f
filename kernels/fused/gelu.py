"""Bias and GELU (erf) in one kernel; the backward that goes with it. Computes gelu_ref of peftdebias/ops/gelu.py:

    z = x + bias        y = z Phi(z),    Phi(z) = (1 + erf(z / sqrt 2)) / 2

    x [T, F] with rows of any stride, bias [F] or None -> y [T, F] in x's dtype. x and bias each of float32, bfloat16 or float16. All arithmetic is float32, and
    z is never rounded. Where x has 16 bits Phi comes from a polynomial within 7.5e-8 (`_normal`): with the library's erf the kernel waits for arithmetic.

With dy the gradient of y and phi the density of the normal distribution:

    dx = dy (Phi(z) + z phi(z)),    phi(z) = exp(-z^2 / 2) / sqrt(2 pi)        dbias = sum_t dx

Saved for the backward: x and bias, and nothing where nobody wants a gradient; z and the slope are computed again. The op overwrites no saved tensor;
`backward_with_output` does what feed_forward.py saved. A frozen bias has no gradient, a trained one the sums of dx before it is rounded: a program sums a stretch of T,
tiles.sum_stretches adds the stretches in their order, so they repeat bit for bit.
What limits it: memory. Alone it saves the pass of the bias; as the product's epilogue it would save its own, and risk the product.

The room: peftdebias/ops/gelu.py (specification), this file, tests/kernel_checks/check_gelu.py (proof). Letters: T rows, F columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .tiles import DTYPES, Spec, ceil_div, expect, on, power, reciprocal, rows_together, sum_spec, sum_stretches

STRETCHES = 128  # at most that many partial sums of a column


# ---------------------------------------------------------------- arithmetic

@triton.jit
def erf_gelu(z):
    """z Phi(z). fp32."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def erf_gelu_slope(z):
    """Phi(z) + z phi(z). fp32."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _normal(z):
    """(Phi(z), exp(-z^2 / 2)) fp32, Phi within 7.5e-8 by Abramowitz and Stegun 7.1.26: less than a 16-bit value can show, by 14 operations where erf takes some
    forty: with twice as many the kernel would wait for them, not for memory."""
    fall, t = tl.exp2(z * z * -0.7213475204444817), reciprocal(1.0 + 0.23164188 * tl.abs(z))  # 1 / (2 log 2); 0.3275911 / sqrt 2
    tail = fall * (t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))))
    return tl.where(z < 0.0, tail, 1.0 - tail), fall


@triton.jit
def gelu_of(z, EXACT: tl.constexpr):
    if EXACT:
        return erf_gelu(z)
    below, _ = _normal(z)
    return z * below


@triton.jit
def gelu_and_slope(z, EXACT: tl.constexpr):
    """What nobody uses of the two is not computed: the compiler leaves it out."""
    if EXACT:
        return erf_gelu(z), erf_gelu_slope(z)
    below, fall = _normal(z)
    return z * below, below + z * 0.3989422804014327 * fall


# ---------------------------------------------------------------- kernels, forward beside backward

@triton.jit
def _shift(bias, columns, F, BF: tl.constexpr):
    """bias [F] at these columns, fp32 [1, BF]; 0 where it is None."""
    shift = tl.zeros((BF,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)
    return shift[None, :]


@triton.jit(do_not_specialize=["T"])
def forward_kernel(x, bias, y, T, F, x_stride, BT: tl.constexpr, BF: tl.constexpr):
    """x [T, F], bias [F] or None -> y [T, F]. Programs (row tile, column tile)."""
    rows, columns = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (rows < T)[:, None] & (columns < F)[None, :]
    z = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32) + _shift(bias, columns, F, BF)
    tl.store(y + rows[:, None] * F + columns[None, :], gelu_of(z, x.dtype.element_ty == tl.float32), mask=inside)


@triton.jit(do_not_specialize=["T", "tiles"])
def backward_kernel(dy, x, bias, dx, y, partial, T, F, dy_stride, x_stride, tiles, BT: tl.constexpr, BF: tl.constexpr):
    """dy, x [T, F], bias [F] or None -> dx [T, F], which may be dy, y [T, F] once more, which may be x, and partial fp32 [stretches, F], the sums of dx: each unless None. Programs
    (stretch of `tiles` tiles of BT rows, column tile); a stretch is one tile where nothing is summed, and the code is for one."""
    count = 1 if partial is None else tiles
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    first = tl.program_id(0).to(tl.int64) * count * BT
    shift, sums = _shift(bias, columns, F, BF), tl.zeros((BT, BF), tl.float32)
    for tile in range(0, count):
        rows = first + tile * BT + tl.arange(0, BT)
        inside = (rows < T)[:, None] & (columns < F)[None, :]
        pull = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32) + shift
        found, slope = gelu_and_slope(z, x.dtype.element_ty == tl.float32)
        fall = pull * slope
        if partial is not None:
            sums += fall
        if dx is not None:
            tl.store(dx + rows[:, None] * F + columns[None, :], fall, mask=inside)
        if y is not None:
            tl.store(y + rows[:, None] * F + columns[None, :], found, mask=inside)
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * F + columns, tl.sum(sums, 0), mask=columns < F)


# ---------------------------------------------------------------- sizes, specs

TILE = 2048  # elements of a program's tile
WIDE = {"": 1024, "sums": 512, "output": 256}


def tiles_for(width: int, also: str = "") -> dict[str, int]:
    """BT, BF and how many warps: 16 elements a thread where columns are many. also: "sums" of dx, or these and the "output" again; each wants narrower tiles (measured on
    an H200, of widths from 256 to 1024)."""
    block = min(WIDE[also], power(width))
    rows = min(16, TILE // block)
    return {"BT": rows, "BF": block, "num_warps": max(1, rows * block // 512)}


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead: BERT's feed-forward widths have one tile."""
    whole = dict.fromkeys(("T", "F", "x_stride", "dy_stride", "tiles"), "i32")
    found, strides = [], ("x_stride", "dy_stride")
    variants = (("forward", "", forward_kernel, ()), ("forward, no bias", "", forward_kernel, ("bias",)), ("backward", "", backward_kernel, ("partial", "y")),
                ("backward, bias trained", "sums", backward_kernel, ("y",)), ("backward, bias trained, y again", "output", backward_kernel, ()),
                ("backward, no bias", "", backward_kernel, ("bias", "partial", "y")))
    for kind in DTYPES.values():
        given = dict.fromkeys(("x", "y", "dy", "dx"), "*" + kind) | {"bias": "*fp32", "partial": "*fp32"}
        for words, also, kernel, absent in variants:
            sizes = tiles_for(3072, also)
            warps = sizes.pop("num_warps")
            fixed = dict.fromkeys(absent) | sizes
            signature = {n: t for n, t in (given | whole).items() if n in kernel.arg_names and n not in fixed}
            found.append(Spec(f"{words}, {kind}", kernel, signature, fixed, warps, aligned=tuple(n for n in ("F", *strides) if n in signature)))
    return [*found, sum_spec()]


# ---------------------------------------------------------------- launchers

@op("gelu_forward", fake=lambda x, bias: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    x = rows_together(x)
    (rows, width), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        sizes = tiles_for(width)
        with on(x):
            forward_kernel[(ceil_div(rows, sizes["BT"]), ceil_div(width, sizes["BF"]))](
                x, None if bias is None else bias.contiguous(), y, rows, width, x.stride(0), enable_fp_fusion=True, **sizes)
    return y


@op("gelu_backward", fake=lambda dy, x, bias, of_x, of_bias: _gradients(x, of_x, of_bias))
def _gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, of_x: bool, of_bias: bool) -> tuple[Tensor, Tensor]:
    """dx [T, F] in x's dtype and dbias fp32 [F], each where wanted, else empty."""
    dx, dbias = _gradients(x, of_x, of_bias)
    _launch_backward(dy, x, bias, dx if of_x else None, None, dbias)
    return dx, dbias


def _launch_backward(dy: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor | None, y: Tensor | None, dbias: Tensor) -> None:
    """Writes dx [T, F], y [T, F] and dbias fp32 [F], where they are there; dbias is empty where nobody wants it."""
    rows, width = x.shape
    if not x.numel():
        dbias.zero_()
        return
    of_bias = dbias.numel() > 0
    dy, x, sizes = rows_together(dy), rows_together(x), tiles_for(width, "output" if y is not None else "sums" if of_bias else "")
    tiles = ceil_div(ceil_div(rows, sizes["BT"]), STRETCHES) if of_bias else 1
    stretches = ceil_div(rows, tiles * sizes["BT"])
    partial = torch.empty((stretches, width), dtype=torch.float32, device=x.device) if of_bias else None
    with on(x):
        backward_kernel[(stretches, ceil_div(width, sizes["BF"]))](
            dy, x, None if bias is None else bias.contiguous(), dx, y, partial, rows, width, dy.stride(0), x.stride(0), tiles, enable_fp_fusion=True, **sizes)
        if of_bias:
            sum_stretches(partial, dbias)


def backward_with_output(dy: Tensor, x: Tensor, bias: Tensor | None, of_bias: bool, of_output: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx [T, F], dbias fp32 [F] or empty, y [T, F] or None) for whoever saved x and no y, and has no use for x any more. dy and x [T, F], contiguous: dx is written over dy,
    y over x, so that autograd hears of it."""
    (_, dbias), y = _gradients(x, False, of_bias), None
    if of_output:
        torch.autograd.graph.increment_version(x)
        y = x.detach()
    _launch_backward(dy, x, bias, dy, y, dbias)
    return dy, dbias, y


def _gradients(x: Tensor, of_x: bool, of_bias: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty((rows, width) if of_x else 0), x.new_empty(width if of_bias else 0, dtype=torch.float32)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_formula(ctx, dy):
    x, bias = ctx.saved_tensors
    of_x, of_bias = ctx.needs_input_grad
    dx, dbias = _gelu_backward(dy, x, bias, of_x, of_bias)
    return dx if of_x else None, dbias.to(bias.dtype) if of_bias else None


_gelu_forward.differentiate(_setup, _backward_formula)


# ---------------------------------------------------------------- the op

@register("gelu", "triton")
def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, F], bias [F] or None -> [T, F]; see the head of this file. Raises ValueError that names what it cannot take."""
    expect("gelu", "x", x, (-1, -1))
    if bias is not None:
        expect("gelu", "bias", bias, (x.shape[1],), device=x.device)
    return _gelu_forward(x, bias)
