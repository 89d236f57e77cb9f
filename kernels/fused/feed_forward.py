"""The feed-forward block: two products and GELU between them. Computes feed_forward_ref of peftdebias/ops/gelu.py:

    y = a W2^T + b2,    a = gelu(z),    z = x W1^T + b1        gelu(z) = z Phi(z)

    x [T, in] float32, bfloat16 or float16, W1 `up` [inner, in], b1 [inner] or None, W2 `down` [out, inner], b2 [out] or None -> y [T, out] of autocast's dtype where that is on,
    else of x's. Products in that dtype, with weights and biases rounded to it; GELU in float32 (gelu.py). Every gradient is of its own tensor's dtype.

With dy the gradient of y:

    dz = (dy W2) gelu'(z)        dx = dz W1        dW1 = dz^T x, db1 = sum_t dz        dW2 = dy^T a, db2 = sum_t dy        (linear_trained.py says how, and what of x is kept)

Kept for the backward: x W1^T and no a, and nothing where nobody wants a gradient. A trained W2 needs a again: whoever computes dz has all that it is made of, and writes it once
more, in the form "library" over x W1^T, which nobody needs then: a second backward of the same forward (retain_graph) is torch's error about a tensor that was overwritten. No
other saved tensor is.

Forms, picked by dispatch.py. "library": the products are the library's, and GELU and its gradient run over their results (gelu.py), each of them a pass of the memory's over
[T, inner]. "fused": `up_kernel` is the first product and GELU, `down_kernel` dy W2 and the gradient of GELU, each by the loop of product.py; the pass is saved, and what a library's
product is faster is lost. The other products are the library's in both. db1 is summed in float32, a tile of rows by its program, the tiles in their order by
tiles.sum_stretches: no atomics, the sums repeat bit for bit.
What limits it: its products.

The room: peftdebias/ops/gelu.py (specification), this file, linear_trained.py, tests/kernel_checks/check_feed_forward.py and check_linear_trained.py (proof).
Letters: T rows; of a product K columns of the left factor, N of the result, BM, BN, BK rows, columns and depth of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import dispatch, product, register
from .gelu import backward_with_output, gelu, gelu_and_slope, gelu_of
from .linear_trained import Normal, checked, dweight_of, kept_of, lasting, rounding_of, sum_of
from .op import first_order, op
from .product import place, quarters, wide
from .tiles import DTYPES, Spec, ceil_div, expect, on, product_dtype, rows_together, sum_spec, sum_stretches

# ---------------------------------------------------------------- kernels, forward beside backward

@triton.jit
def _places(row_tile, column_tile, quarter, T, N, BM: tl.constexpr, BN: tl.constexpr):
    """(places [BM, BN / 4] of a quarter of a tile in a tensor [T, N], its columns, which of these are there, which places are)."""
    first, r = row_tile.to(tl.int64) * BM, tl.arange(0, BM)
    columns = column_tile * BN + quarter * (BN // 4) + tl.arange(0, BN // 4)
    return first * N + (r[:, None] * N + columns[None, :]), columns, columns < N, (r < T - first)[:, None] & (columns < N)[None, :]


@triton.jit
def _plus(z, bias, columns, there):
    """z [BM, n] fp32 + bias [N] at these columns; z where it is None."""
    if bias is not None:
        z += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["T"])
def up_kernel(x, weight, bias, inner, y, T, K, N, x_stride, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """x [T, K], weight [N, K], bias [N] or None -> inner [T, N] = x weight^T unless None, y [T, N] = gelu(x weight^T + bias). A program a tile of y; EVEN: K is a multiple of BK."""
    row_tile, column_tile = place(T, N, BM, BN, GROUP)
    first = row_tile.to(tl.int64) * BM
    total = wide(x + first * x_stride, weight + column_tile.to(tl.int64) * BN * K, tl.zeros((BM, BN), tl.float32), tl.arange(0, BM) < T - first,
                 tl.arange(0, BN) < N - column_tile * BN, x_stride, K, N, True, EVEN, BM, BN, BK)
    parts = quarters(total)
    for quarter in tl.static_range(4):
        places, columns, there, inside = _places(row_tile, column_tile, quarter, T, N, BM, BN)
        if inner is not None:
            tl.store(inner + places, parts[quarter].to(inner.dtype.element_ty), mask=inside)
        found = gelu_of(_plus(parts[quarter], bias, columns, there), x.dtype.element_ty == tl.float32)
        tl.store(y + places, found.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def down_kernel(dy, weight, inner, bias, dinner, y, partial, T, K, N, dy_stride, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """dy [T, K], weight [K, N], inner [T, N], bias [N] or None -> dinner [T, N] = (dy weight) gelu'(inner + bias); y [T, N] = gelu(inner + bias) and partial fp32 [row tiles, N], sums
    of dinner, each unless None. Programs as in up_kernel."""
    row_tile, column_tile = place(T, N, BM, BN, GROUP)
    first = row_tile.to(tl.int64) * BM
    total = wide(dy + first * dy_stride, weight + column_tile * BN, tl.zeros((BM, BN), tl.float32), tl.arange(0, BM) < T - first, tl.arange(0, BN) < N - column_tile * BN,
                 dy_stride, K, N, False, EVEN, BM, BN, BK)
    parts = quarters(total)
    for quarter in tl.static_range(4):
        places, columns, there, inside = _places(row_tile, column_tile, quarter, T, N, BM, BN)
        z = _plus(tl.load(inner + places, mask=inside, other=0.0).to(tl.float32), bias, columns, there)
        found, slope = gelu_and_slope(z, inner.dtype.element_ty == tl.float32)
        fall = parts[quarter] * slope
        tl.store(dinner + places, fall.to(dinner.dtype.element_ty), mask=inside)
        if y is not None:
            tl.store(y + places, found.to(y.dtype.element_ty), mask=inside)
        if partial is not None:  # dy is 0 in rows that are not there
            tl.store(partial + row_tile.to(tl.int64) * N + columns, tl.sum(fall, 0), mask=there)


def specs(arch: int) -> list[Spec]:
    found, numbers = [], dict.fromkeys(("T", "K", "N", "x_stride", "dy_stride"), "i32")
    variants = (("up", up_kernel, ()), ("up, alone", up_kernel, ("inner",)), ("down", down_kernel, ("y", "partial")), ("down, all trained", down_kernel, ()))
    for dtype, kind in DTYPES.items():
        pointers = dict.fromkeys(("x", "dy", "weight", "inner", "y", "dinner", "bias"), f"*{kind}") | {"partial": "*fp32"}
        for words, kernel, absent in variants:
            for regular in (True, False) if not absent else (True,):
                sizes = product.tiles_for(dtype, regular)
                warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                signature = {n: (pointers | numbers)[n] for n in kernel.arg_names if n in pointers | numbers and n not in absent}
                found.append(Spec(f"{words}{'' if regular else ', ragged'}, {kind}", kernel, signature, {"EVEN": regular} | dict.fromkeys(absent) | sizes, warps, stages,
                                  aligned=tuple(n for n in ("K", "N", "x_stride", "dy_stride") if n in signature) if regular else ()))
    return [*found, sum_spec()]


# ---------------------------------------------------------------- launchers

def _grid(left: Tensor, columns: int) -> tuple[tuple[int], dict]:
    """Programs, and the constants and options of a launch, for a product of `left` [T, K] with `columns` columns."""
    rows, depth = left.shape
    sizes = product.tiles_for(left.dtype, product.is_regular(depth, columns, left.stride(0)))
    return (ceil_div(rows, sizes["BM"]) * ceil_div(columns, sizes["BN"]),), sizes | {"EVEN": depth % sizes["BK"] == 0, "enable_fp_fusion": True}


@op("feed_forward_up", fake=lambda x, weight, bias, keeps: (x.new_empty(x.shape[0], weight.shape[0]), x.new_empty((x.shape[0], weight.shape[0]) if keeps else 0)))
def _up(x: Tensor, weight: Tensor, bias: Tensor | None, keeps: bool) -> tuple[Tensor, Tensor]:
    """gelu(x weight^T + bias) and, where `keeps`, x weight^T; both [T, N]. x and weight of one dtype."""
    x, weight, shape = rows_together(x), weight.contiguous(), (x.shape[0], weight.shape[0])
    y, inner = x.new_empty(shape), x.new_empty(shape if keeps else 0)
    if y.numel():
        grid, options = _grid(x, shape[1])
        with on(x):
            up_kernel[grid](x, weight, None if bias is None else bias.contiguous(), inner if keeps else None, y, *x.shape, shape[1], x.stride(0), **options)
    return y, inner


@op("feed_forward_down", fake=lambda dy, weight, inner, bias, of_output, of_bias: (torch.empty_like(inner), inner.new_empty(inner.shape if of_output else 0),
                                                                                  inner.new_empty(inner.shape[1] if of_bias else 0, dtype=torch.float32)))
def _down(dy: Tensor, weight: Tensor, inner: Tensor, bias: Tensor | None, of_output: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dy weight) gelu'(inner + bias) [T, N]; gelu(inner + bias) [T, N] and the sums of the former, fp32 [N], where wanted, else empty. dy and weight of inner's dtype; inner is
    contiguous."""
    dy, weight, (rows, columns) = rows_together(dy), weight.contiguous(), inner.shape
    dinner, y = torch.empty_like(inner), inner.new_empty(inner.shape if of_output else 0)
    sums = inner.new_zeros(columns if of_bias else 0, dtype=torch.float32)
    if inner.numel():
        grid, options = _grid(dy, columns)
        partial = inner.new_empty((ceil_div(rows, options["BM"]), columns), dtype=torch.float32) if of_bias else None
        with on(dy):
            down_kernel[grid](dy, weight, inner, None if bias is None else bias.contiguous(), dinner, y if of_output else None, partial, *dy.shape, columns, dy.stride(0), **options)
            if of_bias:
                sum_stretches(partial, sums)
    return dinner, y, sums


