"""Dropout from counters: the mask is a function of a seed, a place and an element's index, so nobody stores it. Which bits: kernels/fused/dropout.py."""

import torch
from torch import Tensor

from .. import kernels
from ..kernels.dropout_ref import Drop, dropout_ref

__all__ = ["Drop", "dropout", "dropout_ref"]


def dropout(x: Tensor, drop: Drop | None) -> Tensor:
    """x [T, D] dropped; x itself without `drop`. By the implementation that `kernels` chooses for the device; no kernel takes float64."""
    if drop is None:
        return x
    plain = x.dtype == torch.float64
    return (dropout_ref if plain else kernels.choose("dropout", reference=dropout_ref, device=x.device))(x, *drop)
