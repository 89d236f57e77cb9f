"""Sparse deltas: the k values of a module put into a weight. The AdamW of these values: adamw.py.

sparse_add computes sparse_add_ref of peftdebias/sites.py:

    W' = W, but W'[i_j] = W[i_j] + v_j on the flat weight

    W of any shape, i indices int64 [k] into the flat weight, ascending and each once, v values [k]; float32, bfloat16 or float16, W' like W, the sum in float32.
    Gradients: dv_j = dW'[i_j], in v's dtype; dW = dW'. Saved: the indices. Nothing is overwritten. One launch: W is read and W' written once, and the program that
    copies a stretch of W finds the indices that fall into it by bisection. Indices in another order, or twice, would be passed over, and so would those outside W, of
    which torch's gather then refuses the gradient: whoever makes them, sorts them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import register
from .op import op
from .tiles import DTYPES, Spec, ceil_div, expect, on

STRETCH = 4096  # of the flat weight, that one program copies
TOGETHER = 256  # indices that a program places at a time


# ---------------------------------------------------------------- kernels

@triton.jit
def _ends(indices, k, first, STEPS, COPIED: tl.constexpr):
    """int64 [2]: how many of the ascending `indices` [k] are below `first`, and below first + COPIED; STEPS halvings of 0..k, which must be enough."""
    border = first + tl.arange(0, 2) * COPIED
    low, high = tl.zeros([2], tl.int64), tl.zeros([2], tl.int64) + k
    for _ in range(0, STEPS):
        middle = (low + high) // 2
        below = tl.load(indices + middle, mask=low < high, other=0) < border
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where((low < high) & below, high, tl.where(low < high, middle, high))
    return low


@triton.jit
def _add(weight, indices, values, result, size, k, STEPS, COPIED: tl.constexpr, PLACED: tl.constexpr):
    """weight [size], indices int64 [k] ascending, values [k] -> result [size]. A program copies COPIED elements, then places what falls among them."""
    first = tl.program_id(0).to(tl.int64) * COPIED
    n = first + tl.arange(0, COPIED)
    tl.store(result + n, tl.load(weight + n, mask=n < size), mask=n < size)
    ends, which = _ends(indices, k, first, STEPS, COPIED), tl.arange(0, 2)
    start, stop = tl.sum(tl.where(which == 0, ends, 0), 0), tl.sum(tl.where(which == 1, ends, 0), 0)
    tl.debug_barrier()  # the copy is written before any of it is written again
    for j in range(start, stop, PLACED):
        mine = j + tl.arange(0, PLACED)
        place = tl.load(indices + mine, mask=mine < stop, other=size)
        inside = place < size
        value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + tl.load(values + mine, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + place, value, mask=inside)


def specs(arch: int) -> list[Spec]:
    """What is compiled ahead."""
    whole = {"size": "i32", "k": "i32", "STEPS": "i32"}
    tile = {"COPIED": STRETCH, "PLACED": TOGETHER}
    return [Spec(f"add, {d}", _add, {"weight": "*" + d, "indices": "*i64", "values": "*fp32", "result": "*" + d} | whole, tile, num_warps=8, aligned=("size",)) for d in DTYPES.values()]


# ---------------------------------------------------------------- sparse_add

@op("sparse_add", fake=lambda weight, indices, values: torch.empty_like(weight))
def _sparse_add(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    result, k = torch.empty_like(weight), len(indices)
    if weight.numel():
        with on(weight):
            _add[ceil_div(weight.numel(), STRETCH),](weight, indices, values, result, weight.numel(), k, k.bit_length(), COPIED=STRETCH, PLACED=TOGETHER, num_warps=8,
                                                     enable_fp_fusion=True)
    return result


def _setup(ctx, inputs, output):
    ctx.dtype = inputs[2].dtype
    ctx.save_for_backward(inputs[1])


def _backward_formula(ctx, pull):
    """A gather is one launch of torch's already."""
    (indices,) = ctx.saved_tensors
    return pull if ctx.needs_input_grad[0] else None, None, pull.reshape(-1).index_select(0, indices).to(ctx.dtype) if ctx.needs_input_grad[2] else None


_sparse_add.differentiate(_setup, _backward_formula, again=True)


@register("sparse_add", "triton")
def sparse_add(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """weight of any shape, indices int64 [k] into it flat, ascending and each once, values [k] -> the weight with the values added; see the head of this file.

    Raises ValueError that names what it cannot take.
    """
    expect("sparse_add", "weight", weight, (-1,) * weight.dim())
    expect("sparse_add", "indices", indices, (-1,), (torch.int64,), weight.device)
    expect("sparse_add", "values", values, (len(indices),), device=weight.device)
    return _sparse_add(weight.contiguous(), indices.contiguous(), values.contiguous())