def form_for(x: Tensor, inner: int) -> str:
    """"library" or "fused", for x [T, in] and W1 [inner, in]."""
    return dispatch.pick("feed_forward", dispatch.FORMS["feed_forward"], device=x.device, dtype=product_dtype(x), dropout=False, rows=x.shape[0], inside=x.shape[1], outside=inner)


# ---------------------------------------------------------------- the block

class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, up_bias, down, down_bias, normal, recorded):
        to_x, to_up, to_up_bias, to_down = (recorded and needed for needed in ctx.needs_input_grad[:4])  # without gradients too a Function hears that parameters want theirs
        to_inner, up_rounded, down_rounded = to_x or to_up or to_up_bias, rounding_of(up, x.dtype), rounding_of(down, x.dtype)
        ctx.fused = form_for(x, len(up)) == "fused"
        if ctx.fused:
            a, inner = _up(x, up_rounded, up_bias, to_inner or to_down)
        else:
            inner = F.linear(x, up_rounded)
            a = gelu(inner, up_bias)
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (up, up_bias, down, down_bias))
        ctx.save_for_backward(*((inner, up_bias) if to_inner or to_down else (None, None)), lasting(up, up_rounded) if to_x else None,
                              lasting(down, down_rounded) if to_inner else None, *kept_of(x, normal, to_up))
        return F.linear(a, down_rounded, rounding_of(down_bias, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        first_order("feed_forward")
        to_x, to_up, to_up_bias, to_down, to_down_bias, *_ = ctx.needs_input_grad
        inner, shift, up, down, x, *scales = ctx.saved_tensors
        scales, dtypes = None if scales[0] is None else scales, ctx.dtypes
        dinner = sums = a = None
        of_sums = to_up_bias or to_up and scales is not None
        if down is not None and ctx.fused:
            dinner, a, sums = _down(dy, down.to(dy.dtype), inner, shift, to_down, of_sums)
        elif down is not None:
            dinner, sums, a = backward_with_output(dy @ down.to(dy.dtype), inner, shift, of_sums, to_down)
        elif to_down:
            a = gelu(inner, shift)
        ddown, ddown_bias = dweight_of(dy, a, dtypes[2], None, None) if to_down else None, sum_of(dy).to(dtypes[3]) if to_down_bias else None
        del a  # before the products below
        return (dinner @ up.to(dy.dtype) if to_x else None, dweight_of(dinner, x, dtypes[0], scales, sums) if to_up else None,
                sums.to(dtypes[1]) if to_up_bias else None, ddown, ddown_bias, None, None)


@register("feed_forward", "triton")
def feed_forward(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, normal: Normal | None = None) -> Tensor:
    """x [T, in], up [inner, in], up_bias [inner] or None, down [out, inner], down_bias [out] or None -> [T, out]; normal: where x comes from, see linear_trained.py.
    Raises ValueError that names what it cannot take."""
    x = checked("feed_forward", x, up, up_bias, normal, "up", "up's bias")
    expect("feed_forward", "down", down, (-1, up.shape[0]), device=x.device)
    if down_bias is not None:
        expect("feed_forward", "down's bias", down_bias, (down.shape[0],), device=x.device)
    return _FeedForward.apply(x, up, up_bias, down, down_bias, normal, torch.is_grad_enabled())
