"""Scores of a vocabulary: x W^T + bias, where W has a row for every token.

A GPU's library multiplies 16-bit matrices fast where rows are multiples of 8 long. BERT's 30522 scores are not, and its kernels then take three times as long, forward and
backward. There W gets rows of zeros up to a multiple of ROUND, and the scores are the left part of a wider tensor, whose right part stays zero. A W that is frozen for a
while is given them once (`widen`; lowered.py asks for it), any other in every call.

MKL on AMD's processors multiplies few rows by a tall W at half the rate of the product turned round, W x^T. There blocks of that are turned back as the bias is added, each
while it is in the cache (docs/kernels.md).

What it adds over linear.py: these two. Elsewhere, and where W or the bias is trained, it is `linear`.

Letters: M rows asked for, D hidden, V vocabulary.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from .. import kernels
from ..kernels.op import first_order
from ..processor import vendor
from . import compiled
from .linear import form as linear_form
from .linear import in_bf16, linear, product_dtype

ROUND = 64
FEW = 256  # rows: up to which putting W into a wider tensor, in every call, costs more than it saves
TALL, WIDE, LEAST = 8192, 256, 8  # V, D and M from which turning the product round pays
BLOCK, ROWS, EVEN = 4096, 160, 16  # of a block: rows of W, rows of x at most, and what the latter are a multiple of


def scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [M, D], weight [V, D], bias [V] -> [M, V], of autocast's dtype where that is on; linear_ref's values. Its rows may lie further apart than V."""
    dtype = product_dtype(x)
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if not trained and _widens(x, weight, bias, dtype):
        return _Scores.apply(x.to(dtype), weight, bias)
    if not trained and not in_bf16(x, weight, bias) and _turns(x, weight, bias):
        return _Turned.apply(x, weight, bias) if compiled.recorded(x) else turned(x, weight, bias)
    return linear(x, weight, bias)


def _widens(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cuda and dtype.itemsize == 2 and len(weight) % 8 != 0 and len(x) > FEW and compiled.plain(x, weight, bias)


@dataclasses.dataclass(frozen=True)
class Wider:
    """Where a parameter lies. shape: its own, [V, D]; matrix [V', D], V' a multiple of ROUND: its rows, and rows of zeros; shift [V']: room for a bias, and zeros."""

    shape: torch.Size
    matrix: Tensor
    shift: Tensor


_wider = WeakTensorKeyDictionary()  # Parameter -> Wider; apart from the parameter, whose copies and files have no such rows


def widen(parameter: Parameter) -> None:
    """Lays `parameter` [V, D] where rows of zeros follow it, unless V is a multiple of 8, until `narrow`. Its values stay the same, and may change."""
    if len(parameter) % 8:
        matrix = F.pad(parameter.detach(), (0, 0, 0, -len(parameter) % ROUND))
        _wider[parameter] = Wider(parameter.shape, matrix, matrix.new_zeros(len(matrix)))
        parameter.data = matrix[:len(parameter)]


def narrow(parameter: Parameter) -> None:
    """The end of that: to be called as it gets other memory, or this one would be kept."""
    _wider.pop(parameter, None)


def wider(weight: Tensor, dtype: torch.dtype) -> Wider | None:
    """Where `weight` lies, if it is of that dtype and certainly followed by rows of zeros: the very parameter that `widen` laid there, with all its rows, moved by nobody since."""
    found = _wider.get(weight)
    if found is None or weight.shape != found.shape or not weight.is_contiguous() or not weight.dtype == found.matrix.dtype == dtype:
        return None
    return found if weight.data_ptr() == found.matrix.data_ptr() else None


class _Scores(torch.autograd.Function):
    """dx = dy W."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        size, more, there = len(weight), -len(weight) % ROUND, wider(weight, x.dtype)
        if there is None:
            matrix, shift = F.pad(weight.to(x.dtype), (0, 0, 0, more)), F.pad(bias.to(x.dtype), (0, more))
            ctx.save_for_backward(matrix)
        else:
            matrix, shift = there.matrix, there.shift
            shift[:size] = bias
            ctx.save_for_backward(matrix, weight)  # of the two that share their memory autograd counts an update of the weight at the weight alone
        whole = F.linear(x, matrix, shift)
        ctx.whole = whole.detach()
        return whole[:, :size]

    @staticmethod
    def backward(ctx, dy):
        first_order("scores")
        (matrix, *_), whole = ctx.saved_tensors, ctx.whole
        if dy.data_ptr() == whole.data_ptr() and dy.stride() == whole.stride():  # the loss writes its gradient over the scores: then it lies there already
            whole[:, dy.shape[1]:].zero_()  # what is infinite in x is NaN there, and a row that the loss ignores has a gradient of 0 all the same
        else:
            whole = F.pad(dy, (0, len(matrix) - dy.shape[1]))
        return whole @ matrix, None, None


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
    def backward(ctx, dy):
        first_order("scores")
        return dy @ ctx.saved_tensors[0], None, None
