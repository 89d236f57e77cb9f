"""LayerNorm of dropout(hidden) + residual. Ba et al. 2016, arXiv 1607.06450; where it stands in BERT: Devlin et al. 2019, after every block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.dropout_ref import Drop, dropout_ref
from ..kernels.op import first_order
from . import compiled


Normal = tuple[Tensor, Tensor, Tensor]
"""(n [T, D], gain [D], bias [D]): the norm's result is n gain + bias."""
Forked = tuple[Tensor, Tensor, Normal | None]
"""The result for a product, for the residual, and what the product may keep in place of it."""


def norm_ref(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None, fork: bool = False) -> Tensor | Forked:
    """hidden [T, D], residual [T, D] or None, gain and bias [D] -> [T, D]; the specification. epsilon is added to the variance (of D values, not D - 1).

    fork: the result twice, for two readers, whose gradients an implementation may take one by one and add itself; and what it keeps that the result is made of, or None.
    """
    hidden = hidden if drop is None else dropout_ref(hidden, *drop)
    hidden = hidden if residual is None else hidden + residual
    y = F.layer_norm(hidden, gain.shape, gain, bias, epsilon)
    return (y, y, None) if fork else y


def norm(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None, fork: bool = False) -> Tensor | Forked:
    """norm_ref by the implementation that `kernels` chooses for the tensors' device; no kernel takes float64."""
    plain = hidden.dtype == torch.float64
    return (norm_ref if plain else kernels.choose("norm", reference=norm_ref, device=hidden.device, width=hidden.shape[-1]))(hidden, residual, gain, bias, epsilon, drop, fork)


@compiled.register("norm")
def norm_compiled(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None = None, fork: bool = False) -> Tensor | Forked:
    """norm_ref by csrc/ops.cpp. Saves the sum dropout(hidden) + residual, two numbers a row and the seed; the mask is computed again."""
    fits = hidden.dim() == 2 and gain.shape == bias.shape == hidden.shape[1:] and (residual is None or residual.shape == hidden.shape)
    if not fits or not compiled.takes(hidden, residual, gain, bias):
        return norm_ref(hidden, residual, gain, bias, epsilon, drop, fork)
    if compiled.recorded(hidden, residual, gain, bias):
        y = _Norm.apply(hidden, residual, gain, bias, epsilon, drop)
    else:
        y = _forward(hidden, residual, gain, bias, epsilon, drop, None, None)
    return (y, y, None) if fork else y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, residual, gain, bias, epsilon, drop):
        total, statistics = compiled.empty(*hidden.shape), compiled.empty(2, len(hidden))
        ctx.drop = None if drop is None else (drop.rate, drop.site)
        ctx.save_for_backward(total, statistics, gain, None if drop is None else drop.seed)
        return _forward(hidden, residual, gain, bias, epsilon, drop, total, statistics)

    @staticmethod
    def backward(ctx, dy):
        first_order("norm")
        total, statistics, gain, seed = ctx.saved_tensors
        (rows, width), (to_hidden, to_residual, to_gain, to_bias, *_) = total.shape, ctx.needs_input_grad
        drop = None if ctx.drop is None else Drop(ctx.drop[0], seed, ctx.drop[1])
        dy, gain = compiled.lined(dy), gain.contiguous()
        dhidden = compiled.empty(rows, width) if to_hidden else None
        dresidual = compiled.empty(rows, width) if to_residual and (drop is not None or not to_hidden) else None
        dparameters = compiled.empty(2, width) if to_gain or to_bias else None
        compiled.call("norm_backward", dy.data_ptr(), dy.stride(0), total.data_ptr(), statistics.data_ptr(), statistics[1].data_ptr(), gain.data_ptr(),
                      compiled.pointer(dhidden), compiled.pointer(dresidual), compiled.pointer(dparameters), rows, width, *compiled.drawing(drop))
        if to_residual and dresidual is None:
            dresidual = dhidden  # nothing dropped: one gradient for both
        return dhidden, dresidual, dparameters[0] if to_gain else None, dparameters[1] if to_bias else None, None, None


def _forward(hidden: Tensor, residual: Tensor | None, gain: Tensor, bias: Tensor, epsilon: float, drop: Drop | None, total: Tensor | None,
             statistics: Tensor | None) -> Tensor:
    """Writes the sum [T, D] and the statistics [2, T] (mean, 1 / deviation) where they are given."""
    hidden, residual = compiled.lined(hidden), None if residual is None else compiled.lined(residual)
    gain, bias, out = gain.contiguous(), bias.contiguous(), compiled.empty(*hidden.shape)
    mean, rstd = (None, None) if statistics is None else (statistics.data_ptr(), statistics[1].data_ptr())
    compiled.call("norm_forward", hidden.data_ptr(), hidden.stride(0), compiled.pointer(residual), 0 if residual is None else residual.stride(0), gain.data_ptr(),
                  bias.data_ptr(), compiled.pointer(total), mean, rstd, out.data_ptr(), *hidden.shape, epsilon, *compiled.drawing(drop))
    return out
