"""Linears whose W is trained in float32 beside activations of 16 bits. Computes linear_ref of peftdebias/ops/linear.py:

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum_t dy

    x [T, in] float32, bfloat16 or float16, W [out, in], b [out] or None -> y [T, out] of autocast's dtype where that is on, else of x's; the products are the library's, in
    that dtype, with W and b rounded to it. Every gradient is of its own tensor's dtype.

What autograd makes of such a product under autocast rounds dW and db to 16 bits and widens them again, one pass more over each; and sums db by a kernel that takes longer
than a product. Here both leave their products in float32: db is a product with a row of ones.

What is kept for the backward is the memory of a step, so it is as little as there is:
A parameter W itself, which is there anyway and must not change before the backward, and not its rounding, which the backward makes again; of a W that was computed, the
rounding, so that W itself can go. In the forward the roundings of many W and b are one launch (`rounded_once`).
x where W is trained; but where x = n gain + bias comes out of a norm, which keeps n, that n (`normal`):

    dW = dy^T x = (dy^T n) gain + db bias^T        gain along the columns

There dW errs by the rounding of n, 2^-9 of |n gain| in bf16, as the norm's own dgain does; from x by that of x: in a column where bias is nearly -n gain, the former is more.

No saved tensor is overwritten.

The room: peftdebias/ops/linear.py (specification), this file, feed_forward.py (two of them and GELU between), tests/kernel_checks/check_linear_trained.py (proof). Letters: T rows,
in and out widths.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import first_order
from .tiles import Spec, ceil_div, expect, on, product_dtype

Normal = tuple[Tensor, Tensor, Tensor]
"""(n [T, in], gain [in], bias [in]) of a norm: x = n gain + bias."""

TILE = (8, 256)  # rows and columns of a program of unnormal_kernel


@triton.jit
def unnormal_kernel(dweight, sums, gain, bias, out, width, BO: tl.constexpr, BI: tl.constexpr):
    """dweight fp32 [out, width], in place: dy^T n -> dy^T x = dweight gain + sums bias^T. sums fp32 [out] = sum_t dy; gain, bias [width]."""
    rows = tl.program_id(0) * BO + tl.arange(0, BO)
    columns = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows < out)[:, None] & (columns < width)[None, :]
    places = dweight + rows.to(tl.int64)[:, None] * width + columns[None, :]
    along = tl.load(gain + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    total = tl.load(sums + rows, mask=rows < out, other=0.0)[:, None]
    tl.store(places, tl.load(places, mask=inside, other=0.0) * along + total * shift, mask=inside)


def specs(arch: int) -> list[Spec]:
    """All else is a library's or gelu.py's."""
    signature = {"dweight": "*fp32", "sums": "*fp32", "gain": "*fp32", "bias": "*fp32", "out": "i32", "width": "i32"}
    return [Spec("dW from the norm's n", unnormal_kernel, signature, {"BO": TILE[0], "BI": TILE[1]}, aligned=("width",))]


_once: contextvars.ContextVar[dict[int, Tensor]] = contextvars.ContextVar("peftdebias_rounded", default={})


@contextlib.contextmanager
def rounded_once(parameters: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with` block these, which must not change in it, are rounded to `dtype` already, by one launch where each would have its own. A copy goes with its first reader."""
    copies = [torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format) for p in parameters]
    with torch.no_grad():
        if copies:
            torch._foreach_copy_(copies, parameters)
    token = _once.set({id(p): copy for p, copy in zip(parameters, copies)})
    del copies  # who takes one out has it alone
    try:
        yield
    finally:
        _once.reset(token)


def rounding_of(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    copies = _once.get()
    if parameter is not None and (copy := copies.get(id(parameter))) is not None and copy.dtype == dtype:
        return copies.pop(id(parameter))  # a pass reads each once; at its peak, in the last layers, all of them would still be there
    return None if parameter is None else parameter.to(dtype)


def _wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [m, T] right [T, n] of 16 bits -> [m, n]; float32 sums, rounded once where `dtype` is not that."""
    if not left.is_cuda:
        with torch.autocast(left.device.type, enabled=False):  # a backward inside such a block would round what is wide here
            return (left.float() @ right.float()).to(dtype)
    return torch.mm(left, right, out_dtype=torch.float32).to(dtype)


def sum_of(dy: Tensor) -> Tensor:
    """fp32 [out] = sum_t dy. A sum of float32 is left to torch, which adds in pairs."""
    return dy.sum(0) if dy.dtype == torch.float32 else _wide(dy.new_ones(1, len(dy)), dy, torch.float32)[0]


def dweight_of(dy: Tensor, x: Tensor, dtype: torch.dtype, scales: tuple[Tensor, Tensor] | None, sums: Tensor | None) -> Tensor:
    """dW [out, in]. scales: gain and bias [in] where x is n; then with the sums of dy, fp32 [out]."""
    if scales is None:
        return _wide(dy.t(), x, dtype)
    dweight = _wide(dy.t(), x, torch.float32)
    if dweight.numel():
        (out, width), (rows, columns), (gain, bias) = dweight.shape, TILE, scales
        with on(dweight):
            unnormal_kernel[(ceil_div(out, rows), ceil_div(width, columns))](dweight, sums, gain.contiguous(), bias.contiguous(), out, width, BO=rows, BI=columns,
                                                                             enable_fp_fusion=True)
    return dweight.to(dtype)


def lasting(weight: Tensor, rounded: Tensor) -> Tensor:
    """Of both, the one that costs no memory, or less: a parameter, or a part of one, is there anyway."""
    return weight if weight.is_leaf or weight._is_view() and weight._base.is_leaf else rounded


def kept_of(x: Tensor, normal: Normal | None, wanted: bool) -> tuple[Tensor | None, ...]:
    """What dW needs of x, in three places: n, gain and bias, or x."""
    return (None, None, None) if not wanted else normal or (x, None, None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, normal):
        to_x, to_weight, *_ = ctx.needs_input_grad
        rounded = rounding_of(weight, x.dtype)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(lasting(weight, rounded) if to_x else None, *kept_of(x, normal, to_weight))
        return F.linear(x, rounded, rounding_of(bias, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        first_order("linear_trained")
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        weight, x, *scales = ctx.saved_tensors
        scales = None if scales[0] is None else scales
        sums = sum_of(dy) if to_bias or to_weight and scales else None
        return (dy @ weight.to(dy.dtype) if to_x else None, dweight_of(dy, x, ctx.dtypes[0], scales, sums) if to_weight else None,
                sums.to(ctx.dtypes[1]) if to_bias else None, None)


@register("linear_trained", "triton")
def linear_trained(x: Tensor, weight: Tensor, bias: Tensor | None = None, normal: Normal | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] or None -> [T, out]; normal: where x comes from, see the head of this file. Raises ValueError that names what it cannot take."""
    return _Linear.apply(checked("linear_trained", x, weight, bias, normal), weight, bias, normal)


def checked(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, normal: Normal | None, *names: str) -> Tensor:
    """x in the dtype of the products. names: what errors call W and its bias."""
    name, bias_name = names or ("W", "bias")
    expect(op, name, weight, (-1, -1), device=x.device)
    expect(op, "x", x, (-1, weight.shape[1]))
    if bias is not None:
        expect(op, bias_name, bias, (weight.shape[0],), device=x.device)
    x = x.to(product_dtype(x))
    if normal is not None:
        expect(op, "n", normal[0], tuple(x.shape), (x.dtype,), x.device)
        for name, scale in zip(("gain", "the norm's bias"), normal[1:]):
            expect(op, name, scale, x.shape[1:], device=x.device)
    return x
