"""Scores of a vocabulary: x W^T + bias, where W has a row for every token.

A GPU's library multiplies 16-bit matrices fast where rows are multiples of 8 long. BERT's 30522 scores are not, and its kernels then take three times as long, forward and
backward. There W gets rows of zeros up to a multiple of ROUND, and the scores are the left part of a wider tensor, whose right part stays zero.

What it adds over linear.py: that. Elsewhere, and where W or the bias is trained, it is `linear`.

Letters: M rows asked for, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import compiled
from .linear import linear

ROUND = 64
FEW = 256  # rows: up to which putting W into a wider tensor costs more than it saves


def scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [M, D], weight [V, D], bias [V] -> [M, V], of autocast's dtype where that is on; linear_ref's values. Its rows may lie further apart than V."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if x.is_cuda and dtype.itemsize == 2 and len(weight) % 8 and len(x) > FEW and not trained and compiled.plain(x, weight, bias):
        return _Scores.apply(x.to(dtype), weight, bias)
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
