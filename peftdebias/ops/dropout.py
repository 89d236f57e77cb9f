"""Dropout from counters: the mask is a function of a seed, a place and an element's index, so nobody stores it. Which bits: kernels/fused/dropout.py."""

import torch
from torch import Tensor

from .. import kernels
from ..kernels.dropout_ref import Drop, dropout_ref
from ..kernels.op import first_order
from . import compiled

__all__ = ["Drop", "dropout", "dropout_ref"]


def dropout(x: Tensor, drop: Drop | None) -> Tensor:
    """x [T, D] dropped; x itself without `drop`. By the implementation that `kernels` chooses for the device; no kernel takes float64."""
    if drop is None:
        return x
    plain = x.dtype == torch.float64
    return (dropout_ref if plain else kernels.choose("dropout", reference=dropout_ref, device=x.device))(x, *drop)


@compiled.register("dropout")
def dropout_compiled(x: Tensor, rate: float, seed: Tensor, site: int) -> Tensor:
    """dropout_ref by csrc/ops.cpp. Saves the seed alone."""
    if x.dim() != 2 or not compiled.takes(x):
        return dropout_ref(x, rate, seed, site)
    drop = Drop(rate, seed, site)
    return _Dropout.apply(x, drop) if compiled.recorded(x) else _dropped(x, drop)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, drop):
        ctx.rate, ctx.site = drop.rate, drop.site
        ctx.save_for_backward(drop.seed)
        return _dropped(x, drop)

    @staticmethod
    def backward(ctx, dy):
        first_order("dropout")
        return _dropped(dy, Drop(ctx.rate, *ctx.saved_tensors, ctx.site)), None


def _dropped(x: Tensor, drop: Drop) -> Tensor:
    x = compiled.lined(x)
    y = compiled.empty(*x.shape)
    compiled.call("dropout", x.data_ptr(), x.stride(0), y.data_ptr(), *x.shape, *compiled.drawing(drop))
    return y
