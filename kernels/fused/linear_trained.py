"""Linears whose W is trained in float32 beside activations of 16 bits. Computes linear_ref of peftdebias/ops/linear.py, and gelu_linear_ref of peftdebias/ops/gelu.py:

    y = x W^T + b                      dx = dy W        dW = dy^T x        db = sum_t dy
    y = gelu(x + shift) W^T + b        the same with a = gelu(x + shift) for x, and dx from da

    x [T, in] float32, bfloat16 or float16, W [out, in], b [out] or None, shift [in] or None -> y [T, out] of autocast's dtype where that is on, else of x's; the products
    are the library's, in that dtype, with W and b rounded to it. Every gradient is of its own tensor's dtype.

What autograd makes of such a product under autocast rounds dW and db to 16 bits and widens them again, one pass more over each; and sums db by a kernel that takes longer
than a product. Here both leave their products in float32: db is a product with a row of ones. Saved: x where W is trained, W in x's dtype where x wants a gradient.
Inside `rounded_once` the roundings of many W and b are one launch.
gelu_linear saves x and shift and no a, two fifths of what the layer would keep: the kernel that computes dx has z in its registers and writes a once more. It writes dx over
da, which is its own. No saved tensor is overwritten.

The room: peftdebias/ops/linear.py and ops/gelu.py (specifications), this file, tests/kernel_checks/check_linear_trained.py (proof). Letters: T rows, in and out widths.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import register
from .gelu import backward_with_output, gelu
from .op import first_order
from .tiles import Spec, expect, product_dtype


def specs(arch: int) -> list[Spec]:
    """Nothing is compiled ahead: the products are a library's, and the one kernel is gelu.py's."""
    return []


_once: contextvars.ContextVar[dict[int, Tensor]] = contextvars.ContextVar("peftdebias_rounded", default={})


@contextlib.contextmanager
def rounded_once(parameters: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with` block these, which must not change in it, are rounded to `dtype` already, by one launch where each would have its own."""
    copies = [torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format) for p in parameters]
    with torch.no_grad():
        if copies:
            torch._foreach_copy_(copies, parameters)
    token = _once.set({id(p): copy for p, copy in zip(parameters, copies)})
    try:
        yield
    finally:
        _once.reset(token)


def _rounded(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    copy = None if parameter is None else _once.get().get(id(parameter))
    if copy is not None and copy.dtype == dtype:
        return copy
    return None if parameter is None else parameter.to(dtype)


def _wide(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left [m, T] right [T, n] of 16 bits -> [m, n]; float32 sums, rounded once where `dtype` is not that."""
    if not left.is_cuda:
        return (left.float() @ right.float()).to(dtype)
    return torch.mm(left, right, out_dtype=torch.float32).to(dtype)


def _gradients(dy: Tensor, x: Tensor | None, weight: torch.dtype | None, bias: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db) of these dtypes; None where nobody wants it. A sum in float32 is left to torch, which adds in pairs."""
    dweight = None if weight is None else _wide(dy.t(), x, weight)
    if bias is None:
        return dweight, None
    return dweight, dy.sum(0).to(bias) if dy.dtype == torch.float32 else _wide(dy.new_ones(1, len(dy)), dy, bias)[0]


def _wanted(ctx, weight: int, bias: int) -> tuple[torch.dtype | None, torch.dtype | None]:
    return tuple(dtype if ctx.needs_input_grad[i] else None for i, dtype in zip((weight, bias), ctx.dtypes))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        to_x, to_weight, _ = ctx.needs_input_grad
        rounded = _rounded(weight, x.dtype)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if to_weight else None, rounded if to_x else None)
        return F.linear(x, rounded, _rounded(bias, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        first_order("linear_trained")
        x, rounded = ctx.saved_tensors
        return (None if rounded is None else dy @ rounded), *_gradients(dy, x, *_wanted(ctx, 1, 2))


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias):
        rounded = _rounded(weight, x.dtype)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, shift, rounded)
        return F.linear(gelu(x, shift), rounded, _rounded(bias, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        first_order("gelu_linear")
        x, shift, rounded = ctx.saved_tensors
        to_x, to_shift, *_ = ctx.needs_input_grad
        dx, dshift, a = backward_with_output(dy @ rounded, x, shift, to_shift)
        return dx if to_x else None, dshift.to(shift.dtype) if to_shift else None, *_gradients(dy, a, *_wanted(ctx, 2, 3))


@register("linear_trained", "triton")
def linear_trained(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] or None -> [T, out]; see the head of this file. Raises ValueError that names what it cannot take."""
    return _Linear.apply(_checked("linear_trained", x, weight, bias), weight, bias)


@register("gelu_linear", "triton")
def gelu_linear(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], shift [in] or None, weight [out, in], bias [out] or None -> [T, out]; see the head of this file. Raises ValueError that names what it cannot take."""
    if shift is not None:
        expect("gelu_linear", "shift", shift, (weight.shape[1],), device=x.device)
    return _GeluLinear.apply(_checked("gelu_linear", x, weight, bias), shift, weight, bias)


def _checked(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x in the dtype of the products."""
    expect(op, "W", weight, (-1, -1), device=x.device)
    expect(op, "x", x, (-1, weight.shape[1]))
    if bias is not None:
        expect(op, "bias", bias, (weight.shape[0],), device=x.device)
    return x.to(product_dtype(x))
