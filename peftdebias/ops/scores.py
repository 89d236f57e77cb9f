"""Scores of a vocabulary: x W^T + bias, where W has a row for every token.

A GPU's library multiplies 16-bit matrices fast where rows are multiples of 8 long. BERT's 30522 scores are not, and its kernels then take three times as long, forward and
backward. There W gets rows of zeros up to a multiple of ROUND, and the scores are the left part of a wider tensor, whose right part stays zero.

MKL on AMD's processors multiplies few rows by a tall W at half the rate of the product turned round, W x^T. There blocks of that are turned back as the bias is added, each
while it is in the cache (docs/kernels.md).

What it adds over linear.py: these two. Elsewhere, and where W or the bias is trained, it is `linear`.

Letters: M rows asked for, D hidden, V vocabulary.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from . import compiled
from .linear import form as linear_form
from .linear import linear, product_dtype, vendor

ROUND = 64
FEW = 256  # rows: up to which putting W into a wider tensor costs more than it saves
TALL, WIDE, LEAST = 8192, 256, 8  # V, D and M from which turning the product round pays
BLOCK, ROWS, EVEN = 4096, 160, 16  # of a block: rows of W, rows of x at most, and what the latter are a multiple of


def scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [M, D], weight [V, D], bias [V] -> [M, V], of autocast's dtype where that is on; linear_ref's values. Its rows may lie further apart than V."""
    dtype = product_dtype(x)
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if x.is_cuda and dtype.itemsize == 2 and len(weight) % 8 and len(x) > FEW and not trained and compiled.plain(x, weight, bias):
        return _Scores.apply(x.to(dtype), weight, bias)
    if not trained and _turns(x, weight, bias):
        return _Turned.apply(x, weight, bias) if compiled.recorded(x) else turned(x, weight, bias)
    return linear(x, weight, bias)


class _Scores(torch.autograd.Function):
    """dx = dy W."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        size, more = len(weight), -len(weight) % ROUND
        wider = F.pad(weight.to(x.dtype), (0, 0, 0, more))
        whole = F.linear(x, wider, F.pad(bias.to(x.dtype), (0, more)))
        ctx.save_for_backward(wider)
        ctx.whole = whole.detach()
        return whole[:, :size]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (wider,), whole = ctx.saved_tensors, ctx.whole
        if not (dy.data_ptr() == whole.data_ptr() and dy.stride() == whole.stride()):  # the loss writes its gradient over the scores: then it lies there already
            whole = F.pad(dy, (0, len(wider) - dy.shape[1]))
        return whole @ wider, None, None


# ---------------------------------------------------------------- by MKL, on a processor of AMD

def form() -> tuple[str, str]:
    """("turned" or "linear", why): how a CPU computes the scores of TALL tokens or more."""
    if (setting := kernels.setting()) in ("torch", "triton"):
        return "linear", f"kernels are {setting}"
    if (product := linear_form()[0]) != "blas":
        return "linear", f"its form is {product}"
    if not _mkl_on_amd():
        return "linear", "no MKL on a processor of AMD"
    return "turned", f"in blocks of {BLOCK} tokens, as MKL on {vendor()} multiplies few rows by many at half the rate of the product turned round"


def _turns(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (compiled.takes(x, weight, bias) and x.dim() == 2 and len(x) >= LEAST and len(weight) >= TALL and weight.shape[1] >= WIDE
            and not torch.is_autocast_enabled("cpu") and form()[0] == "turned")


@functools.cache
def _mkl_on_amd() -> bool:
    return torch.backends.mkl.is_available() and vendor() == "AuthenticAMD"


def turned(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear_ref without a gradient, by blocks of W x^T."""
    found, parts = x.new_empty(len(x), len(weight)), -(-len(x) // ROWS)
    each = -(-len(x) // (parts * EVEN)) * EVEN
    with torch.no_grad():
        right = [F.pad(part, (0, 0, 0, -len(part) % EVEN)).t() for part in x.split(each)]
        for below, above, shift in zip(weight.split(BLOCK), found.split(BLOCK, 1), bias.split(BLOCK)):
            for part, there in zip(right, above.split(each)):
                torch.add((below @ part)[:, :len(there)].t(), shift, out=there)
    return found


class _Turned(torch.autograd.Function):
    """dx = dy W."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return turned(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None, None
